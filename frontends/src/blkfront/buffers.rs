//! The pages that a frontend lends to its user, and their grants.

use super::{Env, Error, Fault, GrantPolicy, Held};
use alloc::vec::Vec;
use domain_api::{Access, DomainId, Errno, GrantRef};
use shmem::Page;
use xen_abi::blkif::Segment;

/// Sectors of 512 bytes in a page.
pub const SECTORS_PER_PAGE: u8 = 8;

/// A page for data, lent by a frontend.
///
/// Whoever has it may fill and read it; a request takes it along, and the completion brings it
/// back. It is given back by [`give_back`](super::Blkfront::give_back).
#[derive(Debug)]
#[must_use = "a frontend has only so many buffers"]
pub struct Buffer {
    pub(super) index: u16,
    pub(super) page: Page,
}

impl Buffer {
    /// The page.
    #[must_use]
    pub const fn page(&self) -> &Page {
        &self.page
    }

    /// Its number among the frontend's buffers, from 0.
    #[must_use]
    pub const fn index(&self) -> u16 {
        self.index
    }
}

/// Some sectors of a buffer, as part of a request. Parts follow each other on the disk.
#[derive(Debug)]
#[must_use = "a frontend has only so many buffers"]
pub struct Part {
    /// The page.
    pub buffer: Buffer,
    /// First sector of it, 0 to 7.
    pub first: u8,
    /// How many, 1 to 8.
    pub sectors: u8,
}

impl Part {
    /// All of a buffer.
    pub const fn whole(buffer: Buffer) -> Self {
        Self { buffer, first: 0, sectors: SECTORS_PER_PAGE }
    }

    /// Whether its sectors lie in the page.
    pub(super) const fn is_sound(&self) -> bool {
        self.sectors >= 1
            && self.sectors <= SECTORS_PER_PAGE
            && self.first <= SECTORS_PER_PAGE - self.sectors
    }

    pub(super) const fn segment(&self, gref: GrantRef) -> Segment {
        Segment { gref, first_sect: self.first, last_sect: self.first + self.sectors - 1, pad: 0 }
    }
}

/// Pages of one kind. Each may be granted; a connection's end takes the grants back.
pub struct Pool {
    pages: Vec<Page>,
    grefs: Vec<Option<GrantRef>>,
    free: Vec<u16>,
}

impl Pool {
    pub fn new(count: u16) -> Self {
        Self {
            pages: (0..count).map(|_| Page::new_zeroed()).collect(),
            grefs: alloc::vec![None; usize::from(count)],
            free: (0..count).rev().collect(),
        }
    }

    pub fn free(&self) -> usize {
        self.free.len()
    }

    pub fn take(&mut self) -> Option<u16> {
        self.free.pop()
    }

    pub fn put(&mut self, index: u16) {
        self.free.push(index);
    }

    pub fn page(&self, index: u16) -> &Page {
        &self.pages[usize::from(index)]
    }

    /// Whether this is one of ours, as it is now.
    pub fn owns(&self, buffer: &Buffer) -> bool {
        self.pages.get(usize::from(buffer.index)).is_some_and(|page| page.is_same(&buffer.page))
    }

    /// Grants all pages, for the life of a connection.
    pub fn grant_all<E: Env>(&mut self, env: &mut E, to: DomainId) -> Result<(), Errno> {
        for index in 0..self.pages.len() {
            if self.grefs[index].is_none() {
                self.grefs[index] = Some(env.grant(to, &self.pages[index], Access::ReadWrite)?);
            }
        }
        Ok(())
    }

    /// The grant of a page, which is made if there is none.
    #[inline]
    pub fn grant<E: Env>(
        &mut self,
        env: &mut E,
        to: DomainId,
        index: u16,
        access: Access,
    ) -> Result<GrantRef, Errno> {
        let index = usize::from(index);
        if let Some(gref) = self.grefs[index] {
            return Ok(gref);
        }
        let gref = env.grant(to, &self.pages[index], access)?;
        self.grefs[index] = Some(gref);
        Ok(gref)
    }

    /// Ends a request's use of a page.
    #[inline]
    pub fn revoke<E: Env>(
        &mut self,
        env: &mut E,
        index: u16,
        policy: GrantPolicy,
    ) -> Result<(), Error> {
        let slot = &mut self.grefs[usize::from(index)];
        if policy == GrantPolicy::PerRequest
            && let Some(gref) = *slot
        {
            env.revoke(gref).map_err(|_| Error::Broken(Fault::StillGranted(gref)))?;
            *slot = None;
        }
        Ok(())
    }

    /// Takes all grants back. What the backend still holds goes to `held`; a page that it may
    /// also still write to, as `in_flight` knows, is replaced by a fresh one.
    pub fn revoke_all<E: Env>(
        &mut self,
        env: &mut E,
        held: &mut Vec<Held>,
        in_flight: impl Fn(u16) -> bool,
    ) {
        for (index, slot) in (0..).zip(&mut self.grefs) {
            let Some(gref) = slot.take() else { continue };
            if env.revoke(gref).is_err() {
                let page = &mut self.pages[usize::from(index)];
                held.push(Held { gref, page: page.clone() });
                if in_flight(index) {
                    *page = Page::new_zeroed();
                }
            }
        }
    }
}
