//! What each preserved page is used for.
//!
//! Preserved pages outlive the driver domain's incarnation. Some hold what the next one needs:
//! the in-flight tables of queues, the journals of images. The others are those that the disks
//! read from and write to on the domain's own behalf: a disk may still write to them after an
//! incarnation has died, so they must not be memory that the next one has other use for. Page 0
//! is a directory:
//!
//! | bytes      | content                                                             |
//! |------------|---------------------------------------------------------------------|
//! | 0..8       | [`FORMAT`]; anything else means that nothing was ever kept          |
//! | 8 + 8 × i  | key of preserved page i + 1, or 0 while nothing is kept in it       |
//!
//! A key is stored as one word, so that there is no instant at which a page has half an owner. It
//! names a vbd and the page's number in it, or an image. Each queue of a vbd has
//! [`PAGES_PER_QUEUE`] numbers, as many as its ring has pages are in use; the first of them has
//! the head of the queue's table. A head is made to forget what it held before any page of its
//! table gets or loses a key. What a table holds names the connection in turn
//! ([`shmem::inflight::Identity`]).

use crate::tags::Pool;
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
/// Pages that a vbd needs all in all.
pub const PAGES_PER_VBD: usize = TABLE_PAGES_PER_VBD + BOUNCE_PAGES_PER_VBD;
/// Pages that a vbd on a copy-on-write image should have besides: tables, and a journal. It works
/// with fewer, more slowly.
pub const PAGES_PER_IMAGE: usize = qcow2::USUAL_PAGES + 1;

const KEYS: usize = 8;
const MOST_KEYS: usize = (PAGE_SIZE - KEYS) / 8;
const KEY_IN_USE: u64 = 1 << 63;
/// The key is an image's.
const KEY_IMAGE: u64 = 1 << 62;

/// Preserved pages that a driver domain needs for so many vbds, of which so many are on
/// copy-on-write images.
#[must_use]
pub const fn pages_for(vbds: usize, images: usize) -> usize {
    1 + vbds * PAGES_PER_VBD + images * PAGES_PER_IMAGE
}

/// Splits a driver domain's preserved pages into those for its own eyes, and those that its disks
/// have to reach.
#[must_use]
pub fn split(mut pages: Vec<Page>) -> (Vec<Page>, Vec<Page>) {
    let rest = pages.split_off(pages.len().min(1));
    (pages, rest)
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
    /// Pages that are the pool's as long as they have no key.
    pages: Vec<Page>,
}

impl Preserved {
    /// Takes the directory, with what the last incarnation left in it, and from the pool what is
    /// in use.
    #[must_use]
    pub fn new(directory: Option<Page>, pool: &mut Pool) -> Self {
        let preserved = Self { directory, pages: pool.pages().take(MOST_KEYS).collect() };
        if let Some(directory) = &preserved.directory
            && directory.u64(0).load(Acquire) != FORMAT
        {
            for place in 0..MOST_KEYS {
                preserved.store(place, 0);
            }
            directory.u64(0).store(FORMAT, Release);
        }
        for place in 0..preserved.pages.len() {
            if preserved.load(place) != 0 {
                pool.claim(place);
            }
        }
        preserved
    }

    /// The table of a queue whose ring has `pages` pages, with what it held before, if anything.
    /// `None` when too few pages are free.
    ///
    /// # Panics
    /// When the queue or the pages are more than a vbd can have.
    pub fn open(
        &mut self,
        vbd: VbdId,
        queue: u16,
        pages: usize,
        pool: &mut Pool,
    ) -> Option<InflightTable> {
        assert!(queue < MAX_QUEUES && (1..=PAGES_PER_QUEUE).contains(&pages));
        let first = usize::from(queue) * PAGES_PER_QUEUE;
        let mut table = Vec::with_capacity(pages);
        for number in first..first + pages {
            let wanted = key(vbd, number);
            let place = match self.find(wanted) {
                Some(place) => place,
                None => {
                    let place = self.take(pool)?;
                    let head = table.first().unwrap_or(&self.pages[place]);
                    InflightTable::new(head.clone()).forget();
                    self.store(place, wanted);
                    place
                }
            };
            table.push(self.pages[place].clone());
        }
        Some(InflightTable::with_pages(table))
    }

    /// The journal of the image on that volume: the page that it had before, or a page of zeros.
    pub fn journal(&mut self, volume: &str, pool: &mut Pool) -> Option<Page> {
        let wanted = image_key(volume);
        if let Some(place) = self.find(wanted) {
            return Some(self.pages[place].clone());
        }
        let place = self.take(pool)?;
        self.pages[place].clear();
        self.store(place, wanted);
        Some(self.pages[place].clone())
    }

    /// Frees the journal of an image that is in order without it.
    pub fn drop_journal(&mut self, volume: &str, pool: &mut Pool) {
        if let Some(place) = self.find(image_key(volume)) {
            self.give(place, pool);
        }
    }

    /// Makes sure that nothing of this vbd will ever be replayed. Its pages stay its own.
    pub fn forget(&mut self, vbd: VbdId) {
        self.forget_heads(|other| other == vbd);
    }

    /// Frees the pages of a vbd that is gone.
    pub fn release(&mut self, vbd: VbdId, pool: &mut Pool) {
        self.retain(|other| other != vbd, pool);
    }

    /// Frees the pages of all vbds that are not among those given.
    pub fn retain(&mut self, exists: impl Fn(VbdId) -> bool, pool: &mut Pool) {
        self.forget_heads(|vbd| !exists(vbd));
        for place in 0..self.pages.len() {
            if vbd_of(self.load(place)).is_some_and(|(vbd, _)| !exists(vbd)) {
                self.give(place, pool);
            }
        }
    }

    fn forget_heads(&self, whose: impl Fn(VbdId) -> bool) {
        for (place, page) in self.pages.iter().enumerate() {
            if let Some((vbd, number)) = vbd_of(self.load(place))
                && number.is_multiple_of(PAGES_PER_QUEUE)
                && whose(vbd)
            {
                InflightTable::new(page.clone()).forget();
            }
        }
    }

    /// A page of the pool that can get a key.
    fn take(&self, pool: &mut Pool) -> Option<usize> {
        self.directory.as_ref()?;
        pool.take_below(self.pages.len()).map(usize::from)
    }

    /// Takes a page's key away.
    fn give(&self, place: usize, pool: &mut Pool) {
        self.store(place, 0);
        pool.give(u16::try_from(place).unwrap_or(u16::MAX));
    }

    fn find(&self, wanted: u64) -> Option<usize> {
        (0..self.pages.len()).find(|&place| self.load(place) == wanted)
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

/// The vbd that a key names, and the page's number in it.
#[expect(clippy::cast_possible_truncation, reason = "takes the key's fields apart")]
fn vbd_of(word: u64) -> Option<(VbdId, usize)> {
    let vbd = VbdId { domain: DomainId((word >> 32) as u16), device: word as u32 };
    (word & (KEY_IN_USE | KEY_IMAGE) == KEY_IN_USE).then_some((vbd, (word >> 48 & 0xff) as usize))
}

/// A number that stands for a volume, from its text (FNV-1a).
fn image_key(volume: &str) -> u64 {
    let hash = volume.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    KEY_IN_USE | KEY_IMAGE | hash
}

#[cfg(test)]
mod tests {
    use super::*;
    use domain_api::DmaPage;

    const VBD: VbdId = VbdId { domain: DomainId(3), device: 51712 };
    const OTHER: VbdId = VbdId { domain: DomainId(3), device: 51728 };

    fn pages(count: usize) -> Vec<Page> {
        (0..count).map(|_| Page::new_zeroed()).collect()
    }

    /// What an incarnation makes of the domain's pages.
    fn incarnation(pages: &[Page]) -> (Preserved, Pool) {
        let (directory, rest) = split(Vec::from(pages));
        let rest = rest.into_iter().map(|page| DmaPage { page, bus_address: 0 }).collect();
        let mut pool = Pool::new(rest);
        (Preserved::new(directory.first().cloned(), &mut pool), pool)
    }

    #[test]
    fn a_vbd_keeps_its_pages_over_incarnations() {
        let pages = pages(8);
        let (mut first, mut pool) = incarnation(&pages);
        assert!(first.open(OTHER, 0, 2, &mut pool).is_some());
        // The disk uses this one.
        assert_eq!(pool.take(), Some(2));
        assert!(first.open(VBD, 1, 4, &mut pool).is_some());
        let words: Vec<u64> = (0..7).map(|place| first.load(place)).collect();
        let (mut second, mut pool) = incarnation(&pages);
        assert!(second.open(VBD, 1, 4, &mut pool).is_some());
        assert!(second.open(OTHER, 0, 2, &mut pool).is_some());
        assert_eq!(words, (0..7).map(|place| second.load(place)).collect::<Vec<_>>());
        assert_eq!(words[2], 0);
        assert_eq!((pool.take(), pool.take()), (Some(2), None));
    }

    #[test]
    fn pages_are_bounded_and_come_back() {
        let (mut preserved, mut pool) = incarnation(&pages(1 + 5));
        assert!(preserved.open(VBD, 0, 4, &mut pool).is_some());
        assert!(preserved.open(OTHER, 0, 2, &mut pool).is_none());
        preserved.retain(|vbd| vbd == OTHER, &mut pool);
        assert!(preserved.open(OTHER, 3, 4, &mut pool).is_some());
        preserved.release(OTHER, &mut pool);
        assert!(preserved.open(VBD, 0, 1, &mut pool).is_some());
        assert_eq!(core::iter::from_fn(|| pool.take()).count(), 4);
    }

    #[test]
    fn a_journal_is_its_images() {
        let pages = pages(4);
        pages.iter().for_each(|page| page.write(0, &[0xee; PAGE_SIZE]));
        let (mut first, mut pool) = incarnation(&pages);
        let journal = first.journal("gpt:one", &mut pool).unwrap();
        assert_eq!(journal.u64(8).load(Acquire), 0);
        journal.u64(8).store(77, Release);
        let (mut second, mut pool) = incarnation(&pages);
        second.retain(|_| false, &mut pool);
        assert!(!second.journal("gpt:two", &mut pool).unwrap().is_same(&journal));
        let again = second.journal("gpt:one", &mut pool).unwrap();
        assert!(again.is_same(&journal) && again.u64(8).load(Acquire) == 77);
        second.drop_journal("gpt:one", &mut pool);
        assert_eq!(second.journal("gpt:one", &mut pool).unwrap().u64(8).load(Acquire), 0);
    }

    #[test]
    fn garbage_in_the_directory_is_a_fresh_start() {
        let pages = pages(3);
        pages[0].write(0, &[0xee; PAGE_SIZE]);
        let (mut preserved, mut pool) = incarnation(&pages);
        assert!(preserved.open(VBD, 0, 2, &mut pool).is_some());
    }

    #[test]
    fn without_pages_no_vbd_is_served() {
        let (mut preserved, mut pool) = incarnation(&[]);
        assert!(preserved.open(VBD, 0, 1, &mut pool).is_none());
    }

    #[test]
    fn what_a_domain_is_told_to_need_is_enough() {
        for vbds in 1..=20 {
            let (mut preserved, mut pool) = incarnation(&pages(pages_for(vbds, 1)));
            for device in 0..u32::try_from(vbds).unwrap() {
                for queue in 0..MAX_QUEUES {
                    let vbd = VbdId { device, ..VBD };
                    assert!(preserved.open(vbd, queue, PAGES_PER_QUEUE, &mut pool).is_some());
                }
            }
            assert!(preserved.journal("whole", &mut pool).is_some());
            let left = core::iter::from_fn(|| pool.take()).count();
            assert_eq!(left, vbds * BOUNCE_PAGES_PER_VBD + qcow2::USUAL_PAGES);
        }
    }
}
