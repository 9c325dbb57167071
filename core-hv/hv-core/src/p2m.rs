//! A domain's address space: a four-level x86 page table from guest frames to machine frames.
//!
//! A unikernel domain runs on this table, a hardware-virtualized one under it. Entries
//! are the processor's, with what the core must remember in the bits that it leaves to software:
//!
//! | bits   | meaning                                                             |
//! |--------|---------------------------------------------------------------------|
//! | 0      | present                                                             |
//! | 1      | writable                                                            |
//! | 2      | user, always set                                                    |
//! | 3, 4   | write-through and uncached, for device registers                    |
//! | 9..12  | [`Kind`]                                                            |
//! | 12..52 | machine frame                                                       |
//! | 52     | content outlives an incarnation                                     |
//! | 53     | a grant that the domain's devices may reach                         |
//! | 63     | not executable                                                      |
//!
//! Every change of a leaf goes through `P2m::write_leaf`: that is the one place where an IOMMU
//! will follow. Whatever narrows a translation takes a new generation there, so that no
//! processor uses what it cached (ADR 4). Tables are charged to the domain, and stay until it is
//! destroyed. The core itself remembers the entries that it looked up last, as a processor does:
//! `write_leaf` makes it forget them.

use crate::frame::{Account, FrameTable, Mfn};
use crate::platform::{Platform, Space};
use core::cell::Cell;
use xen_abi::{Errno, Gfn};

const PRESENT: u64 = 1;
const WRITE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const UNCACHED: u64 = 3 << 3;
const KIND_SHIFT: u32 = 9;
const KIND_MASK: u64 = 7 << KIND_SHIFT;
const PRESERVED: u64 = 1 << 52;
const DMA: u64 = 1 << 53;
const NO_EXECUTE: u64 = 1 << 63;
const FRAME_MASK: u64 = 0x000f_ffff_ffff_f000;

/// First guest frame that no domain has: the last one of the lower half. A hypercall instruction
/// at its end would return to an address that is not canonical (Xen's XSA-7).
pub const GFN_LIMIT: u64 = (1 << 35) - 1;

/// Entries that an address space remembers, by the low bits of their guest frame.
const CACHED: usize = 16;

/// What backs a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Memory of the domain's own.
    Ram,
    /// Memory of another domain, which granted it.
    Grant,
    /// A page that the core shares with the domain: shared info, grant table.
    Special,
    /// Registers of a device.
    Device,
    /// The boot module.
    Bundle,
}

/// One page of a domain.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Page {
    /// What backs it.
    pub mfn: Mfn,
    /// How.
    pub kind: Kind,
    /// The domain may write it.
    pub write: bool,
    /// The domain may execute it.
    pub execute: bool,
    /// Its content outlives an incarnation.
    pub preserved: bool,
    /// A grant that devices may reach.
    pub dma: bool,
}

impl Page {
    /// A page with no access but reading.
    #[must_use]
    pub const fn new(mfn: Mfn, kind: Kind) -> Self {
        Self { mfn, kind, write: false, execute: false, preserved: false, dma: false }
    }

    fn encode(self) -> u64 {
        let flag = |set: bool, bit: u64| if set { bit } else { 0 };
        self.mfn.address()
            | PRESENT
            | USER
            | flag(self.write, WRITE)
            | flag(self.kind == Kind::Device, UNCACHED)
            | (self.kind as u64) << KIND_SHIFT
            | flag(self.preserved, PRESERVED)
            | flag(self.dma, DMA)
            | flag(!self.execute, NO_EXECUTE)
    }

    fn decode(raw: u64) -> Option<Self> {
        if raw & PRESENT == 0 {
            return None;
        }
        let kind = match (raw & KIND_MASK) >> KIND_SHIFT {
            0 => Kind::Ram,
            1 => Kind::Grant,
            2 => Kind::Special,
            3 => Kind::Device,
            _ => Kind::Bundle,
        };
        Some(Self {
            mfn: frame_of(raw),
            kind,
            write: raw & WRITE != 0,
            execute: raw & NO_EXECUTE == 0,
            preserved: raw & PRESERVED != 0,
            dma: raw & DMA != 0,
        })
    }

    /// Whether `self` takes nothing away from who has `old` cached.
    fn widens(self, old: Self) -> bool {
        self.mfn == old.mfn && self.write >= old.write && self.execute >= old.execute
    }
}

fn frame_of(raw: u64) -> Mfn {
    Mfn((raw & FRAME_MASK) >> 12)
}

/// What a walk over all pages met.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Walk {
    /// A page; go on behind it.
    Page(Gfn, Page),
    /// Nothing before this frame; go on there.
    Skipped(Gfn),
    /// Nothing more.
    End,
}

/// The address space of one domain.
pub struct P2m {
    root: Mfn,
    generation: u64,
    /// A kernel of its own decides what is executable: pages may be writable too.
    lax: bool,
    /// Guest frames and their entries, as they are in the tables.
    cache: [Cell<(u64, u64)>; CACHED],
}

impl P2m {
    /// An empty address space. `lax`: pages may be writable and executable at once, as the machine's
    /// own memory is for a kernel.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub fn new<P: Platform>(
        p: &mut P,
        frames: &mut FrameTable,
        account: &mut Account,
        lax: bool,
    ) -> Result<Self, Errno> {
        let root = frames.allocate(p, account)?;
        p.share_core(root);
        let cache = [const { Cell::new((u64::MAX, 0)) }; CACHED];
        Ok(Self { root, generation: frames.next_generation(), lax, cache })
    }

    /// What a processor loads to run in it.
    #[must_use]
    pub fn space(&self) -> Space {
        Space { root: self.root, generation: self.generation }
    }

    /// The page at `gfn`.
    pub fn page<P: Platform>(&self, p: &P, gfn: Gfn) -> Option<Page> {
        Page::decode(self.entry(p, gfn))
    }

    /// The frame behind `gfn` if it is memory that the domain can read, or write if `write`.
    #[inline]
    pub fn memory<P: Platform>(&self, p: &P, gfn: Gfn, write: bool) -> Option<Mfn> {
        let raw = self.entry(p, gfn);
        let is_device = raw & KIND_MASK == (Kind::Device as u64) << KIND_SHIFT;
        let allowed = raw & PRESENT != 0 && !is_device && (!write || raw & WRITE != 0);
        allowed.then_some(frame_of(raw))
    }

    /// The frame behind `gfn` if it is the domain's own memory.
    #[inline]
    pub fn own_memory<P: Platform>(&self, p: &P, gfn: Gfn) -> Option<Mfn> {
        let raw = self.entry(p, gfn);
        (raw & (PRESENT | KIND_MASK) == PRESENT | (Kind::Ram as u64) << KIND_SHIFT)
            .then_some(frame_of(raw))
    }

    /// The entry for `gfn`, or 0.
    #[inline]
    fn entry<P: Platform>(&self, p: &P, gfn: Gfn) -> u64 {
        let (cached, raw) = self.cached(gfn.0).get();
        if cached == gfn.0 { raw } else { self.look_up(p, gfn) }
    }

    fn cached(&self, gfn: u64) -> &Cell<(u64, u64)> {
        &self.cache[offset(Gfn(gfn), 0) / 8 % CACHED]
    }

    fn look_up<P: Platform>(&self, p: &P, gfn: Gfn) -> u64 {
        let Some((table, offset)) = self.leaf(p, gfn) else { return 0 };
        let raw = p.load64(table, offset);
        self.cached(gfn.0).set((gfn.0, raw));
        raw
    }

    /// Whether what is remembered is what the tables say.
    #[cfg(any(test, feature = "fake"))]
    pub(crate) fn is_cache_true<P: Platform>(&self, p: &P) -> bool {
        let page =
            |gfn| self.leaf(p, Gfn(gfn)).and_then(|(table, at)| Page::decode(p.load64(table, at)));
        self.cache.iter().map(Cell::get).all(|(gfn, raw)| Page::decode(raw) == page(gfn))
    }

    fn leaf<P: Platform>(&self, p: &P, gfn: Gfn) -> Option<(Mfn, usize)> {
        if gfn.0 >= GFN_LIMIT {
            return None;
        }
        let mut table = self.root;
        for level in [3, 2, 1] {
            let raw = p.load64(table, offset(gfn, level));
            if raw & PRESENT == 0 {
                return None;
            }
            table = frame_of(raw);
        }
        Some((table, offset(gfn, 0)))
    }

    /// Puts a page where there is none.
    ///
    /// # Errors
    /// `EINVAL`: beyond the address space, or writable and executable unlawfully. `EEXIST`: there
    /// is a page. `ENOMEM`: no frame for a table.
    pub fn insert<P: Platform>(
        &mut self,
        p: &mut P,
        frames: &mut FrameTable,
        account: &mut Account,
        gfn: Gfn,
        page: Page,
    ) -> Result<(), Errno> {
        if gfn.0 >= GFN_LIMIT || page.write && page.execute && !self.lax {
            return Err(Errno::EINVAL);
        }
        let mut table = self.root;
        for level in [3, 2, 1] {
            let at = offset(gfn, level);
            let raw = p.load64(table, at);
            table = if raw & PRESENT == 0 {
                let next = frames.allocate(p, account)?;
                p.store64(table, at, next.address() | PRESENT | WRITE | USER);
                next
            } else {
                frame_of(raw)
            };
        }
        let at = offset(gfn, 0);
        if p.load64(table, at) & PRESENT != 0 {
            return Err(Errno::EEXIST);
        }
        self.write_leaf(p, frames, (table, at), Some(page));
        Ok(())
    }

    /// Takes away the page at `gfn`, if there is one.
    pub fn remove<P: Platform>(
        &mut self,
        p: &mut P,
        frames: &mut FrameTable,
        gfn: Gfn,
    ) -> Option<Page> {
        let leaf = self.leaf(p, gfn)?;
        let page = Page::decode(p.load64(leaf.0, leaf.1))?;
        self.write_leaf(p, frames, leaf, None);
        Some(page)
    }

    /// Backs the page at `gfn`, which exists, with another frame.
    pub fn replace<P: Platform>(
        &mut self,
        p: &mut P,
        frames: &mut FrameTable,
        gfn: Gfn,
        page: Page,
    ) {
        if let Some(leaf) = self.leaf(p, gfn) {
            self.write_leaf(p, frames, leaf, Some(page));
        }
    }

    /// The only place that changes a translation. Device mappings will follow here.
    fn write_leaf<P: Platform>(
        &mut self,
        p: &mut P,
        frames: &mut FrameTable,
        (table, at): (Mfn, usize),
        page: Option<Page>,
    ) {
        let old = Page::decode(p.load64(table, at));
        if old.is_some_and(|old| !page.is_some_and(|new| new.widens(old))) {
            self.generation = frames.next_generation();
        }
        p.store64(table, at, page.map_or(0, Page::encode));
        // The low bits of the guest frame are those of its place in the table.
        self.cached(at as u64 / 8).set((u64::MAX, 0));
    }

    /// Finds the next page at or behind `from`. Looks at one table's worth of entries at most.
    pub fn walk<P: Platform>(&self, p: &P, from: Gfn) -> Walk {
        if from.0 >= GFN_LIMIT {
            return Walk::End;
        }
        let mut table = self.root;
        for level in [3, 2, 1] {
            let raw = p.load64(table, offset(from, level));
            if raw & PRESENT == 0 {
                return self.skip(p, table, from, level);
            }
            table = frame_of(raw);
        }
        let mut gfn = from.0;
        loop {
            if let Some(page) = Page::decode(p.load64(table, offset(Gfn(gfn), 0))) {
                return Walk::Page(Gfn(gfn), page);
            }
            gfn += 1;
            if gfn.is_multiple_of(512) {
                return Walk::Skipped(Gfn(gfn));
            }
        }
    }

    /// From an absent entry of `table` to the next present one of that table.
    fn skip<P: Platform>(&self, p: &P, table: Mfn, from: Gfn, level: u32) -> Walk {
        let span = 1 << (9 * level);
        let mut gfn = (from.0 / span + 1) * span;
        while !gfn.is_multiple_of(span * 512) && gfn < GFN_LIMIT {
            if p.load64(table, offset(Gfn(gfn), level)) & PRESENT != 0 {
                break;
            }
            gfn += span;
        }
        Walk::Skipped(Gfn(gfn))
    }

    /// Frees the pages of one last-level table and whatever tables become empty by it. Answers
    /// whether nothing is left but the root. Only memory of the domain's own is released.
    pub fn tear_down<P: Platform>(
        &mut self,
        p: &mut P,
        frames: &mut FrameTable,
        account: &mut Account,
    ) -> bool {
        let mut path = [(self.root, 0); 3];
        let mut table = self.root;
        let mut depth = 0;
        while depth < 3 {
            let entries = if depth == 0 { 256 } else { 512 };
            match first_present(p, table, entries) {
                Some(at) => {
                    path[depth] = (table, at);
                    table = frame_of(p.load64(table, at));
                    depth += 1;
                }
                None if depth == 0 => return true,
                // An insertion that found no memory left this table empty.
                None => break,
            }
        }
        if depth == 3 {
            self.clear_table(p, frames, account, table);
        }
        for &(parent, at) in path[..depth].iter().rev() {
            frames.release(table, account);
            p.store64(parent, at, 0);
            table = parent;
            if parent == self.root || first_present(p, parent, 512).is_some() {
                break;
            }
        }
        false
    }

    fn clear_table<P: Platform>(
        &mut self,
        p: &mut P,
        frames: &mut FrameTable,
        account: &mut Account,
        table: Mfn,
    ) {
        for at in (0..4096).step_by(8) {
            if let Some(page) = Page::decode(p.load64(table, at)) {
                self.write_leaf(p, frames, (table, at), None);
                if page.kind == Kind::Ram {
                    frames.release(page.mfn, account);
                }
            }
        }
    }

    /// Frees the root of an address space that was torn down and that no processor has loaded.
    pub fn free(self, frames: &mut FrameTable, account: &mut Account) {
        frames.release(self.root, account);
    }
}

fn first_present<P: Platform>(p: &P, table: Mfn, entries: usize) -> Option<usize> {
    (0..entries).map(|n| n * 8).find(|&at| p.load64(table, at) & PRESENT != 0)
}

/// Where the entry for `gfn` is in a table of `level` (0: the last).
const fn offset(gfn: Gfn, level: u32) -> usize {
    ((gfn.0 >> (9 * level)) & 511) as usize * 8
}
