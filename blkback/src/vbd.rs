//! One vbd, and what its two ends in the store ask of it ([`xenbus::backend`]); besides the rings, its
//! volume has to be open.

use crate::link::{self, Link};
use crate::open::{ImageWanted, OpenVolume, VolumeState, Wanted};
use crate::plane::Station;
use crate::preserved::{MAX_QUEUES, MAX_RING_ORDER, VbdId};
use crate::request::OFFERED_INDIRECT_SEGMENTS;
use crate::{Blkback, Env, frontend_token};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use domain_api::Errno;
use xen_abi::blkif::INFO_READ_ONLY;
use xenbus::Store;
use xenbus::backend::{self, Attached, End, Forget, Serve};
use xenbus::device::{self, Device, DeviceKind};

/// Keys of the frontend that are watched.
const WATCHED: [&str; 1] = ["state"];

/// What is known of a vbd.
pub struct Vbd {
    /// Its end in the store.
    pub end: End,
    /// Its place in the data path's table.
    pub place: usize,
    /// The volume's text.
    pub params: String,
    /// Whether its keys say that it may only be read.
    pub read_only: bool,
}

/// Whether a key of the backend's directory says what to do. The others are our own.
pub fn matters(key: Option<&str>) -> bool {
    matches!(key, None | Some("state" | "online" | "frontend"))
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
        if !backend::refresh(&mut Served { blkback: self, env, id }, store)? {
            self.remove(env, store, id);
        }
        Ok(())
    }

    /// Closes a vbd for a reason that its owner should read.
    pub(crate) fn give_up<E: Env, S: Store>(
        &mut self,
        env: &mut E,
        store: &mut S,
        id: VbdId,
        message: &str,
    ) -> Result<(), Errno> {
        backend::give_up(&mut Served { blkback: self, env, id }, store, message)
    }

    /// Starts to know a vbd. False when its directory is not complete yet.
    fn add<S: Store>(&mut self, store: &mut S, id: VbdId) -> Result<bool, Errno> {
        let device = Device {
            kind: DeviceKind::Vbd,
            backend: self.own,
            frontend: id.domain,
            index: id.device,
        };
        let Some(end) = End::open(store, device, &WATCHED, &frontend_token(id))? else {
            return Ok(false);
        };
        let stations = &mut self.plane.stations;
        let free = stations.iter().position(Option::is_none);
        let place = free.unwrap_or_else(|| {
            stations.push(None);
            stations.len() - 1
        });
        stations[place] = Some(Station::new(id));
        self.vbds.insert(id, Vbd { end, place, params: String::new(), read_only: false });
        Ok(true)
    }

    /// Forgets a vbd whose directory is gone.
    pub(crate) fn remove<E: Env, S: Store>(&mut self, env: &mut E, store: &mut S, id: VbdId) {
        Served { blkback: self, env, id }.disconnect(Forget::Yes);
        self.preserved.release(id, &mut self.plane.desk.pool);
        let Some(vbd) = self.vbds.remove(&id) else { return };
        self.plane.leave(vbd.place, &mut self.preserved);
        vbd.end.leave(store, &WATCHED, &frontend_token(id));
    }

    fn station(&self, id: VbdId) -> Option<&Station> {
        self.plane.stations[self.vbds.get(&id)?.place].as_ref()
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
        let directory = vbd.end.directory();
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
}

/// A vbd, while its ends are looked at.
struct Served<'a, E> {
    blkback: &'a mut Blkback,
    env: &'a mut E,
    id: VbdId,
}

impl<E: Env> Served<'_, E> {
    /// Lets go of the rings, if they are attached.
    fn disconnect(&mut self, forget: Forget) {
        let Self { blkback, env, id } = self;
        if let Some(vbd) = blkback.vbds.get_mut(id) {
            let place = vbd.place;
            if let Some(stats) = blkback.plane.disconnect(*env, place) {
                blkback.ports.retain(|_, (other, _)| *other != place);
                if vbd.end.may_log(env.now_ns()) {
                    log::info!("{id}: disconnected, {stats:?}");
                }
            }
        }
        if forget == Forget::Yes {
            blkback.preserved.forget(*id);
        }
    }

    fn tell_connected(&mut self, link: &Link, taken_over: bool) {
        let Some(vbd) = self.blkback.vbds.get_mut(&self.id) else { return };
        if vbd.end.may_log(self.env.now_ns()) {
            let how = if taken_over { "taken over" } else { "connected" };
            let (queues, replayed) = (link.queues.len(), link.stats.replayed);
            let pages = if link.persistent { ", persistent grants" } else { "" };
            log::info!(
                "{}: {how}, `{}`, {queues} queues{pages}, {replayed} requests replayed",
                self.id,
                vbd.params
            );
        }
    }
}

impl<E: Env, S: Store> Serve<S> for Served<'_, E> {
    fn end(&mut self) -> Option<&mut End> {
        self.blkback.vbds.get_mut(&self.id).map(|vbd| &mut vbd.end)
    }

    fn now_ns(&self) -> u64 {
        self.env.now_ns()
    }

    fn is_attached(&self) -> bool {
        self.blkback.station(self.id).is_some_and(Station::is_attached)
    }

    fn is_draining(&self) -> bool {
        self.blkback.station(self.id).is_some_and(Station::is_draining)
    }

    /// Begins to open the volume besides.
    fn offer(&mut self, store: &mut S) -> Result<(), Errno> {
        let Some(vbd) = self.blkback.vbds.get(&self.id) else { return Ok(()) };
        let directory = vbd.end.directory();
        device::write(store, &directory, "max-ring-page-order", MAX_RING_ORDER)?;
        device::write(store, &directory, "multi-queue-max-queues", MAX_QUEUES)?;
        self.blkback.open_volume(store, self.id, Inherited::No)
    }

    fn attach(&mut self, store: &mut S, taken_over: bool) -> Result<Attached, Errno> {
        let Some(vbd) = self.blkback.vbds.get(&self.id) else { return Ok(Attached::NotYet) };
        let (place, directory) = (vbd.place, vbd.end.directory());
        let Some(station) = self.blkback.plane.stations[place].as_ref() else {
            return Ok(Attached::NotYet);
        };
        if station.is_draining() {
            return Ok(Attached::NotYet);
        }
        let keys = match &station.volume {
            VolumeState::Open(volume) => volume_keys(volume),
            VolumeState::Failed(message) => return Ok(Attached::Refused(message.clone())),
            VolumeState::Opening(_) => return Ok(Attached::NotYet),
            VolumeState::Closed => {
                let inherited = if taken_over { Inherited::Yes } else { Inherited::No };
                let begun = self.blkback.open_volume(store, self.id, inherited);
                return begun.map(|()| Attached::NotYet);
            }
        };
        let attached = link::read_published(store, vbd.end.frontend()).and_then(|published| {
            let pages = (&mut self.blkback.preserved, &mut self.blkback.plane.desk.pool);
            Link::attach(self.env, pages, self.id, &published)
        });
        let link = match attached {
            Ok(link) => link,
            Err(message) => return Ok(Attached::Refused(message)),
        };
        self.tell_connected(&link, taken_over);
        for (number, queue) in link.queues.iter().enumerate() {
            self.blkback.ports.insert(queue.port, (place, number));
        }
        if let Some(station) = &mut self.blkback.plane.stations[place] {
            station.link = Some(link);
        }
        if !taken_over {
            for (key, value) in keys {
                device::write(store, &directory, key, value)?;
            }
        }
        Ok(Attached::Yes)
    }

    fn detach(&mut self, forget: Forget) {
        self.disconnect(forget);
    }

    /// The disk may still work for it.
    fn release(&mut self) -> bool {
        let Some(vbd) = self.blkback.vbds.get(&self.id) else { return true };
        self.blkback.plane.close_volume(vbd.place, &mut self.blkback.preserved)
    }
}

/// Whether a dead incarnation had the vbd connected.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Inherited {
    Yes,
    No,
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
