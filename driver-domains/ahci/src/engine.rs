//! A port's registers, and the orders in which they may be touched.
//!
//! Source: AHCI 1.3.1, §10.1.2 (initialization), §10.3 (starting and stopping), §10.4 (resets).

use crate::command::{BLOCK, Command, Memory};
use crate::registers as reg;
use core::sync::atomic::{Ordering, fence};
use domain_api::{Clock, Registers};

/// Longest time until the command list, or the reception of FISes, stops (§10.3).
const STOP_NS: u64 = 500_000_000;
/// Shortest reset of a link (§10.4.2).
const LINK_RESET_NS: u64 = 1_000_000;
/// How long a link may take to come up again. Serial ATA allows a device 10 ms to answer the
/// reset; what follows takes less.
const LINK_NS: u64 = 50_000_000;

/// Causes that mean that commands did not end well.
pub const FAULTS: u32 = reg::INT_UF
    | reg::INT_PC
    | reg::INT_PRC
    | reg::INT_OF
    | reg::INT_IF
    | reg::INT_HBD
    | reg::INT_HBF
    | reg::INT_TFE;
/// Causes that interrupt.
const INTERRUPTS: u32 = FAULTS | reg::INT_DHR | reg::INT_SDB;

/// The link does not come up, or the engine does not stop.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stuck;

/// What the device said at the end of a command.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TaskFile {
    /// Status.
    pub status: u8,
    /// Error.
    pub error: u8,
}

impl TaskFile {
    pub(crate) fn from_register(value: u32) -> Self {
        let [status, error, ..] = value.to_le_bytes();
        Self { status, error }
    }

    /// Whether the device takes commands.
    pub(crate) fn is_idle(self) -> bool {
        self.status & (reg::STATUS_BSY | reg::STATUS_DRQ) == 0
    }
}

/// The registers of one port.
#[derive(Debug)]
pub struct Engine<R, C> {
    registers: R,
    clock: C,
    base: u32,
}

impl<R: Registers, C: Clock> Engine<R, C> {
    pub fn new(registers: R, clock: C, port: u32) -> Self {
        Self { registers, clock, base: reg::PORTS + port * reg::PORT_BYTES }
    }

    pub fn read(&self, offset: u32) -> u32 {
        self.registers.read(self.base + offset)
    }

    pub fn write(&mut self, offset: u32, value: u32) {
        self.registers.write(self.base + offset, value);
    }

    /// Which port it is.
    pub fn port(&self) -> u32 {
        (self.base - reg::PORTS) / reg::PORT_BYTES
    }

    pub fn now_ns(&self) -> u64 {
        self.clock.now_ns()
    }

    /// Waits until `done`, at most `limit_ns`.
    pub fn wait(&self, limit_ns: u64, done: impl Fn(&Self) -> bool) -> Result<(), Stuck> {
        let begin = self.clock.now_ns();
        loop {
            if done(self) {
                return Ok(());
            }
            if self.clock.now_ns().saturating_sub(begin) > limit_ns {
                return if done(self) { Ok(()) } else { Err(Stuck) };
            }
            core::hint::spin_loop();
        }
    }

    pub fn link_is_up(&self) -> bool {
        self.read(reg::SSTS) & reg::DET_MASK == reg::DET_UP
    }

    pub fn task_file(&self) -> TaskFile {
        TaskFile::from_register(self.read(reg::TFD))
    }

    /// Whether a device is there and takes commands.
    pub fn is_ready(&self) -> bool {
        self.link_is_up() && self.task_file().is_idle()
    }

    /// Stops the command list. What was issued is forgotten.
    pub fn stop(&mut self) -> Result<(), Stuck> {
        let command = self.read(reg::CMD);
        self.write(reg::CMD, command & !(reg::CMD_ST | reg::CMD_ICC_MASK));
        self.wait(STOP_NS, |port| port.read(reg::CMD) & reg::CMD_CR == 0)
    }

    /// Stops everything, also interrupts.
    pub fn stop_all(&mut self) -> Result<(), Stuck> {
        self.write(reg::PXIE, 0);
        self.stop()?;
        let command = self.read(reg::CMD);
        self.write(reg::CMD, command & !(reg::CMD_FRE | reg::CMD_ICC_MASK));
        self.wait(STOP_NS, |port| port.read(reg::CMD) & reg::CMD_FR == 0)
    }

    /// Powers the device and its link.
    pub fn power_up(&mut self) {
        self.write(reg::SCTL, reg::SCTL_IPM_OFF);
        let command = self.read(reg::CMD) & !reg::CMD_ICC_MASK;
        let on = reg::CMD_POD | reg::CMD_SUD | reg::CMD_ICC_ACTIVE;
        self.write(reg::CMD, command | on);
    }

    /// Gives a stopped port its memory, and begins to receive FISes, which makes the device's
    /// status and signature known.
    pub fn receive(&mut self, memory: &Memory) {
        let addresses = [(reg::CLB, memory.list_address()), (reg::FB, memory.fis_address())];
        for (offset, address) in addresses {
            let (low, high) = halves(address);
            self.write(offset, low);
            self.write(offset + 4, high);
        }
        self.clear_causes();
        let command = self.read(reg::CMD) & !reg::CMD_ICC_MASK;
        self.write(reg::CMD, command | reg::CMD_FRE);
    }

    /// Forgets errors and causes of interrupts.
    pub fn clear_causes(&mut self) {
        self.write(reg::SERR, u32::MAX);
        self.write(reg::PXIS, u32::MAX);
    }

    /// Starts the command list; the device must be ready.
    pub fn start(&mut self) {
        let command = self.read(reg::CMD) & !reg::CMD_ICC_MASK;
        self.write(reg::CMD, command | reg::CMD_ST);
    }

    /// Lets the port interrupt.
    pub fn enable_interrupts(&mut self) {
        self.write(reg::PXIE, INTERRUPTS);
    }

    /// Resets link and device of a stopped port, and waits for the link.
    pub fn reset_link(&mut self) -> Result<(), Stuck> {
        self.write(reg::SCTL, reg::SCTL_IPM_OFF | reg::SCTL_DET_RESET);
        let begin = self.clock.now_ns();
        while self.clock.now_ns().saturating_sub(begin) <= LINK_RESET_NS {
            core::hint::spin_loop();
        }
        self.write(reg::SCTL, reg::SCTL_IPM_OFF);
        let up = self.wait(LINK_NS, Self::link_is_up);
        self.clear_causes();
        up
    }

    /// Tells the controller of the commands in `slots`, which it may run at once.
    pub fn issue(&mut self, slots: u32, queued: bool) {
        // The command, and the data to write, are in memory before the controller looks.
        fence(Ordering::Release);
        if queued {
            self.write(reg::SACT, slots);
        }
        self.write(reg::CI, slots);
    }

    /// Runs a command of the driver's own, while no other runs.
    ///
    /// # Errors
    /// The port has to be reset.
    pub fn run_own(
        &mut self,
        memory: &Memory,
        command: &Command,
        limit_ns: u64,
    ) -> Result<[u8; BLOCK], Stuck> {
        let saved = memory.put_own(command);
        self.issue(1, false);
        let ended = self.wait(limit_ns, |port| {
            port.read(reg::CI) & 1 == 0 || port.read(reg::PXIS) & FAULTS != 0
        });
        let data = memory.take_own(&saved);
        let causes = self.read(reg::PXIS);
        let failed = reg::STATUS_ERR | reg::STATUS_DF;
        if ended.is_err() || causes & FAULTS != 0 || self.task_file().status & failed != 0 {
            return Err(Stuck);
        }
        self.write(reg::PXIS, causes);
        Ok(data)
    }
}

/// The low and high half of a bus address.
#[expect(clippy::cast_possible_truncation, reason = "the halves are what is wanted")]
fn halves(address: u64) -> (u32, u32) {
    (address as u32, (address >> 32) as u32)
}
