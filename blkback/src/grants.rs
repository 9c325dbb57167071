//! Granted pages that are mapped for the disk.
//!
//! A page is mapped while a request uses it. Where the frontend's grants are persistent, a page
//! stays mapped afterwards, up to [`MOST_KEPT`] per queue, so that using it again costs nothing;
//! the least recently used ones make room. The frontend takes a persistent grant back only after
//! it has seen that we do not have it mapped any more (`xen-abi.md` §7.2), and the core refuses
//! until then, so that what is found under a grant reference is what that reference means.

use alloc::vec::Vec;
use domain_api::{DmaPage, GrantRef, MappedDmaGrant};

/// Most pages of a queue that stay mapped: what a ring of one page can have under way.
pub const MOST_KEPT: usize = 352;
/// Pages that make room at a time.
const PURGE: usize = 32;
/// Places of the hash table: a power of two, so many that runs are short.
const BUCKETS: usize = 1024;
const _: () = assert!(BUCKETS >= 2 * MOST_KEPT);
/// No entry.
const NONE: u16 = u16::MAX;

/// The mapped pages of one queue. Pages are named by small numbers.
#[derive(Debug)]
pub struct Mappings {
    entries: Vec<Entry>,
    free: Vec<u16>,
    /// Kept entries by grant reference: open addressing, no gaps in a run.
    buckets: Vec<u16>,
    kept: usize,
    clock: u32,
}

#[derive(Debug)]
struct Entry {
    mapping: Option<MappedDmaGrant>,
    gref: GrantRef,
    /// Uses by requests under way.
    users: u16,
    /// Stays when it has no users.
    keep: bool,
    last_used: u32,
}

impl Mappings {
    /// None yet.
    #[must_use]
    pub fn new() -> Self {
        Self {
            entries: Vec::new(),
            free: Vec::new(),
            buckets: alloc::vec![NONE; BUCKETS],
            kept: 0,
            clock: 0,
        }
    }

    /// The page with that name.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    #[inline]
    pub fn page(&self, name: u16) -> &DmaPage {
        let mapping = self.entries[usize::from(name)].mapping.as_ref();
        &mapping.expect("a name stands for a page while it is used").page
    }

    /// Uses a page that was kept. `None`: it is not mapped.
    #[inline]
    pub fn reuse(&mut self, gref: GrantRef) -> Option<u16> {
        let name = self.buckets[self.find(gref).ok()?];
        let entry = &mut self.entries[usize::from(name)];
        entry.users += 1;
        entry.last_used = self.clock;
        Some(name)
    }

    /// Uses a page that was just mapped; with `keep` it stays afterwards, if there is room.
    /// Pages that had to make room are added to `unmap`.
    pub fn insert(
        &mut self,
        mapping: MappedDmaGrant,
        gref: GrantRef,
        keep: bool,
        unmap: &mut Vec<MappedDmaGrant>,
    ) -> u16 {
        if keep && self.kept == MOST_KEPT {
            self.purge(PURGE, unmap);
        }
        // The same page twice in a batch: the second mapping does not stay.
        let bucket = if keep && self.kept < MOST_KEPT { self.find(gref).err() } else { None };
        let keep = bucket.is_some();
        let last_used = self.clock;
        let entry = Entry { mapping: Some(mapping), gref, users: 1, keep, last_used };
        let name = match self.free.pop() {
            Some(name) => {
                self.entries[usize::from(name)] = entry;
                name
            }
            None => {
                self.entries.push(entry);
                u16::try_from(self.entries.len() - 1).expect("the core has fewer handles")
            }
        };
        if let Some(bucket) = bucket {
            self.buckets[bucket] = name;
            self.kept += 1;
        }
        name
    }

    /// Ends a use. If the page does not stay, it is added to `unmap`.
    #[inline]
    pub fn release(&mut self, name: u16, unmap: &mut Vec<MappedDmaGrant>) {
        let entry = &mut self.entries[usize::from(name)];
        entry.users -= 1;
        if entry.users == 0 && !entry.keep {
            unmap.extend(entry.mapping.take());
            self.free.push(name);
        }
    }

    /// Makes up to `count` of the pages that nobody uses go, the least recently used first.
    pub fn purge(&mut self, count: usize, unmap: &mut Vec<MappedDmaGrant>) {
        let mut idle: Vec<(u32, u16)> = (0_u16..)
            .zip(&self.entries)
            .filter(|(_, entry)| entry.is_idle())
            .map(|(name, entry)| (self.clock.wrapping_sub(entry.last_used), name))
            .collect();
        idle.sort_unstable_by(|a, b| b.cmp(a));
        for &(_, name) in idle.iter().take(count) {
            let gref = self.entries[usize::from(name)].gref;
            if let Ok(bucket) = self.find(gref) {
                self.remove(bucket);
            }
            let entry = &mut self.entries[usize::from(name)];
            entry.keep = false;
            unmap.extend(entry.mapping.take());
            self.free.push(name);
        }
    }

    /// Takes all pages. Nobody uses them any more.
    pub fn clear(&mut self, unmap: &mut Vec<MappedDmaGrant>) {
        unmap.extend(self.entries.drain(..).filter_map(|entry| entry.mapping));
        self.free.clear();
        self.buckets.fill(NONE);
        self.kept = 0;
    }

    /// Time passes, for what "recently" means.
    pub fn tick(&mut self) {
        self.clock = self.clock.wrapping_add(1);
    }

    fn home(gref: GrantRef) -> usize {
        (gref.0.wrapping_mul(0x9e37_79b1) >> 22) as usize % BUCKETS
    }

    /// The bucket of a kept page, or else the one where it would go.
    fn find(&self, gref: GrantRef) -> Result<usize, usize> {
        let mut bucket = Self::home(gref);
        loop {
            match self.buckets[bucket] {
                NONE => return Err(bucket),
                name if self.entries[usize::from(name)].gref == gref => return Ok(bucket),
                _ => bucket = (bucket + 1) % BUCKETS,
            }
        }
    }

    /// Empties a bucket, and moves up what would not be found behind the gap.
    fn remove(&mut self, mut gap: usize) {
        self.kept -= 1;
        let mut at = gap;
        loop {
            at = (at + 1) % BUCKETS;
            let name = self.buckets[at];
            if name == NONE {
                break;
            }
            let home = Self::home(self.entries[usize::from(name)].gref);
            let distance = |from: usize| (at + BUCKETS - from) % BUCKETS;
            if distance(home) >= distance(gap) {
                self.buckets[gap] = name;
                gap = at;
            }
        }
        self.buckets[gap] = NONE;
    }
}

impl Entry {
    fn is_idle(&self) -> bool {
        self.users == 0 && self.keep
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use domain_api::Page;
    use proptest::collection::vec;
    use proptest::prelude::*;
    use std::collections::{BTreeMap, BTreeSet};

    fn mapping(handle: u32) -> MappedDmaGrant {
        let page = DmaPage { page: Page::new_zeroed(), bus_address: u64::from(handle) << 12 };
        MappedDmaGrant { page, handle }
    }

    /// As the data path uses it: look, map what is missing, later release.
    #[derive(Clone, Debug)]
    enum Step {
        Use(u32, bool),
        Release(usize),
        Purge(usize),
        Tick,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            // Few references, many of which share a bucket.
            8 => (0_u32..500, prop::bool::weighted(0.9)).prop_map(|(gref, keep)| Step::Use(gref, keep)),
            7 => (0_usize..1000).prop_map(Step::Release),
            1 => (0_usize..40).prop_map(Step::Purge),
            2 => Just(Step::Tick),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 2 } else { 60 }))]

        /// Against sets: a page that is used is mapped, what is given back is not used, nothing
        /// is given back twice or lost, and what is found is what was put in.
        #[test]
        fn every_page_is_given_back_once(steps in vec(step(), 0..1500)) {
            let mut mappings = Mappings::new();
            let mut model: BTreeMap<u32, u32> = BTreeMap::new();
            let mut used: Vec<(u16, u32)> = Vec::new();
            let mut out = BTreeSet::new();
            let mut next = 0;
            for step in steps {
                let mut unmap = Vec::new();
                match step {
                    Step::Use(gref, keep) => {
                        let name = match mappings.reuse(GrantRef(gref)) {
                            Some(name) => {
                                prop_assert_eq!(model.get(&gref), Some(&mappings.entries[usize::from(name)].mapping.as_ref().unwrap().handle));
                                name
                            }
                            None => {
                                prop_assert!(!model.contains_key(&gref));
                                next += 1;
                                let name = mappings.insert(mapping(next), GrantRef(gref), keep, &mut unmap);
                                if mappings.entries[usize::from(name)].keep {
                                    model.insert(gref, next);
                                }
                                name
                            }
                        };
                        let handle = u32::try_from(mappings.page(name).bus_address >> 12).unwrap();
                        used.push((name, handle));
                    }
                    Step::Release(at) if !used.is_empty() => {
                        let (name, _) = used.swap_remove(at % used.len());
                        mappings.release(name, &mut unmap);
                    }
                    Step::Release(_) => {}
                    Step::Purge(count) => mappings.purge(count, &mut unmap),
                    Step::Tick => mappings.tick(),
                }
                for gone in unmap {
                    prop_assert!(out.insert(gone.handle), "given back twice");
                    prop_assert!(used.iter().all(|&(_, handle)| handle != gone.handle));
                    model.retain(|_, handle| *handle != gone.handle);
                }
                prop_assert!(mappings.kept <= MOST_KEPT && mappings.kept == model.len());
                let mapped = mappings.entries.len() - mappings.free.len();
                prop_assert_eq!(mapped + out.len(), next as usize);
            }
            let mut unmap = Vec::new();
            mappings.clear(&mut unmap);
            prop_assert_eq!(unmap.len() + out.len(), next as usize);
        }
    }

    #[test]
    fn the_least_recently_used_go_first() {
        let mut mappings = Mappings::new();
        let mut unmap = Vec::new();
        let most = u32::try_from(MOST_KEPT).unwrap();
        for gref in 0..most {
            mappings.tick();
            let name = mappings.insert(mapping(gref), GrantRef(gref), true, &mut unmap);
            mappings.release(name, &mut unmap);
        }
        mappings.tick();
        let name = mappings.reuse(GrantRef(0)).unwrap();
        mappings.release(name, &mut unmap);
        let _ = mappings.insert(mapping(9999), GrantRef(9999), true, &mut unmap);
        let gone: Vec<u32> = unmap.iter().map(|it| it.handle).collect();
        assert_eq!(gone, (1..=32).collect::<Vec<u32>>());
    }
}
