//! The admin queues: in batches while the controller is started, one job at a time later.

use crate::command::Command;
use crate::identify::ErrorEntry;
use crate::queue::{Entry, Rings};
use crate::registers as reg;
use crate::start::wait;
use alloc::vec::Vec;
use core::fmt;
use domain_api::{Clock, DmaPage, Registers};

/// Longest time for an admin command.
pub const ADMIN_NS: u64 = 10_000_000_000;
/// How often a fatal error is looked for while commands are waited for: an access over the bus.
const STATUS_NS: u64 = 1_000_000;

/// Why an admin command was not answered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Unanswered {
    /// The controller reported a fatal error, or left the bus.
    Fatal,
    /// It took longer than [`ADMIN_NS`].
    Timeout,
}

impl fmt::Display for Unanswered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fatal => "the controller reports a fatal error",
            Self::Timeout => "the controller does not answer admin commands",
        })
    }
}

/// What is under way on the running controller.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Job {
    Abort,
    ErrorLog,
}

/// The admin queues.
#[derive(Debug)]
pub struct Admin {
    rings: Rings,
    /// Identifier of the next command.
    next: u16,
    /// For the error log.
    page: DmaPage,
    /// With its identifier and when it began.
    job: Option<(Job, u16, u64)>,
}

impl Admin {
    /// Admin queues with the memory for their answers.
    pub fn new(rings: Rings, page: DmaPage) -> Self {
        Self { rings, next: 0, page, job: None }
    }

    /// The queues.
    pub fn rings(&self) -> &Rings {
        &self.rings
    }

    fn submit(&mut self, command: &Command) -> u16 {
        let id = self.next;
        // All ones stand for "no command" in the error log.
        self.next = if id == u16::MAX - 1 { 0 } else { id + 1 };
        self.rings.push(command, id);
        id
    }

    /// Runs commands, in any order, and returns what each brought.
    ///
    /// # Errors
    /// The controller did not answer all of them.
    pub fn run<R: Registers>(
        &mut self,
        registers: &mut R,
        clock: &impl Clock,
        commands: &[Command],
    ) -> Result<Vec<Entry>, Unanswered> {
        let mut answers = Vec::with_capacity(commands.len());
        for batch in commands.chunks(usize::from(self.rings.depth())) {
            self.run_batch(registers, clock, batch, &mut answers)?;
        }
        Ok(answers)
    }

    fn run_batch<R: Registers>(
        &mut self,
        registers: &mut R,
        clock: &impl Clock,
        batch: &[Command],
        answers: &mut Vec<Entry>,
    ) -> Result<(), Unanswered> {
        let ids: Vec<u16> = batch.iter().map(|command| self.submit(command)).collect();
        self.rings.publish(registers);
        let mut came: Vec<Option<Entry>> = alloc::vec![None; ids.len()];
        let mut look_ns = clock.now_ns() + STATUS_NS;
        let mut fatal = false;
        let done = wait(clock, ADMIN_NS, || {
            while let Some(entry) = self.rings.take(registers) {
                if let Some(place) = ids.iter().position(|&id| id == entry.id) {
                    came[place] = Some(entry);
                }
            }
            if clock.now_ns() >= look_ns {
                look_ns = clock.now_ns() + STATUS_NS;
                // All ones, when it left the bus, have the bit too.
                fatal = registers.read(reg::CSTS) & reg::CSTS_CFS != 0;
            }
            fatal || came.iter().all(Option::is_some)
        });
        self.rings.release(registers);
        match (fatal, done) {
            (true, _) => Err(Unanswered::Fatal),
            (false, false) => Err(Unanswered::Timeout),
            (false, true) => {
                answers.extend(came.into_iter().flatten());
                Ok(())
            }
        }
    }

    /// Whether a job can be begun.
    pub fn is_idle(&self) -> bool {
        self.job.is_none()
    }

    /// Has a command aborted.
    pub fn abort(&mut self, registers: &mut impl Registers, queue: u16, id: u16, now_ns: u64) {
        self.begin(registers, Job::Abort, &Command::abort(queue, id), now_ns);
    }

    /// Reads the error log; [`Self::progress`] has it some time later.
    pub fn read_log(&mut self, registers: &mut impl Registers, now_ns: u64) {
        self.page.page.clear();
        self.begin(registers, Job::ErrorLog, &Command::error_log(self.page.bus_address), now_ns);
    }

    fn begin(&mut self, registers: &mut impl Registers, job: Job, command: &Command, now_ns: u64) {
        let id = self.submit(command);
        self.job = Some((job, id, now_ns));
        self.rings.publish(registers);
    }

    /// Sees to the job under way. When it was to read the log: its newest entry, if it has any.
    ///
    /// # Errors
    /// It takes too long.
    pub fn progress(
        &mut self,
        registers: &mut impl Registers,
        now_ns: u64,
    ) -> Result<Option<Option<ErrorEntry>>, Unanswered> {
        let mut log = None;
        while let Some(entry) = self.rings.take(registers) {
            let Some((job, id, _)) = self.job else { continue };
            if id != entry.id {
                continue;
            }
            self.job = None;
            if job == Job::ErrorLog {
                let read = entry.status.is_success();
                log = Some(read.then(|| ErrorEntry::parse(&self.page.page)).flatten());
            }
        }
        self.rings.release(registers);
        match self.job {
            Some((_, _, since)) if now_ns.saturating_sub(since) > ADMIN_NS => {
                Err(Unanswered::Timeout)
            }
            _ => Ok(log),
        }
    }
}
