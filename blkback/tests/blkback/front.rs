//! A block frontend made by hand, strict where Linux's is.
//!
//! It holds that the disk becomes what it wrote: each sector has a generation, from which its
//! content follows, and requests in flight never overlap.

use crate::rig::{DRIVER, Random, StoreClient};
use domain_api::fake::Domain;
use domain_api::{Access, DomainId, Errno, EventPort, Events, GrantRef, Granter, Page};
use shmem::ring::FrontRing;
use std::collections::VecDeque;
use xen_abi::blkif::{
    DISCARD, DiscardRequest, FLUSH_DISKCACHE, INDIRECT, IndirectRequest, READ, RSP_OKAY, Request,
    Response, Segment, WRITE,
};
use xenbus::{Store, XenbusState, device};
use zerocopy::{FromZeros, IntoBytes};

pub const DEVICE: u32 = 51712;
/// Most pages in flight: there are not so many entries in the grant table.
const MOST_PAGES: usize = 1400;
/// The generation of a sector that may hold anything.
pub const UNKNOWN: u32 = u32::MAX;

#[derive(Clone, Copy, Debug)]
pub struct Config {
    pub queues: u16,
    pub order: u32,
    pub persistent: bool,
    /// Most segments of a request; more than 11 are indirect.
    pub segments: usize,
    pub narrow: bool,
    /// Segments begin and end anywhere in their pages.
    pub ragged: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self { queues: 1, order: 0, persistent: false, segments: 11, narrow: false, ragged: true }
    }
}

pub enum Ring {
    Wide(FrontRing<Request, Response>),
    Narrow(FrontRing<[u8; 108], [u8; 12]>),
}

impl Ring {
    fn new(pages: Vec<Page>, narrow: bool) -> Self {
        if narrow {
            Self::Narrow(FrontRing::with_pages(pages))
        } else {
            Self::Wide(FrontRing::with_pages(pages))
        }
    }

    pub fn free(&self) -> u32 {
        match self {
            Self::Wide(ring) => ring.free(),
            Self::Narrow(ring) => ring.free(),
        }
    }

    pub fn push(&mut self, request: &Request) {
        match self {
            Self::Wide(ring) => drop(ring.push(request)),
            Self::Narrow(ring) => {
                let bytes = request.as_bytes();
                let mut slot = [0; 108];
                slot[..4].copy_from_slice(&bytes[..4]);
                slot[4..].copy_from_slice(&bytes[8..]);
                ring.push(&slot);
            }
        }
    }

    pub fn publish(&mut self) -> bool {
        match self {
            Self::Wide(ring) => ring.publish(),
            Self::Narrow(ring) => ring.publish(),
        }
    }

    pub fn take(&mut self) -> Option<(u64, u8, i16)> {
        match self {
            Self::Wide(ring) => ring.take().unwrap().map(|it| (it.id, it.operation, it.status)),
            Self::Narrow(ring) => ring.take().unwrap().map(|it| {
                let id = u64::from_le_bytes(it[..8].try_into().unwrap());
                (id, it[8], i16::from_le_bytes(it[10..].try_into().unwrap()))
            }),
        }
    }

    pub fn arm(&mut self) -> bool {
        match self {
            Self::Wide(ring) => ring.arm(),
            Self::Narrow(ring) => ring.arm(),
        }
    }
}

/// A granted page.
#[derive(Debug)]
struct Granted {
    page: Page,
    gref: GrantRef,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Read,
    Write { generation: u32 },
    Flush,
    Discard,
}

#[derive(Debug)]
struct Pending {
    id: u64,
    operation: u8,
    kind: Kind,
    sector: u64,
    sectors: u64,
    /// Pages of data with first and last sector.
    parts: Vec<(Granted, u8, u8)>,
    descriptors: Option<Granted>,
    bad: bool,
}

pub struct Queue {
    pub ring: Ring,
    pub pages: Vec<Page>,
    pub grefs: Vec<GrantRef>,
    pub port: EventPort,
    pending: VecDeque<Pending>,
}

pub struct Front {
    pub id: DomainId,
    pub env: Domain,
    pub client: StoreClient,
    pub config: Config,
    pub queues: Vec<Queue>,
    pub sectors: u64,
    /// Sectors of 512 in a sector of the disk.
    pub unit: u64,
    /// What each sector holds.
    pub generations: Vec<u32>,
    locked: Vec<bool>,
    pub bad: Vec<u64>,
    /// Requests still to be made.
    pub work: u32,
    pub answered: u32,
    pub errors: u32,
    pub store_events: usize,
    pub random: Random,
    pub discards: bool,
    /// What is discarded may be anything afterwards.
    pub vague_discards: bool,
    pub writes: bool,
    /// Persistent pages that are not in use.
    pool: Vec<Granted>,
    pages_in_use: usize,
    next_id: u64,
    next_generation: u32,
    awake: bool,
}

impl Front {
    pub fn new(env: Domain, mut client: StoreClient, config: Config) -> Self {
        let id = env.id();
        let path = format!("/local/domain/{}/backend/vbd/{}/{DEVICE}/state", DRIVER.0, id.0);
        client.watch(&path, "front").unwrap();
        Self {
            id,
            env,
            client,
            config,
            queues: Vec::new(),
            sectors: 0,
            unit: 1,
            generations: Vec::new(),
            locked: Vec::new(),
            bad: Vec::new(),
            work: 0,
            answered: 0,
            errors: 0,
            store_events: 0,
            random: Random(0x9e37_79b9 + u64::from(id.0)),
            discards: true,
            vague_discards: false,
            writes: true,
            pool: Vec::new(),
            pages_in_use: 0,
            next_id: 0,
            next_generation: 1,
            awake: true,
        }
    }

    pub fn directory() -> String {
        format!("device/vbd/{DEVICE}")
    }

    fn backend(&self) -> String {
        format!("/local/domain/{}/backend/vbd/{}/{DEVICE}", DRIVER.0, self.id.0)
    }

    pub fn state(&mut self) -> XenbusState {
        device::state(&mut self.client, &Self::directory()).unwrap()
    }

    pub fn key(&mut self, key: &str) -> Option<u64> {
        let backend = self.backend();
        device::read(&mut self.client, &backend, key).ok()
    }

    pub fn write_key(&mut self, key: &str, value: impl std::fmt::Display) {
        device::write(&mut self.client, &Self::directory(), key, value).unwrap();
    }

    pub fn is_connected(&mut self) -> bool {
        !self.queues.is_empty() && self.state() == XenbusState::CONNECTED
    }

    /// One pass of its event loop. True when it did anything.
    pub fn turn(&mut self) -> bool {
        let mut worked = core::mem::take(&mut self.awake);
        while self.client.next_event().is_some() {
            self.store_events += 1;
            worked = true;
            self.handshake();
        }
        worked |= !self.env.take_pending().is_empty();
        if worked && self.is_connected() {
            self.traffic();
        }
        worked
    }

    pub fn wake(&mut self) {
        self.awake = true;
    }

    fn handshake(&mut self) {
        let directory = self.backend();
        let backend = device::state(&mut self.client, &directory).unwrap();
        match (backend, self.state()) {
            (XenbusState::INIT_WAIT, XenbusState::INITIALISING) => self.publish_rings(),
            (XenbusState::CONNECTED, XenbusState::INITIALISED) => {
                self.sectors = self.key("sectors").unwrap();
                self.unit = self.key("sector-size").unwrap() / 512;
                self.discards &= self.key("feature-discard") == Some(1);
                self.writes = self.key("info").unwrap() & 4 == 0;
                let sectors = usize::try_from(self.sectors).unwrap();
                self.generations.resize(sectors, 0);
                self.locked.resize(sectors, false);
                self.write_key("state", 4);
            }
            (XenbusState::CLOSING | XenbusState::CLOSED, now) if now != XenbusState::CLOSED => {
                self.write_key("state", 6);
            }
            _ => {}
        }
    }

    fn publish_rings(&mut self) {
        assert!(self.key("max-ring-page-order") >= Some(u64::from(self.config.order)));
        assert!(self.key("multi-queue-max-queues") >= Some(u64::from(self.config.queues)));
        let Config { queues, order, narrow, persistent, .. } = self.config;
        for number in 0..queues {
            let pages: Vec<Page> = (0..1 << order).map(|_| Page::new_zeroed()).collect();
            let ring = Ring::new(pages.clone(), narrow);
            let grefs: Vec<GrantRef> = pages
                .iter()
                .map(|page| self.env.grant(DRIVER, page, Access::ReadWrite).unwrap())
                .collect();
            let port = self.env.alloc_unbound(DRIVER).unwrap();
            let below = if queues == 1 { String::new() } else { format!("queue-{number}/") };
            if order == 0 {
                self.write_key(&format!("{below}ring-ref"), grefs[0].0);
            } else {
                for (page, gref) in grefs.iter().enumerate() {
                    self.write_key(&format!("{below}ring-ref{page}"), gref.0);
                }
            }
            self.write_key(&format!("{below}event-channel"), port.0);
            self.queues.push(Queue { ring, pages, grefs, port, pending: VecDeque::new() });
        }
        if order > 0 {
            self.write_key("ring-page-order", order);
        }
        if queues > 1 {
            self.write_key("multi-queue-num-queues", queues);
        }
        self.write_key("protocol", if narrow { "x86_32-abi" } else { "x86_64-abi" });
        self.write_key("feature-persistent", u8::from(persistent));
        self.write_key("state", 3);
    }

    fn traffic(&mut self) {
        for number in 0..self.queues.len() {
            loop {
                while let Some(answer) = self.queues[number].ring.take() {
                    self.answer(number, answer);
                }
                if !self.queues[number].ring.arm() {
                    break;
                }
            }
        }
        let count = u32::try_from(self.queues.len()).unwrap();
        for _ in 0..self.work.min(1000) {
            let number = self.random.below(count) as usize;
            let pages = self.pages_in_use + self.config.segments + 1;
            if pages < MOST_PAGES && self.queues[number].ring.free() > 0 && self.request(number) {
                self.work -= 1;
            }
        }
        for queue in &mut self.queues {
            if queue.ring.publish() {
                self.env.notify(queue.port);
            }
        }
    }

    pub fn in_flight(&self) -> usize {
        self.queues.iter().map(|queue| queue.pending.len()).sum()
    }

    /// A range that nothing in flight touches.
    fn range(&mut self, most: u64) -> Option<(u64, u64)> {
        for _ in 0..10 {
            let units = u32::try_from(self.sectors / self.unit).unwrap();
            let most = u32::try_from(most / self.unit).unwrap().clamp(1, units);
            let len = 1 + self.random.below(most);
            let from = self.random.below(units - len + 1);
            let (sector, sectors) = (u64::from(from) * self.unit, u64::from(len) * self.unit);
            if self.sectors(sector, sectors).all(|it| !self.locked[it]) {
                return Some((sector, sectors));
            }
        }
        None
    }

    fn sectors(&self, sector: u64, sectors: u64) -> std::ops::Range<usize> {
        usize::try_from(sector).unwrap()..usize::try_from(sector + sectors).unwrap()
    }

    /// Makes one request. False: the disk is too busy with others.
    fn request(&mut self, number: usize) -> bool {
        let kind = match self.random.below(20) {
            0 => Kind::Flush,
            1 if self.discards && self.writes => Kind::Discard,
            2..12 if self.writes => {
                self.next_generation += 1;
                Kind::Write { generation: self.next_generation }
            }
            _ => Kind::Read,
        };
        let (sector, sectors) = match kind {
            Kind::Flush => (0, 0),
            Kind::Discard => match self.range(300) {
                Some(range) => range,
                None => return false,
            },
            _ => match self.range(self.config.segments as u64 * 4) {
                Some(range) => range,
                None => return false,
            },
        };
        for at in self.sectors(sector, sectors) {
            self.locked[at] = true;
        }
        self.issue(number, kind, sector, sectors);
        true
    }

    fn granted(&mut self) -> Granted {
        self.pages_in_use += 1;
        if let Some(granted) = self.pool.pop() {
            return granted;
        }
        let page = Page::new_zeroed();
        let gref = self.env.grant(DRIVER, &page, Access::ReadWrite).unwrap();
        Granted { page, gref }
    }

    /// Cuts sectors into segments.
    fn parts(&mut self, mut sectors: u64) -> Vec<(Granted, u8, u8)> {
        let mut parts = Vec::new();
        while sectors > 0 {
            let tight = parts.len() as u64 + sectors.div_ceil(8) >= self.config.segments as u64;
            let (first, most) = if self.config.ragged && !tight {
                let first = self.random.below(8);
                (first, 1 + self.random.below(8 - first))
            } else {
                (0, 8)
            };
            let count = u64::from(most).min(sectors);
            let last = u8::try_from(u64::from(first) + count - 1).unwrap();
            parts.push((self.granted(), u8::try_from(first).unwrap(), last));
            sectors -= count;
        }
        parts
    }

    fn issue(&mut self, number: usize, kind: Kind, sector: u64, sectors: u64) {
        self.next_id += 1;
        let id = self.next_id << 20 | 0xabc;
        let mut request = Request::new_zeroed();
        (request.id, request.sector) = (id, sector);
        let mut pending = Pending {
            id,
            operation: READ,
            kind,
            sector,
            sectors,
            parts: Vec::new(),
            descriptors: None,
            bad: self.bad.iter().any(|it| (sector..sector + sectors).contains(it)),
        };
        match kind {
            Kind::Flush => pending.operation = FLUSH_DISKCACHE,
            Kind::Discard => {
                pending.operation = DISCARD;
                let mut discard = DiscardRequest::new_zeroed();
                (discard.id, discard.sector, discard.nr_sectors) = (id, sector, sectors);
                request = zerocopy::transmute!(discard);
            }
            Kind::Read | Kind::Write { .. } => {
                pending.parts = self.parts(sectors);
                if let Kind::Write { generation } = kind {
                    pending.operation = WRITE;
                    fill(&pending, generation);
                }
                self.segments(&mut request, &mut pending);
            }
        }
        if request.operation != INDIRECT {
            request.operation = pending.operation;
        }
        let queue = &mut self.queues[number];
        queue.ring.push(&request);
        queue.pending.push_back(pending);
    }

    fn segments(&mut self, request: &mut Request, pending: &mut Pending) {
        let segments: Vec<Segment> = pending
            .parts
            .iter()
            .map(|(granted, first, last)| Segment {
                gref: granted.gref,
                first_sect: *first,
                last_sect: *last,
                pad: 0,
            })
            .collect();
        if segments.len() <= 11 {
            request.nr_segments = u8::try_from(segments.len()).unwrap();
            request.segments[..segments.len()].copy_from_slice(&segments);
            return;
        }
        let granted = self.granted();
        for (at, segment) in segments.iter().enumerate() {
            granted.page.write(8 * at, segment.as_bytes());
        }
        let mut indirect = IndirectRequest::new_zeroed();
        (indirect.operation, indirect.indirect_op) = (INDIRECT, pending.operation);
        indirect.nr_segments = u16::try_from(segments.len()).unwrap();
        (indirect.id, indirect.sector) = (request.id, request.sector);
        indirect.grefs[0] = granted.gref;
        pending.descriptors = Some(granted);
        *request = zerocopy::transmute!(indirect);
    }

    fn answer(&mut self, number: usize, (id, operation, status): (u64, u8, i16)) {
        let pending = self.queues[number].pending.pop_front().expect("an answer to a request");
        // Stricter than Linux: the answers have the order of the requests.
        assert_eq!((id, operation), (pending.id, pending.operation), "another request's answer");
        self.answered += 1;
        if pending.bad {
            assert_ne!(status, RSP_OKAY);
            self.errors += 1;
        } else {
            assert_eq!(status, RSP_OKAY, "{:?}", pending.kind);
        }
        for at in self.sectors(pending.sector, pending.sectors) {
            self.locked[at] = false;
            match pending.kind {
                // A failed one may be done in part.
                Kind::Write { .. } | Kind::Discard if pending.bad => {
                    self.generations[at] = UNKNOWN;
                }
                Kind::Write { generation } => self.generations[at] = generation,
                Kind::Discard if self.vague_discards => self.generations[at] = UNKNOWN,
                Kind::Discard => self.generations[at] = 0,
                Kind::Read | Kind::Flush => {}
            }
        }
        if pending.kind == Kind::Read && !pending.bad {
            self.compare(&pending);
        }
        let pages = pending.parts.into_iter().map(|(granted, ..)| granted);
        for granted in pages.chain(pending.descriptors) {
            self.done_with(granted);
        }
    }

    fn compare(&self, pending: &Pending) {
        let mut sector = pending.sector;
        for (granted, first, last) in &pending.parts {
            for at in *first..=*last {
                let mut bytes = [0; 512];
                granted.page.read(usize::from(at) * 512, &mut bytes);
                let generation = self.generations[usize::try_from(sector).unwrap()];
                let right = generation == UNKNOWN || bytes == content(sector, generation);
                assert!(right, "sector {sector} is not generation {generation}");
                sector += 1;
            }
        }
    }

    fn done_with(&mut self, granted: Granted) {
        self.pages_in_use -= 1;
        if !self.config.persistent {
            self.env.revoke(granted.gref).expect("unmapped before it was answered");
        } else if self.random.below(50) == 0 {
            // Linux drops what it sees unmapped.
            match self.env.revoke(granted.gref) {
                Ok(()) => {}
                Err(Errno::EBUSY) => self.pool.push(granted),
                Err(errno) => panic!("{errno}"),
            }
        } else {
            self.pool.push(granted);
        }
    }

    /// Closes the device in good order; the backend has to answer.
    pub fn begin_closing(&mut self) {
        self.write_key("state", 5);
    }

    /// After the backend has closed, nothing is mapped any more.
    pub fn free_everything(&mut self) {
        for queue in self.queues.drain(..) {
            for gref in queue.grefs {
                self.env.revoke(gref).expect("the ring is unmapped");
            }
            self.env.close(queue.port);
            for pending in queue.pending {
                let pages = pending.parts.into_iter().map(|(granted, ..)| granted);
                for granted in pages.chain(pending.descriptors) {
                    self.env.revoke(granted.gref).expect("unmapped");
                }
            }
        }
        for granted in self.pool.drain(..) {
            self.env.revoke(granted.gref).expect("unmapped");
        }
        assert_eq!(self.env.grants(), 0);
    }
}

fn fill(pending: &Pending, generation: u32) {
    let mut sector = pending.sector;
    for (granted, first, last) in &pending.parts {
        for at in *first..=*last {
            let bytes = content(sector, generation);
            granted.page.write(usize::from(at) * 512, &bytes);
            sector += 1;
        }
    }
}

/// What a sector of that generation holds. Generation 0 is zeros.
pub fn content(sector: u64, generation: u32) -> [u8; 512] {
    let mut bytes = [0; 512];
    if generation > 0 {
        let mut word = (sector << 32 | u64::from(generation)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        for part in bytes.chunks_exact_mut(8) {
            word = word.rotate_left(9).wrapping_add(0x1234_5678_9abc_def1);
            part.copy_from_slice(&word.to_le_bytes());
        }
    }
    bytes
}
