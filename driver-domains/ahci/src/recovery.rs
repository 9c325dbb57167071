//! What happens when commands do not end well.
//!
//! When a command fails, the controller stops where it is, and a device with queued commands has
//! aborted all of them; what ended before is known from `PxSACT` and `PxCI`, which must be read
//! before the engine is stopped, as that clears them. Then:
//!
//! 1. The engine is stopped and started again, which forgets what was issued (AHCI §6.2.2).
//! 2. Which command failed? An unqueued one is the slot that the controller was at. Of queued
//!    ones the device tells in its log 10h, which must be read anyway before it takes
//!    commands again (ACS-3 §4.15.6, §A.14).
//! 3. That one fails, or is tried again where the cause is one that passes: data damaged on the
//!    link, say. The others were not at fault and are issued again.
//!
//! Where the device does not answer, or the link is the cause, or a command took too long, the
//! link is reset (COMRESET), and with it the device. Devices without the log are reset too, and
//! all that was running is issued again, one command at a time, until the guilty one fails alone.
//!
//! Requests are idempotent, and no two that overlap are in flight by the contract of
//! [`domain_api::disk::Disk`], so that issuing one twice is harmless. A flush that the device
//! failed is never tried again: the second could succeed without what the first has lost.
//!
//! All of this waits in place, in the bounds below, but for the device's coming back after a
//! reset, which may take seconds: [`State::Settling`].

use crate::command::{BLOCK, Command, ata};
use crate::disk::{AtaDisk, Slots};
use crate::engine::TaskFile;
use crate::identify::{Identity, Unusable};
use crate::notice::Event;
use crate::registers as reg;
use domain_api::disk::{DiskError, Operation};
use domain_api::{Clock, Registers};

/// How often a request is tried.
pub const ATTEMPTS: u8 = 3;
/// How long a read or write may take.
pub const TRANSFER_NS: u64 = 10_000_000_000;
/// How long a flush or a trim may take: it may empty a large cache.
pub const LONG_NS: u64 = 60_000_000_000;
/// How long a device may take to be ready after a reset.
pub const READY_NS: u64 = 10_000_000_000;
/// How much of that is spent waiting in place: most devices are ready at once.
const READY_AT_ONCE_NS: u64 = 20_000_000;
/// How long the device may take for the log, or to identify itself, when it is ready.
const OWN_NS: u64 = 400_000_000;
/// How often a link is reset in a row.
const RESETS: u8 = 3;

/// What a disk is up to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    /// It works.
    Running,
    /// Its link was reset; it will be ready some time.
    Settling {
        /// When the reset was.
        since_ns: u64,
        /// Which one in a row.
        resets: u8,
    },
    /// It is given up.
    Dead(Unusable),
    /// The port's engine does not stop: only a reset of the controller helps.
    Stuck,
    /// All registers read as ones.
    Gone,
}

/// Why commands did not end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Culprit {
    /// This one failed, and this is why.
    Slot(u32, TaskFile),
    /// One of them, or none.
    Unknown(TaskFile),
}

impl<R: Registers, C: Clock> AtaDisk<R, C> {
    /// Deals with a fault that the port reported.
    pub(crate) fn recover(&mut self, causes: u32) {
        let file = self.engine.task_file();
        let current = self.engine.read(reg::CMD) >> reg::CMD_CCS_SHIFT & 0x1f;
        let failed = self.stop();
        if self.state == State::Stuck {
            return;
        }
        let link_lost = causes & (reg::INT_PC | reg::INT_PRC) != 0 || !self.engine.link_is_up();
        if link_lost {
            self.notices.add(Event::LinkLost);
            self.cache_in_doubt = self.identity.cache;
        }
        let by_device = causes & crate::engine::FAULTS == reg::INT_TFE;
        if by_device && !link_lost && self.engine.is_ready() {
            self.engine.clear_causes();
            self.engine.start();
            self.blame(failed, current, file);
        } else {
            self.put_off(failed, Culprit::Unknown(file), true);
            self.reset_link(1);
        }
    }

    /// Stops the engine. What had ended well has ended; the rest, which has not, is returned, and
    /// does not run any more.
    fn stop(&mut self) -> Slots {
        let failed = self.active();
        let ended = self.running & !failed;
        if self.engine.stop().is_err() {
            self.state = State::Stuck;
            return 0;
        }
        self.end_well(ended);
        self.running = 0;
        failed
    }

    /// Finds out whose fault it was, with the engine running again.
    fn blame(&mut self, failed: Slots, current: u32, file: TaskFile) {
        if failed & !self.unqueued == 0 {
            let culprit = match failed >> current & 1 {
                1 => Culprit::Slot(current, file),
                _ => Culprit::Unknown(file),
            };
            self.put_off(failed, culprit, true);
            return;
        }
        let log = self.read_error_log();
        let alone = failed.is_power_of_two().then(|| failed.trailing_zeros());
        match (log, alone) {
            (Some((slot, file)), _) if failed >> slot & 1 == 1 => {
                self.put_off(failed, Culprit::Slot(slot, file), false);
            }
            (log, Some(slot)) => {
                self.put_off(failed, Culprit::Slot(slot, file), false);
                if log.is_none() {
                    self.reset_link(1);
                }
            }
            (_, None) => {
                // Innocent ones are among them: none is charged with an attempt.
                self.put_off(failed, Culprit::Unknown(file), false);
                self.reset_link(1);
            }
        }
    }

    /// Which queued command failed, and why, as the device remembers it.
    fn read_error_log(&mut self) -> Option<(u32, TaskFile)> {
        let lba = ata::LOG_QUEUED_ERROR;
        let command = Command { code: ata::READ_LOG_EXT, feature: 0, lba, count: 1, writes: false };
        let page = self.engine.run_own(&self.memory, &command, OWN_NS).ok()?;
        parse_error_log(&page)
    }

    /// Puts what failed back to what waits, but for those that are not worth it. `charge` says
    /// whether those without proven guilt come closer to their last attempt too.
    fn put_off(&mut self, failed: Slots, culprit: Culprit, charge: bool) {
        let mut retried = 0;
        let mut left = failed;
        while left != 0 {
            let slot = left.trailing_zeros();
            left &= left - 1;
            let result = match culprit {
                Culprit::Slot(guilty, file) if guilty == slot => self.verdict(slot, file),
                Culprit::Slot(..) => None,
                Culprit::Unknown(_) => {
                    self.alone |= 1 << slot;
                    if charge { self.charge(slot, DiskError::Aborted) } else { None }
                }
            };
            match result {
                Some(error) => self.end(slot, Err(error)),
                None => {
                    retried += 1;
                    self.put_back(slot);
                }
            }
        }
        let (Culprit::Slot(_, file) | Culprit::Unknown(file)) = culprit;
        if retried != 0 {
            self.notices.add(Event::Retried(retried, file));
        }
    }

    fn put_back(&mut self, slot: u32) {
        self.memory.renew(slot);
        self.slots[slot as usize].since_ns = 0;
        self.waiting |= 1 << slot;
    }

    /// One more attempt was in vain: the error, if it was the last one.
    fn charge(&mut self, slot: u32, error: DiskError) -> Option<DiskError> {
        let attempts = &mut self.slots[slot as usize].attempts;
        *attempts += 1;
        (*attempts >= ATTEMPTS).then_some(error)
    }

    /// The error that a guilty command ends with, unless it is tried again.
    fn verdict(&mut self, slot: u32, file: TaskFile) -> Option<DiskError> {
        let is_transfer =
            matches!(self.slots[slot as usize].operation, Operation::Read | Operation::Write);
        let error = match file.error {
            error if error & reg::ERROR_ICRC != 0 && is_transfer => {
                self.charge(slot, DiskError::Failed)?
            }
            error if error & reg::ERROR_UNC != 0 => DiskError::Medium,
            error if error & reg::ERROR_IDNF != 0 => DiskError::OutOfRange,
            _ if file.status & reg::STATUS_DF != 0 && is_transfer => {
                self.charge(slot, DiskError::Failed)?
            }
            _ => DiskError::Failed,
        };
        self.notices.add(Event::Failed(error, file));
        Some(error)
    }

    /// Resets link and device, the `resets`th time in a row.
    fn reset_link(&mut self, resets: u8) {
        if self.engine.stop().is_err() {
            self.state = State::Stuck;
            return;
        }
        let since_ns = self.engine.now_ns();
        self.state = State::Settling { since_ns, resets };
        if self.engine.reset_link().is_err() {
            self.reset_again(resets, Unusable::NotReady);
            return;
        }
        // A short wait in place spares the usual device the wait for the next look.
        let _ = self.engine.wait(READY_AT_ONCE_NS, |port| port.is_ready());
        self.settle(since_ns, resets);
    }

    fn reset_again(&mut self, resets: u8, why: Unusable) {
        if resets < RESETS {
            self.reset_link(resets + 1);
        } else {
            self.die(why);
        }
    }

    /// Goes on when the device is ready.
    fn settle(&mut self, since_ns: u64, resets: u8) {
        if !self.engine.is_ready() {
            if self.engine.now_ns().saturating_sub(since_ns) > READY_NS {
                self.reset_again(resets, Unusable::NotReady);
            }
            return;
        }
        self.engine.clear_causes();
        self.engine.start();
        match identify(&mut self.engine, &self.memory, OWN_NS) {
            Ok(identity) if identity.is_same(&self.identity) => {
                self.notices.add(Event::Reset);
                self.state = State::Running;
                self.issue();
            }
            Ok(_) => self.die(Unusable::Exchanged),
            Err(why) => self.reset_again(resets, why),
        }
    }

    /// Looks after the disk now and then: whether commands take too long, or have ended without
    /// an interrupt, and whether a device has become ready.
    pub(crate) fn check(&mut self, now_ns: u64) {
        match self.state {
            State::Running => {
                self.look = true;
                self.check_times(now_ns);
            }
            State::Settling { since_ns, resets } => self.settle(since_ns, resets),
            State::Dead(_) | State::Stuck | State::Gone => {}
        }
    }

    fn check_times(&mut self, now_ns: u64) {
        let mut late = 0;
        let mut left = self.running;
        while left != 0 {
            let index = left.trailing_zeros();
            left &= left - 1;
            let slot = &mut self.slots[index as usize];
            if slot.since_ns == 0 {
                slot.since_ns = now_ns.max(1);
            }
            let limit = match slot.operation {
                Operation::Read | Operation::Write => TRANSFER_NS,
                _ => LONG_NS,
            };
            late |= u32::from(now_ns.saturating_sub(slot.since_ns) > limit) << index;
        }
        late &= self.active();
        if late != 0 {
            self.give_up_waiting(late);
        }
    }

    /// Resets the device for the sake of commands that it does not answer. The others are
    /// issued again.
    fn give_up_waiting(&mut self, late: Slots) {
        let file = self.engine.task_file();
        let failed = self.stop();
        if self.state == State::Stuck {
            return;
        }
        self.notices.add(Event::TimedOut(late.count_ones()));
        self.put_off(failed & late, Culprit::Unknown(file), true);
        self.put_off(failed & !late, Culprit::Unknown(file), false);
        self.reset_link(1);
    }
}

/// Asks a ready device on a running port what it is.
///
/// # Errors
/// It is no disk that can be served, or it does not answer.
pub fn identify<R: Registers, C: Clock>(
    engine: &mut crate::engine::Engine<R, C>,
    memory: &crate::command::Memory,
    limit_ns: u64,
) -> Result<Identity, Unusable> {
    let command = Command { code: ata::IDENTIFY, feature: 0, lba: 0, count: 0, writes: false };
    let data = engine.run_own(memory, &command, limit_ns).map_err(|_| Unusable::NotIdentified)?;
    Identity::parse(&data)
}

/// Reads log 10h: the failed command's slot, status and error.
///
/// | byte | content                                                       |
/// |------|---------------------------------------------------------------|
/// | 0    | bit 7: the error was not of a queued command; bits 0..5: tag  |
/// | 2    | status                                                        |
/// | 3    | error                                                         |
/// | 511  | makes the sum of all bytes 0                                  |
///
/// Source: ACS-3, §A.14.
fn parse_error_log(page: &[u8; BLOCK]) -> Option<(u32, TaskFile)> {
    const NOT_QUEUED: u8 = 1 << 7;
    let sum = page.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
    if sum != 0 || page[0] & NOT_QUEUED != 0 {
        return None;
    }
    Some((u32::from(page[0] & 0x1f), TaskFile { status: page[2], error: page[3] }))
}
