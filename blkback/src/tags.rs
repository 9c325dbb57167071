//! Whose requests the disks have, and the pages of our own that take part in them.

use crate::split::Cursor;
use alloc::vec::Vec;
use domain_api::disk::Tag;
use domain_api::{DmaPage, Page};
use qcow2::LowerTag;

/// Whose a request of a disk is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Owner {
    /// Nobody's: the tag is free.
    Free,
    /// A part of a request of a vbd.
    Request {
        /// Which vbd.
        station: u16,
        /// Which of its queues.
        queue: u16,
        /// Which request in the queue's window.
        index: u32,
        /// The page of our own that it goes through, if it does.
        bounce: Option<Bounce>,
    },
    /// Of the image that a vbd is on.
    Image {
        /// Which vbd.
        station: u16,
        /// What the image calls it.
        tag: LowerTag,
    },
    /// The search for the volume of a vbd.
    Search {
        /// Which vbd.
        station: u16,
        /// Differs between searches, as vbds come and go.
        search: u32,
        /// The page that is read into.
        page: u16,
    },
}

impl Owner {
    /// The same, by way of a page of our own.
    #[must_use]
    pub fn through(self, page: Bounce) -> Self {
        match self {
            Self::Request { station, queue, index, .. } => {
                Self::Request { station, queue, index, bounce: Some(page) }
            }
            other => other,
        }
    }
}

/// Data that go through a page of our own.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bounce {
    /// Which page.
    pub page: u16,
    /// Where in the request's data.
    pub from: Cursor,
    /// How many bytes.
    pub bytes: u16,
}

/// The tags in use, of all disks together.
#[derive(Debug, Default)]
pub struct Tags {
    owners: Vec<Owner>,
    free: Vec<u32>,
}

impl Tags {
    /// A tag for a request.
    #[inline]
    pub fn open(&mut self, owner: Owner) -> Tag {
        if let Some(tag) = self.free.pop() {
            self.owners[tag as usize] = owner;
            return Tag(tag);
        }
        self.owners.push(owner);
        Tag(u32::try_from(self.owners.len() - 1).expect("a disk has fewer requests at a time"))
    }

    /// Takes a tag back, and says whose it was.
    #[inline]
    pub fn close(&mut self, tag: Tag) -> Owner {
        let Some(owner) = self.owners.get_mut(tag.0 as usize) else { return Owner::Free };
        let owner = core::mem::replace(owner, Owner::Free);
        if owner != Owner::Free {
            self.free.push(tag.0);
        }
        owner
    }

    /// Tags in use.
    #[must_use]
    pub fn len(&self) -> usize {
        self.owners.len() - self.free.len()
    }
}

/// Pages of our own, which outlive this incarnation: the disk may write to them after its death.
#[derive(Debug)]
pub struct Pool {
    pages: Vec<DmaPage>,
    free: Vec<u16>,
}

impl Pool {
    /// All of them are free.
    #[must_use]
    pub fn new(pages: Vec<DmaPage>) -> Self {
        let free = (0..u16::try_from(pages.len()).unwrap_or(u16::MAX)).rev().collect();
        Self { pages, free }
    }

    /// All of them, be they free or not.
    pub fn pages(&self) -> impl Iterator<Item = Page> + '_ {
        self.pages.iter().map(|page| page.page.clone())
    }

    /// Takes a certain page, if it is free.
    pub fn claim(&mut self, name: usize) {
        self.free.retain(|&free| usize::from(free) != name);
    }

    /// A free page among the first so many.
    pub fn take_below(&mut self, limit: usize) -> Option<u16> {
        let at = self.free.iter().rposition(|&name| usize::from(name) < limit)?;
        Some(self.free.swap_remove(at))
    }

    /// How many are free.
    #[must_use]
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// A free page.
    pub fn take(&mut self) -> Option<u16> {
        self.free.pop()
    }

    /// The page with that name.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    pub fn page(&self, name: u16) -> &DmaPage {
        &self.pages[usize::from(name)]
    }

    /// Frees a page.
    pub fn give(&mut self, name: u16) {
        self.free.push(name);
    }
}
