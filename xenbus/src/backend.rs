//! A backend's end of its split devices.
//!
//! What is to be done with a device follows from the states of both ends, by the same table whether
//! this incarnation just started or has served the device for hours ([`takeover()`]); what differs is
//! only whether the rings are attached already. Every step is safe to repeat: our own writes come
//! back to us as events.

use crate::device::{self, Device};
use crate::{Store, Takeover, XenbusState, takeover};
use alloc::format;
use alloc::string::{String, ToString};
use xen_abi::Errno;

/// Steps that one event can cause; more would be a circle.
const MOST_STEPS: usize = 4;
/// Log lines that a device may cause in [`LOG_PERIOD_NS`].
const MOST_LINES: u32 = 16;
const LOG_PERIOD_NS: u64 = 10_000_000_000;

/// What a backend knows of a device's end in the store.
#[derive(Debug)]
pub struct End {
    device: Device,
    frontend: String,
    /// The features are in the store and the state is 2, by this incarnation's hand.
    advertised: bool,
    fault: Option<String>,
    lines: u32,
    lines_since_ns: u64,
}

impl End {
    /// Starts to know a device, and watches these keys of its frontend. `None` when its directory
    /// is not complete yet.
    ///
    /// # Errors
    /// The store's.
    pub fn open<S: Store>(
        store: &mut S,
        device: Device,
        keys: &[&str],
        token: &str,
    ) -> Result<Option<Self>, Errno> {
        let path = format!("{}/frontend", device.backend_path());
        let Some(frontend) = store.read_optional(&path)? else { return Ok(None) };
        for key in keys {
            match store.watch(&format!("{frontend}/{key}"), token) {
                Ok(()) | Err(Errno::EEXIST) => {}
                Err(errno) => return Err(errno),
            }
        }
        let (advertised, fault, lines, lines_since_ns) = (false, None, 0, 0);
        Ok(Some(Self { device, frontend, advertised, fault, lines, lines_since_ns }))
    }

    /// Ends the watches of [`Self::open`].
    pub fn leave<S: Store>(&self, store: &mut S, keys: &[&str], token: &str) {
        // They may be gone with the connection; there is nothing left to end then.
        for key in keys {
            let _ = store.unwatch(&format!("{}/{key}", self.frontend), token);
        }
        log::info!("{}: removed", self.device);
    }

    /// Our own directory.
    #[must_use]
    pub fn directory(&self) -> String {
        self.device.backend_path()
    }

    /// The frontend's directory.
    #[must_use]
    pub fn frontend(&self) -> &str {
        &self.frontend
    }

    /// Why it is not served.
    #[must_use]
    pub fn fault(&self) -> Option<&str> {
        self.fault.as_deref()
    }

    /// Whether one more line may be logged: what frontends do must not fill the log.
    pub fn may_log(&mut self, now_ns: u64) -> bool {
        if now_ns.saturating_sub(self.lines_since_ns) >= LOG_PERIOD_NS {
            (self.lines, self.lines_since_ns) = (0, now_ns);
        }
        self.lines += 1;
        self.lines <= MOST_LINES
    }

    /// Tells the owner, once, what is wrong with the device.
    ///
    /// # Errors
    /// The store's.
    pub fn report<S: Store>(
        &mut self,
        store: &mut S,
        now_ns: u64,
        message: &str,
    ) -> Result<(), Errno> {
        if self.fault.as_deref() == Some(message) {
            return Ok(());
        }
        self.fault = Some(message.to_string());
        if self.may_log(now_ns) {
            log::warn!("{}: {message}", self.device);
        }
        store.write(&self.device.error_path(), message.as_bytes())
    }

    fn switch_state<S: Store>(&self, store: &mut S, state: XenbusState) -> Result<(), Errno> {
        device::switch_state(store, &self.directory(), state)
    }
}

/// Whether what is in flight may be taken up again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Forget {
    /// The next connection begins anew.
    Yes,
    /// The next connection goes on with it.
    No,
}

/// What came of an attempt to attach to a frontend's rings.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Attached {
    /// They are served.
    Yes,
    /// Something else must happen first, after which somebody looks again.
    NotYet,
    /// The frontend did something wrong, in words.
    Refused(String),
}

/// One device of a backend, for the steps that its states demand.
pub trait Serve<S: Store> {
    /// Its end; `None` once it is removed.
    fn end(&mut self) -> Option<&mut End>;
    /// The time, for the log's sake.
    fn now_ns(&self) -> u64;
    /// Whether its rings are attached.
    fn is_attached(&self) -> bool;
    /// Whether an earlier connection is still to be waited for before another can be offered.
    fn is_draining(&self) -> bool;
    /// Writes what a frontend reads before it publishes its rings.
    ///
    /// # Errors
    /// The store's.
    fn offer(&mut self, store: &mut S) -> Result<(), Errno>;
    /// Attaches to the rings, at the first unanswered request. With `taken_over` an earlier
    /// incarnation had them, and nothing is written to the store; else it gets what the frontend
    /// reads when it sees that it is connected.
    ///
    /// # Errors
    /// The store's.
    fn attach(&mut self, store: &mut S, taken_over: bool) -> Result<Attached, Errno>;
    /// Lets go of the rings, if they are attached.
    fn detach(&mut self, forget: Forget);
    /// Releases what it has besides the rings. False while that is not possible yet.
    fn release(&mut self) -> bool;
}

/// Looks at both ends of a device, and acts until nothing is left to do. False when its directory
/// is gone: it is to be removed.
///
/// # Errors
/// The store's.
pub fn refresh<S: Store, D: Serve<S>>(device: &mut D, store: &mut S) -> Result<bool, Errno> {
    for _ in 0..MOST_STEPS {
        let Some(end) = device.end() else { return Ok(true) };
        let (own, other) = (end.directory(), end.frontend.clone());
        if store.read_optional(&format!("{own}/frontend"))?.is_none() {
            return Ok(false);
        }
        let backend = device::state(store, &own)?;
        let frontend = device::state(store, &other)?;
        if !step(device, store, backend, frontend)? {
            break;
        }
    }
    Ok(true)
}

/// Closes a device for a reason that its owner should read.
///
/// # Errors
/// The store's.
pub fn give_up<S: Store, D: Serve<S>>(
    device: &mut D,
    store: &mut S,
    message: &str,
) -> Result<(), Errno> {
    device.detach(Forget::Yes);
    let now_ns = device.now_ns();
    let Some(end) = device.end() else { return Ok(()) };
    end.report(store, now_ns, message)?;
    end.switch_state(store, XenbusState::CLOSING)
}

/// One step. True when a state has changed, so that another step may follow.
fn step<S: Store, D: Serve<S>>(
    device: &mut D,
    store: &mut S,
    backend: XenbusState,
    frontend: XenbusState,
) -> Result<bool, Errno> {
    let Some(end) = device.end() else { return Ok(false) };
    let (kind, advertised) = (end.device.kind, end.advertised);
    match takeover(kind, backend, frontend) {
        Takeover::Attach if device.is_attached() => Ok(false),
        Takeover::Attach => connect(device, store, backend).map(|()| false),
        Takeover::Connect => {
            device.detach(Forget::No);
            connect(device, store, backend)?;
            Ok(device.is_attached())
        }
        Takeover::Advertise if advertised && backend == XenbusState::INIT_WAIT => Ok(false),
        Takeover::Advertise | Takeover::StartOver => {
            device.detach(Forget::Yes);
            if device.is_draining() {
                return Ok(false);
            }
            advertise(device, store).map(|()| true)
        }
        Takeover::FollowClosing => {
            device.detach(Forget::Yes);
            let closed = frontend == XenbusState::UNKNOWN;
            let next = if closed { XenbusState::CLOSED } else { XenbusState::CLOSING };
            let Some(end) = device.end() else { return Ok(false) };
            end.switch_state(store, next).map(|()| backend != next)
        }
        Takeover::Release => close(device, store).map(|()| false),
        // The frontend is gone without a word: its domain was destroyed.
        Takeover::Wait if frontend == XenbusState::UNKNOWN && backend == XenbusState::CONNECTED => {
            close(device, store).map(|()| false)
        }
        Takeover::Wait => Ok(false),
    }
}

/// Writes the features, then state 2.
fn advertise<S: Store, D: Serve<S>>(device: &mut D, store: &mut S) -> Result<(), Errno> {
    device.offer(store)?;
    let Some(end) = device.end() else { return Ok(()) };
    end.advertised = true;
    end.fault = None;
    let error = end.device.error_path();
    if store.read_optional(&error)?.is_some() {
        store.rm(&error)?;
    }
    end.switch_state(store, XenbusState::INIT_WAIT)
}

/// Attaches to the rings; state 4 unless it is that already.
fn connect<S: Store, D: Serve<S>>(
    device: &mut D,
    store: &mut S,
    backend: XenbusState,
) -> Result<(), Errno> {
    let taken_over = backend == XenbusState::CONNECTED;
    let attached = device.attach(store, taken_over)?;
    let Some(end) = device.end() else { return Ok(()) };
    // After this, another round of advertising is a new one.
    end.advertised &= attached == Attached::NotYet;
    match attached {
        Attached::Yes if !taken_over => end.switch_state(store, XenbusState::CONNECTED),
        Attached::Yes | Attached::NotYet => Ok(()),
        Attached::Refused(message) => give_up(device, store, &message),
    }
}

/// The frontend is closed: state 6, and the directory goes if the toolstack wants that.
fn close<S: Store, D: Serve<S>>(device: &mut D, store: &mut S) -> Result<(), Errno> {
    device.detach(Forget::Yes);
    let Some(end) = device.end() else { return Ok(()) };
    end.advertised = false;
    if !device.release() {
        return Ok(());
    }
    let Some(end) = device.end() else { return Ok(()) };
    end.switch_state(store, XenbusState::CLOSED)?;
    let directory = end.directory();
    if device::read_or(store, &directory, "online", 1_u32) != Ok(0) {
        return Ok(());
    }
    match store.rm(&directory) {
        // Where the directory is the toolstack's, it removes it itself.
        Ok(()) | Err(Errno::EACCES | Errno::ENOENT) => Ok(()),
        Err(errno) => Err(errno),
    }
}
