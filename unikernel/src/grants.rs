//! Both sides of grants: our own table, and the window where pages of others are mapped.
#![expect(unsafe_code, reason = "mappings come and go at addresses of our choice")]

use crate::domain::{Domain, page_at};
use crate::hypercall;
use alloc::vec::Vec;
use axolotl_abi::start::{GRANT_TABLE_GPA, GRANT_WINDOW_GPA, GRANT_WINDOW_PAGES};
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use domain_api::{
    Access, DeviceGrants, Direction, DmaPage, GrantCopy, Granter, Grants, MapRequest,
    MappedDmaGrant, MappedGrant,
};
use shmem::Page;
use xen_abi::grant::{
    COPY, CopyPtr, ENTRIES_PER_FRAME, GNTCOPY_DEST_GREF, GNTCOPY_SOURCE_GREF, GNTMAP_DEVICE_MAP,
    GNTMAP_HOST_MAP, GNTMAP_READONLY, GTF_PERMIT_ACCESS, GTF_READING, GTF_READONLY, GTF_WRITING,
    GrantStatus, MAP_GRANT_REF, MAX_FRAMES, MapGrantRef, RESERVED_ENTRIES, UNMAP_GRANT_REF,
    UnmapGrantRef,
};
use xen_abi::memory::SPACE_GRANT_TABLE;
use xen_abi::{DomainId, Errno, Gfn, GrantRef, PAGE_SIZE};

/// Grant operations in one hypercall.
const BATCH: usize = 32;

/// Our grant table (`xen-abi.md` §8): grows by a frame when it is full.
pub(crate) struct GrantTable {
    frames: Vec<Page>,
    free: Vec<u32>,
    /// The granted pages, by entry: they must not be freed while somebody may use them.
    granted: Vec<Option<Page>>,
}

impl GrantTable {
    pub(crate) const fn new() -> Self {
        Self { frames: Vec::new(), free: Vec::new(), granted: Vec::new() }
    }

    /// Adds the next frame of entries.
    fn add_frame(&mut self, frame: Page) {
        let first = ENTRIES_PER_FRAME * u32::try_from(self.frames.len()).unwrap_or(MAX_FRAMES);
        let end = first + ENTRIES_PER_FRAME;
        self.frames.push(frame);
        self.granted.resize(end as usize, None);
        self.free.extend((first.max(RESERVED_ENTRIES)..end).rev());
    }

    fn entry(&self, gref: u32) -> (&Page, usize) {
        let (frame, entry) = (gref / ENTRIES_PER_FRAME, gref % ENTRIES_PER_FRAME);
        (&self.frames[frame as usize], 8 * entry as usize)
    }

    /// Fills a free entry; flags come last. `None`: there is no free one.
    fn grant(&mut self, to: DomainId, page: &Page, access: Access) -> Option<GrantRef> {
        let frame = u32::try_from(page.gfn().0).ok()?;
        let gref = self.free.pop()?;
        let (entries, at) = self.entry(gref);
        let flags = match access {
            Access::ReadOnly => GTF_PERMIT_ACCESS | GTF_READONLY,
            Access::ReadWrite => GTF_PERMIT_ACCESS,
        };
        entries.u16(at + 2).store(to.0, Relaxed);
        entries.u32(at + 4).store(frame, Relaxed);
        entries.u16(at).store(flags, Release);
        self.granted[gref as usize] = Some(page.clone());
        Some(GrantRef(gref))
    }

    /// Clears an entry, unless it is in use: the core sets bits of `flags` at any time, so that
    /// looking and clearing is one exchange.
    fn revoke(&mut self, gref: GrantRef) -> Result<(), Errno> {
        let held = self.granted.get(gref.0 as usize).is_some_and(Option::is_some);
        if !held {
            return Err(Errno::EINVAL);
        }
        let (entries, at) = self.entry(gref.0);
        let flags = entries.u16(at);
        flags
            .fetch_update(Acquire, Relaxed, |now| {
                (now & (GTF_READING | GTF_WRITING) == 0).then_some(0)
            })
            .map_err(|_| Errno::EBUSY)?;
        self.granted[gref.0 as usize] = None;
        self.free.push(gref.0);
        Ok(())
    }
}

impl Granter for Domain {
    fn grant(&mut self, to: DomainId, page: &Page, access: Access) -> Result<GrantRef, Errno> {
        let mut table = self.table().borrow_mut();
        if table.free.is_empty() {
            let index = table.frames.len() as u64;
            if index >= u64::from(MAX_FRAMES) {
                return Err(Errno::ENOSPC);
            }
            let gpa = GRANT_TABLE_GPA + index * PAGE_SIZE as u64;
            // SAFETY: the addresses are set apart for these frames, and this one is not used yet.
            unsafe { hypercall::add_to_physmap(SPACE_GRANT_TABLE, index, Gfn::containing(gpa))? };
            table.add_frame(page_at(gpa));
        }
        table.grant(to, page, access).ok_or(Errno::ENOSPC)
    }

    fn revoke(&mut self, gref: GrantRef) -> Result<(), Errno> {
        self.table().borrow_mut().revoke(gref)
    }
}

/// The addresses where grants of others are mapped.
pub(crate) struct Window {
    /// Slots that were used and are free again.
    free: Vec<u64>,
    /// Slots that were never used start here.
    fresh: u64,
}

impl Window {
    pub(crate) const fn new() -> Self {
        Self { free: Vec::new(), fresh: 0 }
    }

    fn take(&mut self) -> Option<u64> {
        if let Some(slot) = self.free.pop() {
            return Some(slot);
        }
        if self.fresh == GRANT_WINDOW_PAGES {
            return None;
        }
        self.fresh += 1;
        Some(GRANT_WINDOW_GPA + (self.fresh - 1) * PAGE_SIZE as u64)
    }

    fn give_back(&mut self, address: u64) {
        self.free.push(address);
    }
}

impl Domain {
    /// Maps several pages in as few hypercalls as possible. Each has its own result, in order.
    pub fn map_all(&mut self, requests: &[MapRequest]) -> Vec<Result<MappedGrant, GrantStatus>> {
        let mut results = Vec::with_capacity(requests.len());
        for part in requests.chunks(BATCH) {
            self.map_batch(part, 0, |done| {
                results.push(done.map(|it| MappedGrant { page: it.page.page, handle: it.handle }));
            });
        }
        results
    }

    /// Maps up to [`BATCH`] pages, with `flags` besides those of the requests.
    fn map_batch(
        &mut self,
        requests: &[MapRequest],
        flags: u32,
        mut done: impl FnMut(Result<MappedDmaGrant, GrantStatus>),
    ) {
        let mut window = self.window().borrow_mut();
        let mut batch = [MAP_NOTHING; BATCH];
        let mut count = 0;
        for (operation, request) in batch.iter_mut().zip(requests) {
            let Some(address) = window.take() else { break };
            *operation = map_operation(request, address, flags);
            count += 1;
        }
        // SAFETY: 1. the structure is that of the operation. 2. Pages appear only in free slots
        // of the window, where nothing is.
        let answer = unsafe { hypercall::grant(MAP_GRANT_REF, &mut batch[..count]) };
        for operation in &batch[..count] {
            let status = answer.map_or(GrantStatus::GENERAL_ERROR, |_| operation.status);
            if status == GrantStatus::OKAY {
                let (page, bus_address) = (page_at(operation.host_addr), operation.dev_bus_addr);
                let page = DmaPage { page, bus_address };
                done(Ok(MappedDmaGrant { page, handle: operation.handle }));
            } else {
                window.give_back(operation.host_addr);
                done(Err(status));
            }
        }
        for _ in &requests[count..] {
            done(Err(GrantStatus::NO_SPACE));
        }
    }

    /// Gives several mappings back in as few hypercalls as possible.
    ///
    /// # Panics
    /// When other handles to one of the pages are left.
    pub fn unmap_all(&mut self, mappings: Vec<MappedGrant>) {
        self.unmap_each(mappings.into_iter().map(|it| (it.page, it.handle)));
    }

    fn unmap_each(&mut self, mut mappings: impl Iterator<Item = (Page, u32)>) {
        loop {
            let mut batch = [UNMAP_NOTHING; BATCH];
            let mut count = 0;
            for (operation, (page, handle)) in batch.iter_mut().zip(mappings.by_ref().take(BATCH)) {
                assert_eq!(page.handles(), 1, "a page is unmapped while it is in use");
                operation.host_addr = page.gfn().address();
                operation.handle = handle;
                count += 1;
            }
            if count == 0 {
                return;
            }
            self.unmap_batch(&mut batch[..count]);
        }
    }

    fn unmap_batch(&mut self, batch: &mut [UnmapGrantRef]) {
        // SAFETY: 1. the structure is that of the operation. 2. `unmap_all` made sure that
        // nothing refers to the pages.
        let answer = unsafe { hypercall::grant(UNMAP_GRANT_REF, batch) };
        for operation in batch {
            if answer.is_ok() && operation.status == GrantStatus::OKAY {
                self.window().borrow_mut().give_back(operation.host_addr);
            } else {
                // Still mapped, perhaps: the address stays out of use.
                log::error!("unmapping {:#x}: {:?}", operation.host_addr, operation.status);
            }
        }
    }
}

const MAP_NOTHING: MapGrantRef = MapGrantRef {
    host_addr: 0,
    flags: 0,
    gref: GrantRef(0),
    dom: DomainId::INVALID,
    status: GrantStatus::GENERAL_ERROR,
    handle: 0,
    dev_bus_addr: 0,
};

const UNMAP_NOTHING: UnmapGrantRef = UnmapGrantRef {
    host_addr: 0,
    dev_bus_addr: 0,
    handle: 0,
    status: GrantStatus::GENERAL_ERROR,
    pad: 0,
};

fn map_operation(request: &MapRequest, address: u64, flags: u32) -> MapGrantRef {
    let read_only = match request.access {
        Access::ReadOnly => GNTMAP_READONLY,
        Access::ReadWrite => 0,
    };
    MapGrantRef {
        host_addr: address,
        flags: GNTMAP_HOST_MAP | read_only | flags,
        gref: request.gref,
        dom: request.granter,
        ..MAP_NOTHING
    }
}

fn copy_operation(operation: &GrantCopy) -> xen_abi::grant::GrantCopy {
    let local = CopyPtr {
        frame: operation.local.gfn().0,
        domid: DomainId::SELF,
        offset: operation.local_offset,
        pad: 0,
    };
    let remote = CopyPtr {
        frame: operation.gref.0.into(),
        domid: operation.remote,
        offset: operation.remote_offset,
        pad: 0,
    };
    let (source, dest, flags) = match operation.direction {
        Direction::FromRemote => (remote, local, GNTCOPY_SOURCE_GREF),
        Direction::ToRemote => (local, remote, GNTCOPY_DEST_GREF),
    };
    let status = GrantStatus::GENERAL_ERROR;
    xen_abi::grant::GrantCopy { source, dest, len: operation.len, flags, status, pad: 0 }
}

impl DeviceGrants for Domain {
    fn map_for_devices(
        &mut self,
        requests: &[MapRequest],
        results: &mut Vec<Result<MappedDmaGrant, GrantStatus>>,
    ) {
        for part in requests.chunks(BATCH) {
            self.map_batch(part, GNTMAP_DEVICE_MAP, |done| results.push(done));
        }
    }

    fn unmap_from_devices(&mut self, mappings: &mut Vec<MappedDmaGrant>) {
        self.unmap_each(mappings.drain(..).map(|it| (it.page.page, it.handle)));
    }
}

impl Grants for Domain {
    fn map(
        &mut self,
        granter: DomainId,
        gref: GrantRef,
        access: Access,
    ) -> Result<MappedGrant, GrantStatus> {
        let mut result = self.map_all(&[MapRequest { granter, gref, access }]);
        result.pop().unwrap_or(Err(GrantStatus::GENERAL_ERROR))
    }

    fn unmap(&mut self, mapping: MappedGrant) {
        self.unmap_each(core::iter::once((mapping.page, mapping.handle)));
    }

    fn copy(&mut self, operations: &mut [GrantCopy]) {
        let nothing = CopyPtr { frame: 0, domid: DomainId::INVALID, offset: 0, pad: 0 };
        let status = GrantStatus::GENERAL_ERROR;
        let empty = xen_abi::grant::GrantCopy {
            source: nothing,
            dest: nothing,
            len: 0,
            flags: 0,
            status,
            pad: 0,
        };
        for part in operations.chunks_mut(BATCH) {
            let mut batch = [empty; BATCH];
            for (operation, wanted) in batch.iter_mut().zip(part.iter()) {
                *operation = copy_operation(wanted);
            }
            let batch = &mut batch[..part.len()];
            // SAFETY: 1. the structure is that of the operation. 2. What it names of ours are
            // `Page`s, whose memory may change at any time.
            let answer = unsafe { hypercall::grant(COPY, batch) };
            for (wanted, operation) in part.iter_mut().zip(batch) {
                wanted.status = answer.map_or(GrantStatus::GENERAL_ERROR, |_| operation.status);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(table: &GrantTable, gref: GrantRef) -> [u8; 8] {
        let (page, at) = table.entry(gref.0);
        let mut bytes = [0; 8];
        page.read(at, &mut bytes);
        bytes
    }

    /// xen-abi §8.1, and the reserved entries stay free.
    #[test]
    fn an_entry_has_the_layout_of_version_1() {
        let mut table = GrantTable::new();
        table.add_frame(Page::new_zeroed());
        // A host's addresses may be too high for a 32-bit frame number; a domain's never are.
        let page = Page::new_zeroed();
        let Ok(frame) = u32::try_from(page.gfn().0) else { return };
        let gref = table.grant(DomainId(0x302), &page, Access::ReadOnly).unwrap();
        assert_eq!(gref, GrantRef(8));
        let [a, b, c, d] = frame.to_le_bytes();
        assert_eq!(entry(&table, gref), [5, 0, 2, 3, a, b, c, d]);
        assert_eq!(page.handles(), 2, "a granted page is not freed");
        assert_eq!(table.revoke(gref), Ok(()));
        assert_eq!(page.handles(), 1);
        assert_eq!(table.revoke(gref), Err(Errno::EINVAL));
    }

    /// xen-abi §8.2: in use is in use, whichever bit says so.
    #[test]
    fn a_grant_in_use_is_not_revoked() {
        let mut table = GrantTable::new();
        table.add_frame(Page::new_zeroed());
        let page = Page::new_zeroed();
        let Some(gref) = table.grant(DomainId(2), &page, Access::ReadWrite) else { return };
        for bit in [GTF_READING, GTF_WRITING] {
            let (entries, at) = table.entry(gref.0);
            entries.u16(at).fetch_or(bit, Relaxed);
            assert_eq!(table.revoke(gref), Err(Errno::EBUSY));
            let (entries, at) = table.entry(gref.0);
            entries.u16(at).fetch_and(!bit, Relaxed);
        }
        assert_eq!(table.revoke(gref), Ok(()));
    }

    #[test]
    fn the_window_ends() {
        let mut window = Window::new();
        let first = window.take().unwrap();
        assert_eq!(first, GRANT_WINDOW_GPA);
        for _ in 1..GRANT_WINDOW_PAGES {
            assert!(window.take().is_some());
        }
        assert_eq!(window.take(), None);
        window.give_back(first);
        assert_eq!(window.take(), Some(first));
    }
}
