//! The rings, ports and requests of one connection.

use super::buffers::{Part, Pool};
use super::{Completion, Config, Env, Error, Fault, GrantPolicy, Held, IoError, Operation, Stats};
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use domain_api::{Access, DomainId, Errno, EventPort, GrantRef};
use shmem::{Page, ring::FrontRing};
use xen_abi::blkif::{
    DISCARD, DiscardRequest, INDIRECT, IndirectRequest, MAX_INDIRECT_PAGES, MAX_SEGMENTS, READ,
    RSP_EOPNOTSUPP, RSP_ERROR, RSP_OKAY, Request, Response, SEGMENTS_PER_PAGE, Segment,
};
use zerocopy::{FromZeros, IntoBytes};

/// What the backend and we agreed on for a connection.
#[derive(Clone, Copy, Debug)]
pub struct Agreed {
    pub backend: DomainId,
    /// The device's number, as far as a request has room for it.
    pub handle: u16,
    pub queues: u16,
    pub ring_page_order: u8,
}

/// A request on its way to a ring. Its user's values were checked.
pub struct Order {
    pub tag: u64,
    pub operation: Operation,
    pub sector: u64,
    pub sectors: u64,
    pub parts: Vec<Part>,
}

/// A request that the backend has.
#[derive(Debug)]
struct Active {
    id: u64,
    tag: u64,
    operation: Operation,
    parts: Vec<Part>,
    /// Pages of its segments; as many as there are segments for.
    indirect: [u16; MAX_INDIRECT_PAGES],
}

impl Active {
    fn indirect(&self) -> &[u16] {
        &self.indirect[..indirect_pages(self.parts.len())]
    }
}

/// Pages that the segments of a request take.
pub const fn indirect_pages(segments: usize) -> usize {
    if segments <= MAX_SEGMENTS { 0 } else { segments.div_ceil(SEGMENTS_PER_PAGE) }
}

struct Queue {
    ring: FrontRing<Request, Response>,
    pages: Vec<Held>,
    port: EventPort,
    active: Vec<Option<Active>>,
    free: Vec<u16>,
}

pub struct Channel {
    agreed: Agreed,
    policy: GrantPolicy,
    queues: Vec<Queue>,
    /// Where the next request goes, and where the next answer is looked for.
    next_submit: usize,
    next_complete: usize,
    /// Makes every request's id a new one, so that a late answer is not taken for another's.
    generation: u64,
    /// Pages of segments.
    indirect: Pool,
}

impl Channel {
    /// Makes rings and ports, and grants all `buffers` where they stay granted.
    pub fn open<E: Env>(
        env: &mut E,
        agreed: Agreed,
        config: &Config,
        buffers: &mut Pool,
        held: &mut Vec<Held>,
    ) -> Result<Self, Errno> {
        let mut channel = Self {
            agreed,
            policy: config.grants,
            queues: Vec::new(),
            next_submit: 0,
            next_complete: 0,
            generation: 0,
            indirect: Pool::new(0),
        };
        match channel.build(env, buffers) {
            Ok(()) => Ok(channel),
            Err(errno) => {
                channel.close(env, buffers, held, &mut VecDeque::new());
                Err(errno)
            }
        }
    }

    fn build<E: Env>(&mut self, env: &mut E, buffers: &mut Pool) -> Result<(), Errno> {
        for _ in 0..self.agreed.queues {
            let pages: Vec<Page> =
                (0..1 << self.agreed.ring_page_order).map(|_| Page::new_zeroed()).collect();
            let ring = FrontRing::with_pages(pages.clone());
            let port = env.alloc_unbound(self.agreed.backend)?;
            let len = ring.len();
            let queue = Queue {
                ring,
                pages: Vec::new(),
                port,
                active: (0..len).map(|_| None).collect(),
                free: (0..slot_number(len)).rev().collect(),
            };
            self.queues.push(queue);
            // In the list before the next step can fail, so that `close` finds all.
            for page in pages {
                let gref = env.grant(self.agreed.backend, &page, Access::ReadWrite)?;
                if let Some(queue) = self.queues.last_mut() {
                    queue.pages.push(Held { gref, page });
                }
            }
        }
        match self.policy {
            GrantPolicy::Persistent => buffers.grant_all(env, self.agreed.backend),
            GrantPolicy::PerRequest => Ok(()),
        }
    }

    /// Prepares for requests of up to `segments`, when `buffers` pages are all that can be in
    /// use at a time.
    pub fn allow_indirect<E: Env>(
        &mut self,
        env: &mut E,
        segments: u16,
        buffers: u16,
    ) -> Result<(), Errno> {
        let each = indirect_pages(usize::from(segments));
        let most = usize::from(buffers) / (MAX_SEGMENTS + 1);
        let slots = self.queues.iter().map(|queue| queue.active.len()).sum();
        let count = most.clamp(1, slots) * each;
        self.indirect = Pool::new(u16::try_from(count).map_err(|_| Errno::EINVAL)?);
        match self.policy {
            GrantPolicy::Persistent => self.indirect.grant_all(env, self.agreed.backend),
            GrantPolicy::PerRequest => Ok(()),
        }
    }

    /// Keys of each queue's ring and port.
    pub fn queue_keys(&self) -> impl Iterator<Item = (Vec<GrantRef>, EventPort)> {
        let refs = |queue: &Queue| queue.pages.iter().map(|page| page.gref).collect();
        self.queues.iter().map(move |queue| (refs(queue), queue.port))
    }

    /// Closes the ports and takes back what the backend gave back; the rest goes to `held`.
    /// Requests without an answer go to `lost`.
    pub fn close<E: Env>(
        mut self,
        env: &mut E,
        buffers: &mut Pool,
        held: &mut Vec<Held>,
        lost: &mut VecDeque<Completion>,
    ) {
        let mut open: Vec<Active> = Vec::new();
        for queue in self.queues {
            env.close(queue.port);
            for granted in queue.pages {
                if env.revoke(granted.gref).is_err() {
                    held.push(granted);
                }
            }
            open.extend(queue.active.into_iter().flatten());
        }
        self.indirect.revoke_all(env, held, |_| false);
        // In the order in which they were made.
        open.sort_unstable_by_key(|active| active.id >> 16);
        let in_flight = |index| {
            open.iter().any(|active| active.parts.iter().any(|part| part.buffer.index == index))
        };
        buffers.revoke_all(env, held, in_flight);
        for mut active in open {
            for part in &mut active.parts {
                part.buffer.page = buffers.page(part.buffer.index).clone();
            }
            lost.push_back(active.end(Err(IoError::Lost)));
        }
    }

    pub fn owns(&self, port: EventPort) -> bool {
        self.queues.iter().any(|queue| queue.port == port)
    }

    pub fn in_flight(&self) -> u32 {
        self.queues.iter().map(|queue| queue.ring.in_flight()).sum()
    }

    pub fn slots(&self) -> u32 {
        self.queues.iter().map(|queue| queue.ring.len()).sum()
    }

    /// Shows new requests of all rings.
    #[inline]
    pub fn publish<E: Env>(&mut self, env: &mut E, stats: &mut Stats) {
        for queue in &mut self.queues {
            if queue.ring.publish() {
                stats.notifications += 1;
                env.notify(queue.port);
            }
        }
    }

    /// The next queue with a free slot, round robin.
    fn pick(&mut self) -> Option<usize> {
        for _ in 0..self.queues.len() {
            let at = self.next_submit;
            self.next_submit = if at + 1 == self.queues.len() { 0 } else { at + 1 };
            if !self.queues[at].free.is_empty() && self.queues[at].ring.free() > 0 {
                return Some(at);
            }
        }
        None
    }

    /// Queues a request. On an error nothing has happened.
    pub fn submit<E: Env>(
        &mut self,
        env: &mut E,
        order: Order,
        buffers: &mut Pool,
    ) -> Result<(), (Error, Vec<Part>)> {
        let Some(at) = self.pick() else { return Err((Error::Full, order.parts)) };
        let id = match self.queues[at].free.last() {
            Some(&slot) => self.generation << 16 | u64::from(slot),
            None => return Err((Error::Full, order.parts)),
        };
        let mut active = Active {
            id,
            tag: order.tag,
            operation: order.operation,
            parts: order.parts,
            indirect: [0; MAX_INDIRECT_PAGES],
        };
        let request = match order.operation {
            Operation::Discard => Some(self.discard(id, order.sector, order.sectors)),
            _ if active.parts.len() > MAX_SEGMENTS => {
                self.indirect(env, &mut active, order.sector, buffers)
            }
            _ => self.direct(env, &active, order.sector, buffers),
        };
        let Some(request) = request else {
            self.undo(env, &active.parts, buffers);
            return Err((Error::Full, active.parts));
        };
        let queue = &mut self.queues[at];
        let slot = queue.free.pop().map_or(0, usize::from);
        queue.active[slot] = Some(active);
        queue.ring.push(&request);
        self.generation += 1;
        Ok(())
    }

    fn discard(&self, id: u64, sector: u64, nr_sectors: u64) -> Request {
        let handle = self.agreed.handle;
        let rest = [0; 10];
        zerocopy::transmute!(DiscardRequest {
            operation: DISCARD,
            flag: 0,
            handle,
            pad: 0,
            id,
            sector,
            nr_sectors,
            rest
        })
    }

    /// A request with its segments in the slot.
    #[inline]
    fn direct<E: Env>(
        &self,
        env: &mut E,
        active: &Active,
        sector: u64,
        buffers: &mut Pool,
    ) -> Option<Request> {
        let mut request = Request::new_zeroed();
        request.operation = active.operation.number();
        request.nr_segments = u8::try_from(active.parts.len()).ok()?;
        request.handle = self.agreed.handle;
        request.id = active.id;
        request.sector = sector;
        let access = self.access(active.operation);
        for (segment, part) in request.segments.iter_mut().zip(&active.parts) {
            let gref = buffers.grant(env, self.agreed.backend, part.buffer.index, access).ok()?;
            *segment = part.segment(gref);
        }
        Some(request)
    }

    /// A request with its segments in pages of their own.
    fn indirect<E: Env>(
        &mut self,
        env: &mut E,
        active: &mut Active,
        sector: u64,
        buffers: &mut Pool,
    ) -> Option<Request> {
        if self.indirect.free() < indirect_pages(active.parts.len()) {
            return None;
        }
        let mut request = IndirectRequest::new_zeroed();
        request.operation = INDIRECT;
        request.indirect_op = active.operation.number();
        request.nr_segments = u16::try_from(active.parts.len()).ok()?;
        request.id = active.id;
        request.sector = sector;
        request.handle = self.agreed.handle;
        let access = self.access(active.operation);
        let mut taken = 0;
        let complete = active.parts.chunks(SEGMENTS_PER_PAGE).enumerate().all(|(n, parts)| {
            let Some(index) = self.indirect.take() else { return false };
            active.indirect[n] = index;
            taken = n + 1;
            let written = self.write_segments(env, index, parts, access, buffers);
            written.map(|gref| request.grefs[n] = gref).is_some()
        });
        if complete {
            return Some(zerocopy::transmute!(request));
        }
        for &index in &active.indirect[..taken] {
            // Nobody has seen these grants.
            let _ = self.indirect.revoke(env, index, self.policy);
            self.indirect.put(index);
        }
        None
    }

    /// Fills a page of segments; its grant.
    fn write_segments<E: Env>(
        &mut self,
        env: &mut E,
        index: u16,
        parts: &[Part],
        access: Access,
        buffers: &mut Pool,
    ) -> Option<GrantRef> {
        for (n, part) in parts.iter().enumerate() {
            let gref = buffers.grant(env, self.agreed.backend, part.buffer.index, access).ok()?;
            let segment = part.segment(gref);
            self.indirect.page(index).write(n * size_of::<Segment>(), segment.as_bytes());
        }
        self.indirect.grant(env, self.agreed.backend, index, Access::ReadOnly).ok()
    }

    /// What the backend needs of a page that is granted for one request.
    const fn access(&self, operation: Operation) -> Access {
        match operation {
            Operation::Write => Access::ReadOnly,
            _ => Access::ReadWrite,
        }
    }

    /// Takes the grants for a request back that was not made.
    fn undo<E: Env>(&self, env: &mut E, parts: &[Part], buffers: &mut Pool) {
        for part in parts {
            // Nobody has seen these grants.
            let _ = buffers.revoke(env, part.buffer.index, self.policy);
        }
    }

    /// The next request that was answered. `None`: an event follows when there is one.
    #[inline]
    pub fn complete<E: Env>(
        &mut self,
        env: &mut E,
        buffers: &mut Pool,
    ) -> Result<Option<Completion>, Error> {
        let mut idle = 0;
        while idle < self.queues.len() {
            let at = self.next_complete;
            let taken = self.queues[at].ring.take();
            match taken.map_err(|error| Error::Broken(Fault::Ring(error)))? {
                Some(response) => return self.answered(env, at, response, buffers).map(Some),
                None if self.queues[at].ring.arm() => idle = 0,
                None => {
                    idle += 1;
                    self.next_complete = if at + 1 == self.queues.len() { 0 } else { at + 1 };
                }
            }
        }
        Ok(None)
    }

    /// Checks an answer, and ends its request.
    fn answered<E: Env>(
        &mut self,
        env: &mut E,
        at: usize,
        response: Response,
        buffers: &mut Pool,
    ) -> Result<Completion, Error> {
        let queue = &mut self.queues[at];
        let Response { id, operation, status, .. } = response;
        #[expect(clippy::cast_possible_truncation, reason = "the slot's number is in the low bits")]
        let slot = id as u16;
        let active = queue.active.get(usize::from(slot)).and_then(Option::as_ref);
        let Some(active) = active.filter(|active| active.id == id) else {
            return Err(Error::Broken(Fault::Id(id)));
        };
        let expected = active.operation.number();
        if operation != expected {
            return Err(Error::Broken(Fault::Operation { id, expected, found: operation }));
        }
        let result = match status {
            RSP_OKAY => Ok(()),
            RSP_ERROR => Err(IoError::Failed),
            RSP_EOPNOTSUPP => Err(IoError::Unsupported),
            _ => return Err(Error::Broken(Fault::Status { id, status })),
        };
        for part in &active.parts {
            buffers.revoke(env, part.buffer.index, self.policy)?;
        }
        for &index in active.indirect() {
            self.indirect.revoke(env, index, self.policy)?;
        }
        for &index in active.indirect() {
            self.indirect.put(index);
        }
        queue.free.push(slot);
        match queue.active[usize::from(slot)].take() {
            Some(active) => Ok(active.end(result)),
            None => Err(Error::Broken(Fault::Id(id))),
        }
    }
}

impl Active {
    fn end(self, result: Result<(), IoError>) -> Completion {
        Completion { tag: self.tag, operation: self.operation, result, parts: self.parts }
    }
}

impl Operation {
    /// As in requests and their answers.
    pub(super) const fn number(self) -> u8 {
        match self {
            Self::Read => READ,
            Self::Write => xen_abi::blkif::WRITE,
            Self::Flush => xen_abi::blkif::FLUSH_DISKCACHE,
            Self::Discard => DISCARD,
        }
    }
}

/// Numbers of slots fit: a ring of 16 pages has 512.
#[expect(clippy::cast_possible_truncation, reason = "a ring has at most 16 pages")]
const fn slot_number(len: u32) -> u16 {
    len as u16
}
