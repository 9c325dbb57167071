//! The in-flight table: what a backend was doing when it died.
//!
//! A response overwrites the slot of its request, so a backend that dies between writing
//! responses and publishing them has destroyed requests that nobody answered. It copies each
//! slot privately anyway before it looks at it; [`BackRing`](crate::ring::BackRing) makes that
//! copy here, in a page that outlives the incarnation. The next incarnation finds in
//! `[rsp_prod, consumed)` what was under way, whatever the ring's slots have become.
//!
//! One page, or as many as the ring has, written by the backend alone:
//!
//! | bytes  | field        | meaning                                                       |
//! |--------|--------------|---------------------------------------------------------------|
//! | 0..4   | `magic`      | [`MAGIC`] when the rest is valid; written last                |
//! | 4..6   | `slot_bytes` | bytes of an entry                                             |
//! | 6..8   | `domid`      | the frontend's domain                                         |
//! | 8..12  | `slots`      | number of entries, N                                          |
//! | 12..16 | `ring_ref`   | grant reference of the ring's first page                      |
//! | 16..20 | `port`       | the frontend's event port                                     |
//! | 20..24 | `consumed`   | index behind the last request taken from the ring             |
//! | 24..32 | `incarnation`| tag that differs between incarnations of the frontend         |
//! | 64..   | entries      | request i is entry i mod N                                    |
//!
//! Order: an entry is written, then `consumed` is stored with `Release`; the reader is the next
//! incarnation, which starts after the writer has stopped, so an entry that `consumed` covers is
//! whole, and a torn one is not covered and still intact in the ring.
//!
//! Source: the takeover conditions R1 and R8 and the attach algorithm, `xen-abi.md` §10.

use crate::page::Page;
use crate::sync::Ordering::{Relaxed, Release};
use crate::{read_across, write_across};
use alloc::vec::Vec;
use xen_abi::{DomainId, EventPort, GrantRef, PAGE_SIZE};

/// First word of a valid table: "AXIF".
pub const MAGIC: u32 = u32::from_le_bytes(*b"AXIF");
/// Where entry 0 is.
pub const ENTRIES: usize = 64;

const OFFSET_MAGIC: usize = 0;
const OFFSET_SHAPE: usize = 4;
const OFFSET_SLOTS: usize = 8;
const OFFSET_RING: usize = 12;
const OFFSET_PORT: usize = 16;
const OFFSET_CONSUMED: usize = 20;
const OFFSET_INCARNATION: usize = 24;

/// Which connection a table belongs to. Two connections that differ in anything here share no
/// requests.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Identity {
    /// The frontend's domain.
    pub frontend: DomainId,
    /// A number that differs between lives of the frontend's domain.
    pub incarnation: u64,
    /// The ring's grant reference (of its first page).
    pub ring: GrantRef,
    /// The frontend's event port.
    pub port: EventPort,
}

/// Preserved pages that hold the private copies of a ring's requests.
#[derive(Debug)]
pub struct InflightTable {
    /// The first one has the head.
    pages: Vec<Page>,
    slot_bytes: usize,
    mask: u32,
}

impl InflightTable {
    /// Takes a page that outlives the domain's incarnation, with whatever the last one left
    /// there (zeros when there was none).
    #[must_use]
    pub fn new(page: Page) -> Self {
        Self::with_pages(alloc::vec![page])
    }

    /// The same of several pages, for a ring of several pages. The first names the table: it is
    /// the one that is made to forget.
    ///
    /// # Panics
    /// When there are none.
    #[must_use]
    pub fn with_pages(pages: Vec<Page>) -> Self {
        assert!(!pages.is_empty(), "an in-flight table has a page");
        Self { pages, slot_bytes: 0, mask: 0 }
    }

    /// Makes sure that nothing will be taken from this table again. For a connection that ended
    /// in good order.
    pub fn forget(&mut self) {
        self.pages[0].u32(OFFSET_MAGIC).store(0, Release);
    }

    /// Says for which ring the table is. Returns `consumed` if it was for the same one before,
    /// and `None` after having started it anew at `start`.
    ///
    /// # Panics
    /// When the entries do not fit the pages.
    pub(crate) fn open(
        &mut self,
        identity: Identity,
        slots: u32,
        slot_bytes: usize,
        start: u32,
    ) -> Option<u32> {
        assert!(
            ENTRIES + slots as usize * slot_bytes <= self.pages.len() * PAGE_SIZE,
            "an in-flight table has as many pages as its ring"
        );
        self.slot_bytes = slot_bytes;
        self.mask = slots - 1;
        let wanted = Self::head(identity, slots, slot_bytes);
        if self.load(OFFSET_MAGIC) == MAGIC
            && wanted.iter().all(|&(offset, value)| self.load(offset) == value)
        {
            return Some(self.load(OFFSET_CONSUMED));
        }
        // Invalid until it is complete, should we die in between.
        self.pages[0].u32(OFFSET_MAGIC).store(0, Release);
        for (offset, value) in wanted {
            self.pages[0].u32(offset).store(value, Release);
        }
        self.pages[0].u32(OFFSET_CONSUMED).store(start, Release);
        self.pages[0].u32(OFFSET_MAGIC).store(MAGIC, Release);
        None
    }

    #[expect(clippy::cast_possible_truncation, reason = "halves, and a slot is below 4096 bytes")]
    fn head(identity: Identity, slots: u32, slot_bytes: usize) -> [(usize, u32); 6] {
        [
            (OFFSET_SHAPE, slot_bytes as u32 | u32::from(identity.frontend.0) << 16),
            (OFFSET_SLOTS, slots),
            (OFFSET_RING, identity.ring.0),
            (OFFSET_PORT, identity.port.0),
            (OFFSET_INCARNATION, identity.incarnation as u32),
            (OFFSET_INCARNATION + 4, (identity.incarnation >> 32) as u32),
        ]
    }

    fn load(&self, offset: usize) -> u32 {
        self.pages[0].u32(offset).load(Relaxed)
    }

    fn entry(&self, index: u32) -> usize {
        ENTRIES + (index & self.mask) as usize * self.slot_bytes
    }

    /// Keeps the copy of request `index`, and only then counts it as consumed.
    #[inline]
    pub(crate) fn store(&mut self, index: u32, request: &[u8]) {
        write_across(&self.pages, self.entry(index), request);
        self.pages[0].u32(OFFSET_CONSUMED).store(index.wrapping_add(1), Release);
    }

    /// The copy of request `index`.
    pub(crate) fn copy(&self, index: u32, request: &mut [u8]) {
        read_across(&self.pages, self.entry(index), request);
    }
}
