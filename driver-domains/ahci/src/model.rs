//! An adapter with disks as its driver sees them, for tests: registers, command processing in the
//! pages given to it, messages, links, and faults on demand.
//!
//! Queued and DMA commands are executed when the test says so, in the order that it chooses
//! ([`Model::step`]); commands that the driver waits for (IDENTIFY, READ LOG) at once. What no
//! driver may do is noted in [`Model::violations`]: touching registers out of order, mixing
//! queued and other commands, memory that nobody gave to the device, DMA before bus mastering.

mod disk;

use crate::registers as reg;
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::rc::Rc;
use alloc::string::String;
use alloc::vec::Vec;
use core::cell::{RefCell, RefMut};
use domain_api::{Clock, Dma, DmaPage, Errno, Page, Registers};

use disk::{Answer, Pending};
pub use disk::{Content, Faults, ModelDisk};

/// Ports of the model.
pub const PORTS: usize = 4;
/// Bytes of its registers.
pub const BYTES: u32 = 0x1100;
/// How long its reset takes.
const RESET_NS: u64 = 100_000;

/// What adapters differ in, and what can be wrong with one.
#[derive(Clone, Copy, Debug)]
pub struct Adapter {
    /// Command slots.
    pub slots: u32,
    /// Queued commands.
    pub ncq: bool,
    /// Addresses of 64 bits.
    pub wide: bool,
    /// A reset clears capabilities and ports implemented until they are written back.
    pub forgets: bool,
    /// Links are down after power-on until `CMD.SUD` is set.
    pub staggered: bool,
    /// `GHC.HR` never clears.
    pub stuck_reset: bool,
    /// `CMD.CR` of all ports never clears.
    pub stuck_engine: bool,
    /// The firmware owns it, and lets go.
    pub firmware: bool,
    /// Messages are lost.
    pub lost_interrupts: bool,
    /// Every register reads as ones.
    pub gone: bool,
}

impl Default for Adapter {
    fn default() -> Self {
        Self {
            slots: 32,
            ncq: true,
            wide: true,
            forgets: false,
            staggered: false,
            stuck_reset: false,
            stuck_engine: false,
            firmware: false,
            lost_interrupts: false,
            gone: false,
        }
    }
}

#[derive(Debug, Default)]
struct PortState {
    registers: BTreeMap<u32, u32>,
    disk: Option<ModelDisk>,
    pending: Vec<Pending>,
    /// An error stopped it until `CMD.ST` is cleared.
    halted: bool,
    /// When the link was reset by `SCTL`.
    reset_begun: Option<u64>,
    /// Times that its link was reset.
    resets: u32,
}

#[derive(Debug)]
struct State {
    adapter: Adapter,
    bus_master: bool,
    registers: BTreeMap<u32, u32>,
    ports: [PortState; PORTS],
    pages: BTreeMap<u64, Page>,
    memory_left: usize,
    frames: u64,
    signalled: bool,
    messages: u32,
    reset_until: u64,
    now_ns: u64,
    step_ns: u64,
    violations: Vec<String>,
}

/// An adapter. Clones are the same one; it serves as registers, as DMA memory and as clock.
#[derive(Clone, Debug)]
pub struct Model(Rc<RefCell<State>>);

impl Model {
    /// An adapter after power-on, with these disks on its ports.
    #[must_use]
    pub fn new(adapter: Adapter, disks: [Option<ModelDisk>; PORTS]) -> Self {
        let mut state = State {
            adapter,
            bus_master: false,
            registers: BTreeMap::new(),
            ports: disks.map(|disk| PortState { disk, ..PortState::default() }),
            pages: BTreeMap::new(),
            memory_left: 4096,
            frames: 0,
            signalled: false,
            messages: 0,
            reset_until: 0,
            now_ns: 0,
            step_ns: 1000,
            violations: Vec::new(),
        };
        state.power_on();
        Self(Rc::new(RefCell::new(state)))
    }

    /// An adapter with one disk.
    #[must_use]
    pub fn with(disk: ModelDisk) -> Self {
        Self::new(Adapter::default(), [Some(disk), None, None, None])
    }

    /// Changes what is wrong with the adapter.
    pub fn set_adapter(&self, change: impl FnOnce(&mut Adapter)) {
        change(&mut self.0.borrow_mut().adapter);
    }

    /// Turns bus mastering on or off, as the PCI command register does.
    pub fn set_bus_master(&self, on: bool) {
        self.0.borrow_mut().bus_master = on;
    }

    /// Limits the memory that [`Dma::alloc`] has left, in pages.
    pub fn set_memory(&self, pages: usize) {
        self.0.borrow_mut().memory_left = pages;
    }

    /// How much time passes with each look at the clock.
    pub fn set_clock_step(&self, ns: u64) {
        self.0.borrow_mut().step_ns = ns;
    }

    /// Lets time pass.
    pub fn advance(&self, ns: u64) {
        self.0.borrow_mut().now_ns += ns;
    }

    /// Writes anything into a register, as a previous owner may have done.
    pub fn poke(&self, offset: u32, value: u32) {
        let mut state = self.0.borrow_mut();
        match State::port_of(offset) {
            Some((port, offset)) if port < PORTS => {
                state.ports[port].registers.insert(offset, value);
            }
            Some(_) => {}
            None => {
                state.registers.insert(offset, value);
            }
        }
    }

    /// The disk on a port.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    pub fn disk(&self, port: usize) -> RefMut<'_, ModelDisk> {
        RefMut::map(self.0.borrow_mut(), |s| s.ports[port].disk.as_mut().expect("a disk"))
    }

    /// Puts something else on a port, or nothing, while it runs.
    pub fn plug(&self, port: usize, disk: Option<ModelDisk>) {
        let mut state = self.0.borrow_mut();
        let at = &mut state.ports[port];
        at.pending.clear();
        at.halted = true;
        at.disk = disk;
        state.raise(port, reg::INT_PRC | reg::INT_PC);
    }

    /// How often a port's link was reset since the last reset of the adapter.
    #[must_use]
    pub fn resets(&self, port: usize) -> u32 {
        self.0.borrow().ports[port].resets
    }

    /// Commands that wait in a port: slot, and whether queued.
    #[must_use]
    pub fn pending(&self, port: usize) -> Vec<(u32, bool)> {
        self.0.borrow().ports[port].pending.iter().map(|p| (p.slot, p.queued)).collect()
    }

    /// Executes one of the commands that wait in a port, chosen by `choice`. `false`: none can.
    pub fn step(&self, port: usize, choice: usize) -> bool {
        self.0.borrow_mut().step(port, choice)
    }

    /// Executes all that wait.
    pub fn run(&self) {
        for port in 0..PORTS {
            while self.step(port, 0) {}
        }
    }

    /// The number of messages since the last call.
    #[must_use]
    pub fn messages(&self) -> u32 {
        core::mem::take(&mut self.0.borrow_mut().messages)
    }

    /// What the driver did wrong.
    #[must_use]
    pub fn violations(&self) -> Vec<String> {
        self.0.borrow().violations.clone()
    }
}

impl State {
    /// Port and register in it.
    fn port_of(offset: u32) -> Option<(usize, u32)> {
        let at = offset.checked_sub(reg::PORTS)?;
        Some(((at / reg::PORT_BYTES) as usize, at % reg::PORT_BYTES))
    }

    fn violation(&mut self, what: String) {
        self.violations.push(what);
    }

    fn port(&self, port: usize, offset: u32) -> u32 {
        self.ports[port].registers.get(&offset).copied().unwrap_or(0)
    }

    fn set(&mut self, port: usize, offset: u32, value: u32) {
        self.ports[port].registers.insert(offset, value);
    }

    fn power_on(&mut self) {
        let a = self.adapter;
        let bit = |on: bool, bit: u32| if on { bit } else { 0 };
        let cap = (a.slots - 1) << reg::CAP_NCS_SHIFT
            | bit(a.ncq, reg::CAP_SNCQ)
            | bit(a.wide, reg::CAP_S64A)
            | bit(a.staggered, 1 << 27);
        self.registers.insert(reg::CAP, cap);
        self.registers.insert(reg::PI, (1 << PORTS) - 1);
        self.registers.insert(reg::CAP2, bit(a.firmware, reg::CAP2_BOH));
        self.registers.insert(reg::BOHC, bit(a.firmware, reg::BOHC_BOS));
        self.reset();
    }

    /// What `GHC.HR` does.
    fn reset(&mut self) {
        self.registers.insert(reg::GHC, 0);
        self.registers.insert(reg::IS, 0);
        if self.adapter.forgets && self.now_ns != 0 {
            self.registers.insert(reg::CAP, 0);
            self.registers.insert(reg::PI, 0);
        }
        self.signalled = false;
        for port in 0..PORTS {
            self.ports[port].registers.clear();
            self.ports[port].resets = 0;
            let spun = if self.adapter.staggered { 0 } else { reg::CMD_SUD | reg::CMD_POD };
            self.set(port, reg::CMD, spun);
            self.reset_device(port);
        }
    }

    fn reset_device(&mut self, port: usize) {
        let now = self.now_ns;
        let at = &mut self.ports[port];
        at.pending.clear();
        at.halted = false;
        if let Some(disk) = &mut at.disk {
            disk.reset(now);
        }
    }

    fn raise(&mut self, port: usize, causes: u32) {
        let value = self.port(port, reg::PXIS) | causes;
        self.set(port, reg::PXIS, value);
        self.signal();
    }

    /// Sends a message when the interrupt condition becomes true.
    fn signal(&mut self) {
        let mut is = self.registers[&reg::IS];
        for port in 0..PORTS {
            let active = self.port(port, reg::PXIS) & self.port(port, reg::PXIE) != 0;
            is |= u32::from(active) << port;
        }
        self.registers.insert(reg::IS, is);
        let on = is != 0 && self.registers[&reg::GHC] & reg::GHC_IE != 0;
        if on && !self.signalled && !self.adapter.lost_interrupts {
            self.messages += 1;
        }
        self.signalled = on;
    }

    /// Memory that the device accesses.
    fn page(&mut self, address: u64, len: usize) -> Option<(Page, usize)> {
        if !self.bus_master {
            self.violation(format!("access to {address:#x} without bus mastering"));
            return None;
        }
        if !self.adapter.wide && address >> 32 != 0 {
            self.violation(format!("address {address:#x} is too wide"));
        }
        let at = usize::try_from(address % 4096).ok()?;
        let page = self.pages.get(&(address / 4096)).filter(|_| at + len <= 4096).cloned();
        if page.is_none() {
            self.violation(format!("access to {len} bytes at {address:#x}"));
        }
        Some((page?, at))
    }

    fn read_port(&mut self, port: usize, offset: u32) -> u32 {
        let now = self.now_ns;
        let value = self.port(port, offset);
        let on = value & reg::CMD_ST != 0 || self.adapter.stuck_engine;
        let disk = self.ports[port].disk.as_ref();
        match offset {
            reg::SSTS => {
                let spun = self.port(port, reg::CMD) & reg::CMD_SUD != 0;
                let resetting = self.ports[port].reset_begun.is_some();
                disk.filter(|_| spun && !resetting).map_or(0, |disk| disk.link(now))
            }
            reg::TFD => {
                let receives = self.port(port, reg::CMD) & reg::CMD_FRE != 0;
                disk.filter(|_| receives).map_or(0x7f, |disk| disk.task_file(now))
            }
            reg::SIG => disk.map_or(u32::MAX, |disk| disk.signature),
            reg::CMD => {
                let fr = if value & reg::CMD_FRE != 0 { reg::CMD_FR } else { 0 };
                value | fr | if on { reg::CMD_CR } else { 0 }
            }
            _ => value,
        }
    }

    fn write_port(&mut self, port: usize, offset: u32, value: u32) {
        let old = self.port(port, offset);
        match offset {
            reg::PXIS | reg::SERR => {
                self.set(port, offset, old & !value);
                self.signal();
            }
            reg::PXIE => {
                self.set(port, offset, value);
                self.signal();
            }
            reg::CMD => self.write_command(port, value),
            reg::SCTL => self.write_link(port, value),
            reg::CLB | reg::CLBU | reg::FB | reg::FBU => {
                if self.port(port, reg::CMD) & (reg::CMD_ST | reg::CMD_FRE) != 0 {
                    self.violation(format!("port {port}: addresses change while it runs"));
                }
                self.set(port, offset, value);
            }
            reg::SACT => self.set(port, offset, old | value),
            reg::CI => {
                for slot in (0..32).filter(|slot| value >> slot & 1 == 1) {
                    self.issue(port, slot);
                }
            }
            _ => self.set(port, offset, value),
        }
    }

    fn write_command(&mut self, port: usize, value: u32) {
        let old = self.port(port, reg::CMD);
        let value = value & !(reg::CMD_CR | reg::CMD_FR | reg::CMD_ICC_MASK | 0x1f00);
        let begins = |bit| value & bit != 0 && old & bit == 0;
        if begins(reg::CMD_FRE) {
            let address =
                u64::from(self.port(port, reg::FBU)) << 32 | u64::from(self.port(port, reg::FB));
            if address % 256 != 0 {
                self.violation(format!("FIS area at {address:#x}"));
            }
            let _ = self.page(address, 256);
        }
        if begins(reg::CMD_ST) {
            let ready = self.read_port(port, reg::TFD) & 0x88 == 0;
            let up = self.read_port(port, reg::SSTS) & 0xf == reg::DET_UP;
            if !ready || !up || value & reg::CMD_FRE == 0 {
                self.violation(format!("port {port} is started when it must not"));
            }
        }
        if value & reg::CMD_ST == 0 && !self.adapter.stuck_engine {
            if old & value & reg::CMD_FRE == 0 && old & reg::CMD_ST != 0 {
                self.violation(format!("port {port}: FISes end before the list"));
            }
            self.set(port, reg::CI, 0);
            self.set(port, reg::SACT, 0);
            self.ports[port].pending.clear();
            self.ports[port].halted = false;
        }
        self.set(port, reg::CMD, value | (old & 0x1f00));
    }

    fn write_link(&mut self, port: usize, value: u32) {
        self.set(port, reg::SCTL, value);
        let now = self.now_ns;
        let begun = self.ports[port].reset_begun;
        match (value & reg::DET_MASK == reg::SCTL_DET_RESET, begun) {
            (true, None) => {
                if self.port(port, reg::CMD) & reg::CMD_ST != 0 {
                    self.violation(format!("port {port}: link reset while it runs"));
                }
                self.ports[port].reset_begun = Some(now);
            }
            (false, Some(begun)) => {
                if now - begun < 1_000_000 {
                    self.violation(format!("port {port}: link reset of {} ns", now - begun));
                }
                self.ports[port].reset_begun = None;
                self.ports[port].resets += 1;
                self.reset_device(port);
            }
            _ => {}
        }
    }

    /// The driver issues a slot.
    fn issue(&mut self, port: usize, slot: u32) {
        let bit = 1 << slot;
        let ci = self.port(port, reg::CI);
        if self.port(port, reg::CMD) & reg::CMD_ST == 0 || slot >= self.adapter.slots {
            self.violation(format!("port {port}: slot {slot} is issued when it must not"));
            return;
        }
        if ci & bit != 0 || self.ports[port].pending.iter().any(|p| p.slot == slot) {
            self.violation(format!("port {port}: slot {slot} is issued twice"));
            return;
        }
        self.set(port, reg::CI, ci | bit);
        if self.ports[port].halted {
            return;
        }
        let Some(pending) = self.decode(port, slot) else { return };
        if self.ports[port].pending.iter().any(|other| other.queued != pending.queued) {
            self.violation(format!("port {port}: queued and other commands are mixed"));
        }
        if pending.queued != (self.port(port, reg::SACT) & bit != 0) {
            self.violation(format!("port {port}: PxSACT of slot {slot} is wrong"));
        }
        if pending.queued {
            // The device takes it at once, and finishes it later.
            self.set(port, reg::CI, ci & !bit);
        }
        let at_once = pending.is_own();
        self.ports[port].pending.push(pending);
        if at_once {
            let last = self.ports[port].pending.len() - 1;
            self.execute(port, last);
        }
    }

    fn step(&mut self, port: usize, choice: usize) -> bool {
        let at = &self.ports[port];
        let ready: Vec<usize> =
            at.pending.iter().enumerate().filter(|(_, p)| !p.hangs).map(|(at, _)| at).collect();
        if at.halted || ready.is_empty() {
            return false;
        }
        // Commands that are not queued are executed in the order of their slots.
        let queued = at.pending[ready[0]].queued;
        let index = if queued {
            ready[choice % ready.len()]
        } else {
            let first = ready.iter().min_by_key(|at_| at.pending[**at_].slot);
            *first.expect("not empty")
        };
        self.execute(port, index);
        true
    }

    fn execute(&mut self, port: usize, index: usize) {
        let pending = self.ports[port].pending[index].clone();
        let slot = pending.slot;
        match self.perform(port, &pending) {
            Answer::Done => {
                self.ports[port].pending.remove(index);
                let register = if pending.queued { reg::SACT } else { reg::CI };
                let value = self.port(port, register) & !(1 << slot);
                self.set(port, register, value);
                let cause = if pending.queued { reg::INT_SDB } else { reg::INT_DHR };
                self.raise(port, cause);
            }
            Answer::Hangs => self.ports[port].pending[index].hangs = true,
            Answer::Failed => {
                self.ports[port].halted = true;
                let command = self.port(port, reg::CMD) & !0x1f00;
                self.set(port, reg::CMD, command | slot << reg::CMD_CCS_SHIFT);
                self.raise(port, reg::INT_TFE | reg::INT_SDB);
            }
            Answer::Interface => {
                self.ports[port].halted = true;
                self.raise(port, reg::INT_IF);
            }
        }
    }

    fn read(&mut self, offset: u32) -> u32 {
        if self.adapter.gone {
            return u32::MAX;
        }
        match Self::port_of(offset) {
            Some((port, offset)) if port < PORTS => self.read_port(port, offset),
            Some(_) => 0,
            None => self.registers.get(&offset).copied().unwrap_or(0),
        }
    }

    fn write(&mut self, offset: u32, value: u32) {
        if self.adapter.gone {
            return;
        }
        if let Some((port, offset)) = Self::port_of(offset) {
            if port < PORTS {
                self.write_port(port, offset, value);
            } else {
                self.violation(format!("port {port} is not implemented"));
            }
            return;
        }
        match offset {
            reg::GHC => {
                if value & reg::GHC_AE == 0 {
                    self.violation("AHCI mode is left".into());
                }
                if value & reg::GHC_HR != 0 {
                    if self.bus_master {
                        self.violation("reset with bus mastering on".into());
                    }
                    self.reset();
                    self.reset_until = self.now_ns + RESET_NS;
                    self.registers.insert(reg::GHC, reg::GHC_HR);
                } else {
                    self.registers.insert(reg::GHC, value);
                    self.signal();
                }
            }
            reg::IS => {
                let is = self.registers[&reg::IS] & !value;
                self.registers.insert(reg::IS, is);
                self.signal();
            }
            reg::BOHC => {
                let given = if value & reg::BOHC_OOS != 0 { !reg::BOHC_BOS } else { u32::MAX };
                self.registers.insert(reg::BOHC, value & given);
            }
            _ => {
                self.registers.insert(offset, value);
            }
        }
    }

    /// The reset ends by itself.
    fn pass_time(&mut self) {
        self.now_ns += self.step_ns;
        let control = self.registers[&reg::GHC];
        if control & reg::GHC_HR != 0
            && self.now_ns >= self.reset_until
            && !self.adapter.stuck_reset
        {
            self.registers.insert(reg::GHC, control & !reg::GHC_HR);
        }
    }
}

impl Registers for Model {
    fn read(&self, offset: u32) -> u32 {
        self.0.borrow_mut().read(offset)
    }

    fn write(&mut self, offset: u32, value: u32) {
        self.0.borrow_mut().write(offset, value);
    }
}

impl Dma for Model {
    fn alloc(&mut self) -> Result<DmaPage, Errno> {
        let mut state = self.0.borrow_mut();
        state.memory_left = state.memory_left.checked_sub(1).ok_or(Errno::ENOMEM)?;
        let page = Page::new_zeroed();
        // Above 4 GiB where the adapter allows, so that forgetting half of an address fails.
        let first = if state.adapter.wide { 0x10_0000 } else { 0x100 };
        let frame = first + state.frames * 3;
        state.frames += 1;
        state.pages.insert(frame, page.clone());
        Ok(DmaPage { page, bus_address: frame * 4096 })
    }
}

impl Clock for Model {
    fn now_ns(&self) -> u64 {
        let mut state = self.0.borrow_mut();
        state.pass_time();
        state.now_ns
    }
}
