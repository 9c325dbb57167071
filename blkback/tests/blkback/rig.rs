//! A driver domain, its disks, guests and a store in one process.
//!
//! Everybody sleeps unless an event, a store event or work that it announced itself wakes it, so
//! a lost wake-up shows as a request that is never answered. The backend can be killed before or
//! after any call that it makes to the core or to a disk.

use crate::disk::{ModelDisk, SharedMedium};
use crate::front::{Config, DEVICE, Front, UNKNOWN, content};
use blkback::preserved::{self, VbdId};
use blkback::{Blkback, Progress, VbdInfo};
use domain_api::fake::{Domain, World};
use domain_api::{
    Access, Clock, DeviceGrants, DomainId, Errno, EventPort, Events, GrantCopy, GrantRef,
    GrantStatus, Grants, MapRequest, MappedDmaGrant, MappedGrant, Page,
};
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::rc::Rc;
use std::sync::atomic::Ordering::Relaxed;
use xenbus::device::{self, Device, DeviceKind};
use xenbus::{Client, NodeAccess, Nodes, Permission, Store, XenbusState};
use xenstore::{LocalStore, LocalTransport};

pub const TOOLSTACK: DomainId = DomainId(0);
pub const DRIVER: DomainId = DomainId(2);

pub type StoreClient = Client<LocalTransport>;

/// Counts the backend's calls, and ends its life at a given one.
#[derive(Clone, Default)]
pub struct Fuse(Rc<Cell<Option<u32>>>);

/// What a life ends with; passes through `catch_unwind` without a message.
struct Killed;

impl Fuse {
    pub fn step(&self) {
        if let Some(left) = self.0.get() {
            if left == 0 {
                self.0.set(None);
                resume_unwind(Box::new(Killed));
            }
            self.0.set(Some(left - 1));
        }
    }

    pub fn light(&self, steps: u32) {
        self.0.set(Some(steps));
    }

    pub fn put_out(&self) {
        self.0.set(None);
    }
}

/// A domain whose life hangs on a fuse, before and after each call.
pub struct Env {
    pub domain: Domain,
    fuse: Fuse,
    /// Calls that would be hypercalls, without notifications.
    pub calls: u32,
    /// Pages of others that were mapped at each notification.
    pub mapped: Vec<usize>,
}

impl Env {
    fn around<R>(&mut self, call: impl FnOnce(&mut Domain) -> R) -> R {
        self.fuse.step();
        let result = call(&mut self.domain);
        self.fuse.step();
        result
    }
}

impl Events for Env {
    fn alloc_unbound(&mut self, remote: DomainId) -> Result<EventPort, Errno> {
        self.around(|domain| domain.alloc_unbound(remote))
    }
    fn bind_interdomain(&mut self, remote: DomainId, port: EventPort) -> Result<EventPort, Errno> {
        self.around(|domain| domain.bind_interdomain(remote, port))
    }
    fn close(&mut self, port: EventPort) {
        self.around(|domain| domain.close(port));
    }
    fn notify(&mut self, port: EventPort) {
        self.mapped.push(self.domain.mappings());
        self.around(|domain| domain.notify(port));
    }
}

impl Grants for Env {
    fn map(
        &mut self,
        granter: DomainId,
        gref: GrantRef,
        access: Access,
    ) -> Result<MappedGrant, GrantStatus> {
        self.calls += 1;
        self.around(|domain| domain.map(granter, gref, access))
    }
    fn unmap(&mut self, mapping: MappedGrant) {
        self.calls += 1;
        self.around(|domain| domain.unmap(mapping));
    }
    fn copy(&mut self, operations: &mut [GrantCopy]) {
        self.calls += 1;
        self.around(|domain| domain.copy(operations));
    }
}

impl DeviceGrants for Env {
    fn map_for_devices(
        &mut self,
        requests: &[MapRequest],
        results: &mut Vec<Result<MappedDmaGrant, GrantStatus>>,
    ) {
        self.calls += 1;
        self.around(|domain| domain.map_for_devices(requests, results));
    }
    fn unmap_from_devices(&mut self, mappings: &mut Vec<MappedDmaGrant>) {
        self.calls += 1;
        self.around(|domain| domain.unmap_from_devices(mappings));
    }
}

impl Clock for Env {
    fn now_ns(&self) -> u64 {
        self.domain.now_ns()
    }
}

/// One life of the driver domain.
pub struct Back {
    pub env: Env,
    pub disks: Vec<ModelDisk>,
    pub blkback: Blkback,
    pub client: StoreClient,
    awake: bool,
}

impl Back {
    pub fn wake(&mut self) {
        self.awake = true;
    }

    /// One pass of a driver domain's event loop. True when it did anything.
    fn turn(&mut self) -> bool {
        let mut worked = core::mem::take(&mut self.awake);
        while let Some(event) = self.client.next_event() {
            let Self { env, disks, blkback, client, .. } = self;
            assert!(blkback.store_event(env, client, disks, &event).unwrap());
            worked = true;
        }
        for port in self.env.domain.take_pending() {
            assert!(self.blkback.event(port), "an event of nobody: {port:?}");
            worked = true;
        }
        if worked {
            let Self { env, disks, blkback, client, .. } = self;
            let Progress { more_work, store_work } = blkback.poll(env, disks);
            if store_work {
                blkback.settle(env, client, disks).unwrap();
            }
            self.awake = more_work || store_work;
        }
        for disk in &mut self.disks {
            self.awake |= disk.work();
        }
        worked || self.awake
    }
}

pub struct Rig {
    pub world: World,
    pub store: LocalStore,
    pub toolstack: StoreClient,
    pub media: Vec<SharedMedium>,
    pub preserved: Vec<Page>,
    pub fuse: Fuse,
    pub back: Option<Back>,
    pub fronts: Vec<Front>,
    pub kills: usize,
}

impl Rig {
    /// A driver domain with these disks and room for `vbds`.
    pub fn new(media: Vec<SharedMedium>, vbds: usize) -> Self {
        Self::with_images(media, vbds, 0)
    }

    /// The same with room for copy-on-write images.
    pub fn with_images(media: Vec<SharedMedium>, vbds: usize, images: usize) -> Self {
        let world = World::new();
        let store = LocalStore::new();
        let mut toolstack = store.client(TOOLSTACK);
        home(&mut toolstack, DRIVER);
        let pages = preserved::pages_for(vbds, images);
        let mut rig = Self {
            world,
            store,
            toolstack,
            media,
            preserved: (0..pages).map(|_| Page::new_zeroed()).collect(),
            fuse: Fuse::default(),
            back: None,
            fronts: Vec::new(),
            kills: 0,
        };
        rig.start_back();
        rig
    }

    /// Starts the driver domain's next incarnation.
    pub fn start_back(&mut self) {
        let mut domain = self.world.domain(DRIVER);
        if self.kills > 0 {
            self.store.restart(DRIVER);
        }
        let client = self.store.client(DRIVER);
        let (directory, pool) = preserved::split(self.preserved.clone());
        let pool = pool.iter().map(|page| domain.dma_page(page)).collect();
        let env = Env { domain, fuse: self.fuse.clone(), calls: 0, mapped: Vec::new() };
        let new = |medium| ModelDisk::new(&self.world, medium, &self.fuse);
        let disks = self.media.iter().map(new).collect();
        let blkback = Blkback::new(DRIVER, directory, pool);
        let mut back = Back { env, disks, blkback, client, awake: true };
        let started = catch_unwind(AssertUnwindSafe(|| {
            let Back { env, disks, blkback, client, .. } = &mut back;
            blkback.start(env, client, disks).unwrap();
        }));
        self.back = Some(back);
        if let Err(reason) = started {
            self.bury(reason);
        }
    }

    fn bury(&mut self, reason: Box<dyn std::any::Any + Send>) {
        if !reason.is::<Killed>() {
            resume_unwind(reason);
        }
        self.kill_back();
    }

    /// Ends the driver domain's life.
    pub fn kill_back(&mut self) {
        self.fuse.put_out();
        if let Some(back) = self.back.take() {
            back.disks.into_iter().for_each(ModelDisk::die);
        }
        self.world.kill(DRIVER);
        self.kills += 1;
    }

    pub fn back(&mut self) -> &mut Back {
        self.back.as_mut().expect("the driver domain is alive")
    }

    /// Creates a guest's home and its vbd in the store, as the toolstack does.
    pub fn add_device(&mut self, id: DomainId, volume: &str, mode: &str) -> Device {
        home(&mut self.toolstack, id);
        self.add_directories(id, volume, mode)
    }

    pub fn add_directories(&mut self, id: DomainId, volume: &str, mode: &str) -> Device {
        let device = Device { kind: DeviceKind::Vbd, backend: DRIVER, frontend: id, index: DEVICE };
        let (front, back) = (device.frontend_path(), device.backend_path());
        let owned = |owner, reader| [Permission::owner(owner), Permission::reader(reader)];
        self.toolstack
            .transaction(|nodes| {
                nodes.mkdir(&front)?;
                nodes.set_perms(&front, &owned(id, DRIVER))?;
                nodes.mkdir(&back)?;
                nodes.set_perms(&back, &owned(DRIVER, id))?;
                for (path, value, owner, reader) in [
                    (format!("{front}/backend"), back.clone(), id, DRIVER),
                    (format!("{front}/backend-id"), DRIVER.0.to_string(), id, DRIVER),
                    (format!("{front}/virtual-device"), DEVICE.to_string(), id, DRIVER),
                    (format!("{front}/device-type"), "disk".into(), id, DRIVER),
                    (format!("{front}/state"), "1".into(), id, DRIVER),
                    (format!("{back}/frontend"), front.clone(), DRIVER, id),
                    (format!("{back}/frontend-id"), id.0.to_string(), DRIVER, id),
                    (format!("{back}/online"), "1".into(), DRIVER, id),
                    (format!("{back}/params"), volume.into(), DRIVER, id),
                    (format!("{back}/mode"), mode.into(), DRIVER, id),
                    (format!("{back}/format"), "raw".into(), DRIVER, id),
                    (format!("{back}/state"), "1".into(), DRIVER, id),
                ] {
                    nodes.write(&path, value.as_bytes())?;
                    nodes.set_perms(&path, &owned(owner, reader))?;
                }
                Ok(())
            })
            .unwrap();
        device
    }

    /// What the toolstack does when a guest's domain starts over: the frontend's directory as it
    /// was at first.
    pub fn add_directories_anew(&mut self, id: DomainId) {
        let device = Device { kind: DeviceKind::Vbd, backend: DRIVER, frontend: id, index: DEVICE };
        let front = device.frontend_path();
        let owned = [Permission::owner(id), Permission::reader(DRIVER)];
        self.toolstack
            .transaction(|nodes| {
                nodes.rm(&front)?;
                nodes.mkdir(&front)?;
                nodes.set_perms(&front, &owned)?;
                for (key, value) in [("backend", device.backend_path()), ("state", "1".into())] {
                    nodes.write(&format!("{front}/{key}"), value.as_bytes())?;
                    nodes.set_perms(&format!("{front}/{key}"), &owned)?;
                }
                Ok(())
            })
            .unwrap();
    }

    /// Adds a guest with a working frontend; its index in `fronts`.
    pub fn add_guest(&mut self, number: u16, volume: &str, mode: &str, config: Config) -> usize {
        let index = self.add_unconnected(number, volume, mode, config);
        self.run();
        assert!(self.fronts[index].is_connected());
        index
    }

    pub fn add_unconnected(
        &mut self,
        number: u16,
        volume: &str,
        mode: &str,
        config: Config,
    ) -> usize {
        let id = DomainId(number);
        self.add_device(id, volume, mode);
        let front = Front::new(self.world.domain(id), self.store.client(id), config);
        self.fronts.push(front);
        self.fronts.len() - 1
    }

    /// Adds a guest on a copy-on-write image, which is not connected yet.
    pub fn add_image(&mut self, number: u16, volume: &str, backing: &str, config: Config) -> usize {
        let id = DomainId(number);
        let device = self.add_device(id, volume, "w");
        let directory = device.backend_path();
        for (key, value) in [("format", "qcow2"), ("backing", backing)] {
            self.toolstack.write(&format!("{directory}/{key}"), value.as_bytes()).unwrap();
        }
        let front = Front::new(self.world.domain(id), self.store.client(id), config);
        self.fronts.push(front);
        self.fronts.len() - 1
    }

    /// One turn of everybody. True when anybody did anything.
    pub fn step(&mut self) -> bool {
        let mut worked = false;
        if let Some(back) = &mut self.back {
            match catch_unwind(AssertUnwindSafe(|| back.turn())) {
                Ok(it) => worked |= it,
                Err(reason) => {
                    self.bury(reason);
                    worked = true;
                }
            }
        }
        for front in &mut self.fronts {
            worked |= front.turn();
        }
        worked
    }

    /// Lets everybody work until all sleep.
    pub fn run(&mut self) {
        for _ in 0..50_000 {
            if !self.step() {
                return;
            }
        }
        panic!("nobody goes to sleep");
    }

    /// Has all guests make so many requests, and waits for the end.
    pub fn load(&mut self, requests: u32) {
        for front in &mut self.fronts {
            front.work += requests;
            front.wake();
        }
        self.run();
    }

    pub fn vbd(&mut self, number: u16) -> VbdInfo {
        let id = VbdId { domain: DomainId(number), device: DEVICE };
        self.back().blkback.vbds().find(|vbd| vbd.id == id).expect("the vbd is known")
    }

    /// States of both ends, backend's first.
    pub fn states(&mut self, number: u16) -> (XenbusState, XenbusState) {
        let frontend = DomainId(number);
        let device = Device { kind: DeviceKind::Vbd, backend: DRIVER, frontend, index: DEVICE };
        let state = |client: &mut StoreClient, path| device::state(client, path).unwrap();
        (
            state(&mut self.toolstack, &device.backend_path()),
            state(&mut self.toolstack, &device.frontend_path()),
        )
    }

    pub fn error_of(&mut self, number: u16) -> Option<String> {
        let path = format!("/local/domain/{}/error/backend/vbd/{number}/{DEVICE}/error", DRIVER.0);
        self.toolstack.read_optional(&path).unwrap()
    }

    /// All of a guest's disk is what the guest believes, from sector `start` of the medium on.
    pub fn compare(&mut self, guest: usize, medium: usize, start: u64) {
        let front = &self.fronts[guest];
        assert_eq!((front.work, front.in_flight()), (0, 0), "requests are left");
        let medium = self.media[medium].borrow();
        for (sector, &generation) in (0..).zip(&front.generations) {
            let at = usize::try_from((start + sector) * 512).unwrap();
            let right = content(sector, generation) == medium.bytes[at..at + 512];
            assert!(generation == UNKNOWN || right, "sector {sector} on the disk");
        }
    }

    /// What a dead backend may have left in a ring: bodies of answers that it never published.
    /// Every unanswered request that is safe in the in-flight table may be overwritten so.
    pub fn tear_rings(&mut self) {
        assert!(self.back.is_none());
        let load = |page: &Page, offset| page.u32(offset).load(Relaxed);
        for front in &self.fronts {
            for queue in &front.queues {
                let slot = if front.config.narrow { 108 } else { 112 };
                let table = self.preserved.iter().find(|page| {
                    load(page, 0) == shmem::inflight::MAGIC
                        && load(page, 12) == queue.grefs[0].0
                        && load(page, 4) == slot | u32::from(front.id.0) << 16
                });
                let Some(table) = table else { continue };
                let (mut index, consumed) = (load(&queue.pages[0], 8), load(table, 20));
                let slots = xen_abi::ring::slots(4096 * queue.pages.len(), slot as usize);
                while index != consumed {
                    let at = 64 + (index % slots * slot) as usize;
                    for byte in at..at + 12 {
                        queue.pages[byte / 4096].u8(byte % 4096).store(0x5a, Relaxed);
                    }
                    index = index.wrapping_add(1);
                }
            }
        }
    }

    /// Ends all connections, and sees that nothing is left of them.
    pub fn close_all(&mut self) {
        self.run();
        for front in &mut self.fronts {
            front.begin_closing();
        }
        self.run();
        for index in 0..self.fronts.len() {
            let number = self.fronts[index].id.0;
            assert_eq!(self.states(number), (XenbusState::CLOSED, XenbusState::CLOSED));
            self.fronts[index].free_everything();
        }
        let back = self.back();
        assert_eq!((back.env.domain.mappings(), back.env.domain.open_ports()), (0, 0));
        assert_eq!(back.blkback.in_use(), (0, 0));
    }
}

pub fn home(toolstack: &mut StoreClient, id: DomainId) {
    let path = format!("/local/domain/{}", id.0);
    toolstack.mkdir(&path).unwrap();
    let owner = Permission { access: NodeAccess::None, domid: TOOLSTACK };
    toolstack.set_perms(&path, &[owner, Permission::reader(id)]).unwrap();
    for below in ["error", "backend", "device"] {
        let node = format!("{path}/{below}");
        toolstack.mkdir(&node).unwrap();
        toolstack.set_perms(&node, &[Permission::owner(id)]).unwrap();
    }
}

/// A small generator; the same numbers from the same seed.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, bound: u32) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        u32::try_from(self.0 >> 33).unwrap() % bound
    }
}
