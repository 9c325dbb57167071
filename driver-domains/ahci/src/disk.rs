//! A disk: requests become commands in slots, and ended commands become completions.
//!
//! A slot is free, or its request waits to be issued, or it runs, or it is done. Queued commands
//! (NCQ) and others must not be with the device at the same time, so that a flush or a trim waits
//! until the queued commands before it have ended, and holds back those after it. The two kinds
//! take turns, so that neither waits for ever.

use crate::command::{Command, Memory, ata};
use crate::engine::{Engine, FAULTS};
use crate::identify::{Identity, Unusable};
use crate::notice::{Event, Notices};
use crate::recovery::State;
use crate::registers as reg;
use domain_api::disk::{Completion, Disk, DiskError, Geometry, Operation, Request, Tag};
use domain_api::{Clock, Registers};

/// Slots of a port, at most.
pub const SLOTS: u32 = 32;

/// A set of slots, a bit for each.
pub type Slots = u32;

/// What is known about the request in a slot.
#[derive(Clone, Copy, Debug)]
pub struct Slot {
    pub tag: Tag,
    pub operation: Operation,
    /// How often it was tried in vain.
    pub attempts: u8,
    /// When [`AtaDisk::check`] first saw it run; 0: not yet.
    pub since_ns: u64,
    pub result: Result<(), DiskError>,
}

/// A disk on a port.
#[derive(Debug)]
pub struct AtaDisk<R, C> {
    pub(crate) engine: Engine<R, C>,
    pub(crate) memory: Memory,
    pub(crate) identity: Identity,
    geometry: Geometry,
    /// Commands are queued (NCQ).
    pub(crate) ncq: bool,
    /// The controller takes addresses of 64 bits.
    wide: bool,
    pub(crate) slots: [Slot; SLOTS as usize],
    free: Slots,
    pub(crate) waiting: Slots,
    pub(crate) running: Slots,
    done: Slots,
    /// Of those in use: not to be mixed with queued commands.
    pub(crate) unqueued: Slots,
    /// Of those in use: to be issued alone, as one of them breaks whatever runs with it.
    pub(crate) alone: Slots,
    /// What was issued last was unqueued.
    turn: bool,
    /// Something may have ended.
    pub(crate) look: bool,
    pub(crate) state: State,
    /// The link was lost, perhaps with the power, perhaps with the disk's cache.
    pub(crate) cache_in_doubt: bool,
    pub(crate) notices: Notices,
}

impl<R: Registers, C: Clock> AtaDisk<R, C> {
    /// A disk on a port that runs.
    pub(crate) fn new(
        engine: Engine<R, C>,
        memory: Memory,
        identity: Identity,
        (hba_slots, hba_ncq, wide): (u32, bool, bool),
    ) -> Self {
        let ncq = hba_ncq && identity.queue_depth > 1;
        let depth = if ncq { hba_slots.min(identity.queue_depth) } else { hba_slots };
        let slot = Slot {
            tag: Tag(0),
            operation: Operation::Read,
            attempts: 0,
            since_ns: 0,
            result: Ok(()),
        };
        Self {
            engine,
            memory,
            geometry: identity.geometry(u16::try_from(depth).unwrap_or(1)),
            identity,
            ncq,
            wide,
            slots: [slot; SLOTS as usize],
            free: u32::MAX >> (SLOTS - depth.clamp(1, SLOTS)),
            waiting: 0,
            running: 0,
            done: 0,
            unqueued: 0,
            alone: 0,
            turn: false,
            look: false,
            state: State::Running,
            cache_in_doubt: false,
            notices: Notices::default(),
        }
    }

    /// What the disk said about itself.
    #[must_use]
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Whether it queues commands by itself (NCQ).
    #[must_use]
    pub fn is_queueing(&self) -> bool {
        self.ncq
    }

    /// Whether it has no requests.
    #[cfg(test)]
    pub(crate) fn is_idle(&self) -> bool {
        self.waiting | self.running | self.done == 0
    }

    /// Ends the request in `slot`.
    pub(crate) fn end(&mut self, slot: u32, result: Result<(), DiskError>) {
        let bit = !(1 << slot);
        self.waiting &= bit;
        self.running &= bit;
        self.unqueued &= bit;
        self.alone &= bit;
        self.done |= 1 << slot;
        self.slots[slot as usize].result = result;
    }

    /// Writes a read or write into `slot`.
    fn put_transfer(&mut self, slot: u32, request: &Request<'_>) -> Result<bool, DiskError> {
        self.check_transfer(request)?;
        let shift = self.identity.sector_shift;
        let sectors = request.sectors >> shift;
        // A count of 65536 would be 0; `max_sectors` is far below.
        let sectors = u16::try_from(sectors).map_err(|_| DiskError::Unsupported)?;
        let writes = request.operation == Operation::Write;
        let code = match (self.ncq, writes) {
            (true, false) => ata::READ_FPDMA,
            (true, true) => ata::WRITE_FPDMA,
            (false, false) => ata::READ_DMA_EXT,
            (false, true) => ata::WRITE_DMA_EXT,
        };
        let tag = u16::try_from(slot << 3).map_err(|_| DiskError::Unsupported)?;
        let (feature, count) = if self.ncq { (sectors, tag) } else { (0, sectors) };
        let command = Command { code, feature, lba: request.sector >> shift, count, writes };
        self.memory.put_with_buffers(slot, &command, request.buffers);
        Ok(!self.ncq)
    }

    fn check_transfer(&self, request: &Request<'_>) -> Result<(), DiskError> {
        let mut bytes = 0;
        for buffer in request.buffers {
            let is_whole = buffer.offset % 512 == 0 && buffer.len % 512 == 0 && buffer.len != 0;
            let end = u32::from(buffer.offset) + u32::from(buffer.len);
            let is_reached = self.wide || buffer.bus_address() + 4096 <= 1 << 32;
            if !is_whole || end > 4096 || !is_reached {
                return Err(DiskError::Unsupported);
            }
            bytes += u64::from(buffer.len);
        }
        let too_many = request.buffers.len() > usize::from(self.geometry.max_buffers);
        if too_many || bytes / 512 != request.sectors {
            return Err(DiskError::Unsupported);
        }
        self.check_range(request)
    }

    fn check_range(&self, request: &Request<'_>) -> Result<(), DiskError> {
        let mask = (1 << self.identity.sector_shift) - 1;
        if (request.sector | request.sectors) & mask != 0 || request.sectors == 0 {
            return Err(DiskError::Unsupported);
        }
        match request.sector.checked_add(request.sectors) {
            Some(end) if end <= self.geometry.sectors => Ok(()),
            _ => Err(DiskError::OutOfRange),
        }
    }

    /// Writes a command that makes completed writes durable. `None`: nothing to do.
    fn put_flush(&mut self, slot: u32) -> Option<Result<bool, DiskError>> {
        let Some(code) = self.identity.flush else {
            // Nothing to flush, or no way to do so, which must not pass as success.
            return self.identity.cache.then_some(Err(DiskError::Unsupported));
        };
        let command = Command { code, feature: 0, lba: 0, count: 0, writes: false };
        self.memory.put(slot, &command);
        Some(Ok(true))
    }

    fn put_trim(&mut self, slot: u32, request: &Request<'_>) -> Result<bool, DiskError> {
        if request.sectors > u64::from(self.geometry.max_discard_sectors) {
            return Err(DiskError::Unsupported);
        }
        self.check_range(request)?;
        let shift = self.identity.sector_shift;
        let code = ata::DATA_SET_MANAGEMENT;
        let command = Command { code, feature: ata::TRIM, lba: 0, count: 1, writes: true };
        let (lba, count) = (request.sector >> shift, request.sectors >> shift);
        self.memory.put_trim(slot, &command, lba, count);
        Ok(true)
    }

    /// Issues what may be issued now.
    pub(crate) fn issue(&mut self) {
        let batch = self.next_batch();
        if batch == 0 {
            return;
        }
        self.turn = batch & self.unqueued != 0;
        self.waiting &= !batch;
        self.running |= batch;
        self.engine.issue(batch, !self.turn);
    }

    fn next_batch(&self) -> Slots {
        if !matches!(self.state, State::Running) {
            return 0;
        }
        if self.alone != 0 {
            let one = self.alone & self.alone.wrapping_neg();
            return if self.running == 0 { one } else { 0 };
        }
        let unqueued = self.waiting & self.unqueued;
        let queued = self.waiting & !self.unqueued;
        let runs_unqueued = self.running & self.unqueued != 0;
        match (queued != 0, unqueued != 0) {
            (true, false) if !runs_unqueued => queued,
            (false, true) if self.running == 0 || runs_unqueued => unqueued,
            (true, true) if self.running == 0 => {
                if self.turn {
                    queued
                } else {
                    unqueued
                }
            }
            _ => 0,
        }
    }

    /// Commands that the device has not finished.
    pub(crate) fn active(&self) -> Slots {
        let queued = self.running & self.unqueued == 0;
        self.running & self.engine.read(if queued { reg::SACT } else { reg::CI })
    }

    /// Notes that commands ended well.
    pub(crate) fn end_well(&mut self, mut ended: Slots) {
        if self.alone == 0 && self.unqueued & ended == 0 {
            // The usual case, without a look at each slot; `result` is `Ok` since `submit`.
            self.running &= !ended;
            self.done |= ended;
            return;
        }
        while ended != 0 {
            self.end(ended.trailing_zeros(), Ok(()));
            ended &= ended - 1;
        }
    }

    /// Looks what has ended, and issues what waited for it.
    fn collect(&mut self) {
        self.look = false;
        if !matches!(self.state, State::Running) {
            return;
        }
        // Causes first: what ends after they were cleared raises them again.
        let causes = self.engine.read(reg::PXIS);
        if causes == u32::MAX {
            self.state = State::Gone;
            return;
        }
        if causes != 0 {
            self.engine.write(reg::PXIS, causes);
        }
        if causes & FAULTS != 0 {
            self.recover(causes);
        } else {
            let ended = self.running & !self.active();
            self.end_well(ended);
        }
        self.issue();
    }

    /// Whether there is something to collect.
    pub(crate) fn has_news(&mut self) -> bool {
        let settled = matches!(self.state, State::Running);
        self.look |= settled && self.engine.read(reg::PXIS) != 0;
        self.is_told()
    }

    /// The same, without asking the adapter.
    pub(crate) fn is_told(&self) -> bool {
        self.look || self.done != 0
    }
}

impl<R: Registers, C: Clock> Disk for AtaDisk<R, C> {
    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn submit(&mut self, request: Request<'_>) -> Result<(), domain_api::disk::Busy> {
        if self.free == 0 {
            return Err(domain_api::disk::Busy);
        }
        let slot = self.free.trailing_zeros();
        let Request { tag, operation, .. } = request;
        let put = match operation {
            _ if matches!(self.state, State::Dead(_)) => Some(Err(DiskError::Aborted)),
            Operation::Read | Operation::Write => Some(self.put_transfer(slot, &request)),
            Operation::Flush => self.put_flush(slot),
            Operation::Discard => Some(self.put_trim(slot, &request)),
            Operation::WriteZeroes => Some(Err(DiskError::Unsupported)),
        };
        self.free &= !(1 << slot);
        self.slots[slot as usize] =
            Slot { tag, operation, attempts: 0, since_ns: 0, result: Ok(()) };
        match put {
            None => self.end(slot, Ok(())),
            Some(Err(error)) => self.end(slot, Err(error)),
            Some(Ok(unqueued)) => {
                self.waiting |= 1 << slot;
                self.unqueued |= u32::from(unqueued) << slot;
            }
        }
        Ok(())
    }

    fn kick(&mut self) {
        if self.waiting != 0 {
            self.issue();
        }
    }

    fn complete(&mut self) -> Option<Completion> {
        if self.done == 0 && self.look {
            self.collect();
        }
        if self.done == 0 {
            return None;
        }
        let slot = self.done.trailing_zeros();
        self.done &= self.done - 1;
        self.free |= 1 << slot;
        let Slot { tag, operation, result, .. } = self.slots[slot as usize];
        Some(Completion { tag, result: self.judge_flush(operation, result) })
    }
}

impl<R: Registers, C: Clock> AtaDisk<R, C> {
    /// The first flush after the cache may have lost its content is a failed one: what it should
    /// have made durable may be gone.
    fn judge_flush(
        &mut self,
        operation: Operation,
        result: Result<(), DiskError>,
    ) -> Result<(), DiskError> {
        if operation != Operation::Flush || result.is_err() || !self.cache_in_doubt {
            return result;
        }
        self.cache_in_doubt = false;
        self.notices.add(Event::FlushRefused);
        Err(DiskError::Failed)
    }

    /// Gives the disk up: whatever waits, and whatever will be submitted, fails.
    pub(crate) fn die(&mut self, why: Unusable) {
        // Interrupts are off whether or not the engine stops.
        let _ = self.engine.stop_all();
        let mut left = self.waiting | self.running;
        while left != 0 {
            self.end(left.trailing_zeros(), Err(DiskError::Aborted));
            left &= left - 1;
        }
        self.notices.add(Event::GivenUp(why));
        self.state = State::Dead(why);
    }
}
