//! Machine frames: which are free, whose the others are, and who still uses them.
//!
//! A frame goes through these states:
//!
//! ```text
//!  fresh or free ──allocate (scrubbed)──▶ used by one domain ──release──▶ free
//!                                            │ release while pinned          ▲
//!                                            └────────▶ orphan ──last unpin──┘
//! ```
//!
//! A *pin* says that somebody other than the owner reaches the frame: a grant that is mapped, or
//! being copied. A pinned frame never becomes free, whatever its owner does or whether it still
//! lives: it becomes an orphan that nobody else gets. Frames are scrubbed when they are given
//! out, so nothing of an earlier owner is ever seen.

use crate::platform::Platform;
use core::ops::Range;
use heapless::Vec;
use xen_abi::{DomainId, Errno};

/// A machine frame number. Only the frame table and the page-table code make one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(transparent)]
pub struct Mfn(pub u64);

impl Mfn {
    /// Physical address of the frame's first byte.
    #[must_use]
    pub const fn address(self) -> u64 {
        self.0 << 12
    }
}

/// Not ours, or never given out so far.
const UNTOUCHED: u8 = 0;
const FREE: u8 = 1;
const USED: u8 = 2;
const ORPHAN: u8 = 3;

/// What the core knows of one frame. 16 bytes; all zero means: never given out.
#[derive(Default)]
#[repr(C)]
pub struct FrameInfo {
    pins: u32,
    /// Next frame of the free list, 0 behind the last.
    next: u32,
    owner: u16,
    state: u8,
    pad: [u8; 5],
}
const _: () = assert!(size_of::<FrameInfo>() == 16);

/// Most separate ranges of memory.
pub const MAX_RANGES: usize = 64;

/// All frames that can be given out.
pub struct FrameTable {
    info: &'static mut [FrameInfo],
    /// Frames that were never given out.
    fresh: Vec<Range<u64>, MAX_RANGES>,
    first_free: u32,
    free: u64,
    total: u64,
    orphans: u64,
    /// Last number of [`Self::next_generation`].
    generation: u64,
}

/// How much memory a domain may use, and does.
#[derive(Clone, Copy, Debug)]
pub struct Account {
    /// Whose.
    pub owner: DomainId,
    /// Frames charged now.
    pub pages: u32,
    /// Most frames.
    pub max: u32,
}

impl FrameTable {
    /// A table without frames.
    #[must_use]
    pub const fn empty() -> Self {
        Self {
            info: &mut [],
            fresh: Vec::new(),
            first_free: 0,
            free: 0,
            total: 0,
            orphans: 0,
            generation: 0,
        }
    }

    /// Takes over the memory of the table itself.
    pub fn set_memory(&mut self, info: &'static mut [FrameInfo]) {
        self.info = info;
    }

    /// Gives that memory back; there are no frames any more.
    #[cfg(any(test, feature = "fake"))]
    pub(crate) fn take_memory(&mut self) -> &'static mut [FrameInfo] {
        core::mem::take(&mut self.info)
    }

    /// Adds the whole frames of a range of physical addresses, except frame 0 and those that
    /// have no entry in the table. More ranges than [`MAX_RANGES`] are left unused.
    pub fn add(&mut self, range: &Range<u64>) {
        let start = range.start.div_ceil(4096).max(1);
        let end = (range.end >> 12).min(self.info.len() as u64).min(u64::from(u32::MAX));
        if start < end && self.fresh.push(start..end).is_ok() {
            self.free += end - start;
            self.total += end - start;
        }
    }

    /// Frames managed, and frames free.
    #[must_use]
    pub fn counts(&self) -> (u64, u64) {
        (self.total, self.free)
    }

    /// Frames that have no owner any more but are still pinned.
    #[must_use]
    pub fn orphans(&self) -> u64 {
        self.orphans
    }

    /// A number for an address space whose translations were narrowed; never the same twice.
    pub fn next_generation(&mut self) -> u64 {
        self.generation += 1;
        self.generation
    }

    /// Whether a frame is memory that is given out by this table, now or later.
    #[must_use]
    pub fn manages(&self, mfn: Mfn) -> bool {
        self.info.get(index(mfn)).is_some_and(|info| info.state != UNTOUCHED)
            || self.fresh.iter().any(|range| range.contains(&mfn.0))
    }

    /// Gives out a frame full of zeros, charged to `account`.
    ///
    /// # Errors
    /// `ENOMEM`: the account is at its limit, or no frame is free.
    pub fn allocate<P: Platform>(
        &mut self,
        p: &mut P,
        account: &mut Account,
    ) -> Result<Mfn, Errno> {
        if account.pages >= account.max {
            return Err(Errno::ENOMEM);
        }
        let mfn = self.take().ok_or(Errno::ENOMEM)?;
        p.zero(mfn);
        let info = &mut self.info[index(mfn)];
        *info = FrameInfo { pins: 0, next: 0, owner: account.owner.0, state: USED, pad: [0; 5] };
        account.pages += 1;
        self.free -= 1;
        Ok(mfn)
    }

    fn take(&mut self) -> Option<Mfn> {
        if self.first_free != 0 {
            let mfn = Mfn(u64::from(self.first_free));
            self.first_free = self.info[index(mfn)].next;
            return Some(mfn);
        }
        let range = self.fresh.last_mut()?;
        let mfn = Mfn(range.start);
        range.start += 1;
        if range.is_empty() {
            self.fresh.pop();
        }
        Some(mfn)
    }

    /// Takes a frame back from its owner. If it is pinned, it is freed at the last unpin.
    ///
    /// # Panics
    /// The frame is not used by the owner of `account`.
    pub fn release(&mut self, mfn: Mfn, account: &mut Account) {
        let info = &mut self.info[index(mfn)];
        assert!(
            info.state == USED && info.owner == account.owner.0,
            "only its owner releases a frame"
        );
        account.pages -= 1;
        if info.pins > 0 {
            info.state = ORPHAN;
            self.orphans += 1;
        } else {
            self.put(mfn);
        }
    }

    fn put(&mut self, mfn: Mfn) {
        let next = self.first_free;
        self.info[index(mfn)] = FrameInfo { pins: 0, next, owner: 0, state: FREE, pad: [0; 5] };
        #[expect(clippy::cast_possible_truncation, reason = "`add` keeps frames below 2^32")]
        {
            self.first_free = mfn.0 as u32;
        }
        self.free += 1;
    }

    /// Whether the frame is `owner`'s.
    #[must_use]
    pub fn is_owned_by(&self, mfn: Mfn, owner: DomainId) -> bool {
        self.info.get(index(mfn)).is_some_and(|info| info.state == USED && info.owner == owner.0)
    }

    /// Whether somebody other than its owner reaches the frame.
    #[must_use]
    pub fn is_pinned(&self, mfn: Mfn) -> bool {
        self.info.get(index(mfn)).is_some_and(|info| info.pins > 0)
    }

    /// Notes one more user of a frame beside its owner.
    ///
    /// # Panics
    /// The frame is not in use.
    pub fn pin(&mut self, mfn: Mfn) {
        let info = &mut self.info[index(mfn)];
        assert!(info.state == USED || info.state == ORPHAN, "only frames in use are pinned");
        info.pins += 1;
    }

    /// Takes one such note back.
    ///
    /// # Panics
    /// The frame is not pinned.
    pub fn unpin(&mut self, mfn: Mfn) {
        let info = &mut self.info[index(mfn)];
        assert!(info.pins > 0, "every unpin follows a pin");
        info.pins -= 1;
        if info.pins == 0 && info.state == ORPHAN {
            self.orphans -= 1;
            self.put(mfn);
        }
    }

    /// Sum of all pins; for tests.
    #[must_use]
    pub fn total_pins(&self) -> u64 {
        self.info.iter().map(|info| u64::from(info.pins)).sum()
    }
}

fn index(mfn: Mfn) -> usize {
    usize::try_from(mfn.0).unwrap_or(usize::MAX)
}

/// A table of a domain's objects in frames that are charged to it; grows frame by frame.
///
/// Emptying it keeps the frames, so that a restart cannot fail for want of memory.
#[derive(Debug)]
pub struct Table<const N: usize> {
    frames: [Mfn; N],
    held: u16,
    len: u16,
}

impl<const N: usize> Table<N> {
    /// A table without frames.
    #[must_use]
    pub const fn new() -> Self {
        Self { frames: [Mfn(0); N], held: 0, len: 0 }
    }

    /// Frames in use.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len.into()
    }

    /// Whether no frame is in use.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The frame number `index`, if it is in use.
    #[must_use]
    pub fn frame(&self, index: usize) -> Option<Mfn> {
        self.frames[..self.len()].get(index).copied()
    }

    /// Where the entry `index` of `bytes` bytes is, if the table has it.
    #[must_use]
    pub fn entry(&self, index: u32, bytes: usize) -> Option<(Mfn, usize)> {
        let per_frame = 4096 / bytes;
        let index = index as usize;
        Some((self.frame(index / per_frame)?, index % per_frame * bytes))
    }

    /// Adds a frame of zeros.
    ///
    /// # Errors
    /// `ENOSPC`: the table is at its limit. `ENOMEM`: as [`FrameTable::allocate`].
    pub fn grow<P: Platform>(
        &mut self,
        p: &mut P,
        frames: &mut FrameTable,
        account: &mut Account,
    ) -> Result<Mfn, Errno> {
        if self.len() == N {
            return Err(Errno::ENOSPC);
        }
        if self.len == self.held {
            self.frames[self.len()] = frames.allocate(p, account)?;
            self.held += 1;
        }
        self.len += 1;
        Ok(self.frames[self.len() - 1])
    }

    /// Forgets all entries, keeps the frames.
    pub fn clear<P: Platform>(&mut self, p: &mut P) {
        for &frame in &self.frames[..self.len()] {
            p.zero(frame);
        }
        self.len = 0;
    }

    /// Gives all frames back.
    pub fn free(&mut self, frames: &mut FrameTable, account: &mut Account) {
        for &frame in &self.frames[..self.held.into()] {
            frames.release(frame, account);
        }
        self.held = 0;
        self.len = 0;
    }
}

impl<const N: usize> Default for Table<N> {
    fn default() -> Self {
        Self::new()
    }
}
