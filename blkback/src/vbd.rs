//! One vbd and its two ends in the store.
//!
//! What is to be done follows from the states of both ends, by the same table whether this
//! incarnation just started or has served the vbd for hours ([`xenbus::takeover()`]); what
//! differs is only whether the rings are attached and the volume is open already. Every step is
//! safe to repeat: our own writes come back to us as events.

use crate::link::{self, Link};
use crate::open::{ImageWanted, OpenVolume, VolumeState, Wanted};
use crate::plane::Station;
use crate::preserved::{MAX_QUEUES, MAX_RING_ORDER, VbdId};
use crate::request::OFFERED_INDIRECT_SEGMENTS;
use crate::{Blkback, Env, frontend_token};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use domain_api::Errno;
use xen_abi::blkif::INFO_READ_ONLY;
use xenbus::device::{self, Device, DeviceKind};
use xenbus::{Store, Takeover, XenbusState, takeover};

/// Steps that one event can cause; more would be a circle.
const MOST_STEPS: usize = 4;
/// Log lines that a vbd may cause in [`LOG_PERIOD_NS`].
const MOST_LINES: u32 = 16;
const LOG_PERIOD_NS: u64 = 10_000_000_000;

/// What is known of a vbd.
pub struct Vbd {
    device: Device,
    /// Its place in the data path's table.
    pub place: usize,
    /// The frontend's directory.
    frontend: String,
    /// The volume's text.
    pub params: String,
    /// Whether its keys say that it may only be read.
    pub read_only: bool,
    /// Why it was closed.
    pub fault: Option<String>,
    /// The features are in the store and the state is 2, by this incarnation's hand.
    advertised: bool,
    lines: u32,
    lines_since_ns: u64,
}

/// Whether a key of the backend's directory says what to do. The others are our own.
pub fn matters(key: Option<&str>) -> bool {
    matches!(key, None | Some("state" | "online" | "frontend"))
}

impl Vbd {
    fn backend(&self) -> String {
        self.device.backend_path()
    }

    /// Whether one more line may be logged: what frontends do must not fill the log.
    fn may_log(&mut self, now_ns: u64) -> bool {
        if now_ns.saturating_sub(self.lines_since_ns) >= LOG_PERIOD_NS {
            (self.lines, self.lines_since_ns) = (0, now_ns);
        }
        self.lines += 1;
        self.lines <= MOST_LINES
    }
}

impl Blkback {
    /// Looks at both ends of a vbd, and acts until nothing is left to do.
    pub(crate) fn refresh<E: Env, S: Store>(
        &mut self,
        env: &mut E,
        store: &mut S,
        id: VbdId,
    ) -> Result<(), Errno> {
        if !self.vbds.contains_key(&id) && !self.add(store, id)? {
            return Ok(());
        }
        for _ in 0..MOST_STEPS {
            let Some(vbd) = self.vbds.get(&id) else { return Ok(()) };
            let (backend_dir, frontend_dir) = (vbd.backend(), vbd.frontend.clone());
            if store.read_optional(&format!("{backend_dir}/frontend"))?.is_none() {
                self.remove(env, store, id);
                return Ok(());
            }
            let backend = device::state(store, &backend_dir)?;
            let frontend = device::state(store, &frontend_dir)?;
            if !self.step(env, store, id, backend, frontend)? {
                return Ok(());
            }
        }
        Ok(())
    }

    /// One step. True when a state has changed, so that another step may follow.
    fn step<E: Env, S: Store>(
        &mut self,
        env: &mut E,
        store: &mut S,
        id: VbdId,
        backend: XenbusState,
        frontend: XenbusState,
    ) -> Result<bool, Errno> {
        match takeover(DeviceKind::Vbd, backend, frontend) {
            Takeover::Attach if self.station(id).is_some_and(Station::is_attached) => Ok(false),
            Takeover::Attach => self.connect(env, store, id, backend).map(|()| false),
            Takeover::Connect => {
                self.disconnect(env, id, Forget::No);
                self.connect(env, store, id, backend)?;
                Ok(self.station(id).is_some_and(Station::is_attached))
            }
            Takeover::Advertise if self.is_advertised(id) && backend == XenbusState::INIT_WAIT => {
                Ok(false)
            }
            Takeover::Advertise | Takeover::StartOver => {
                self.disconnect(env, id, Forget::Yes);
                if self.station(id).is_some_and(Station::is_draining) {
                    return Ok(false);
                }
                self.advertise(env, store, id).map(|()| true)
            }
            Takeover::FollowClosing => {
                self.disconnect(env, id, Forget::Yes);
                let closed = frontend == XenbusState::UNKNOWN;
                let next = if closed { XenbusState::CLOSED } else { XenbusState::CLOSING };
                self.switch_state(env, store, id, next).map(|()| backend != next)
            }
            Takeover::Release => self.close(env, store, id).map(|()| false),
            // The frontend is gone without a word: its domain was destroyed.
            Takeover::Wait
                if frontend == XenbusState::UNKNOWN && backend == XenbusState::CONNECTED =>
            {
                self.close(env, store, id).map(|()| false)
            }
            Takeover::Wait => Ok(false),
        }
    }

    /// Starts to know a vbd. False when its directory is not complete yet.
    fn add<S: Store>(&mut self, store: &mut S, id: VbdId) -> Result<bool, Errno> {
        let device = Device {
            kind: DeviceKind::Vbd,
            backend: self.own,
            frontend: id.domain,
            index: id.device,
        };
        let directory = device.backend_path();
        let Some(frontend) = store.read_optional(&format!("{directory}/frontend"))? else {
            return Ok(false);
        };
        match store.watch(&format!("{frontend}/state"), &frontend_token(id)) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(errno) => return Err(errno),
        }
        let stations = &mut self.plane.stations;
        let free = stations.iter().position(Option::is_none);
        let place = free.unwrap_or_else(|| {
            stations.push(None);
            stations.len() - 1
        });
        stations[place] = Some(Station::new(id));
        let vbd = Vbd {
            device,
            place,
            frontend,
            params: String::new(),
            read_only: false,
            fault: None,
            advertised: false,
            lines: 0,
            lines_since_ns: 0,
        };
        self.vbds.insert(id, vbd);
        Ok(true)
    }

    /// Forgets a vbd whose directory is gone.
    pub(crate) fn remove<E: Env, S: Store>(&mut self, env: &mut E, store: &mut S, id: VbdId) {
        self.disconnect(env, id, Forget::Yes);
        self.preserved.release(id, &mut self.plane.desk.pool);
        let Some(vbd) = self.vbds.remove(&id) else { return };
        self.plane.leave(vbd.place, &mut self.preserved);
        // The watch may be gone with the connection; there is nothing left to end then.
        let _ = store.unwatch(&format!("{}/state", vbd.frontend), &frontend_token(id));
        log::info!("{id}: removed");
    }

    fn station(&self, id: VbdId) -> Option<&Station> {
        self.plane.stations[self.vbds.get(&id)?.place].as_ref()
    }

    fn is_advertised(&self, id: VbdId) -> bool {
        self.vbds.get(&id).is_some_and(|vbd| vbd.advertised)
    }

    /// Writes the features that a frontend reads before it makes its rings, then state 2, and
    /// begins to open the volume.
    fn advertise<E: Env, S: Store>(
        &mut self,
        env: &mut E,
        store: &mut S,
        id: VbdId,
    ) -> Result<(), Errno> {
        let Some(vbd) = self.vbds.get_mut(&id) else { return Ok(()) };
        let directory = vbd.backend();
        device::write(store, &directory, "max-ring-page-order", MAX_RING_ORDER)?;
        device::write(store, &directory, "multi-queue-max-queues", MAX_QUEUES)?;
        vbd.advertised = true;
        vbd.fault = None;
        let error = error_node(id);
        if store.read_optional(&error)?.is_some() {
            store.rm(&error)?;
        }
        self.open_volume(store, id, Inherited::No)?;
        self.switch_state(env, store, id, XenbusState::INIT_WAIT)
    }

    /// Begins to open the volume, unless that was begun.
    fn open_volume<S: Store>(
        &mut self,
        store: &mut S,
        id: VbdId,
        inherited: Inherited,
    ) -> Result<(), Errno> {
        let Some(vbd) = self.vbds.get_mut(&id) else { return Ok(()) };
        let open = self.plane.stations[vbd.place].as_ref().map(|it| &it.volume);
        if matches!(open, Some(VolumeState::Open(_) | VolumeState::Opening(_))) {
            return Ok(());
        }
        let directory = vbd.backend();
        let params = store.read_optional(&format!("{directory}/params"))?.unwrap_or_default();
        let mode = store.read_optional(&format!("{directory}/mode"))?;
        vbd.params.clone_from(&params);
        vbd.read_only = mode.as_deref().is_none_or(|mode| !mode.starts_with('w'));
        let mut wanted = Wanted {
            params,
            read_only: vbd.read_only,
            inherited: inherited == Inherited::Yes,
            image: None,
        };
        match store.read_optional(&format!("{directory}/format"))?.as_deref() {
            None | Some("raw") => {}
            Some("qcow2") => {
                let backing = store.read_optional(&format!("{directory}/backing"))?;
                wanted.image = Some(ImageWanted { backing });
            }
            Some(other) => {
                let message = format!("the backend's key `format` is unknown: {other:.40}");
                self.plane.refuse(vbd.place, message);
                return Ok(());
            }
        }
        self.plane.open(vbd.place, wanted);
        Ok(())
    }

    /// Attaches to the rings, once the volume is open; state 4 unless it is that already.
    fn connect<E: Env, S: Store>(
        &mut self,
        env: &mut E,
        store: &mut S,
        id: VbdId,
        backend: XenbusState,
    ) -> Result<(), Errno> {
        let Some(vbd) = self.vbds.get(&id) else { return Ok(()) };
        let (place, frontend, directory) = (vbd.place, vbd.frontend.clone(), vbd.backend());
        let Some(station) = self.plane.stations[place].as_ref() else { return Ok(()) };
        if station.is_draining() {
            return Ok(());
        }
        let keys = match &station.volume {
            VolumeState::Open(volume) => volume_keys(volume),
            VolumeState::Failed(message) => {
                let message = message.clone();
                return self.give_up(env, store, id, &message);
            }
            VolumeState::Opening(_) => return Ok(()),
            VolumeState::Closed => {
                let taken_over = backend == XenbusState::CONNECTED;
                let inherited = if taken_over { Inherited::Yes } else { Inherited::No };
                return self.open_volume(store, id, inherited);
            }
        };
        let attached = link::read_published(store, &frontend).and_then(|published| {
            let pages = (&mut self.preserved, &mut self.plane.desk.pool);
            Link::attach(env, pages, id, &published)
        });
        let link = match attached {
            Ok(link) => link,
            Err(message) => return self.give_up(env, store, id, &message),
        };
        self.tell_connected(env, id, &link, backend);
        for (number, queue) in link.queues.iter().enumerate() {
            self.ports.insert(queue.port, (place, number));
        }
        if let Some(station) = &mut self.plane.stations[place] {
            station.link = Some(link);
        }
        if backend != XenbusState::CONNECTED {
            for (key, value) in keys {
                device::write(store, &directory, key, value)?;
            }
            self.switch_state(env, store, id, XenbusState::CONNECTED)?;
        }
        Ok(())
    }

    fn tell_connected<E: Env>(&mut self, env: &E, id: VbdId, link: &Link, backend: XenbusState) {
        let Some(vbd) = self.vbds.get_mut(&id) else { return };
        // Once connected, another round of advertising is a new one.
        vbd.advertised = false;
        if vbd.may_log(env.now_ns()) {
            let how = if backend == XenbusState::CONNECTED { "taken over" } else { "connected" };
            let (queues, replayed) = (link.queues.len(), link.stats.replayed);
            let pages = if link.persistent { ", persistent grants" } else { "" };
            log::info!(
                "{id}: {how}, `{}`, {queues} queues{pages}, {replayed} requests replayed",
                vbd.params
            );
        }
    }

    /// Lets go of the rings, if they are attached.
    fn disconnect<E: Env>(&mut self, env: &mut E, id: VbdId, forget: Forget) {
        if let Some(vbd) = self.vbds.get_mut(&id) {
            let place = vbd.place;
            if let Some(stats) = self.plane.disconnect(env, place) {
                self.ports.retain(|_, (other, _)| *other != place);
                if vbd.may_log(env.now_ns()) {
                    log::info!("{id}: disconnected, {stats:?}");
                }
            }
        }
        if forget == Forget::Yes {
            self.preserved.forget(id);
        }
    }

    /// The frontend is closed: state 6 when the disk has nothing of it any more, and the
    /// directory goes if the toolstack wants that.
    fn close<E: Env, S: Store>(
        &mut self,
        env: &mut E,
        store: &mut S,
        id: VbdId,
    ) -> Result<(), Errno> {
        self.disconnect(env, id, Forget::Yes);
        let Some(vbd) = self.vbds.get_mut(&id) else { return Ok(()) };
        let (place, directory) = (vbd.place, vbd.backend());
        vbd.advertised = false;
        if !self.plane.close_volume(place, &mut self.preserved) {
            return Ok(());
        }
        self.switch_state(env, store, id, XenbusState::CLOSED)?;
        if device::read_or(store, &directory, "online", 1_u32) == Ok(0) {
            match store.rm(&directory) {
                // Where the directory is the toolstack's, it removes it itself.
                Ok(()) | Err(Errno::EACCES | Errno::ENOENT) => {}
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    /// Tells the owner what is wrong with a vbd.
    pub(crate) fn report<E: Env, S: Store>(
        &mut self,
        env: &E,
        store: &mut S,
        id: VbdId,
        message: &str,
    ) -> Result<(), Errno> {
        let Some(vbd) = self.vbds.get_mut(&id) else { return Ok(()) };
        if vbd.fault.as_deref() == Some(message) {
            return Ok(());
        }
        vbd.fault = Some(message.to_string());
        if vbd.may_log(env.now_ns()) {
            log::warn!("{id}: {message}");
        }
        store.write(&error_node(id), message.as_bytes())
    }

    /// Closes a vbd for a reason that its owner should read.
    pub(crate) fn give_up<E: Env, S: Store>(
        &mut self,
        env: &mut E,
        store: &mut S,
        id: VbdId,
        message: &str,
    ) -> Result<(), Errno> {
        self.disconnect(env, id, Forget::Yes);
        self.report(env, store, id, message)?;
        self.switch_state(env, store, id, XenbusState::CLOSING)
    }

    fn switch_state<E: Env, S: Store>(
        &mut self,
        env: &E,
        store: &mut S,
        id: VbdId,
        state: XenbusState,
    ) -> Result<(), Errno> {
        let Some(vbd) = self.vbds.get_mut(&id) else { return Ok(()) };
        let directory = vbd.backend();
        if device::state(store, &directory)? != state {
            device::write(store, &directory, "state", state.0)?;
            if vbd.may_log(env.now_ns()) {
                log::debug!("{id}: state {}", state.0);
            }
        }
        Ok(())
    }
}

/// Whether what is in flight may be taken up again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Forget {
    Yes,
    No,
}

/// Whether a dead incarnation had the vbd connected.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Inherited {
    Yes,
    No,
}

/// Where the reason for a vbd's end is written, as Linux does it (`xenbus_dev_error`).
fn error_node(id: VbdId) -> String {
    format!("error/backend/vbd/{}/{}/error", id.domain.0, id.device)
}

/// What the frontend reads when it sees state 4.
fn volume_keys(volume: &OpenVolume) -> Vec<(&'static str, u64)> {
    let geometry = &volume.geometry;
    let info = if volume.limits.read_only { INFO_READ_ONLY } else { 0 };
    let mut keys = alloc::vec![
        ("feature-flush-cache", 1),
        ("feature-persistent", 1),
        ("feature-max-indirect-segments", u64::from(OFFERED_INDIRECT_SEGMENTS)),
        ("feature-discard", u64::from(volume.limits.discard)),
        ("sectors", volume.limits.sectors),
        ("info", u64::from(info)),
        ("sector-size", u64::from(geometry.sector_size)),
        ("physical-sector-size", u64::from(geometry.physical_sector_size)),
    ];
    if volume.limits.discard {
        keys.push(("discard-granularity", volume.discard_granularity()));
        keys.push(("discard-alignment", volume.discard_alignment()));
        keys.push(("discard-secure", 0));
    }
    keys
}
