//! Network frontend.
//!
//! Buffers are pages of our own. Under [`GrantPolicy::Keep`] each is granted to the backend once
//! for the life of the connection, and frames are copied in and out: no grant table work and no
//! hypercall per frame, and what the backend can reach never changes. [`GrantPolicy::PerRequest`]
//! grants a page for one request only, as Linux does.
//!
//! What the backend answers is checked as strictly as by Linux 6.1's netfront, and where Linux
//! is lenient (receive ids), more strictly: the first impossible answer ends the connection with a
//! [`Fault`] that names it. So a backend that, after a restart, answers twice, loses its place or
//! still holds a page, is found out.
//!
//! Life of a device, `state` of our end in brackets:
//!
//! ```text
//!  [1] ──backend 2──▶ rings, keys ──▶ [4] ──backend 5 or 6, or close()──▶ [6] ──reopen()──▶ [1]
//! ```
//!
//! Sources: `xen/include/public/io/netif.h`, xen-abi §6.4, 6.5, 7.3.

mod channel;
#[cfg(feature = "smoltcp")]
mod phy;

#[cfg(feature = "smoltcp")]
pub use phy::{Phy, RxFrame, TxSlot};

use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use channel::Channel;
use core::fmt;
use domain_api::{DomainId, Errno, EventPort, Events, GrantRef, Granter};
use shmem::PeerError;
use xenbus::device::{self, Device, DeviceKind};
use xenbus::{Event, Nodes, Store, XenbusState};

/// What netfront needs of the core.
pub trait Env: Events + Granter {}
impl<T: Events + Granter> Env for T {}

/// Longest frame that is sent: 14 bytes of header, 4 of VLAN tag, 1500 of payload.
pub const MAX_FRAME: usize = domain_api::nic::MAX_FRAME;
/// Longest frame that is received.
const MAX_RECEIVED: usize = 65535;
const TOKEN: &str = "netfront/";

/// An Ethernet address.
pub type Mac = [u8; 6];

/// How pages are granted to the backend.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GrantPolicy {
    /// Once, for as long as the device is connected.
    Keep,
    /// For one request each; a page that the backend still holds when it answers is a [`Fault`].
    PerRequest,
}

/// Whether the layer-4 checksum of a frame is in it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Checksum {
    /// It is.
    Complete,
    /// The field holds the sum of the pseudo-header only; the backend finishes it.
    Blank,
}

/// Sizes and policies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Config {
    /// Pages for frames to send, 1 to 256.
    pub tx_buffers: u16,
    /// Pages for frames to receive, 1 to 256.
    pub rx_buffers: u16,
    /// Bytes of a frame that go into one page, 1 to 4096; a frame that has more is sent in parts,
    /// of which there are at most 18.
    pub fragment: u16,
    /// How pages are granted.
    pub grants: GrantPolicy,
    /// Whether there are two event channels where the backend can have it so.
    pub split_events: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            tx_buffers: 64,
            rx_buffers: 128,
            fragment: 4096,
            grants: GrantPolicy::Keep,
            split_events: true,
        }
    }
}

/// What no correct backend does. The connection is of no use afterwards.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// `rsp_prod` of a ring is impossible.
    Ring(PeerError),
    /// An answer to a request that was never made, or was answered already.
    TxId(u16),
    /// A receive answer with another id than the request in its slot has.
    RxId {
        /// The id of the request.
        expected: u16,
        /// The id in the answer.
        found: u16,
    },
    /// A receive answer whose data leave the page.
    RxExtent {
        /// Where they would start.
        offset: u16,
        /// Their bytes.
        len: u16,
    },
    /// A packet whose parts were not published together, or are longer than a packet can be.
    RxChain,
    /// A kind of answer that we did not ask for.
    RxFlags(u16),
    /// A page that the backend still held when it answered.
    StillGranted(GrantRef),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ring(error) => write!(f, "{error}"),
            Self::TxId(id) => write!(f, "transmit answer for inactive request {id}"),
            Self::RxId { expected, found } => {
                write!(f, "receive answer {found} in the place of {expected}")
            }
            Self::RxExtent { offset, len } => {
                write!(f, "receive answer of {len} bytes at offset {offset}")
            }
            Self::RxChain => write!(f, "received packet is cut"),
            Self::RxFlags(flags) => write!(f, "receive answer with flags {flags:#x}"),
            Self::StillGranted(gref) => write!(f, "grant {} still in use", gref.0),
        }
    }
}

/// Why a frame was not sent or received.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Error {
    /// There is no connection, or not any more.
    NotConnected,
    /// All buffers are in use; an event follows when there is one again.
    Full,
    /// The frame is too long, or shorter than a header.
    BadLength,
    /// The backend broke the protocol.
    Broken(Fault),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotConnected => write!(f, "not connected"),
            Self::Full => write!(f, "all transmit buffers are in use"),
            Self::BadLength => write!(f, "no length of a frame"),
            Self::Broken(fault) => write!(f, "{fault}"),
        }
    }
}

impl core::error::Error for Error {}

/// Counters.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Stats {
    /// Frames handed to the backend.
    pub tx_packets: u64,
    /// Their bytes.
    pub tx_bytes: u64,
    /// Slots that the backend answered with an error.
    pub tx_errors: u64,
    /// Frames received.
    pub rx_packets: u64,
    /// Their bytes.
    pub rx_bytes: u64,
    /// Receive answers that carried an error.
    pub rx_errors: u64,
    /// Events that we sent.
    pub notifications: u64,
}

/// A network interface.
pub struct Netfront {
    device: Device,
    mac: Mac,
    config: Config,
    state: XenbusState,
    backend_state: XenbusState,
    channel: Option<Channel>,
    /// Of earlier connections: pages that the backend still held when they ended.
    held: Vec<channel::Granted>,
    received: Vec<u8>,
    #[cfg(feature = "smoltcp")]
    received_len: usize,
    fault: Option<Fault>,
    stats: Stats,
}

impl Netfront {
    /// Finds interface `index` of the domain `own` in the store, and watches its backend.
    /// The connection is made by [`Self::store_event`] or [`Self::refresh`], when the backend
    /// is ready.
    ///
    /// # Errors
    /// `ENOENT` when there is no such interface, `EINVAL` when its keys make no sense or `config`
    /// is out of bounds, and the store's.
    pub fn new<S: Store>(
        store: &mut S,
        own: DomainId,
        index: u32,
        config: Config,
    ) -> Result<Self, Errno> {
        let sizes = [config.tx_buffers, config.rx_buffers];
        if sizes.iter().any(|&size| size == 0 || size > 256)
            || usize::from(config.fragment) * xen_abi::netif::MAX_TX_SLOTS < MAX_FRAME
            || usize::from(config.fragment) > xen_abi::PAGE_SIZE
            || usize::from(config.tx_buffers) < MAX_FRAME.div_ceil(usize::from(config.fragment))
        {
            return Err(Errno::EINVAL);
        }
        let device = device::find_backend(store, own, DeviceKind::Vif, index)?;
        let directory = device.frontend_path();
        let mac = store.read_string(&format!("{directory}/mac"))?;
        let mac = parse_mac(&mac).ok_or(Errno::EINVAL)?;
        let state = device::state(store, &directory)?;
        let mut front = Self {
            device,
            mac,
            config,
            state,
            backend_state: XenbusState::UNKNOWN,
            channel: None,
            held: Vec::new(),
            received: vec![0; MAX_RECEIVED],
            #[cfg(feature = "smoltcp")]
            received_len: 0,
            fault: None,
            stats: Stats::default(),
        };
        // A state left by an earlier life of this domain, which nobody reset.
        if state != XenbusState::INITIALISING {
            front.switch(store, XenbusState::INITIALISING)?;
        }
        store.watch(&front.backend_node("state"), &front.token())?;
        Ok(front)
    }

    /// Our Ethernet address.
    #[must_use]
    pub const fn mac(&self) -> Mac {
        self.mac
    }

    /// Whether frames can be sent and received.
    #[must_use]
    pub const fn is_connected(&self) -> bool {
        self.channel.is_some() && self.fault.is_none()
    }

    /// `state` of our end.
    #[must_use]
    pub const fn state(&self) -> XenbusState {
        self.state
    }

    /// `state` of the backend's end, as last seen.
    #[must_use]
    pub const fn backend_state(&self) -> XenbusState {
        self.backend_state
    }

    /// What the backend did wrong, if it did.
    #[must_use]
    pub const fn fault(&self) -> Option<Fault> {
        self.fault
    }

    /// The counters.
    #[must_use]
    pub const fn stats(&self) -> Stats {
        self.stats
    }

    /// Requests that the backend has not answered: sent frames' parts, posted buffers.
    #[must_use]
    pub fn in_flight(&self) -> (u32, u32) {
        self.channel.as_ref().map_or((0, 0), Channel::in_flight)
    }

    /// Takes an event of the store. False: it belongs to somebody else.
    ///
    /// # Errors
    /// See [`Self::refresh`].
    pub fn store_event<E: Env, S: Store>(
        &mut self,
        env: &mut E,
        store: &mut S,
        event: &Event,
    ) -> Result<bool, Errno> {
        if event.token != self.token() {
            return Ok(false);
        }
        self.refresh(env, store)?;
        Ok(true)
    }

    /// Looks at the backend's state and acts on it.
    ///
    /// # Errors
    /// The store's; `ENOSPC` when there are no ports or grants for a connection.
    pub fn refresh<E: Env, S: Store>(&mut self, env: &mut E, store: &mut S) -> Result<(), Errno> {
        self.backend_state = device::state(store, &self.device.backend_path())?;
        let initialising = self.state == XenbusState::INITIALISING;
        match self.backend_state {
            XenbusState::INIT_WAIT if initialising => self.connect(env, store),
            XenbusState::CLOSING | XenbusState::CLOSED
                if !initialising && self.state != XenbusState::CLOSED =>
            {
                self.disconnect(env);
                self.switch(store, XenbusState::CLOSED)
            }
            _ => Ok(()),
        }
    }

    /// Ends the connection in good order.
    ///
    /// # Errors
    /// The store's.
    pub fn close<E: Env, S: Store>(&mut self, env: &mut E, store: &mut S) -> Result<(), Errno> {
        if self.state == XenbusState::CLOSED {
            return Ok(());
        }
        self.switch(store, XenbusState::CLOSING)?;
        self.disconnect(env);
        self.refresh(env, store)
    }

    /// Asks for a new connection after the last one was closed.
    ///
    /// # Errors
    /// The store's.
    pub fn reopen<E: Env, S: Store>(&mut self, env: &mut E, store: &mut S) -> Result<(), Errno> {
        self.disconnect(env);
        self.fault = None;
        self.switch(store, XenbusState::INITIALISING)?;
        self.refresh(env, store)
    }

    /// Takes an event channel's event. False: the port is not ours. Then receive until there is
    /// nothing left.
    pub fn event(&mut self, port: EventPort) -> bool {
        self.channel.as_ref().is_some_and(|channel| channel.owns(port))
    }

    /// Queues a frame; [`Self::flush`] tells the backend.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn transmit<E: Env>(
        &mut self,
        env: &mut E,
        frame: &[u8],
        checksum: Checksum,
    ) -> Result<(), Error> {
        if !(14..=MAX_FRAME).contains(&frame.len()) {
            return Err(Error::BadLength);
        }
        let channel = live(&mut self.channel, self.fault)?;
        let done = channel.transmit(env, frame, checksum, &mut self.stats);
        self.check(done)
    }

    /// Whether a frame can be queued now. If not, an event follows when it can.
    pub fn can_transmit<E: Env>(&mut self, env: &mut E) -> bool {
        let Ok(channel) = live(&mut self.channel, self.fault) else { return false };
        let done = channel.make_room(env, &mut self.stats);
        self.check(done).is_ok()
    }

    /// Hands the next received frame to `work`. `None` when there is none; then an event follows
    /// when there is one.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn receive<E: Env, R>(
        &mut self,
        env: &mut E,
        work: impl FnOnce(&[u8]) -> R,
    ) -> Result<Option<R>, Error> {
        let len = self.receive_frame(env)?;
        Ok(len.map(|len| work(&self.received[..len])))
    }

    /// Shows the backend what was queued and posted, and takes its answers. To be called after
    /// each burst of frames, before the domain sleeps.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn flush<E: Env>(&mut self, env: &mut E) -> Result<(), Error> {
        let channel = live(&mut self.channel, self.fault)?;
        channel.publish(env, &mut self.stats);
        let done = channel.collect(env, &mut self.stats);
        self.check(done)
    }

    fn receive_frame<E: Env>(&mut self, env: &mut E) -> Result<Option<usize>, Error> {
        let channel = live(&mut self.channel, self.fault)?;
        let done = channel.receive(env, &mut self.received, &mut self.stats);
        self.check(done)
    }

    /// Keeps the first fault.
    fn check<R>(&mut self, done: Result<R, Error>) -> Result<R, Error> {
        if let Err(Error::Broken(fault)) = done
            && self.fault.is_none()
        {
            log::error!("{}: {fault}", self.device.frontend_path());
            self.fault = Some(fault);
        }
        done
    }

    fn connect<E: Env, S: Store>(&mut self, env: &mut E, store: &mut S) -> Result<(), Errno> {
        self.release_held(env);
        let backend = self.device.backend_path();
        if !device::has_feature(store, &backend, "feature-rx-copy")? {
            return Err(Errno::ENODEV);
        }
        let split = self.config.split_events
            && device::has_feature(store, &backend, "feature-split-event-channels")?;
        let mut channel =
            Channel::open(env, self.device.backend, self.config, split, &mut self.held)?;
        let directory = self.device.frontend_path();
        let keys = channel.keys();
        let written = store.transaction(|nodes| write_keys(nodes, &directory, &keys));
        if let Err(errno) = written {
            channel.close(env, &mut self.held);
            return Err(errno);
        }
        channel.publish(env, &mut self.stats);
        self.channel = Some(channel);
        self.fault = None;
        self.switch(store, XenbusState::CONNECTED)
    }

    fn disconnect<E: Env>(&mut self, env: &mut E) {
        if let Some(channel) = self.channel.take() {
            channel.close(env, &mut self.held);
        }
        self.release_held(env);
    }

    fn release_held<E: Env>(&mut self, env: &mut E) {
        self.held.retain(|granted| env.revoke(granted.gref) == Err(Errno::EBUSY));
    }

    fn switch<S: Store>(&mut self, store: &mut S, state: XenbusState) -> Result<(), Errno> {
        self.state = state;
        device::switch_state(store, &self.device.frontend_path(), state)
    }

    fn backend_node(&self, key: &str) -> String {
        format!("{}/{key}", self.device.backend_path())
    }

    fn token(&self) -> String {
        format!("{TOKEN}{}", self.device.index)
    }
}

fn live(channel: &mut Option<Channel>, fault: Option<Fault>) -> Result<&mut Channel, Error> {
    match (channel, fault) {
        (_, Some(fault)) => Err(Error::Broken(fault)),
        (Some(channel), None) => Ok(channel),
        (None, None) => Err(Error::NotConnected),
    }
}

fn write_keys(
    nodes: &mut dyn Nodes,
    directory: &str,
    keys: &[(&'static str, u32)],
) -> Result<(), Errno> {
    for old in ["event-channel", "event-channel-tx", "event-channel-rx"] {
        if nodes.read_optional(&format!("{directory}/{old}"))?.is_some() {
            nodes.rm(&format!("{directory}/{old}"))?;
        }
    }
    for &(key, value) in keys {
        device::write(nodes, directory, key, value)?;
    }
    Ok(())
}

fn parse_mac(text: &str) -> Option<Mac> {
    let mut mac = [0; 6];
    let mut bytes = text.split(':');
    for byte in &mut mac {
        *byte = u8::from_str_radix(bytes.next()?, 16).ok()?;
    }
    bytes.next().is_none().then_some(mac)
}
