//! Both ends of a ring of requests and responses.
//!
//! The shared page is described in [`xen_abi::ring`]. Each side keeps its own counters privately
//! and publishes copies; what it reads of the peer's is checked before it is believed.
//!
//! Order: a producer writes slots, then stores its counter with `Release`; the consumer loads
//! the counter with `Acquire`, then reads slots. For notifications, the producer stores its
//! counter, issues a full fence, then loads the peer's event index; the consumer stores its event
//! index, issues a full fence, then loads the peer's counter: one of the two sees the other's
//! store, so either the peer is told or the consumer finds the work itself.
//!
//! A backend publishes responses in the order of their requests, whole packets at a time, with
//! one store of `rsp_prod`. Then `[rsp_prod, req_prod)` is exactly what nobody has answered, and
//! [`BackRing::attach`] can go on where a dead incarnation stopped (see [`crate::inflight`]).

use crate::inflight::{Identity, InflightTable};
use crate::page::Page;
use crate::sync::Ordering::{Acquire, Relaxed, Release, SeqCst};
use crate::sync::fence;
use crate::{PeerError, check_counter, read_across, write_across};
use alloc::vec::Vec;
use core::marker::PhantomData;
use core::mem::size_of;
use xen_abi::PAGE_SIZE;
use xen_abi::ring::{REQ_EVENT, REQ_PROD, RSP_EVENT, RSP_PROD, SLOTS, must_notify, slots};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// What may stand in a slot: plain bytes, any value.
pub trait Entry: FromBytes + IntoBytes + Immutable + Copy {}
impl<T: FromBytes + IntoBytes + Immutable + Copy> Entry for T {}

/// The pages of a ring, as slots.
#[derive(Debug)]
struct Slots {
    /// One page or more; the first has the counters.
    pages: Vec<Page>,
    slot_bytes: usize,
    mask: u32,
}

impl Slots {
    fn new(pages: Vec<Page>, slot_bytes: usize) -> Self {
        assert!(!pages.is_empty(), "a ring has a page");
        let len = slots(pages.len() * PAGE_SIZE, slot_bytes);
        Self { pages, slot_bytes, mask: len - 1 }
    }

    fn len(&self) -> u32 {
        self.mask + 1
    }

    fn load(&self, offset: usize) -> u32 {
        self.pages[0].u32(offset).load(Acquire)
    }

    fn store(&self, offset: usize, value: u32) {
        self.pages[0].u32(offset).store(value, Release);
    }

    fn offset(&self, index: u32) -> usize {
        SLOTS + (index & self.mask) as usize * self.slot_bytes
    }

    #[inline]
    fn read(&self, index: u32, bytes: &mut [u8]) {
        read_across(&self.pages, self.offset(index), bytes);
    }

    #[inline]
    fn write(&self, index: u32, bytes: &[u8]) {
        write_across(&self.pages, self.offset(index), bytes);
    }

    /// Publishes a counter that moved from `old` to `new`, and says whether the peer, which left
    /// its wish at `event`, must be told.
    fn publish(&self, counter: usize, old: u32, new: u32, event: usize) -> bool {
        if old == new {
            return false;
        }
        self.store(counter, new);
        fence(SeqCst);
        must_notify(old, new, self.pages[0].u32(event).load(Relaxed))
    }

    /// Asks to be told when `counter` moves past `seen`. `true`: it has already.
    fn arm(&self, event: usize, seen: u32, counter: usize) -> bool {
        self.pages[0].u32(event).store(seen.wrapping_add(1), Relaxed);
        fence(SeqCst);
        self.load(counter) != seen
    }
}

/// Bytes of a slot: room for either kind of entry.
const fn slot_bytes<Req, Rsp>() -> usize {
    if size_of::<Req>() > size_of::<Rsp>() { size_of::<Req>() } else { size_of::<Rsp>() }
}

/// The frontend's end: puts requests in, takes responses out.
#[derive(Debug)]
pub struct FrontRing<Req, Rsp> {
    slots: Slots,
    /// Index behind the last request written.
    requested: u32,
    /// As stored in `req_prod`.
    published: u32,
    /// Index behind the last response taken.
    taken: u32,
    entries: PhantomData<(Req, Rsp)>,
}

impl<Req: Entry, Rsp: Entry> FrontRing<Req, Rsp> {
    /// Slots of a ring of one page.
    pub const LEN: u32 = slots(PAGE_SIZE, slot_bytes::<Req, Rsp>());

    /// Makes an empty ring in one page. To be done before the page is granted.
    #[must_use]
    pub fn new(page: Page) -> Self {
        Self::with_pages(alloc::vec![page])
    }

    /// Makes an empty ring in several pages.
    ///
    /// # Panics
    /// When there are none.
    #[must_use]
    pub fn with_pages(pages: Vec<Page>) -> Self {
        let slots = Slots::new(pages, slot_bytes::<Req, Rsp>());
        slots.store(REQ_PROD, 0);
        slots.store(RSP_PROD, 0);
        slots.store(REQ_EVENT, 1);
        slots.store(RSP_EVENT, 1);
        Self { slots, requested: 0, published: 0, taken: 0, entries: PhantomData }
    }

    /// Number of slots.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a ring's size, not its filling")]
    pub fn len(&self) -> u32 {
        self.slots.len()
    }

    /// Requests that can be pushed now.
    #[must_use]
    pub fn free(&self) -> u32 {
        self.slots.len() - self.in_flight()
    }

    /// Requests pushed whose responses were not taken yet.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.requested.wrapping_sub(self.taken)
    }

    /// Index of the response that [`Self::take`] returns next. Its slot is also that of the
    /// request with this index.
    #[must_use]
    pub fn next_response(&self) -> u32 {
        self.taken
    }

    /// Writes a request into the next slot and returns its index. The backend sees it after
    /// [`Self::publish`].
    ///
    /// # Panics
    /// When no slot is free: the caller looks at [`Self::free`] first.
    pub fn push(&mut self, request: &Req) -> u32 {
        assert!(self.free() > 0, "a frontend pushes only while slots are free");
        let index = self.requested;
        self.slots.write(index, request.as_bytes());
        self.requested = index.wrapping_add(1);
        index
    }

    /// Shows all pushed requests to the backend. `true`: it wants to be told.
    #[must_use = "the backend may be waiting for an event"]
    pub fn publish(&mut self) -> bool {
        let old = self.published;
        self.published = self.requested;
        self.slots.publish(REQ_PROD, old, self.published, REQ_EVENT)
    }

    /// Takes the next response, if any.
    ///
    /// # Errors
    /// The backend claims more responses than there were requests, or takes some back.
    pub fn take(&mut self) -> Result<Option<Rsp>, PeerError> {
        let claimed = self.slots.load(RSP_PROD);
        check_counter(claimed, self.taken, self.published)?;
        if claimed == self.taken {
            return Ok(None);
        }
        let mut response = Rsp::new_zeroed();
        self.slots.read(self.taken, response.as_mut_bytes());
        self.taken = self.taken.wrapping_add(1);
        Ok(Some(response))
    }

    /// Asks for an event with the next response. `true`: there is one already, go on taking.
    #[must_use = "what has arrived meanwhile brings no event"]
    pub fn arm(&mut self) -> bool {
        self.slots.arm(RSP_EVENT, self.taken, RSP_PROD)
    }
}

/// The backend's end: takes requests out, puts responses in, in the order of the requests.
#[derive(Debug)]
pub struct BackRing<Req, Rsp> {
    slots: Slots,
    table: InflightTable,
    /// Index behind the last request taken.
    taken: u32,
    /// Requests known to be there: `req_prod` as last read and checked.
    known: u32,
    /// Requests below this index come from the table.
    replay_end: u32,
    /// Index behind the last response written.
    answered: u32,
    /// As stored in `rsp_prod`.
    published: u32,
    entries: PhantomData<(Req, Rsp)>,
}

impl<Req: Entry, Rsp: Entry> BackRing<Req, Rsp> {
    /// Attaches to a ring that a frontend made, fresh or left behind by a dead incarnation of
    /// this backend: goes on with the first request that has no published response.
    ///
    /// The requests that the dead incarnation had taken from *this* connection come out of
    /// `table` again; a table of any other connection is started anew. After the first pass over
    /// the ring the caller notifies the frontend once in any case, for the dead incarnation may
    /// have published without telling (R9 in `xen-abi.md` §10.2).
    ///
    /// # Errors
    /// The counters that the frontend left are impossible.
    ///
    /// # Panics
    /// When there are no pages, or more requests than the table holds.
    pub fn attach(
        pages: Vec<Page>,
        mut table: InflightTable,
        identity: Identity,
    ) -> Result<Self, PeerError> {
        let slots = Slots::new(pages, slot_bytes::<Req, Rsp>());
        let start = slots.load(RSP_PROD);
        let known = slots.load(REQ_PROD);
        check_counter(known, start, start.wrapping_add(slots.len()))?;
        let mut replay_end = start;
        if let Some(consumed) = table.open(identity, slots.len(), slots.slot_bytes, start) {
            check_counter(start, consumed.wrapping_sub(slots.len()), consumed)?;
            replay_end =
                start.wrapping_add(consumed.wrapping_sub(start).min(known.wrapping_sub(start)));
        }
        Ok(Self {
            slots,
            table,
            taken: start,
            known,
            replay_end,
            answered: start,
            published: start,
            entries: PhantomData,
        })
    }

    /// Number of slots.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a ring's size, not its filling")]
    pub fn len(&self) -> u32 {
        self.slots.len()
    }

    /// Requests that were taken and have no response yet.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.taken.wrapping_sub(self.answered)
    }

    /// Requests that [`Self::take`] will still return from a dead incarnation's table.
    #[must_use]
    pub fn replayed(&self) -> u32 {
        self.replay_end.wrapping_sub(self.taken)
    }

    /// Requests waiting to be taken.
    ///
    /// # Errors
    /// The frontend claims more requests than fit, or takes some back.
    pub fn available(&mut self) -> Result<u32, PeerError> {
        let claimed = self.slots.load(REQ_PROD);
        check_counter(claimed, self.known, self.published.wrapping_add(self.slots.len()))?;
        self.known = claimed;
        Ok(claimed.wrapping_sub(self.taken))
    }

    /// Takes the next request, if any: a private copy, already safe in the in-flight table.
    ///
    /// # Errors
    /// The frontend claims more requests than fit, or takes some back.
    #[inline]
    pub fn take(&mut self) -> Result<Option<Req>, PeerError> {
        if self.taken == self.known && self.available()? == 0 {
            return Ok(None);
        }
        let index = self.taken;
        let mut request = Req::new_zeroed();
        if index == self.replay_end {
            self.slots.read(index, request.as_mut_bytes());
            self.table.store(index, request.as_bytes());
            self.replay_end = index.wrapping_add(1);
        } else {
            self.table.copy(index, request.as_mut_bytes());
        }
        self.taken = index.wrapping_add(1);
        Ok(Some(request))
    }

    /// Writes the response to the oldest request that has none. The frontend sees it after
    /// [`Self::publish`].
    ///
    /// # Panics
    /// When every request that was taken has its response.
    #[inline]
    pub fn respond(&mut self, response: &Rsp) {
        assert!(self.in_flight() > 0, "a backend answers only what it has taken");
        self.slots.write(self.answered, response.as_bytes());
        self.answered = self.answered.wrapping_add(1);
    }

    /// Shows all responses to the frontend, with one store; to be called when they end a whole
    /// packet. `true`: the frontend wants to be told.
    #[must_use = "the frontend may be waiting for an event"]
    pub fn publish(&mut self) -> bool {
        let old = self.published;
        self.published = self.answered;
        self.slots.publish(RSP_PROD, old, self.published, RSP_EVENT)
    }

    /// Asks for an event with the next request. `true`: there is one already, go on taking.
    #[must_use = "what has arrived meanwhile brings no event"]
    pub fn arm(&mut self) -> bool {
        self.slots.arm(REQ_EVENT, self.taken, REQ_PROD)
    }

    /// Asks for an event when there are more requests than those that [`Self::available`] counted
    /// last. `true`: there are already, count again. For one who needs several at once and leaves
    /// in the ring what is too few.
    #[must_use = "what has arrived meanwhile brings no event"]
    pub fn arm_for_more(&mut self) -> bool {
        self.slots.arm(REQ_EVENT, self.known, REQ_PROD)
    }

    /// Gives the table back, for another connection.
    #[must_use]
    pub fn into_table(self) -> InflightTable {
        self.table
    }
}
