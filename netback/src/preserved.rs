//! Which preserved page holds the in-flight table of which ring.
//!
//! Preserved pages outlive the driver domain's incarnation. Page 0 is a directory:
//!
//! | bytes      | content                                                             |
//! |------------|---------------------------------------------------------------------|
//! | 0..8       | [`FORMAT`]; anything else means that nothing was ever kept          |
//! | 8 + 8 × i  | key of preserved page i + 1, or 0 while that page is free           |
//!
//! A key names a ring of a vif's queue and is stored as one word, so that there is no instant at which a
//! page has half an owner. A page is made to forget what it held before it gets a key and before
//! it loses one. What a table holds names the connection in turn ([`shmem::inflight::Identity`]).

use alloc::vec::Vec;
use core::sync::atomic::Ordering::{Acquire, Release};
use domain_api::DomainId;
use shmem::Page;
use shmem::inflight::InflightTable;
use xen_abi::PAGE_SIZE;

/// First word of a directory in this format: "AXNETB01".
pub const FORMAT: u64 = u64::from_le_bytes(*b"AXNETB01");
/// Preserved pages that each queue of a vif needs.
pub const PAGES_PER_QUEUE: usize = 2;
/// Most queues of a vif. Each lets another of a guest's processors send and receive by itself; the
/// driver domain has only one for all of them.
pub const MAX_QUEUES: u16 = 4;
/// Preserved pages that a vif with all queues needs.
pub const PAGES_PER_VIF: usize = MAX_QUEUES as usize * PAGES_PER_QUEUE;

const KEYS: usize = 8;
const MOST_KEYS: usize = (PAGE_SIZE - KEYS) / 8;
const KEY_IN_USE: u64 = 1 << 63;

/// Preserved pages that a driver domain needs for so many vifs: at least, when each has one queue
/// only, and so that each can have all of them.
#[must_use]
pub const fn pages_for(vifs: usize) -> (usize, usize) {
    (1 + vifs * PAGES_PER_QUEUE, 1 + vifs * PAGES_PER_VIF)
}

/// Which ring of a queue.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ring {
    /// From the guest.
    Tx,
    /// To the guest.
    Rx,
}

/// Names a vif: the frontend's domain, and the number of the device there.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct VifId {
    /// The frontend's domain.
    pub domain: DomainId,
    /// The device's number in that domain.
    pub handle: u32,
}

impl core::fmt::Display for VifId {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "vif{}.{}", self.domain.0, self.handle)
    }
}

/// The directory and the pages that it names.
#[derive(Debug)]
pub struct Preserved {
    directory: Option<Page>,
    tables: Vec<Page>,
}

impl Preserved {
    /// Takes the domain's preserved pages, with what the last incarnation left in them.
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

    /// Vifs that find room, at most.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.tables.len() / PAGES_PER_QUEUE
    }

    /// Queues that each of so many vifs can have; at least one, whether there is room or not.
    #[must_use]
    pub fn queues(&self, vifs: usize) -> u16 {
        let share = self.capacity() / vifs.max(1);
        u16::try_from(share).unwrap_or(MAX_QUEUES).clamp(1, MAX_QUEUES)
    }

    /// The table of a ring: the one it had before, or a fresh one. `None` when all are in use.
    pub fn open(&mut self, vif: VifId, ring: Ring, queue: u16) -> Option<InflightTable> {
        let wanted = key(vif, ring, queue);
        if let Some(place) = self.find(wanted) {
            return Some(InflightTable::new(self.tables[place].clone()));
        }
        let place = self.find(0)?;
        let mut table = InflightTable::new(self.tables[place].clone());
        table.forget();
        self.store(place, wanted);
        Some(table)
    }

    /// Makes sure that nothing of this vif will ever be replayed. Its pages stay its own.
    pub fn forget(&mut self, vif: VifId) {
        for place in self.places_of(vif) {
            InflightTable::new(self.tables[place].clone()).forget();
        }
    }

    /// Frees the pages of a vif that is gone.
    pub fn release(&mut self, vif: VifId) {
        self.forget(vif);
        for place in self.places_of(vif) {
            self.store(place, 0);
        }
    }

    /// Frees the pages of all vifs that are not among those given.
    pub fn retain(&mut self, exists: impl Fn(VifId) -> bool) {
        for place in 0..self.tables.len() {
            let word = self.load(place);
            if word != 0 && !exists(vif_of(word)) {
                InflightTable::new(self.tables[place].clone()).forget();
                self.store(place, 0);
            }
        }
    }

    fn places_of(&self, vif: VifId) -> impl Iterator<Item = usize> + '_ {
        let places = 0..self.tables.len();
        places.filter(move |&place| self.load(place) != 0 && vif_of(self.load(place)) == vif)
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

fn key(vif: VifId, ring: Ring, queue: u16) -> u64 {
    let ring = match ring {
        Ring::Tx => 1_u64,
        Ring::Rx => 2,
    };
    let ring = ring | u64::from(queue) << 4;
    KEY_IN_USE | ring << 48 | u64::from(vif.domain.0) << 32 | u64::from(vif.handle)
}

#[expect(clippy::cast_possible_truncation, reason = "takes the key's fields apart")]
fn vif_of(word: u64) -> VifId {
    VifId { domain: DomainId((word >> 32) as u16), handle: word as u32 }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VIF: VifId = VifId { domain: DomainId(3), handle: 0 };
    const OTHER: VifId = VifId { domain: DomainId(3), handle: 1 };

    fn pages(count: usize) -> Vec<Page> {
        (0..count).map(|_| Page::new_zeroed()).collect()
    }

    #[test]
    fn a_vif_keeps_its_pages_over_incarnations() {
        let pages = pages(5);
        let mut first = Preserved::new(pages.clone());
        assert!(first.open(OTHER, Ring::Tx, 0).is_some());
        assert!(first.open(VIF, Ring::Rx, 0).is_some());
        let words: Vec<u64> = (0..4).map(|place| first.load(place)).collect();
        let mut second = Preserved::new(pages);
        assert!(second.open(VIF, Ring::Rx, 0).is_some());
        assert!(second.open(OTHER, Ring::Tx, 0).is_some());
        assert_eq!(words, (0..4).map(|place| second.load(place)).collect::<Vec<_>>());
        assert_eq!(words[2..], [0, 0]);
    }

    #[test]
    fn pages_are_bounded_and_come_back() {
        let mut preserved = Preserved::new(pages(3));
        assert_eq!(preserved.capacity(), 1);
        assert!(preserved.open(VIF, Ring::Tx, 0).is_some());
        assert!(preserved.open(VIF, Ring::Rx, 0).is_some());
        assert!(preserved.open(OTHER, Ring::Tx, 0).is_none());
        preserved.retain(|vif| vif == OTHER);
        assert!(preserved.open(OTHER, Ring::Tx, 0).is_some());
        preserved.release(OTHER);
        assert!(preserved.open(VIF, Ring::Rx, 0).is_some());
    }

    #[test]
    fn each_queue_has_pages_of_its_own() {
        let pages = pages(1 + PAGES_PER_VIF);
        let mut preserved = Preserved::new(pages.clone());
        for queue in 0..MAX_QUEUES {
            assert!(preserved.open(VIF, Ring::Tx, queue).is_some());
            assert!(preserved.open(VIF, Ring::Rx, queue).is_some());
        }
        let words: Vec<u64> = (0..PAGES_PER_VIF).map(|place| preserved.load(place)).collect();
        assert!((1..words.len()).all(|n| !words[..n].contains(&words[n])));
        assert!(preserved.open(OTHER, Ring::Tx, 0).is_none());
        let mut preserved = Preserved::new(pages);
        assert!(preserved.open(VIF, Ring::Rx, 3).is_some(), "the same page as before");
        preserved.release(VIF);
        assert!(preserved.open(OTHER, Ring::Tx, 0).is_some());
    }

    #[test]
    fn pages_are_shared_out_evenly() {
        let preserved = Preserved::new(pages(16));
        let shares = [0, 1, 2, 3, 4, 7, 8, 100].map(|vifs| preserved.queues(vifs));
        assert_eq!(shares, [4, 4, 3, 2, 1, 1, 1, 1]);
        let (least, all) = pages_for(3);
        assert_eq!(Preserved::new(pages(least)).queues(3), 1);
        assert_eq!(Preserved::new(pages(all)).queues(3), MAX_QUEUES);
    }

    #[test]
    fn garbage_in_the_directory_is_a_fresh_start() {
        let pages = pages(3);
        pages[0].write(0, &[0xee; PAGE_SIZE]);
        let mut preserved = Preserved::new(pages);
        assert!(preserved.open(VIF, Ring::Tx, 0).is_some());
    }

    #[test]
    fn without_pages_no_vif_is_served() {
        let mut preserved = Preserved::new(Vec::new());
        assert_eq!(preserved.capacity(), 0);
        assert!(preserved.open(VIF, Ring::Tx, 0).is_none());
    }
}
