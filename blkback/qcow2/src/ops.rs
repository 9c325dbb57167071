//! Requests below that are in flight, and flushes.

use crate::api::{File, Lower, LowerRequest, LowerTag};
use alloc::vec::Vec;
use domain_api::disk::{Buffer, DiskError, Operation, SECTOR};

/// Why something cannot go on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Stop {
    /// Something in flight has to end first; then it is simply tried again.
    Wait,
    /// It never will.
    Error(DiskError),
}

impl From<DiskError> for Stop {
    fn from(error: DiskError) -> Self {
        Self::Error(error)
    }
}

/// Who waits for a request below.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Owner {
    /// A page of the cache.
    Page(usize),
    /// The flushes.
    Flush,
    /// A request of the guest, by its slot.
    Guest(usize),
    /// A change of a mapping, by its slot.
    Change(usize),
    /// A copy that such a change makes.
    Copy(usize),
    /// The growth of the refcounts.
    Growth,
}

/// Most requests below at a time.
const MOST: usize = 256;

/// The requests below.
#[derive(Debug)]
pub(crate) struct Ops {
    owners: Vec<Option<Owner>>,
    free: Vec<u32>,
    /// The disk had no room for one.
    pub(crate) was_busy: bool,
}

/// What is asked of a volume below.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ask<'a> {
    pub(crate) file: File,
    pub(crate) operation: Operation,
    /// Byte, a multiple of 512.
    pub(crate) at: u64,
    /// Bytes, a multiple of 512.
    pub(crate) len: u64,
    pub(crate) buffers: &'a [Buffer<'a>],
}

impl Ops {
    pub(crate) fn new() -> Self {
        Self { owners: Vec::new(), free: Vec::new(), was_busy: false }
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.owners.len() - self.free.len()
    }

    /// Submits a request; `Wait` when there is no room.
    pub(crate) fn submit(
        &mut self,
        lower: &mut impl Lower,
        owner: Owner,
        ask: &Ask<'_>,
    ) -> Result<(), Stop> {
        let slot = match self.free.last() {
            Some(&slot) => slot,
            None if self.owners.len() < MOST => {
                let slot = u32::try_from(self.owners.len()).map_err(|_| Stop::Wait)?;
                self.owners.push(None);
                self.free.push(slot);
                slot
            }
            None => return self.busy(),
        };
        let request = LowerRequest {
            file: ask.file,
            tag: LowerTag(slot),
            operation: ask.operation,
            sector: ask.at / SECTOR,
            sectors: ask.len / SECTOR,
            buffers: ask.buffers,
        };
        if lower.submit(request).is_err() {
            return self.busy();
        }
        self.free.pop();
        self.owners[slot as usize] = Some(owner);
        Ok(())
    }

    fn busy(&mut self) -> Result<(), Stop> {
        self.was_busy = true;
        Err(Stop::Wait)
    }

    /// Whose request ended. `None` for a tag that is not in use.
    pub(crate) fn take(&mut self, tag: LowerTag) -> Option<Owner> {
        let owner = self.owners.get_mut(tag.0 as usize)?.take()?;
        self.free.push(tag.0);
        Some(owner)
    }
}

/// Flushes of the image's volume, each for all who want one.
///
/// A flush that began before somebody's writes were completed is of no use to him, so a ticket is
/// always for the next one.
#[derive(Debug, Default)]
pub(crate) struct Flushes {
    wanted: u64,
    started: u64,
    ended: u64,
    failed: Option<(u64, DiskError)>,
}

/// The number of the flush that somebody waits for; 0: none.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct FlushTicket(u64);

impl FlushTicket {
    pub(crate) const NONE: Self = Self(0);
}

impl Flushes {
    /// Wants everything to be durable that was completed before.
    pub(crate) fn want(&mut self) -> FlushTicket {
        self.wanted = self.started + 1;
        FlushTicket(self.wanted)
    }

    /// Whether a flush has ended.
    pub(crate) fn check(&self, ticket: FlushTicket) -> Result<(), Stop> {
        match self.failed {
            Some((number, error)) if number == ticket.0 && ticket != FlushTicket::NONE => {
                Err(error.into())
            }
            _ if self.ended >= ticket.0 => Ok(()),
            _ => Err(Stop::Wait),
        }
    }

    /// Starts the next one, if it is wanted and none is under way.
    pub(crate) fn start(&mut self, lower: &mut impl Lower, ops: &mut Ops) {
        if self.started != self.ended || self.wanted <= self.started {
            return;
        }
        let ask =
            Ask { file: File::Image, operation: Operation::Flush, at: 0, len: 0, buffers: &[] };
        if ops.submit(lower, Owner::Flush, &ask).is_ok() {
            self.started += 1;
        }
    }

    pub(crate) fn completed(&mut self, result: Result<(), DiskError>) {
        self.ended = self.started;
        self.failed = result.err().map(|error| (self.ended, error));
    }
}
