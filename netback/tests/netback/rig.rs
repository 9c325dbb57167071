//! A driver domain, its card, guests and a store in one process.
//!
//! Everybody sleeps unless an event, a store event or work that it announced itself wakes it, so
//! a lost wake-up shows as a frame that never arrives. The backend can be killed before or after
//! any call that it makes to the core or to the card.

use crate::wire::{self, Shape};
use domain_api::fake::{Domain, World};
use domain_api::nic::{Buffer, Checksum, MAX_FRAME, MAX_PACKET, Nic, Offload, Offloads, Received};
use domain_api::{
    Access, Clock, DomainId, Errno, EventPort, Events, GrantCopy, GrantRef, GrantStatus, Grants,
    MappedGrant, Page,
};
use frontends::netfront::{self, Config, Cutting, Error, Netfront};
use netback::preserved::{VifId, pages_for};
use netback::{Netback, Progress, VifInfo};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::rc::Rc;
use std::vec::Drain;
use xenbus::device::{Device, DeviceKind};
use xenbus::{Client, NodeAccess, Nodes, Permission, Store, XenbusState};
use xenstore::{LocalStore, LocalTransport};

pub const TOOLSTACK: DomainId = DomainId(0);
pub const DRIVER: DomainId = DomainId(2);
pub const OUTSIDE_MAC: [u8; 6] = [2, 0xee, 0, 0, 0, 1];
pub const BROADCAST: [u8; 6] = [0xff; 6];
const NIC_BUFFERS: u16 = 24;

pub type StoreClient = Client<LocalTransport>;

/// Counts the backend's calls, and ends its life at a given one.
#[derive(Clone, Default)]
pub struct Fuse(Rc<Cell<Option<u32>>>);

/// What a life ends with; passes through `catch_unwind` without a message.
struct Killed;

impl Fuse {
    fn step(&self) {
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
        self.around(|domain| domain.map(granter, gref, access))
    }
    fn unmap(&mut self, mapping: MappedGrant) {
        self.around(|domain| domain.unmap(mapping));
    }
    fn copy(&mut self, operations: &mut [GrantCopy]) {
        for operation in operations {
            self.around(|domain| domain.copy(std::slice::from_mut(operation)));
        }
    }
}

impl Clock for Env {
    fn now_ns(&self) -> u64 {
        self.domain.now_ns()
    }
}

/// The network outside, which outlives every driver.
#[derive(Default)]
pub struct Outside {
    /// Frames that left.
    pub sent: Vec<Vec<u8>>,
    /// Frames that will arrive, and what the card finds out about their checksums.
    pub arriving: VecDeque<(Vec<u8>, Checksum)>,
    /// The card keeps its transmit buffers.
    pub stuck: bool,
    pub link_down: bool,
    /// What the card of the next life can do.
    pub offloads: Offloads,
    /// Packets that the card was asked to do something for.
    pub offloaded: usize,
}

/// All that a card can do.
pub const OFFLOADS: Offloads =
    Offloads { checksum_v4: true, checksum_v6: true, segment_v4: true, segment_v6: true };

/// Transmit buffers of a card that cuts, which has to have them for a packet of any length.
const CUTTING_BUFFERS: u16 = 48;
/// Where transmit buffers start in their page, and their bytes.
const TX_OFFSET: u16 = 64;
const TX_ROOM: u16 = 1700;

pub struct FakeNic {
    outside: Rc<RefCell<Outside>>,
    fuse: Fuse,
    offloads: Offloads,
    pages: Vec<Page>,
    tx_free: Vec<u16>,
    queued: Vec<(Vec<Buffer>, Offload)>,
    /// Buffers that somebody did not get.
    short: usize,
    rx_free: Vec<u16>,
}

impl FakeNic {
    fn new(outside: Rc<RefCell<Outside>>, fuse: Fuse) -> Self {
        let offloads = outside.borrow().offloads;
        let cuts = offloads.segment_v4 || offloads.segment_v6;
        let buffers = if cuts { CUTTING_BUFFERS } else { NIC_BUFFERS };
        Self {
            outside,
            fuse,
            offloads,
            pages: (0..buffers).map(|_| Page::new_zeroed()).collect(),
            tx_free: (0..buffers).collect(),
            queued: Vec::new(),
            short: 0,
            rx_free: (0..buffers).collect(),
        }
    }

    /// Transmit in the lower halves of the pages, receive in the upper ones.
    fn buffer(&self, token: u16, offset: u16, len: u16) -> Buffer {
        Buffer { page: self.pages[usize::from(token)].clone(), offset, len, token }
    }

    /// Sends what is queued. True when there are as many buffers again as somebody waits for.
    pub fn complete(&mut self) -> bool {
        let stuck = self.outside.borrow().stuck;
        let packets = if stuck { 0 } else { self.queued.len() };
        for (packet, offload) in self.queued.drain(..packets) {
            let mut bytes = Vec::new();
            for buffer in packet {
                let mut part = vec![0; usize::from(buffer.len)];
                buffer.page.read(usize::from(buffer.offset), &mut part);
                bytes.extend(part);
                self.tx_free.push(buffer.token);
            }
            let mut outside = self.outside.borrow_mut();
            outside.offloaded += usize::from(offload != Offload::Nothing);
            outside.sent.extend(wire::card(&bytes, offload));
        }
        let wake = self.short > 0 && self.tx_free.len() >= self.short;
        if wake {
            self.short = 0;
        }
        wake
    }

    fn has_work(&self) -> bool {
        !self.outside.borrow().arriving.is_empty()
    }

    pub fn lent(&self) -> usize {
        let queued: usize = self.queued.iter().map(|(packet, _)| packet.len()).sum();
        self.pages.len() * 2 - self.tx_free.len() - queued - self.rx_free.len()
    }
}

impl Nic for FakeNic {
    fn mac(&self) -> [u8; 6] {
        [2, 0, 0, 0, 0, 0xff]
    }
    fn link_up(&self) -> bool {
        !self.outside.borrow().link_down
    }
    fn offloads(&self) -> Offloads {
        self.offloads
    }
    fn tx_buffers(&mut self, bytes: usize, buffers: &mut Vec<Buffer>) -> bool {
        assert!((14..=MAX_PACKET).contains(&bytes));
        let wanted = bytes.div_ceil(TX_ROOM.into());
        let cuts = self.offloads.segment_v4 || self.offloads.segment_v6;
        assert!(wanted == 1 || cuts, "nobody said that it has so many");
        if self.tx_free.len() < wanted {
            self.short = wanted;
            return false;
        }
        let tokens = self.tx_free.split_off(self.tx_free.len() - wanted);
        buffers.extend(tokens.into_iter().map(|token| self.buffer(token, TX_OFFSET, TX_ROOM)));
        true
    }
    fn transmit(&mut self, packet: Drain<'_, Buffer>, offload: Offload) {
        self.fuse.step();
        let packet: Vec<Buffer> = packet.collect();
        let len: usize = packet.iter().map(|part| usize::from(part.len)).sum();
        let asked = match offload {
            Offload::Nothing => true,
            Offload::Checksum(it) if it.ipv6 => self.offloads.checksum_v6,
            Offload::Checksum(_) => self.offloads.checksum_v4,
            Offload::Segment { headers, .. } if headers.ipv6 => self.offloads.segment_v6,
            Offload::Segment { .. } => self.offloads.segment_v4,
        };
        assert!(asked, "{offload:?} was never offered");
        assert!(len <= MAX_FRAME || matches!(offload, Offload::Segment { .. }));
        assert!((14..=MAX_PACKET).contains(&len) && packet.iter().all(|part| part.len > 0));
        self.queued.push((packet, offload));
    }
    fn cancel(&mut self, buffer: Buffer) {
        self.tx_free.push(buffer.token);
    }
    fn flush(&mut self) {
        self.fuse.step();
    }
    fn receive(&mut self) -> Option<Received> {
        let token = *self.rx_free.last()?;
        let (frame, checksum) = self.outside.borrow_mut().arriving.pop_front()?;
        self.rx_free.pop();
        self.pages[usize::from(token)].write(2048, &frame);
        let buffer = self.buffer(token, 2048, u16::try_from(frame.len()).unwrap());
        Some(Received { buffer, checksum })
    }
    fn recycle(&mut self, buffer: Buffer) {
        self.fuse.step();
        self.rx_free.push(buffer.token);
    }
}

/// One life of the driver domain.
pub struct Back {
    pub env: Env,
    pub nic: FakeNic,
    pub netback: Netback,
    pub client: StoreClient,
    awake: bool,
}

impl Back {
    /// One pass of a driver domain's event loop. True when it did anything.
    fn turn(&mut self) -> bool {
        let mut worked = core::mem::take(&mut self.awake) || self.nic.has_work();
        while let Some(event) = self.client.next_event() {
            assert!(self.netback.store_event(&mut self.env, &mut self.client, &event).unwrap());
            worked = true;
        }
        for port in self.env.domain.take_pending() {
            assert!(self.netback.event(port), "an event of nobody: {port:?}");
            worked = true;
        }
        if worked {
            let Progress { more_work, store_work, .. } =
                self.netback.poll(&mut self.env, &mut self.nic);
            if store_work {
                self.netback.settle(&mut self.env, &mut self.client).unwrap();
            }
            self.awake = more_work;
        }
        // The card's interrupt when transmit buffers come free.
        self.awake |= self.nic.complete();
        worked || self.awake
    }
}

/// A packet that a guest has to send.
pub struct Packet {
    pub bytes: Vec<u8>,
    pub checksum: netfront::Checksum,
    pub cutting: Option<Cutting>,
    pub queue: usize,
}

pub struct Guest {
    pub id: DomainId,
    pub mac: [u8; 6],
    pub env: Domain,
    pub client: StoreClient,
    pub front: Netfront,
    /// Frames received.
    pub inbox: Vec<Vec<u8>>,
    /// What is known of each of them.
    pub known: Vec<netfront::Received>,
    /// Packets that still have to be sent.
    pub outbox: VecDeque<Packet>,
    /// Whether it takes what it receives.
    pub deaf: bool,
    /// Store events seen.
    pub store_events: usize,
    awake: bool,
}

impl Guest {
    fn turn(&mut self) -> bool {
        let mut worked = core::mem::take(&mut self.awake);
        while let Some(event) = self.client.next_event() {
            self.front.store_event(&mut self.env, &mut self.client, &event).unwrap();
            self.store_events += 1;
            worked = true;
        }
        for port in self.env.take_pending() {
            let _ = self.front.event(port);
            worked = true;
        }
        if worked && self.front.is_connected() {
            self.traffic();
        }
        worked
    }

    fn traffic(&mut self) {
        while !self.deaf {
            match self.front.receive_packet(&mut self.env, |it, known| (it.to_vec(), known)) {
                Ok(Some((frame, known))) => {
                    self.inbox.push(frame);
                    self.known.push(known);
                }
                Ok(None) => break,
                Err(error) => panic!("{}: {error}", self.id),
            }
        }
        while let Some(Packet { bytes, checksum, cutting, queue }) = self.outbox.front() {
            let queue = queue % self.front.queues();
            match self.front.transmit_packet(&mut self.env, queue, bytes, *checksum, *cutting) {
                Ok(()) => drop(self.outbox.pop_front()),
                Err(Error::Full) => break,
                Err(error) => panic!("{}: {error}", self.id),
            }
        }
        self.front.flush(&mut self.env).unwrap_or_else(|error| panic!("{}: {error}", self.id));
    }

    pub fn send(&mut self, frame: Vec<u8>) {
        self.push(frame, netfront::Checksum::Complete, None, 0);
    }

    pub fn send_blank(&mut self, frame: Vec<u8>) {
        self.push(frame, netfront::Checksum::Blank, None, 0);
    }

    /// Sends a TCP packet that is to be cut.
    pub fn send_long(&mut self, destination: [u8; 6], shape: Shape, mss: u16) {
        let bytes = shape.blank(destination, self.mac);
        let cutting = Some(Cutting { ipv6: shape.ipv6, mss });
        self.push(bytes, netfront::Checksum::Blank, cutting, 0);
    }

    pub fn push(
        &mut self,
        bytes: Vec<u8>,
        checksum: netfront::Checksum,
        cutting: Option<Cutting>,
        queue: usize,
    ) {
        self.outbox.push_back(Packet { bytes, checksum, cutting, queue });
        self.awake = true;
    }

    pub fn wake(&mut self) {
        self.awake = true;
    }
}

pub struct Rig {
    pub world: World,
    pub store: LocalStore,
    pub toolstack: StoreClient,
    pub outside: Rc<RefCell<Outside>>,
    pub preserved: Vec<Page>,
    pub fuse: Fuse,
    pub back: Option<Back>,
    pub guests: Vec<Guest>,
    pub kills: usize,
}

impl Rig {
    /// A driver domain with room for `vifs`, with a queue each.
    pub fn new(vifs: usize) -> Self {
        Self::with(pages_for(vifs).0, Offloads::default())
    }

    /// A driver domain with so many preserved pages, and a card that can do so much.
    pub fn with(pages: usize, offloads: Offloads) -> Self {
        let world = World::new();
        let store = LocalStore::new();
        let mut toolstack = store.client(TOOLSTACK);
        home(&mut toolstack, DRIVER);
        let mut rig = Self {
            world,
            store,
            toolstack,
            outside: Rc::new(RefCell::new(Outside { offloads, ..Outside::default() })),
            preserved: (0..pages).map(|_| Page::new_zeroed()).collect(),
            fuse: Fuse::default(),
            back: None,
            guests: Vec::new(),
            kills: 0,
        };
        rig.start_back();
        rig
    }

    /// Starts the driver domain's next incarnation.
    pub fn start_back(&mut self) {
        let env = Env { domain: self.world.domain(DRIVER), fuse: self.fuse.clone() };
        if self.kills > 0 {
            self.store.restart(DRIVER);
        }
        let client = self.store.client(DRIVER);
        let nic = FakeNic::new(self.outside.clone(), self.fuse.clone());
        let netback = Netback::new(DRIVER, self.preserved.clone());
        let mut back = Back { env, nic, netback, client, awake: true };
        let started = catch_unwind(AssertUnwindSafe(|| {
            back.netback.start(&mut back.env, &mut back.client).unwrap();
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
        self.world.kill(DRIVER);
        self.back = None;
        self.kills += 1;
    }

    pub fn back(&mut self) -> &mut Back {
        self.back.as_mut().expect("the driver domain is alive")
    }

    /// Creates a guest's domain and its vif in the store, as the toolstack does.
    pub fn add_device(&mut self, id: DomainId, mac: [u8; 6]) -> Device {
        home(&mut self.toolstack, id);
        let device = Device { kind: DeviceKind::Vif, backend: DRIVER, frontend: id, index: 0 };
        let (front, back) = (device.frontend_path(), device.backend_path());
        let owned = |owner, reader| [Permission::owner(owner), Permission::reader(reader)];
        self.toolstack
            .transaction(|nodes| {
                nodes.mkdir(&front)?;
                nodes.set_perms(&front, &owned(id, DRIVER))?;
                nodes.mkdir(&back)?;
                nodes.set_perms(&back, &owned(DRIVER, id))?;
                let text = mac.map(|byte| format!("{byte:02x}")).join(":");
                for (path, value, owner, reader) in [
                    (format!("{front}/backend"), back.clone(), id, DRIVER),
                    (format!("{front}/backend-id"), DRIVER.0.to_string(), id, DRIVER),
                    (format!("{front}/handle"), "0".into(), id, DRIVER),
                    (format!("{front}/mac"), text.clone(), id, DRIVER),
                    (format!("{front}/state"), "1".into(), id, DRIVER),
                    (format!("{back}/frontend"), front.clone(), DRIVER, id),
                    (format!("{back}/frontend-id"), id.0.to_string(), DRIVER, id),
                    (format!("{back}/online"), "1".into(), DRIVER, id),
                    (format!("{back}/mac"), text, DRIVER, id),
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

    /// Adds a guest with a working frontend; its index in `guests`.
    pub fn add_guest(&mut self, number: u16, config: Config) -> usize {
        let id = DomainId(number);
        let mac = guest_mac(number);
        self.add_device(id, mac);
        let guest = self.boot(id, mac, config);
        self.guests.push(guest);
        self.run();
        let index = self.guests.len() - 1;
        assert!(self.guests[index].front.is_connected());
        index
    }

    pub fn boot(&mut self, id: DomainId, mac: [u8; 6], config: Config) -> Guest {
        let env = self.world.domain(id);
        let mut client = self.store.client(id);
        let front = Netfront::new(&mut client, id, 0, config).unwrap();
        assert_eq!(front.mac(), mac);
        Guest {
            id,
            mac,
            env,
            client,
            front,
            inbox: Vec::new(),
            known: Vec::new(),
            outbox: VecDeque::new(),
            deaf: false,
            store_events: 0,
            awake: true,
        }
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
        for guest in &mut self.guests {
            worked |= guest.turn();
        }
        worked
    }

    /// Lets everybody work until all sleep.
    pub fn run(&mut self) {
        for _ in 0..20_000 {
            if !self.step() {
                return;
            }
        }
        panic!("nobody goes to sleep");
    }

    pub fn arrive(&mut self, frame: Vec<u8>) {
        self.arrive_with(frame, Checksum::Unknown);
    }

    pub fn arrive_with(&mut self, frame: Vec<u8>, checksum: Checksum) {
        self.outside.borrow_mut().arriving.push_back((frame, checksum));
    }

    pub fn sent(&mut self) -> Vec<Vec<u8>> {
        core::mem::take(&mut self.outside.borrow_mut().sent)
    }

    pub fn vif(&mut self, number: u16) -> VifInfo {
        let id = VifId { domain: DomainId(number), handle: 0 };
        self.back().netback.vifs().find(|vif| vif.id == id).expect("the vif is known")
    }

    /// States of both ends, backend's first.
    pub fn states(&mut self, number: u16) -> (XenbusState, XenbusState) {
        let frontend = DomainId(number);
        let device = Device { kind: DeviceKind::Vif, backend: DRIVER, frontend, index: 0 };
        let state = |client: &mut StoreClient, path| xenbus::device::state(client, path).unwrap();
        (
            state(&mut self.toolstack, &device.backend_path()),
            state(&mut self.toolstack, &device.frontend_path()),
        )
    }

    pub fn error_of(&mut self, number: u16) -> Option<String> {
        let path = format!("/local/domain/{}/error/backend/vif/{number}/0/error", DRIVER.0);
        self.toolstack.read_optional(&path).unwrap()
    }

    /// What a dead backend may have left in a ring: bodies of answers that it never published.
    /// Every unanswered request that is safe in the in-flight table may be overwritten so.
    pub fn tear_rings(&mut self) {
        assert!(self.back.is_none());
        let mut mapper = self.world.domain(DRIVER);
        let mut rings = Vec::new();
        for guest in &mut self.guests {
            let vif = format!("/local/domain/{}/device/vif/0", guest.id.0);
            let queues = (0..4).map(|queue| format!("{vif}/queue-{queue}"));
            for directory in queues.chain([vif.clone()]) {
                for (key, slot) in [("tx-ring-ref", 12), ("rx-ring-ref", 8)] {
                    let read = xenbus::device::read_grant(&mut self.toolstack, &directory, key);
                    let Ok(gref) = read else { continue };
                    let Ok(map) = mapper.map(guest.id, gref, Access::ReadWrite) else { continue };
                    rings.push((guest.id, gref, slot, map));
                }
            }
        }
        for (id, gref, slot, map) in rings {
            let load =
                |page: &Page, offset| page.u32(offset).load(std::sync::atomic::Ordering::Relaxed);
            let table = self.preserved.iter().find(|page| {
                load(page, 0) == shmem::inflight::MAGIC
                    && load(page, 12) == gref.0
                    && load(page, 4) >> 16 == u32::from(id.0)
                    && load(page, 4) & 0xffff == slot
            });
            if let Some(table) = table {
                let (mut index, consumed) = (load(&map.page, 8), load(table, 20));
                while index != consumed {
                    let at = 64 + (index % 256 * slot) as usize;
                    map.page.write(at, &[0x5a; 4]);
                    if slot == 8 {
                        map.page.write(at + 4, &[0xa5; 4]);
                    }
                    index = index.wrapping_add(1);
                }
            }
            mapper.unmap(map);
        }
        self.world.kill(DRIVER);
    }

    /// Ends all connections, and sees that nothing is left of them.
    pub fn close_all(&mut self) {
        self.run();
        assert_eq!(self.back().nic.lent(), 0, "buffers of the card were lost");
        for guest in &mut self.guests {
            guest.front.close(&mut guest.env, &mut guest.client).unwrap();
        }
        self.run();
        for index in 0..self.guests.len() {
            let guest = &self.guests[index];
            assert_eq!(guest.env.grants(), 0, "grants of {} are left", guest.id);
            let number = guest.id.0;
            assert_eq!(self.states(number), (XenbusState::CLOSED, XenbusState::CLOSED));
        }
        let domain = &self.back().env.domain;
        assert_eq!((domain.mappings(), domain.open_ports()), (0, 0));
    }
}

pub fn guest_mac(number: u16) -> [u8; 6] {
    [0, 0x16, 0x3e, 0, 0, u8::try_from(number).unwrap()]
}

fn home(toolstack: &mut StoreClient, id: DomainId) {
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

/// A frame whose content follows from `seq`.
pub fn frame(destination: [u8; 6], source: [u8; 6], seq: u32, len: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = destination.into_iter().chain(source).chain([0x88, 0xb5]).collect();
    bytes.extend(seq.to_be_bytes());
    let mut state = seq.wrapping_mul(2_654_435_761) | 1;
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        bytes.push(state.to_le_bytes()[0]);
    }
    bytes.truncate(len);
    bytes
}

/// The number of a frame of at least 18 bytes.
pub fn seq_of(frame: &[u8]) -> u32 {
    u32::from_be_bytes(frame[14..18].try_into().unwrap())
}

/// Checks a frame byte by byte against its number.
pub fn check(frame_bytes: &[u8]) -> u32 {
    let seq = seq_of(frame_bytes);
    let destination = frame_bytes[..6].try_into().unwrap();
    let source = frame_bytes[6..12].try_into().unwrap();
    assert_eq!(frame_bytes, frame(destination, source, seq, frame_bytes.len()), "corrupt frame");
    seq
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
