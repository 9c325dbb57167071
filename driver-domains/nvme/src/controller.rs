//! The running controller, as all its namespaces share it.

use crate::admin::{Admin, Unanswered};
use crate::command::{Command, nvm};
use crate::identify::ErrorEntry;
use crate::io::{Failure, IoQueue, Outcome};
use crate::registers as reg;
use crate::{ABORT_TIMEOUT_NS, COMMAND_TIMEOUT_NS, Hang, Statistics};
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::fmt;
use domain_api::Registers;
use domain_api::disk::{Busy, Completion, Operation, Request};

/// So many completions of nothing end the trust in a controller.
const MOST_STRAYS: u64 = 64;
/// Least time between two reports.
const REPORT_NS: u64 = 60_000_000_000;

/// What went wrong with a command, and what the controller's log says about it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Report {
    /// The command.
    pub failure: Failure,
    /// The newest entry of the log.
    pub log: Option<ErrorEntry>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Failure { command, status, retried } = self.failure;
        let again = if retried { ", tried again" } else { "" };
        write!(
            f,
            "command {:#04x} for namespace {} failed: {status}{again}",
            command.opcode, command.namespace
        )?;
        match &self.log {
            Some(entry) => write!(f, "; {entry}"),
            None => Ok(()),
        }
    }
}

/// See the module.
#[derive(Debug)]
pub struct Controller<R> {
    registers: R,
    admin: Admin,
    pub(crate) queues: Vec<IoQueue>,
    /// For each disk what ended but was not asked for yet.
    ended: Vec<VecDeque<Completion>>,
    depth: u16,
    pub(crate) statistics: Statistics,
    failure: Option<Failure>,
    /// When the next failure may be reported.
    report_ns: u64,
}

/// Where on a disk, in its blocks.
#[derive(Clone, Copy, Debug)]
pub struct Blocks {
    pub namespace: u32,
    pub first: u64,
    pub count: u32,
}

impl<R: Registers> Controller<R> {
    /// A controller that runs, with `disks` namespaces.
    pub fn new(registers: R, admin: Admin, queues: Vec<IoQueue>, disks: usize) -> Self {
        let depth: u16 = queues.iter().map(|queue| queue.rings.depth()).sum();
        let ended = || VecDeque::with_capacity(usize::from(depth));
        Self {
            registers,
            admin,
            queues,
            ended: (0..disks).map(|_| ended()).collect(),
            depth,
            statistics: Statistics::default(),
            failure: None,
            report_ns: 0,
        }
    }

    /// Commands that may be under way at a time.
    pub fn depth(&self) -> u16 {
        self.depth
    }

    /// A queue with room. Each disk has a queue of its own, so that the controller takes from
    /// all disks in turn; it uses the others' when that is full.
    #[inline]
    fn vacancy(&self, disk: u8) -> Option<(usize, u16)> {
        let home = usize::from(disk) % self.queues.len();
        if let Some(slot) = self.queues[home].vacant() {
            return Some((home, slot));
        }
        self.queues.iter().enumerate().find_map(|(n, queue)| Some((n, queue.vacant()?)))
    }

    /// Queues a request that was checked.
    ///
    /// # Errors
    /// All queues are full.
    #[inline]
    pub fn submit(&mut self, disk: u8, blocks: Blocks, request: &Request<'_>) -> Result<(), Busy> {
        let (place, slot) = self.vacancy(disk).ok_or(Busy)?;
        let queue = &mut self.queues[place];
        let Blocks { namespace, first, count } = blocks;
        let transfer = |opcode| {
            let prp = queue.describe(slot, request.buffers);
            Command::transfer(opcode, namespace, first, count, prp)
        };
        let command = match request.operation {
            Operation::Read => transfer(nvm::READ),
            Operation::Write => transfer(nvm::WRITE),
            Operation::Flush => Command::flush(namespace),
            Operation::WriteZeroes => Command::write_zeroes(namespace, first, count),
            Operation::Discard => {
                let range = queue.describe_range(slot, first, count);
                Command::deallocate(namespace, range)
            }
        };
        queue.send(slot, disk, request.tag, command);
        Ok(())
    }

    /// Ends a request without the controller.
    ///
    /// # Errors
    /// Too many were not asked for yet.
    pub fn end(&mut self, disk: u8, completion: Completion) -> Result<(), Busy> {
        let ended = &mut self.ended[usize::from(disk)];
        if ended.len() >= usize::from(self.depth) {
            return Err(Busy);
        }
        ended.push_back(completion);
        Ok(())
    }

    /// Rings the doorbells of queues that have new commands.
    #[inline]
    pub fn kick(&mut self) {
        for queue in &mut self.queues {
            queue.rings.publish(&mut self.registers);
        }
    }

    /// The next request of `disk` that ended. What it meets of other disks' is kept for them.
    #[inline]
    pub fn complete(&mut self, disk: u8) -> Option<Completion> {
        if let Some(completion) = self.ended[usize::from(disk)].pop_front() {
            return Some(completion);
        }
        // An idle queue is not worth a look at its memory.
        for queue in self.queues.iter_mut().filter(|queue| !queue.is_idle()) {
            while let Some(entry) = queue.rings.take(&mut self.registers) {
                match queue.finish(&entry) {
                    Outcome::Ended(whose, completion) if whose == disk => return Some(completion),
                    Outcome::Ended(whose, completion) => {
                        self.ended[usize::from(whose)].push_back(completion);
                    }
                    Outcome::Retry => self.statistics.retries += 1,
                    Outcome::Stray => self.statistics.strays += 1,
                }
            }
        }
        None
    }

    /// See [`crate::Nvme::arm`].
    pub fn arm(&mut self) -> bool {
        let mut work = self.ended.iter().any(|ended| !ended.is_empty());
        for queue in &mut self.queues {
            queue.rings.release(&mut self.registers);
            work |= !queue.is_idle() && queue.rings.has_entry();
        }
        work
    }

    /// See [`crate::Nvme::check`].
    pub fn check(&mut self, now_ns: u64) -> Result<Option<Report>, Hang> {
        let status = self.registers.read(reg::CSTS);
        if status == u32::MAX {
            return Err(Hang::Gone);
        }
        if status & reg::CSTS_CFS != 0 {
            return Err(Hang::Fatal);
        }
        if status & reg::CSTS_RDY == 0 {
            return Err(Hang::NotReady);
        }
        if self.statistics.strays > MOST_STRAYS {
            return Err(Hang::Strays);
        }
        let report = self.look_into_failures(now_ns)?;
        for queue in &mut self.queues {
            while queue.is_idle() && queue.rings.take(&mut self.registers).is_some() {
                self.statistics.strays += 1;
            }
            queue.give_again();
        }
        self.kick();
        self.look_for_overdue(now_ns)?;
        Ok(report)
    }

    fn look_into_failures(&mut self, now_ns: u64) -> Result<Option<Report>, Hang> {
        let progress = self.admin.progress(&mut self.registers, now_ns);
        let log = progress.map_err(|unanswered| match unanswered {
            Unanswered::Fatal => Hang::Fatal,
            Unanswered::Timeout => Hang::Admin,
        })?;
        let report = log.and_then(|log| Some(Report { failure: self.failure.take()?, log }));
        let last = self.queues.iter_mut().filter_map(|queue| queue.failure.take()).last();
        if last.is_some() && self.failure.is_none() && now_ns >= self.report_ns {
            self.failure = last;
            self.report_ns = now_ns + REPORT_NS;
        }
        // Not while an abort is under way; the log will not run away.
        if self.failure.is_some() && self.admin.is_idle() {
            self.admin.read_log(&mut self.registers, now_ns);
        }
        Ok(report)
    }

    fn look_for_overdue(&mut self, now_ns: u64) -> Result<(), Hang> {
        for queue in &mut self.queues {
            let (oldest_ns, overdue) = queue.overdue(now_ns, COMMAND_TIMEOUT_NS);
            if oldest_ns > COMMAND_TIMEOUT_NS + ABORT_TIMEOUT_NS {
                return Err(Hang::Timeout);
            }
            if let Some(id) = overdue
                && self.admin.is_idle()
            {
                queue.aborting(id);
                self.admin.abort(&mut self.registers, queue.rings.id(), id, now_ns);
                self.statistics.aborts += 1;
            }
        }
        Ok(())
    }
}
