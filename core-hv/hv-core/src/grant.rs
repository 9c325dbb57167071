//! Grant tables, version 1 (`xen-abi.md` §8).
//!
//! Three tables take part:
//!
//! * the *shared* table of the granter, which the domain writes and the core only touches with
//!   atomic operations on the word that holds `flags` and `domid`;
//! * the *active* table beside it, 16 bytes per entry, which says how the core has a grant in
//!   use: word 0 is the frame (0..40), whether the granter itself may write it (40) and the
//!   grantee (48..64), word 1 counts pins (0..32) and those for writing (32..64);
//! * the *maps* of the grantee, 32 bytes per handle: granter, flags and reference, page, frame,
//!   and the granter's life. A free one has flags 0 and the next free handle + 1 in word 1.
//!
//! A pin is taken by compare-and-swap on the granter's entry, and the frame is read behind that:
//! whatever the granter writes meanwhile, the decision holds for what is pinned. While a grant
//! is in use only the active entry is believed. When the granter starts a new life its tables
//! are emptied; a peer that unmaps afterwards gives back the pin on the frame, and the
//! granter's life tells that there is no entry any more.

use crate::domain::Domain;
use crate::fault::{Answer, Fault};
use crate::frame::Mfn;
use crate::p2m::{Kind, Page};
use crate::platform::Platform;
use crate::state::Core;
use core::mem::offset_of;
use xen_abi::grant::{
    self, CopyPtr, GNTCOPY_DEST_GREF, GNTCOPY_SOURCE_GREF, GNTMAP_DEVICE_MAP, GNTMAP_HOST_MAP,
    GNTMAP_READONLY, GTF_PERMIT_ACCESS, GTF_READING, GTF_READONLY, GTF_TYPE_MASK, GTF_WRITING,
    GetVersion, GrantCopy, GrantEntryV1, GrantStatus, MAX_FRAMES, MapGrantRef, QuerySize,
    RESERVED_ENTRIES, SetVersion, SetupTable, UnmapGrantRef,
};
use xen_abi::{DomainId, Errno, Gfn, GrantRef};
use zerocopy::IntoBytes;

/// Elements of a batch that one hypercall deals with before others get a chance.
const BATCH: u32 = 32;
const ACTIVE_BYTES: usize = 16;
const MAP_BYTES: usize = 32;
const MAPS_PER_FRAME: u32 = 128;
const _: () = assert!(MAPS_PER_FRAME as usize * MAP_BYTES == 4096);
/// Attempts to swap an entry that its owner keeps changing; then it is the owner's fault.
const ATTEMPTS: usize = 5;
const OWNER_WRITES: u64 = 1 << 40;
/// Version 2 only.
const GTF_SUB_PAGE: u16 = 1 << 8;

/// How a grant is in use.
#[derive(Clone, Copy, Debug, Default)]
struct Active {
    frame: u64,
    pins: u32,
    writers: u32,
    grantee: u16,
    owner_writes: bool,
}

impl Active {
    #[expect(clippy::cast_possible_truncation, reason = "takes fields apart")]
    fn load<P: Platform>(p: &P, (mfn, at): (Mfn, usize)) -> Self {
        let (place, counts) = (p.load64(mfn, at), p.load64(mfn, at + 8));
        Self {
            frame: place & (OWNER_WRITES - 1),
            pins: counts as u32,
            writers: (counts >> 32) as u32,
            grantee: (place >> 48) as u16,
            owner_writes: place & OWNER_WRITES != 0,
        }
    }

    fn store<P: Platform>(self, p: &mut P, (mfn, at): (Mfn, usize)) {
        let writes = if self.owner_writes { OWNER_WRITES } else { 0 };
        p.store64(mfn, at, self.frame | writes | u64::from(self.grantee) << 48);
        p.store64(mfn, at + 8, u64::from(self.pins) | u64::from(self.writers) << 32);
    }
}

/// A grant in use. Whoever holds one gives it back by `Core::unpin`.
#[derive(Clone, Copy, Debug)]
#[must_use]
pub(crate) struct Pin {
    granter: DomainId,
    life: u64,
    gref: GrantRef,
    write: bool,
    pub(crate) mfn: Mfn,
}

/// One of the caller's mappings.
#[derive(Clone, Copy, Debug)]
struct Map {
    pin: Pin,
    gfn: Gfn,
}

const MAP_USED: u64 = 1;
const MAP_WRITE: u64 = 2;

impl Map {
    #[expect(clippy::cast_possible_truncation, reason = "takes fields apart")]
    fn load<P: Platform>(p: &P, (mfn, at): (Mfn, usize)) -> Option<Self> {
        let word = p.load64(mfn, at);
        if word >> 16 & MAP_USED == 0 {
            return None;
        }
        let pin = Pin {
            granter: DomainId(word as u16),
            life: p.load64(mfn, at + 24),
            gref: GrantRef((word >> 32) as u32),
            write: word >> 16 & MAP_WRITE != 0,
            mfn: Mfn(p.load64(mfn, at + 16)),
        };
        Some(Self { pin, gfn: Gfn(p.load64(mfn, at + 8)) })
    }

    fn store<P: Platform>(self, p: &mut P, (mfn, at): (Mfn, usize)) {
        let flags = MAP_USED | if self.pin.write { MAP_WRITE } else { 0 };
        let word = u64::from(self.pin.granter.0) | flags << 16 | u64::from(self.pin.gref.0) << 32;
        p.store64(mfn, at, word);
        p.store64(mfn, at + 8, self.gfn.0);
        p.store64(mfn, at + 16, self.pin.mfn.0);
        p.store64(mfn, at + 24, self.pin.life);
    }
}

impl<P: Platform> Core<P> {
    /// `grant_table_op`.
    pub(crate) fn grant_op(
        &mut self,
        p: &mut P,
        id: DomainId,
        [command, array, count, ..]: [u64; 5],
    ) -> Answer {
        match command {
            grant::COPY => {
                let bytes = size_of::<GrantCopy>() as u64;
                self.batch(p, id, (array, count, bytes), Self::copy_one)
            }
            grant::MAP_GRANT_REF => {
                let bytes = size_of::<MapGrantRef>() as u64;
                self.batch(p, id, (array, count, bytes), Self::map_one)
            }
            grant::UNMAP_GRANT_REF => {
                let bytes = size_of::<UnmapGrantRef>() as u64;
                self.batch(p, id, (array, count, bytes), Self::unmap_one)
            }
            grant::SETUP_TABLE if count == 1 => self.setup_table(p, id, array),
            grant::QUERY_SIZE if count == 1 => self.query_size(p, id, array),
            grant::SET_VERSION if count == 1 => {
                let mut op: SetVersion = self.get(p, id, array)?;
                let wanted = core::mem::replace(&mut op.version, 1);
                self.put(p, id, array, &op)?;
                if wanted == 1 { Ok(0) } else { Err(Errno::ENOSYS.into()) }
            }
            grant::GET_VERSION if count == 1 => {
                let mut op: GetVersion = self.get(p, id, array)?;
                self.self_or_built(id, op.dom)?;
                op.version = 1;
                self.put(p, id, array, &op)?;
                Ok(0)
            }
            grant::SETUP_TABLE | grant::QUERY_SIZE | grant::SET_VERSION | grant::GET_VERSION => {
                Err(Errno::EINVAL.into())
            }
            _ => Err(Errno::ENOSYS.into()),
        }
    }

    /// Deals with up to [`BATCH`] elements of `bytes` each, then lets the caller come again for
    /// the rest.
    fn batch(
        &mut self,
        p: &mut P,
        id: DomainId,
        (array, count, bytes): (u64, u64, u64),
        one: fn(&mut Self, &mut P, DomainId, u64) -> Result<(), Errno>,
    ) -> Answer {
        let count = u32::try_from(count).map_err(|_| Errno::EINVAL)?;
        let first = self.me(id).vcpu().progress.min(count);
        let last = count.min(first.saturating_add(BATCH));
        for index in first..last {
            one(self, p, id, array.wrapping_add(u64::from(index) * bytes))?;
        }
        if last < count {
            self.me_mut(id).vcpu_mut().progress = last;
            return Err(Fault::Again);
        }
        Ok(0)
    }

    fn map_one(&mut self, p: &mut P, id: DomainId, gpa: u64) -> Result<(), Errno> {
        let mut op: MapGrantRef = self.get(p, id, gpa)?;
        op.status = match self.map_grant(p, id, &op) {
            Ok((handle, address)) => {
                op.handle = handle;
                op.dev_bus_addr = address;
                GrantStatus::OKAY
            }
            Err(status) => status,
        };
        let result = self.put(p, id, gpa, &op);
        if result.is_err() && op.status == GrantStatus::OKAY {
            // Nobody would know the handle.
            let _ = self.unmap_grant(p, id, op.handle, op.host_addr);
        }
        result
    }

    fn map_grant(
        &mut self,
        p: &mut P,
        id: DomainId,
        op: &MapGrantRef,
    ) -> Result<(u32, u64), GrantStatus> {
        let known = GNTMAP_HOST_MAP | GNTMAP_READONLY | GNTMAP_DEVICE_MAP;
        if op.flags & GNTMAP_HOST_MAP == 0 || op.flags & !known != 0 {
            return Err(GrantStatus::GENERAL_ERROR);
        }
        let dma = op.flags & GNTMAP_DEVICE_MAP != 0;
        if dma && self.me(id).devices.is_empty() {
            // Only who has a device is told a bus address.
            return Err(GrantStatus::GENERAL_ERROR);
        }
        if !op.host_addr.is_multiple_of(4096) {
            return Err(GrantStatus::BAD_VIRT_ADDR);
        }
        let gfn = Gfn::containing(op.host_addr);
        let handle = self.free_handle(p, id).map_err(|_| GrantStatus::NO_SPACE)?;
        let write = op.flags & GNTMAP_READONLY == 0;
        let pin = self.pin(p, op.dom, id, op.gref, write)?;
        let page = Page { write, dma, ..Page::new(pin.mfn, Kind::Grant) };
        let (domain, frames) = self.with_frames(id);
        let inserted = domain.p2m.insert(p, frames, &mut domain.account, gfn, page);
        if let Err(errno) = inserted {
            self.unpin(p, pin);
            return Err(match errno {
                Errno::ENOMEM => GrantStatus::NO_SPACE,
                _ => GrantStatus::BAD_VIRT_ADDR,
            });
        }
        self.take_handle(p, id, handle, Map { pin, gfn });
        Ok((handle, if dma { pin.mfn.address() } else { 0 }))
    }

    fn unmap_one(&mut self, p: &mut P, id: DomainId, gpa: u64) -> Result<(), Errno> {
        let mut op: UnmapGrantRef = self.get(p, id, gpa)?;
        op.status = match self.unmap_grant(p, id, op.handle, op.host_addr) {
            Ok(()) => GrantStatus::OKAY,
            Err(status) => status,
        };
        self.put(p, id, gpa, &op)
    }

    fn unmap_grant(
        &mut self,
        p: &mut P,
        id: DomainId,
        handle: u32,
        host_addr: u64,
    ) -> Result<(), GrantStatus> {
        let place = self.me(id).grants.maps.entry(handle, MAP_BYTES);
        let map = place.and_then(|place| Map::load(p, place)).ok_or(GrantStatus::BAD_HANDLE)?;
        if map.gfn.address() != host_addr {
            return Err(GrantStatus::BAD_VIRT_ADDR);
        }
        self.drop_map(p, id, handle, map);
        Ok(())
    }

    /// Takes the mapping away before the pin: afterwards the granter may do as it likes.
    fn drop_map(&mut self, p: &mut P, id: DomainId, handle: u32, map: Map) {
        let (domain, frames) = self.with_frames(id);
        domain.p2m.remove(p, frames, map.gfn);
        let grants = &mut domain.grants;
        if let Some((mfn, at)) = grants.maps.entry(handle, MAP_BYTES) {
            p.store64(mfn, at, 0);
            p.store64(mfn, at + 8, grants.free_map.into());
            grants.free_map = handle + 1;
            grants.mapped -= 1;
        }
        self.unpin(p, map.pin);
    }

    /// A handle that is not in use. It stays so until [`Self::take_handle`].
    fn free_handle(&mut self, p: &mut P, id: DomainId) -> Result<u32, Errno> {
        let (domain, frames) = self.with_frames(id);
        if domain.grants.free_map == 0 {
            #[expect(clippy::cast_possible_truncation, reason = "at most 128 frames")]
            let first = domain.grants.maps.len() as u32 * MAPS_PER_FRAME;
            let frame = domain.grants.maps.grow(p, frames, &mut domain.account)?;
            for index in 0..MAPS_PER_FRAME {
                let next = if index + 1 == MAPS_PER_FRAME { 0 } else { first + index + 2 };
                p.store64(frame, index as usize * MAP_BYTES + 8, next.into());
            }
            domain.grants.free_map = first + 1;
        }
        Ok(domain.grants.free_map - 1)
    }

    fn take_handle(&mut self, p: &mut P, id: DomainId, handle: u32, map: Map) {
        let grants = &mut self.me_mut(id).grants;
        if let Some((mfn, at)) = grants.maps.entry(handle, MAP_BYTES) {
            grants.free_map = u32::try_from(p.load64(mfn, at + 8)).unwrap_or(0);
            grants.mapped += 1;
            map.store(p, (mfn, at));
        }
    }

    /// Gives back the foreign pages that a dead domain has mapped, from handle `from` on. Answers
    /// where to go on, or nothing when all are back.
    pub(crate) fn drop_maps(&mut self, p: &mut P, id: DomainId, from: u32) -> Option<u32> {
        let mut handle = from;
        while self.me(id).grants.mapped > 0 {
            if handle - from == BATCH * 8 {
                return Some(handle);
            }
            let place = self.me(id).grants.maps.entry(handle, MAP_BYTES)?;
            if let Some(map) = Map::load(p, place) {
                self.drop_map(p, id, handle, map);
            }
            handle += 1;
        }
        None
    }

    fn copy_one(&mut self, p: &mut P, id: DomainId, gpa: u64) -> Result<(), Errno> {
        let mut op: GrantCopy = self.get(p, id, gpa)?;
        op.status = match self.copy_grant(p, id, &op) {
            Ok(()) => GrantStatus::OKAY,
            Err(status) => status,
        };
        let status = gpa.wrapping_add(offset_of!(GrantCopy, status) as u64);
        self.write_caller(p, id, status, op.status.as_bytes())
    }

    fn copy_grant(&mut self, p: &mut P, id: DomainId, op: &GrantCopy) -> Result<(), GrantStatus> {
        let fits = |side: &CopyPtr| u32::from(side.offset) + u32::from(op.len) <= 4096;
        if !fits(&op.source) || !fits(&op.dest) {
            return Err(GrantStatus::BAD_COPY_ARG);
        }
        let source =
            self.copy_side(p, id, &op.source, op.flags & GNTCOPY_SOURCE_GREF != 0, false)?;
        let dest = match self.copy_side(p, id, &op.dest, op.flags & GNTCOPY_DEST_GREF != 0, true) {
            Ok(dest) => dest,
            Err(status) => {
                self.end_side(p, source);
                return Err(status);
            }
        };
        let from = (source.0, usize::from(op.source.offset));
        let to = (dest.0, usize::from(op.dest.offset));
        let overlaps = from.0 == to.0 && from.1.abs_diff(to.1) < usize::from(op.len);
        if !overlaps {
            p.copy(from, to, op.len.into());
        }
        self.end_side(p, source);
        self.end_side(p, dest);
        if overlaps { Err(GrantStatus::BAD_COPY_ARG) } else { Ok(()) }
    }

    /// The frame of one side of a copy, with its pin if it is a grant.
    fn copy_side(
        &mut self,
        p: &mut P,
        id: DomainId,
        side: &CopyPtr,
        is_grant: bool,
        write: bool,
    ) -> Result<(Mfn, Option<Pin>), GrantStatus> {
        if is_grant {
            #[expect(clippy::cast_possible_truncation, reason = "the reference is the low half")]
            let gref = GrantRef(side.frame as u32);
            let pin = self.pin(p, side.domid, id, gref, write)?;
            return Ok((pin.mfn, Some(pin)));
        }
        if side.domid != DomainId::SELF && side.domid != id {
            return Err(GrantStatus::PERMISSION_DENIED);
        }
        let page = self.me(id).p2m.page(p, Gfn(side.frame)).ok_or(GrantStatus::BAD_PAGE)?;
        let is_memory = matches!(page.kind, Kind::Ram | Kind::Grant);
        if !is_memory || write && !page.write {
            return Err(GrantStatus::BAD_PAGE);
        }
        Ok((page.mfn, None))
    }

    fn end_side(&mut self, p: &mut P, (_, pin): (Mfn, Option<Pin>)) {
        if let Some(pin) = pin {
            self.unpin(p, pin);
        }
    }

    /// Takes a grant into use for `grantee` (§8.3).
    fn pin(
        &mut self,
        p: &mut P,
        granter: DomainId,
        grantee: DomainId,
        gref: GrantRef,
        write: bool,
    ) -> Result<Pin, GrantStatus> {
        let granter = if granter == DomainId::SELF { grantee } else { granter };
        let domain = self.domain(granter).filter(|domain| domain.is_alive());
        let domain = domain.ok_or(GrantStatus::BAD_DOMAIN)?;
        let entry = domain.grants.shared.entry(gref.0, size_of::<GrantEntryV1>());
        let place = domain.grants.active.entry(gref.0, ACTIVE_BYTES);
        let (entry, place) = entry.zip(place).ok_or(GrantStatus::BAD_GNTREF)?;
        let mut active = Active::load(p, place);
        if active.pins > 0 && active.grantee != grantee.0 {
            return Err(GrantStatus::GENERAL_ERROR);
        }
        if active.pins == u32::MAX {
            return Err(GrantStatus::NO_SPACE);
        }
        if active.pins == 0 || write && active.writers == 0 {
            mark(p, entry, grantee, write)?;
        }
        let life = domain.life;
        if active.pins == 0 {
            // Behind the swap: whoever changes the frame now changes nothing for us.
            let gfn = Gfn(p.load32(entry.0, entry.1 + offset_of!(GrantEntryV1, frame)).into());
            match domain.p2m.page(p, gfn) {
                Some(page) if page.kind == Kind::Ram => {
                    active.frame = page.mfn.0;
                    active.owner_writes = page.write;
                }
                _ => {
                    unmark(p, entry, GTF_READING | GTF_WRITING);
                    return Err(GrantStatus::BAD_PAGE);
                }
            }
        }
        if write && !active.owner_writes {
            // Nobody gives away what it does not have.
            if active.writers == 0 {
                let left = if active.pins == 0 { GTF_READING | GTF_WRITING } else { GTF_WRITING };
                unmark(p, entry, left);
            }
            return Err(GrantStatus::PERMISSION_DENIED);
        }
        active.grantee = grantee.0;
        active.pins += 1;
        active.writers += u32::from(write);
        active.store(p, place);
        let mfn = Mfn(active.frame);
        self.frames.pin(mfn);
        Ok(Pin { granter, life, gref, write, mfn })
    }

    /// Gives a grant back. If its granter has begun another life since, there is no entry any
    /// more, and only the frame is given back.
    fn unpin(&mut self, p: &mut P, pin: Pin) {
        self.frames.unpin(pin.mfn);
        let Some(domain) = self.domain(pin.granter).filter(|domain| domain.life == pin.life) else {
            return;
        };
        let entry = domain.grants.shared.entry(pin.gref.0, size_of::<GrantEntryV1>());
        let place = domain.grants.active.entry(pin.gref.0, ACTIVE_BYTES);
        let Some((entry, place)) = entry.zip(place) else { return };
        let mut active = Active::load(p, place);
        active.pins -= 1;
        active.writers -= u32::from(pin.write);
        active.store(p, place);
        let mut done = 0;
        if pin.write && active.writers == 0 {
            done |= GTF_WRITING;
        }
        if active.pins == 0 {
            done |= GTF_READING;
        }
        if done != 0 {
            unmark(p, entry, done);
        }
    }

    fn setup_table(&mut self, p: &mut P, id: DomainId, gpa: u64) -> Answer {
        let mut op: SetupTable = self.get(p, id, gpa)?;
        op.status = match self.self_or_built(id, op.dom) {
            Err(_) => GrantStatus::BAD_DOMAIN,
            Ok(_) if op.nr_frames > MAX_FRAMES => GrantStatus::GENERAL_ERROR,
            Ok(owner) => match self.grow_grants(p, owner, op.nr_frames) {
                Ok(()) => GrantStatus::OKAY,
                Err(_) => GrantStatus::NO_SPACE,
            },
        };
        if op.status == GrantStatus::OKAY {
            for index in 0..u64::from(op.nr_frames) {
                let at = op.frame_list.wrapping_add(index * 8);
                self.put(p, id, at, &0_u64)?;
            }
        }
        self.put(p, id, gpa, &op)?;
        Ok(0)
    }

    fn query_size(&mut self, p: &mut P, id: DomainId, gpa: u64) -> Answer {
        let mut op: QuerySize = self.get(p, id, gpa)?;
        op.status = GrantStatus::BAD_DOMAIN;
        if let Ok(owner) = self.self_or_built(id, op.dom) {
            op.nr_frames = u32::try_from(self.me(owner).grants.shared.len()).unwrap_or(MAX_FRAMES);
            op.max_nr_frames = MAX_FRAMES;
            op.status = GrantStatus::OKAY;
        }
        self.put(p, id, gpa, &op)?;
        Ok(0)
    }

    /// Makes sure that the domain's table has so many frames.
    ///
    /// # Errors
    /// `ENOSPC`, `ENOMEM`: as [`crate::frame::Table::grow`]; the table keeps what it has.
    pub(crate) fn grow_grants(
        &mut self,
        p: &mut P,
        id: DomainId,
        wanted: u32,
    ) -> Result<(), Errno> {
        let (Domain { grants, account, .. }, frames) = self.with_frames(id);
        while grants.shared.len() < wanted as usize {
            while grants.active.len() < 2 * (grants.shared.len() + 1) {
                grants.active.grow(p, frames, account)?;
            }
            grants.shared.grow(p, frames, account)?;
        }
        Ok(())
    }

    /// Fills a reserved entry of a domain that is being built.
    ///
    /// # Errors
    /// `EINVAL`: not a reserved entry, or the page is no memory. `ENOMEM`.
    pub(crate) fn set_grant(
        &mut self,
        p: &mut P,
        id: DomainId,
        grantee: DomainId,
        gref: GrantRef,
        gfn: Gfn,
    ) -> Result<(), Errno> {
        let frame = u32::try_from(gfn.0).map_err(|_| Errno::EINVAL)?;
        let page = self.me(id).p2m.page(p, gfn);
        if gref.0 >= RESERVED_ENTRIES || !page.is_some_and(|page| page.kind == Kind::Ram) {
            return Err(Errno::EINVAL);
        }
        self.grow_grants(p, id, 1)?;
        let place = self.me(id).grants.shared.entry(gref.0, size_of::<GrantEntryV1>());
        let (mfn, at) = place.ok_or(Errno::EINVAL)?;
        let entry = GrantEntryV1 { flags: GTF_PERMIT_ACCESS, domid: grantee, frame };
        p.write(mfn, at, entry.as_bytes());
        Ok(())
    }
}

/// Marks an entry as in use, if it permits that.
fn mark<P: Platform>(
    p: &mut P,
    (mfn, at): (Mfn, usize),
    grantee: DomainId,
    write: bool,
) -> Result<(), GrantStatus> {
    let marks = GTF_READING | if write { GTF_WRITING } else { 0 };
    for _ in 0..ATTEMPTS {
        let word = p.load32(mfn, at);
        #[expect(clippy::cast_possible_truncation, reason = "takes fields apart")]
        let (flags, domid) = (word as u16, (word >> 16) as u16);
        if flags & (GTF_TYPE_MASK | GTF_SUB_PAGE) != GTF_PERMIT_ACCESS || domid != grantee.0 {
            return Err(GrantStatus::GENERAL_ERROR);
        }
        if write && flags & GTF_READONLY != 0 {
            return Err(GrantStatus::GENERAL_ERROR);
        }
        if p.compare_exchange32(mfn, at, word, word | u32::from(marks)).is_ok() {
            return Ok(());
        }
    }
    Err(GrantStatus::GENERAL_ERROR)
}

fn unmark<P: Platform>(p: &mut P, (mfn, at): (Mfn, usize), marks: u16) {
    p.and32(mfn, at, !u32::from(marks));
}
