//! Which preserved page holds which part of the in-flight table of which queue.
//!
//! Preserved pages outlive the driver domain's incarnation. Page 0 is a directory:
//!
//! | bytes      | content                                                             |
//! |------------|---------------------------------------------------------------------|
//! | 0..8       | [`FORMAT`]; anything else means that nothing was ever kept          |
//! | 8 + 8 × i  | key of preserved page i + 1, or 0 while that page is free           |
//!
//! A key names a vbd and the page's number in it, and is stored as one word, so that there is no
//! instant at which a page has half an owner. Each queue has [`PAGES_PER_QUEUE`] numbers, as many
//! as its ring has pages are in use; the first of them has the head of the queue's table. A head
//! is made to forget what it held before any page of its table gets or loses a key. What a table
//! holds names the connection in turn ([`shmem::inflight::Identity`]).
//!
//! Besides these a block driver domain needs preserved pages that its disk reads from and writes
//! to on the domain's own behalf: the disk may still write to them after the incarnation has
//! died, so they must not be memory that the next incarnation has other use for.

use alloc::vec::Vec;
use core::sync::atomic::Ordering::{Acquire, Release};
use domain_api::DomainId;
use shmem::Page;
use shmem::inflight::InflightTable;
use xen_abi::PAGE_SIZE;

/// First word of a directory in this format: "AXBLKB01".
pub const FORMAT: u64 = u64::from_le_bytes(*b"AXBLKB01");
/// Most queues of a vbd.
pub const MAX_QUEUES: u16 = 4;
/// Most pages of a ring, as a power of 2.
pub const MAX_RING_ORDER: u32 = 2;
/// Most pages of a ring, and so of its in-flight table.
pub const PAGES_PER_QUEUE: usize = 1 << MAX_RING_ORDER;
/// Pages for in-flight tables that a vbd needs at most.
pub const TABLE_PAGES_PER_VBD: usize = MAX_QUEUES as usize * PAGES_PER_QUEUE;
/// Pages for the disk's own use that a vbd needs.
pub const BOUNCE_PAGES_PER_VBD: usize = 8;
/// Most vbds of a driver domain.
pub const MAX_VBDS: usize = MOST_KEYS / TABLE_PAGES_PER_VBD;

const KEYS: usize = 8;
const MOST_KEYS: usize = (PAGE_SIZE - KEYS) / 8;
const KEY_IN_USE: u64 = 1 << 63;

/// Preserved pages that a driver domain needs for so many vbds.
#[must_use]
pub const fn pages_for(vbds: usize) -> usize {
    1 + vbds * (TABLE_PAGES_PER_VBD + BOUNCE_PAGES_PER_VBD)
}

/// Splits a driver domain's preserved pages into those for [`Preserved`] and those that become
/// bounce pages. The same pages get the same use in every incarnation.
#[must_use]
pub fn split(mut pages: Vec<Page>) -> (Vec<Page>, Vec<Page>) {
    let rest = pages.len().saturating_sub(1);
    let vbds = rest / (TABLE_PAGES_PER_VBD + BOUNCE_PAGES_PER_VBD);
    let bounce = if vbds == 0 { rest / 3 } else { vbds * BOUNCE_PAGES_PER_VBD };
    let bounce = pages.split_off(pages.len() - bounce);
    (pages, bounce)
}

/// Names a vbd: the frontend's domain, and the number of the device there.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct VbdId {
    /// The frontend's domain.
    pub domain: DomainId,
    /// The device's number in that domain, such as 51712 for xvda.
    pub device: u32,
}

impl core::fmt::Display for VbdId {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "vbd{}.{}", self.domain.0, self.device)
    }
}

/// The directory and the pages that it names.
#[derive(Debug)]
pub struct Preserved {
    directory: Option<Page>,
    tables: Vec<Page>,
}

impl Preserved {
    /// Takes the pages, with what the last incarnation left in them.
    #[must_use]
    pub fn new(pages: Vec<Page>) -> Self {
        let mut pages = pages.into_iter();
        let directory = pages.next();
        let preserved = Self { directory, tables: pages.take(MOST_KEYS).collect() };
        if let Some(directory) = &preserved.directory
            && directory.u64(0).load(Acquire) != FORMAT
        {
            for place in 0..MOST_KEYS {
                preserved.store(place, 0);
            }
            directory.u64(0).store(FORMAT, Release);
        }
        preserved
    }

    /// The table of a queue whose ring has `pages` pages, with what it held before, if anything.
    /// `None` when too few pages are free.
    ///
    /// # Panics
    /// When the queue or the pages are more than a vbd can have.
    pub fn open(&mut self, vbd: VbdId, queue: u16, pages: usize) -> Option<InflightTable> {
        assert!(queue < MAX_QUEUES && (1..=PAGES_PER_QUEUE).contains(&pages));
        let first = usize::from(queue) * PAGES_PER_QUEUE;
        let mut table = Vec::with_capacity(pages);
        for number in first..first + pages {
            let wanted = key(vbd, number);
            let place = match self.find(wanted) {
                Some(place) => place,
                None => {
                    let place = self.find(0)?;
                    let head = table.first().unwrap_or(&self.tables[place]);
                    InflightTable::new(head.clone()).forget();
                    self.store(place, wanted);
                    place
                }
            };
            table.push(self.tables[place].clone());
        }
        Some(InflightTable::with_pages(table))
    }

    /// Makes sure that nothing of this vbd will ever be replayed. Its pages stay its own.
    pub fn forget(&mut self, vbd: VbdId) {
        self.forget_heads(|other| other == vbd);
    }

    /// Frees the pages of a vbd that is gone.
    pub fn release(&mut self, vbd: VbdId) {
        self.retain(|other| other != vbd);
    }

    /// Frees the pages of all vbds that are not among those given.
    pub fn retain(&mut self, exists: impl Fn(VbdId) -> bool) {
        self.forget_heads(|vbd| !exists(vbd));
        for place in 0..self.tables.len() {
            let word = self.load(place);
            if word != 0 && !exists(vbd_of(word)) {
                self.store(place, 0);
            }
        }
    }

    fn forget_heads(&self, whose: impl Fn(VbdId) -> bool) {
        for (place, page) in self.tables.iter().enumerate() {
            let word = self.load(place);
            if word != 0 && number_of(word).is_multiple_of(PAGES_PER_QUEUE) && whose(vbd_of(word)) {
                InflightTable::new(page.clone()).forget();
            }
        }
    }

    fn find(&self, wanted: u64) -> Option<usize> {
        (0..self.tables.len()).find(|&place| self.load(place) == wanted)
    }

    fn load(&self, place: usize) -> u64 {
        self.directory.as_ref().map_or(0, |page| page.u64(KEYS + 8 * place).load(Acquire))
    }

    fn store(&self, place: usize, word: u64) {
        if let Some(page) = &self.directory {
            page.u64(KEYS + 8 * place).store(word, Release);
        }
    }
}

fn key(vbd: VbdId, number: usize) -> u64 {
    KEY_IN_USE | (number as u64) << 48 | u64::from(vbd.domain.0) << 32 | u64::from(vbd.device)
}

#[expect(clippy::cast_possible_truncation, reason = "takes the key's fields apart")]
fn vbd_of(word: u64) -> VbdId {
    VbdId { domain: DomainId((word >> 32) as u16), device: word as u32 }
}

fn number_of(word: u64) -> usize {
    usize::from((word >> 48) as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    const VBD: VbdId = VbdId { domain: DomainId(3), device: 51712 };
    const OTHER: VbdId = VbdId { domain: DomainId(3), device: 51728 };

    fn pages(count: usize) -> Vec<Page> {
        (0..count).map(|_| Page::new_zeroed()).collect()
    }

    #[test]
    fn a_vbd_keeps_its_pages_over_incarnations() {
        let pages = pages(8);
        let mut first = Preserved::new(pages.clone());
        assert!(first.open(OTHER, 0, 2).is_some());
        assert!(first.open(VBD, 1, 4).is_some());
        let words: Vec<u64> = (0..7).map(|place| first.load(place)).collect();
        let mut second = Preserved::new(pages);
        assert!(second.open(VBD, 1, 4).is_some());
        assert!(second.open(OTHER, 0, 2).is_some());
        assert_eq!(words, (0..7).map(|place| second.load(place)).collect::<Vec<_>>());
        assert_eq!(words[6], 0);
    }

    #[test]
    fn pages_are_bounded_and_come_back() {
        let mut preserved = Preserved::new(pages(1 + 5));
        assert!(preserved.open(VBD, 0, 4).is_some());
        assert!(preserved.open(OTHER, 0, 2).is_none());
        preserved.retain(|vbd| vbd == OTHER);
        assert!(preserved.open(OTHER, 3, 4).is_some());
        preserved.release(OTHER);
        assert!(preserved.open(VBD, 0, 1).is_some());
    }

    #[test]
    fn garbage_in_the_directory_is_a_fresh_start() {
        let pages = pages(3);
        pages[0].write(0, &[0xee; PAGE_SIZE]);
        assert!(Preserved::new(pages).open(VBD, 0, 2).is_some());
    }

    #[test]
    fn without_pages_no_vbd_is_served() {
        assert!(Preserved::new(Vec::new()).open(VBD, 0, 1).is_none());
    }

    #[test]
    fn what_a_domain_is_told_to_need_is_enough() {
        for vbds in 1..=MAX_VBDS {
            let (kept, bounce) = split(pages(pages_for(vbds)));
            assert_eq!(bounce.len(), vbds * BOUNCE_PAGES_PER_VBD);
            let mut preserved = Preserved::new(kept);
            for device in 0..u32::try_from(vbds).unwrap() {
                for queue in 0..MAX_QUEUES {
                    let vbd = VbdId { device, ..VBD };
                    assert!(preserved.open(vbd, queue, PAGES_PER_QUEUE).is_some());
                }
            }
        }
        assert_eq!(split(pages(4)).1.len(), 1);
        assert_eq!(split(Vec::new()).0.len(), 0);
    }
}
