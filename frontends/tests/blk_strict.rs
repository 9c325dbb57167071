//! The block frontend against a backend by hand: what is right passes, what is wrong is named.

use domain_api::fake::{Domain, World};
use domain_api::{
    Access, DomainId, EventPort, Events, GrantRef, Granter, Grants, MappedGrant, Page,
};
use frontends::blkfront::{
    self, Blkfront, Completion, Config, Error, Fault, FrontDisk, GrantPolicy, IoError, Operation,
    Part,
};
use proptest::prelude::*;
use shmem::inflight::{Identity, InflightTable};
use shmem::ring::BackRing;
use std::sync::atomic::Ordering::Relaxed;
use xen_abi::blkif::{
    self, DISCARD, DiscardRequest, FLUSH_DISKCACHE, INDIRECT, IndirectRequest, READ, Request,
    Response, Segment, WRITE,
};
use xen_abi::ring::RSP_PROD;
use xenbus::device::{self, Device, DeviceKind};
use xenbus::{Client, Nodes, XenbusState};
use xenstore::{LocalStore, LocalTransport};
use zerocopy::FromBytes;

const GUEST: DomainId = DomainId(3);
const DRIVER: DomainId = DomainId(2);
const XVDA: u32 = 51712;
const DEVICE: Device =
    Device { kind: DeviceKind::Vbd, backend: DRIVER, frontend: GUEST, index: XVDA };
const SECTORS: u64 = 4096;

/// One queue at the backend's end.
struct Queue {
    ring: BackRing<Request, Response>,
    pages: Vec<MappedGrant>,
    port: EventPort,
}

/// A backend and the toolstack, by hand.
struct Back {
    driver: Domain,
    toolstack: Client<LocalTransport>,
    queues: Vec<Queue>,
    disk: Vec<u8>,
}

struct Rig {
    guest: Domain,
    client: Client<LocalTransport>,
    front: Blkfront,
    back: Back,
}

fn config() -> Config {
    Config {
        queues: 1,
        ring_page_order: 0,
        indirect_segments: 32,
        grants: GrantPolicy::PerRequest,
        buffers: 64,
    }
}

fn store(keys: &[(&str, &str)]) -> (Client<LocalTransport>, Client<LocalTransport>) {
    let store = LocalStore::new();
    let mut toolstack = store.client(DomainId(0));
    let (front, back) = (DEVICE.frontend_path(), DEVICE.backend_path());
    let mut nodes = vec![
        (format!("{front}/backend"), back.as_str()),
        (format!("{front}/backend-id"), "2"),
        (format!("{front}/device-type"), "disk"),
        (format!("{front}/state"), "1"),
        (format!("{back}/state"), "2"),
        (format!("{back}/sectors"), "4096"),
        (format!("{back}/info"), "0"),
    ];
    nodes.extend(keys.iter().map(|(key, value)| (format!("{back}/{key}"), *value)));
    for (path, value) in nodes {
        toolstack.write(&path, value.as_bytes()).unwrap();
        let perms = [xenbus::Permission::owner(GUEST), xenbus::Permission::reader(GUEST)];
        toolstack.set_perms(&path, &perms).unwrap();
    }
    toolstack.set_perms(&front, &[xenbus::Permission::owner(GUEST)]).unwrap();
    let parent = front.rsplit_once('/').map(|(parent, _)| parent.to_owned()).unwrap();
    let perms = [xenbus::Permission::owner(DomainId(0)), xenbus::Permission::reader(GUEST)];
    for readable in [&parent, &back] {
        toolstack.set_perms(readable, &perms).unwrap();
    }
    (toolstack, store.client(GUEST))
}

const ALL: [(&str, &str); 6] = [
    ("feature-flush-cache", "1"),
    ("feature-discard", "1"),
    ("feature-persistent", "1"),
    ("feature-max-indirect-segments", "32"),
    ("multi-queue-max-queues", "2"),
    ("max-ring-page-order", "1"),
];

fn rig(config: Config) -> Rig {
    rig_with(config, &ALL)
}

fn rig_with(config: Config, keys: &[(&str, &str)]) -> Rig {
    let world = World::new();
    let (mut guest, driver) = (world.domain(GUEST), world.domain(DRIVER));
    let (toolstack, mut client) = store(keys);
    assert_eq!(blkfront::devices(&mut client, GUEST), Ok(vec![XVDA]));
    let mut front = Blkfront::new(&mut client, GUEST, XVDA, config).unwrap();
    front.refresh(&mut guest, &mut client).unwrap();
    assert_eq!((front.state(), front.is_connected()), (XenbusState::INITIALISED, false));
    assert_eq!(front.flush(&mut guest, 0), Err(Error::Unsupported));
    let disk = vec![0; 512 * usize::try_from(SECTORS).unwrap()];
    let mut back = Back { driver, toolstack, queues: Vec::new(), disk };
    back.connect();
    front.refresh(&mut guest, &mut client).unwrap();
    assert_eq!((front.state(), front.is_connected()), (XenbusState::CONNECTED, true));
    Rig { guest, client, front, back }
}

impl Back {
    /// Reads the frontend's keys as a backend does, and maps its rings.
    fn connect(&mut self) {
        let directory = DEVICE.frontend_path();
        let store = &mut self.toolstack;
        let protocol = store.read_string(&format!("{directory}/protocol"));
        assert_eq!(protocol.as_deref(), Ok("x86_64-abi"));
        let queues = device::read_or(store, &directory, "multi-queue-num-queues", 1_u32).unwrap();
        let order = device::read_or(store, &directory, "ring-page-order", 0_u32).unwrap();
        for number in 0..queues {
            let place = match queues {
                1 => directory.clone(),
                _ => format!("{directory}/queue-{number}"),
            };
            let port = device::read_port(store, &place, "event-channel").unwrap();
            let port = self.driver.bind_interdomain(GUEST, port).unwrap();
            let keys = match order {
                0 => vec!["ring-ref".to_owned()],
                _ => (0..1 << order).map(|page| format!("ring-ref{page}")).collect(),
            };
            let map = |key: String| {
                let gref = device::read_grant(store, &place, &key).unwrap();
                self.driver.map(GUEST, gref, Access::ReadWrite).unwrap()
            };
            let pages: Vec<_> = keys.into_iter().map(map).collect();
            let identity =
                Identity { frontend: GUEST, incarnation: 0, ring: GrantRef(0), port: EventPort(0) };
            let table = pages.iter().map(|_| Page::new_zeroed()).collect();
            let ring = BackRing::attach(
                pages.iter().map(|page| page.page.clone()).collect(),
                InflightTable::with_pages(table),
                identity,
            );
            self.queues.push(Queue { ring: ring.unwrap(), pages, port });
        }
        self.set_state("4");
    }

    fn set_state(&mut self, state: &str) {
        self.toolstack
            .write(&format!("{}/state", DEVICE.backend_path()), state.as_bytes())
            .unwrap();
    }

    fn disconnect(&mut self) {
        for queue in self.queues.drain(..) {
            drop(queue.ring);
            self.driver.close(queue.port);
            queue.pages.into_iter().for_each(|page| self.driver.unmap(page));
        }
    }

    fn take(&mut self) -> Option<Request> {
        self.queues.iter_mut().find_map(|queue| queue.ring.take().unwrap())
    }

    fn answer(&mut self, queue: usize, id: u64, operation: u8, status: i16) {
        let queue = &mut self.queues[queue];
        queue.ring.respond(&Response { id, operation, pad: 0, status, pad2: 0 });
        if queue.ring.publish() {
            self.driver.notify(queue.port);
        }
    }

    fn segments(&mut self, request: &Request) -> (u8, Vec<Segment>) {
        if request.operation != INDIRECT {
            let count = usize::from(request.nr_segments);
            return (request.operation, request.segments[..count].to_vec());
        }
        let request: IndirectRequest = zerocopy::transmute!(*request);
        let page = self.driver.map(GUEST, request.grefs[0], Access::ReadOnly).unwrap();
        let segment = |n: u16| {
            let mut bytes = [0; 8];
            page.page.read(usize::from(n) * 8, &mut bytes);
            Segment::read_from_bytes(&bytes).unwrap()
        };
        let segments = (0..request.nr_segments).map(segment).collect();
        self.driver.unmap(page);
        (request.indirect_op, segments)
    }

    /// Does a request as a disk would; the operation to answer with.
    fn execute(&mut self, request: &Request) -> u8 {
        match request.operation {
            FLUSH_DISKCACHE => return FLUSH_DISKCACHE,
            DISCARD => {
                let request: DiscardRequest = zerocopy::transmute!(*request);
                let (from, len) = (request.sector * 512, request.nr_sectors * 512);
                let (from, len) = (usize::try_from(from).unwrap(), usize::try_from(len).unwrap());
                self.disk[from..from + len].fill(0);
                return DISCARD;
            }
            _ => {}
        }
        let (operation, segments) = self.segments(request);
        let mut at = usize::try_from(request.sector * 512).unwrap();
        for segment in segments {
            let access = if operation == READ { Access::ReadWrite } else { Access::ReadOnly };
            let mapped = self.driver.map(GUEST, segment.gref, access).unwrap();
            let from = usize::from(segment.first_sect) * 512;
            let len = usize::from(segment.last_sect + 1) * 512 - from;
            match operation {
                READ => mapped.page.write(from, &self.disk[at..at + len]),
                WRITE => mapped.page.read(from, &mut self.disk[at..at + len]),
                other => panic!("operation {other}"),
            }
            at += len;
            self.driver.unmap(mapped);
        }
        operation
    }

    /// Serves all that is there, the newest first.
    fn serve(&mut self) -> usize {
        let mut done = 0;
        for at in 0..self.queues.len() {
            let mut requests = Vec::new();
            while let Some(request) = self.queues[at].ring.take().unwrap() {
                requests.push(request);
            }
            for request in requests.iter().rev() {
                let operation = self.execute(request);
                self.answer(at, request.id, operation, blkif::RSP_OKAY);
                done += 1;
            }
        }
        done
    }
}

impl Rig {
    fn parts(&mut self, count: usize) -> Vec<Part> {
        (0..count).map(|_| Part::whole(self.front.take_buffer().unwrap())).collect()
    }

    fn read(&mut self, tag: u64, sector: u64, parts: Vec<Part>) -> Result<(), Error> {
        let done = self.front.read(&mut self.guest, tag, sector, parts);
        self.front.kick(&mut self.guest);
        done.map_err(|refused| self.return_parts(refused.parts, refused.error))
    }

    fn write(&mut self, tag: u64, sector: u64, parts: Vec<Part>) -> Result<(), Error> {
        let done = self.front.write(&mut self.guest, tag, sector, parts);
        self.front.kick(&mut self.guest);
        done.map_err(|refused| self.return_parts(refused.parts, refused.error))
    }

    fn return_parts(&mut self, parts: Vec<Part>, error: Error) -> Error {
        parts.into_iter().for_each(|part| self.front.give_back(part.buffer));
        error
    }

    fn complete(&mut self) -> Result<Option<Completion>, Error> {
        self.front.complete(&mut self.guest)
    }

    /// What one request ended with.
    fn ended(&mut self) -> (u64, Result<(), IoError>) {
        let done = self.complete().unwrap().expect("one request has ended");
        done.parts.into_iter().for_each(|part| self.front.give_back(part.buffer));
        (done.tag, done.result)
    }
}

#[test]
fn a_request_says_where_its_data_are() {
    let mut rig = rig(config());
    let mut parts = rig.parts(2);
    (parts[0].first, parts[0].sectors) = (6, 2);
    (parts[1].first, parts[1].sectors) = (0, 3);
    rig.write(7, 100, parts).unwrap();
    let request = rig.back.take().unwrap();
    assert_eq!((request.operation, request.nr_segments, request.sector), (WRITE, 2, 100));
    assert_eq!(request.handle, 51712);
    let extents = request.segments.map(|it| (it.first_sect, it.last_sect));
    assert_eq!(extents[..2], [(6, 7), (0, 2)]);
    let gref = request.segments[0].gref;
    assert!(rig.back.driver.map(GUEST, gref, Access::ReadWrite).is_err(), "a write is only read");
}

#[test]
fn flushes_and_discards_have_no_data() {
    let mut rig = rig(config());
    rig.front.flush(&mut rig.guest, 1).unwrap();
    rig.front.discard(&mut rig.guest, 2, 8, 4088).unwrap();
    rig.front.kick(&mut rig.guest);
    let flush = rig.back.take().unwrap();
    assert_eq!((flush.operation, flush.nr_segments, flush.sector), (FLUSH_DISKCACHE, 0, 0));
    let discard: DiscardRequest = zerocopy::transmute!(rig.back.take().unwrap());
    assert_eq!((discard.sector, discard.nr_sectors, discard.flag), (8, 4088, 0));
    rig.back.answer(0, flush.id, FLUSH_DISKCACHE, blkif::RSP_EOPNOTSUPP);
    rig.back.answer(0, discard.id, DISCARD, blkif::RSP_ERROR);
    assert_eq!(rig.ended(), (1, Err(IoError::Unsupported)));
    assert_eq!(rig.ended(), (2, Err(IoError::Failed)));
    assert!(!rig.front.info().flush && rig.front.info().discard);
    assert_eq!(rig.front.flush(&mut rig.guest, 3), Err(Error::Unsupported));
    assert_eq!(rig.front.stats().errors, 2);
}

#[test]
fn requests_that_the_disk_cannot_do_are_refused() {
    let keys = [("sector-size", "4096"), ("feature-max-indirect-segments", "5")];
    let mut rig = rig_with(config(), &keys);
    assert_eq!(rig.front.info().max_parts, 11);
    for (sector, count) in [(4, 1), (4096, 1), (4088, 2), (u64::MAX - 7, 1), (0, 0), (0, 12)] {
        let parts = rig.parts(count);
        assert_eq!(rig.read(0, sector, parts), Err(Error::BadRequest), "{sector} {count}");
    }
    for (first, sectors) in [(4, 4), (0, 9), (0, 0), (1, 8), (255, 8)] {
        let mut parts = rig.parts(1);
        (parts[0].first, parts[0].sectors) = (first, sectors);
        assert_eq!(rig.write(0, 0, parts), Err(Error::BadRequest), "{first} {sectors}");
    }
    assert_eq!(rig.front.discard(&mut rig.guest, 0, 0, 8), Err(Error::Unsupported));
    assert_eq!((rig.front.in_flight(), rig.guest.grants()), (0, 1));
    let parts = rig.parts(11);
    assert_eq!(rig.read(1, 4096 - 88, parts), Ok(()));
}

#[test]
fn a_read_only_disk_is_not_written() {
    let mut rig = rig_with(config(), &[("info", "4"), ("feature-discard", "1")]);
    let parts = rig.parts(1);
    assert_eq!(rig.write(0, 0, parts), Err(Error::ReadOnly));
    assert_eq!(rig.front.discard(&mut rig.guest, 0, 0, 8), Err(Error::ReadOnly));
    let parts = rig.parts(1);
    assert_eq!(rig.read(0, 0, parts), Ok(()));
}

#[test]
fn unknown_and_double_answers_are_faults() {
    for bad in [5_u64, 0xffff, 1 << 16, u64::MAX] {
        let mut rig = rig(config());
        for tag in 0..2 {
            let parts = rig.parts(1);
            rig.read(tag, 0, parts).unwrap();
        }
        let first = rig.back.take().unwrap().id;
        let _ = rig.back.take().unwrap();
        rig.back.answer(0, first, READ, 0);
        assert_eq!(rig.ended(), (0, Ok(())));
        let bad = if bad == 5 { first } else { bad };
        rig.back.answer(0, bad, READ, 0);
        let fault = Error::Broken(Fault::Id(bad));
        assert_eq!(rig.complete().map(|_| ()), Err(fault));
        let parts = rig.parts(1);
        assert_eq!(rig.read(0, 0, parts), Err(fault), "it stays broken");
        assert!(!rig.front.is_connected());
    }
}

/// The slot is the same, the request is another: only an id that is never used twice shows it.
#[test]
fn a_late_answer_is_not_taken_for_that_of_the_slots_next_request() {
    let mut rig = rig(config());
    let mut ids = Vec::new();
    for tag in 0..3 {
        let parts = rig.parts(1);
        rig.read(tag, 0, parts).unwrap();
        let id = rig.back.take().unwrap().id;
        ids.push(id);
        let answered = if tag == 2 { ids[1] } else { id };
        rig.back.answer(0, answered, READ, 0);
        if tag < 2 {
            assert_eq!(rig.ended(), (tag, Ok(())));
        }
    }
    assert_eq!(rig.complete().map(|_| ()), Err(Error::Broken(Fault::Id(ids[1]))));
}

#[test]
fn answers_name_the_operation_and_a_known_status() {
    let mut rig = rig(config());
    let parts = rig.parts(12);
    rig.read(0, 0, parts).unwrap();
    let request = rig.back.take().unwrap();
    rig.back.answer(0, request.id, INDIRECT, 0);
    let fault = Fault::Operation { id: request.id, expected: READ, found: INDIRECT };
    assert_eq!(rig.complete().map(|_| ()), Err(Error::Broken(fault)));

    let mut rig = self::rig(config());
    rig.front.flush(&mut rig.guest, 0).unwrap();
    rig.front.kick(&mut rig.guest);
    let id = rig.back.take().unwrap().id;
    rig.back.answer(0, id, FLUSH_DISKCACHE, -5);
    let fault = Fault::Status { id, status: -5 };
    assert_eq!(rig.complete().map(|_| ()), Err(Error::Broken(fault)));
}

#[test]
fn impossible_ring_counters_are_faults() {
    for claimed in [2, 33, u32::MAX] {
        let mut rig = rig(config());
        let parts = rig.parts(1);
        rig.read(0, 0, parts).unwrap();
        rig.back.queues[0].pages[0].page.u32(RSP_PROD).store(claimed, Relaxed);
        assert!(matches!(rig.complete(), Err(Error::Broken(Fault::Ring(_)))));
    }
}

#[test]
fn pages_that_are_still_held_when_they_are_answered_are_a_fault() {
    for indirect in [false, true] {
        let mut rig = rig(config());
        let parts = rig.parts(if indirect { 12 } else { 1 });
        rig.read(0, 0, parts).unwrap();
        let request = rig.back.take().unwrap();
        let gref = match indirect {
            false => request.segments[0].gref,
            true => {
                let request: IndirectRequest = zerocopy::transmute!(request);
                request.grefs[0]
            }
        };
        let held = rig.back.driver.map(GUEST, gref, Access::ReadOnly).unwrap();
        rig.back.answer(0, request.id, READ, 0);
        let fault = Error::Broken(Fault::StillGranted(gref));
        assert_eq!(rig.complete().map(|_| ()), Err(fault));
        rig.back.driver.unmap(held);
    }
}

/// What the backend may still write to does not come back to the user.
#[test]
fn requests_without_an_answer_are_lost_with_the_connection() {
    for grants in [GrantPolicy::Persistent, GrantPolicy::PerRequest] {
        let mut rig = rig(Config { grants, ..config() });
        for tag in 0..3 {
            let parts = rig.parts(1);
            rig.read(tag, 8 * tag, parts).unwrap();
        }
        let request = rig.back.take().unwrap();
        let held = rig.back.driver.map(GUEST, request.segments[0].gref, Access::ReadWrite).unwrap();
        rig.back.set_state("5");
        rig.front.refresh(&mut rig.guest, &mut rig.client).unwrap();
        assert_eq!((rig.front.state(), rig.front.is_connected()), (XenbusState::CLOSED, false));
        held.page.write(0, b"late");
        for tag in 0..3 {
            let done = rig.complete().unwrap().unwrap();
            assert_eq!((done.tag, done.result), (tag, Err(IoError::Lost)));
            let mut seen = [0; 4];
            done.parts[0].buffer.page().read(0, &mut seen);
            assert_eq!(seen, [0; 4]);
            for part in done.parts {
                rig.front.give_back(part.buffer);
            }
        }
        assert_eq!(rig.complete().map(|_| ()), Err(Error::NotConnected));
        assert_eq!((rig.front.free_buffers(), rig.guest.grants()), (64, 2), "ring and one page");
        rig.back.driver.unmap(held);
        rig.back.disconnect();
        rig.back.set_state("2");
        rig.front.reopen(&mut rig.guest, &mut rig.client).unwrap();
        rig.back.connect();
        rig.front.refresh(&mut rig.guest, &mut rig.client).unwrap();
        let parts = rig.parts(1);
        rig.read(9, 0, parts).unwrap();
        assert_eq!((rig.back.serve(), rig.ended()), (1, (9, Ok(()))));
    }
}

#[test]
fn want_of_slots_pages_or_grants_is_full_and_passes() {
    let mut rig = rig(config());
    for tag in 0..32 {
        let parts = rig.parts(1);
        rig.read(tag, 0, parts).unwrap();
    }
    let parts = rig.parts(1);
    assert_eq!(rig.read(32, 0, parts), Err(Error::Full));
    assert_eq!(rig.back.serve(), 32);
    for _ in 0..32 {
        assert_eq!(rig.ended().1, Ok(()));
    }
    let filler = Page::new_zeroed();
    let mut grefs = Vec::new();
    while let Ok(gref) = rig.guest.grant(DRIVER, &filler, Access::ReadOnly) {
        grefs.push(gref);
    }
    for (count, left) in [(1, 0), (3, 2), (12, 10)] {
        let freed: Vec<_> = (0..left).map(|_| grefs.pop().unwrap()).collect();
        freed.into_iter().for_each(|gref| rig.guest.revoke(gref).unwrap());
        let before = rig.guest.grants();
        let parts = rig.parts(count);
        assert_eq!(rig.read(0, 0, parts), Err(Error::Full), "{count} parts, {left} entries more");
        assert_eq!(rig.guest.grants(), before, "nothing is left behind");
    }
}

#[test]
fn a_new_size_is_read_when_the_state_is_written_again() {
    let mut rig = rig(config());
    let path = format!("{}/sectors", DEVICE.backend_path());
    rig.back.toolstack.write(&path, b"8192").unwrap();
    rig.back.set_state("4");
    rig.front.refresh(&mut rig.guest, &mut rig.client).unwrap();
    assert_eq!(rig.front.info().sectors, 8192);
}

#[test]
fn a_connection_of_another_shape_leaves_no_old_keys() {
    let mut rig = rig(Config { queues: 4, ring_page_order: 3, ..config() });
    assert_eq!((rig.front.info().queues, rig.front.info().slots), (2, 128));
    rig.front.close(&mut rig.guest, &mut rig.client).unwrap();
    rig.back.disconnect();
    let base = DEVICE.backend_path();
    rig.back.toolstack.rm(&format!("{base}/multi-queue-max-queues")).unwrap();
    rig.back.toolstack.write(&format!("{base}/max-ring-page-order"), b"0").unwrap();
    rig.back.set_state("2");
    rig.front.reopen(&mut rig.guest, &mut rig.client).unwrap();
    let mut names = rig.client.directory(&DEVICE.frontend_path()).unwrap();
    names.sort();
    let expected = [
        "backend",
        "backend-id",
        "device-type",
        "event-channel",
        "feature-persistent",
        "protocol",
        "ring-ref",
        "state",
    ];
    assert_eq!(names, expected);
}

#[test]
fn it_is_a_disk_like_any_other() {
    use domain_api::disk::{Buffer, Disk, DiskError, Operation, Request, Tag};
    let Rig { guest, front, mut back, .. } = rig(config());
    let mut disk = FrontDisk::new(front, guest);
    let pages = disk.pages().to_vec();
    pages[3].page.write(512, &[7; 1024]);
    let buffer = |index: usize| Buffer { page: &pages[index], offset: 512, len: 1024 };
    let request = |tag, operation, buffers| Request {
        tag: Tag(tag),
        operation,
        sector: 40,
        sectors: 2,
        buffers,
    };
    let (three, five) = ([buffer(3)], [buffer(5)]);
    disk.submit(request(1, Operation::Write, &three)).unwrap();
    disk.submit(request(2, Operation::Write, &three)).unwrap();
    let taken = disk.complete().unwrap();
    assert_eq!((taken.tag, taken.result), (Tag(2), Err(DiskError::OutOfRange)), "a page in use");
    for (tag, operation) in [(1, Operation::Write), (4, Operation::Read), (5, Operation::Flush)] {
        let buffers: &[Buffer<'_>] = if tag == 4 { &five } else { &[] };
        if tag != 1 {
            disk.submit(request(tag, operation, buffers)).unwrap();
        }
        disk.kick();
        assert_eq!(back.serve(), 1);
        let done = disk.complete().unwrap();
        assert_eq!((done.tag, done.result), (Tag(tag), Ok(())));
    }
    let mut seen = [0; 1024];
    pages[5].page.read(512, &mut seen);
    assert_eq!(seen, [7; 1024]);
    assert!(disk.complete().is_none());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever the shape of the connection and the requests, with answers in reverse order and
    /// several requests in flight, what was written is read, and nothing is left behind.
    #[test]
    fn what_was_written_is_read(
        queues in 1_u16..4,
        ring_page_order in 0_u8..3,
        persistent in any::<bool>(),
        batches in prop::collection::vec(
            prop::collection::vec((0_u64..8, 1_usize..16, any::<u8>(), 0_u8..8), 1..4), 1..6),
    ) {
        let grants =
            if persistent { GrantPolicy::Persistent } else { GrantPolicy::PerRequest };
        let mut rig = rig(Config { queues, ring_page_order, grants, ..config() });
        let mut model = rig.back.disk.clone();
        let idle = rig.guest.grants();
        for (tag, batch) in (0_u64..).zip(&batches) {
            let mut busy = [false; 8];
            for &(zone, count, fill, trim) in batch {
                // Requests in flight must not overlap: one for each zone.
                if core::mem::replace(&mut busy[usize::try_from(zone).unwrap()], true) {
                    continue;
                }
                let sector = zone * 512 + tag;
                let mut parts = rig.parts(count);
                parts[0].first = trim;
                parts[0].sectors = 8 - trim;
                let mut at = usize::try_from(sector * 512).unwrap();
                for part in &parts {
                    let len = usize::from(part.sectors) * 512;
                    part.buffer.page().write(usize::from(part.first) * 512, &vec![fill; len]);
                    model[at..at + len].fill(fill);
                    at += len;
                }
                rig.write(tag, sector, parts).unwrap();
            }
            let served = rig.back.serve();
            prop_assert!(rig.guest.has_pending(), "the frontend asked to be told");
            for _ in 0..served {
                prop_assert_eq!(rig.ended(), (tag, Ok(())));
            }
            let _ = rig.guest.take_pending();
            prop_assert!(rig.complete().unwrap().is_none());
        }
        prop_assert!(rig.back.disk == model);
        prop_assert_eq!((rig.front.free_buffers(), rig.guest.grants()), (64, idle));
        for zone in 0..8 {
            let parts = rig.parts(13);
            rig.read(0, zone * 512, parts).unwrap();
            rig.back.serve();
            let done = rig.complete().unwrap().unwrap();
            prop_assert_eq!(done.operation, Operation::Read);
            for (n, part) in done.parts.into_iter().enumerate() {
                let mut bytes = [0; 4096];
                part.buffer.page().read(0, &mut bytes);
                let at = usize::try_from(zone).unwrap() * 512 * 512 + n * 4096;
                prop_assert!(bytes == model[at..at + 4096]);
                rig.front.give_back(part.buffer);
            }
        }
    }
}
