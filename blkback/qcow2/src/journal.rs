//! The journal: which clusters are neither free nor in use for good right now.
//!
//! A cluster's refcount and the table entry that refers to it are in different sectors, so there
//! is always an instant at which one says more than the other. It is chosen such that the
//! refcount is too large, never too small: what a power cut leaves is a lost cluster, never one
//! with two owners. The death of the driver domain is to lose none. So before a cluster's refcount
//! is touched, the journal, in a page that outlives the incarnation, says which cluster it is,
//! which entry decides about it, and what its refcount is with and without that reference. The
//! next incarnation looks at the entry on the medium and stores the one or the other, however
//! often; then it begins to serve.
//!
//! | bytes  | content                                                                        |
//! |--------|--------------------------------------------------------------------------------|
//! | 0..8   | [`FORMAT`]; anything else means that nothing was ever kept                     |
//! | 8..16  | sectors of the volume                                                          |
//! | 16..24 | virtual size                                                                   |
//! | 24..32 | place of the L1 table                                                          |
//! | 32..40 | no cluster below this one is free (a hint: where to look for one)              |
//! | 64..   | records of 32 bytes                                                            |
//!
//! A record, of which the first word is written last when it begins and first when it ends:
//!
//! | bytes  | content                                                                        |
//! |--------|--------------------------------------------------------------------------------|
//! | 0..2   | refcount while the entry refers to the cluster                                 |
//! | 2..4   | refcount while it does not                                                     |
//! | 4..7   | how many clusters from the first one on                                        |
//! | 7      | which entry: 0 no record, 1 of a guest's cluster, 2 of the L1 table, 3 header  |
//! | 8..16  | first cluster                                                                  |
//! | 16..24 | number of the guest's cluster, or of the L1 entry                              |

use alloc::vec::Vec;
use core::sync::atomic::Ordering::{Acquire, Release};
use shmem::Page;
use xen_abi::PAGE_SIZE;

/// First word of a journal in this format: "AXQCOW01".
pub(crate) const FORMAT: u64 = u64::from_le_bytes(*b"AXQCOW01");
const HINT: usize = 32;
const RECORDS: usize = 64;
const RECORD: usize = 32;
/// Records that find room.
pub(crate) const MOST_RECORDS: usize = (PAGE_SIZE - RECORDS) / RECORD;

/// Which entry refers to a cluster, or does not.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Link {
    /// The L2 entry of a cluster of the guest.
    Cluster(u64),
    /// An entry of the L1 table.
    Table(u64),
    /// The header's reference to the refcount table.
    Reftable,
}

/// A record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Record {
    pub(crate) link: Link,
    /// First cluster.
    pub(crate) cluster: u64,
    /// How many.
    pub(crate) clusters: u32,
    /// Refcount while the entry refers to it.
    pub(crate) linked: u16,
    /// Refcount while it does not.
    pub(crate) unlinked: u16,
}

/// A place in the journal that is in use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Place(usize);

/// The page.
#[derive(Debug)]
pub(crate) struct Journal {
    page: Page,
    /// Places that are in use, one bit each.
    used: u128,
}

impl Journal {
    /// Takes the page for the image with this identity, with the records that are in it.
    pub(crate) fn open(page: Page, identity: [u64; 3]) -> Self {
        let mut journal = Self { page, used: 0 };
        let fields = identity.into_iter().enumerate().map(|(at, word)| (8 + 8 * at, word));
        let is_same = fields.clone().all(|(at, word)| journal.page.u64(at).load(Acquire) == word);
        if journal.page.u64(0).load(Acquire) != FORMAT || !is_same {
            journal.page.u64(0).store(0, Release);
            for place in 0..MOST_RECORDS {
                journal.page.u64(at(place)).store(0, Release);
            }
            for (at, word) in fields {
                journal.page.u64(at).store(word, Release);
            }
            journal.page.u64(HINT).store(0, Release);
            journal.page.u64(0).store(FORMAT, Release);
        }
        for place in 0..MOST_RECORDS {
            if journal.page.u64(at(place)).load(Acquire) != 0 {
                journal.used |= 1 << place;
            }
        }
        journal
    }

    /// Below which cluster none is free.
    pub(crate) fn hint(&self) -> u64 {
        self.page.u64(HINT).load(Acquire)
    }

    pub(crate) fn set_hint(&self, hint: u64) {
        self.page.u64(HINT).store(hint, Release);
    }

    /// All records, with their places; `None` where one cannot be read.
    pub(crate) fn records(&self) -> Vec<(Place, Option<Record>)> {
        let used = (0..MOST_RECORDS).filter(|place| self.used & (1 << place) != 0);
        used.map(|place| (Place(place), self.read(place))).collect()
    }

    /// Whether a cluster is in a record.
    pub(crate) fn names(&self, cluster: u64) -> bool {
        let mut rest = self.used;
        while rest != 0 {
            let place = rest.trailing_zeros() as usize;
            rest &= rest - 1;
            if self.page.u64(at(place) + 8).load(Acquire) == cluster {
                return true;
            }
        }
        false
    }

    /// Begins a record. `None`: no room.
    pub(crate) fn begin(&mut self, record: Record) -> Option<Place> {
        let place = self.used.trailing_ones() as usize;
        if place >= MOST_RECORDS {
            return None;
        }
        let (kind, index) = match record.link {
            Link::Cluster(index) => (1_u64, index),
            Link::Table(index) => (2, index),
            Link::Reftable => (3, 0),
        };
        let word = u64::from(record.linked)
            | u64::from(record.unlinked) << 16
            | u64::from(record.clusters & 0xff_ffff) << 32
            | kind << 56;
        self.page.u64(at(place) + 8).store(record.cluster, Release);
        self.page.u64(at(place) + 16).store(index, Release);
        self.page.u64(at(place)).store(word, Release);
        self.used |= 1 << place;
        Some(Place(place))
    }

    /// Ends a record: the medium says all that it said.
    pub(crate) fn end(&mut self, place: Place) {
        self.page.u64(at(place.0)).store(0, Release);
        self.used &= !(1 << place.0);
    }

    #[expect(clippy::cast_possible_truncation, reason = "takes the word's fields apart")]
    fn read(&self, place: usize) -> Option<Record> {
        let word = self.page.u64(at(place)).load(Acquire);
        let index = self.page.u64(at(place) + 16).load(Acquire);
        let link = match word >> 56 {
            1 => Link::Cluster(index),
            2 => Link::Table(index),
            3 => Link::Reftable,
            _ => return None,
        };
        Some(Record {
            link,
            cluster: self.page.u64(at(place) + 8).load(Acquire),
            clusters: (word >> 32) as u32 & 0xff_ffff,
            linked: word as u16,
            unlinked: (word >> 16) as u16,
        })
    }
}

const fn at(place: usize) -> usize {
    RECORDS + place * RECORD
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECORD_OF_7: Record =
        Record { link: Link::Cluster(9), cluster: 7, clusters: 1, linked: 1, unlinked: 0 };

    #[test]
    fn records_outlive_the_incarnation() {
        let page = Page::new_zeroed();
        let mut first = Journal::open(page.clone(), [1, 2, 3]);
        let place = first.begin(RECORD_OF_7).unwrap();
        let other = Record { link: Link::Reftable, cluster: 0x1234, clusters: 3, ..RECORD_OF_7 };
        assert!(first.begin(other).is_some());
        first.set_hint(5);
        first.end(place);
        let second = Journal::open(page.clone(), [1, 2, 3]);
        assert_eq!(second.records()[0].1, Some(other));
        assert!(second.names(0x1234) && !second.names(7));
        assert_eq!(second.hint(), 5);
        let another = Journal::open(page, [1, 2, 4]);
        assert_eq!((another.records().len(), another.hint()), (0, 0));
    }

    #[test]
    fn room_is_bounded_and_comes_back() {
        let mut journal = Journal::open(Page::new_zeroed(), [0; 3]);
        let places: Vec<Place> =
            (0..MOST_RECORDS).map(|_| journal.begin(RECORD_OF_7).unwrap()).collect();
        assert_eq!(journal.begin(RECORD_OF_7), None);
        journal.end(places[5]);
        assert_eq!(journal.begin(RECORD_OF_7), Some(places[5]));
    }

    #[test]
    fn garbage_is_a_fresh_start() {
        let page = Page::new_zeroed();
        page.write(0, &[0xee; PAGE_SIZE]);
        assert!(Journal::open(page, [1, 2, 3]).records().is_empty());
    }
}
