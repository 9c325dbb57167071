//! The controller as its driver sees it, for tests: registers, EEPROM, descriptor processing in the
//! pages given to it, MSI-X messages, link, and faults on demand.
//!
//! Two dialects: [`Dialect::Datasheet`] resets its registers as the datasheet says;
//! [`Dialect::Lazy`] keeps most of them over a reset and masks interrupts by `EIAC` alone, as QEMU
//! 7.2 does. A correct driver cannot tell them apart. What no driver may do is noted in
//! [`Model::violations`].

mod engine;

use crate::PciId;
use crate::descriptor::{DESCRIPTOR_BYTES, DEXT, EOP, IFCS, RS, STATUS_DD, STATUS_EOP};
use crate::registers as reg;
use alloc::collections::{BTreeMap, VecDeque};
use alloc::format;
use alloc::rc::Rc;
use alloc::string::String;
use alloc::vec::Vec;
use core::cell::RefCell;
use core::sync::atomic::Ordering;
use domain_api::{Clock, Dma, DmaPage, Errno, Page, Registers};
use engine::{Context, Kind};

/// The address in the model's EEPROM.
pub const MAC: [u8; 6] = [0x52, 0x54, 0x00, 0x12, 0x34, 0x56];

/// How the model treats what implementations differ in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Dialect {
    /// By the book.
    Datasheet,
    /// As QEMU 7.2.
    Lazy,
}

/// What can be wrong with a delivered frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Defect {
    /// Nothing.
    None,
    /// Error bits in the descriptor.
    Errors(u8),
    /// A length that is not the frame's.
    Length(u16),
    /// Split: a first descriptor without end-of-packet, then one with it.
    Pieces,
}

/// Faults of the whole device.
#[derive(Clone, Copy, Default, Debug)]
pub struct Faults {
    /// `CTRL.RST` never clears.
    pub stuck_reset: bool,
    /// `STATUS.GIO_MASTER_ENABLE` never clears.
    pub stuck_master: bool,
    /// `EERD` never reports done.
    pub dead_eeprom: bool,
    /// The automatic EEPROM read never ends.
    pub stuck_auto_read: bool,
    /// The firmware never lets go of the PHY.
    pub stuck_firmware: bool,
    /// Messages are lost.
    pub lost_interrupts: bool,
    /// Nothing is sent before [`Model::transmit`].
    pub paused_transmitter: bool,
    /// Every register reads as ones.
    pub gone: bool,
}

#[derive(Debug)]
struct State {
    dialect: Dialect,
    faults: Faults,
    bus_master: bool,
    registers: BTreeMap<u32, u32>,
    eeprom: [u16; 3],
    link: bool,
    negotiations: u32,
    pages: BTreeMap<u64, Page>,
    memory_left: usize,
    signalled: u32,
    messages: Vec<u32>,
    sent: VecDeque<Vec<u8>>,
    context: Option<Context>,
    /// The packet whose descriptors are being processed, and what they have in common.
    gathered: Vec<u8>,
    kind: u64,
    slow: bool,
    now_ns: u64,
    violations: Vec<String>,
    bus: Option<Bus>,
}

struct Bus(Memory);

impl core::fmt::Debug for Bus {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("Bus")
    }
}

/// Memory as a machine around the model has it: the page of a bus frame, if the device may reach
/// it now.
pub type Memory = Rc<dyn Fn(u64) -> Option<Page>>;

/// A controller. Clones are the same one; it serves as registers, as DMA memory and as clock.
#[derive(Clone, Debug)]
pub struct Model(Rc<RefCell<State>>);

impl Model {
    /// What its configuration space says.
    pub const ID: PciId = PciId { vendor: 0x8086, device: 0x10d3, subsystem: 0xa01f_8086 };

    /// A controller after power-on, with its link up.
    #[must_use]
    pub fn new(dialect: Dialect) -> Self {
        let mut state = State {
            dialect,
            faults: Faults::default(),
            bus_master: false,
            registers: BTreeMap::new(),
            eeprom: [0; 3],
            link: true,
            negotiations: 1,
            pages: BTreeMap::new(),
            memory_left: 1024,
            signalled: 0,
            messages: Vec::new(),
            sent: VecDeque::new(),
            context: None,
            gathered: Vec::new(),
            kind: 0,
            slow: false,
            now_ns: 0,
            violations: Vec::new(),
            bus: None,
        };
        for (word, bytes) in state.eeprom.iter_mut().zip(MAC.chunks_exact(2)) {
            *word = u16::from_le_bytes([bytes[0], bytes[1]]);
        }
        state.reset();
        Self(Rc::new(RefCell::new(state)))
    }

    /// Turns bus mastering on or off, as the PCI command register does.
    pub fn set_bus_master(&self, on: bool) {
        self.0.borrow_mut().bus_master = on;
    }

    /// Has it find memory elsewhere than in the pages that it gave out itself.
    pub fn set_bus(&self, memory: Memory) {
        self.0.borrow_mut().bus = Some(Bus(memory));
    }

    /// Sets the faults.
    pub fn set_faults(&self, faults: Faults) {
        self.0.borrow_mut().faults = faults;
    }

    /// Replaces the EEPROM's address; `loaded` says whether the address register gets it too.
    pub fn set_eeprom(&self, mac: [u8; 6], loaded: bool) {
        let mut state = self.0.borrow_mut();
        for (word, bytes) in state.eeprom.iter_mut().zip(mac.chunks_exact(2)) {
            *word = u16::from_le_bytes([bytes[0], bytes[1]]);
        }
        if loaded {
            state.load_address();
        }
    }

    /// Limits the memory that [`Dma::alloc`] has left, in pages.
    pub fn set_memory(&self, pages: usize) {
        self.0.borrow_mut().memory_left = pages;
    }

    /// Plugs or unplugs the cable.
    pub fn set_link(&self, up: bool) {
        let mut state = self.0.borrow_mut();
        if state.link != up {
            state.link = up;
            state.raise(reg::INT_LSC);
        }
    }

    /// Sets the link's speed: 100 Mb/s, or 1 Gb/s as in the beginning.
    pub fn set_slow(&self, slow: bool) {
        self.0.borrow_mut().slow = slow;
    }

    /// Writes anything into a register, as a previous owner may have done.
    pub fn poke(&self, offset: u32, value: u32) {
        self.0.borrow_mut().registers.insert(offset, value);
    }

    /// How often the link was negotiated.
    #[must_use]
    pub fn negotiations(&self) -> u32 {
        self.0.borrow().negotiations
    }

    /// Lets time pass.
    pub fn advance(&self, ns: u64) {
        self.0.borrow_mut().now_ns += ns;
    }

    /// The messages since the last call, as vectors.
    #[must_use]
    pub fn messages(&self) -> Vec<u32> {
        core::mem::take(&mut self.0.borrow_mut().messages)
    }

    /// The frames sent since the last call.
    #[must_use]
    pub fn sent(&self) -> Vec<Vec<u8>> {
        self.0.borrow_mut().sent.drain(..).collect()
    }

    /// What the driver did wrong.
    #[must_use]
    pub fn violations(&self) -> Vec<String> {
        self.0.borrow().violations.clone()
    }

    /// A frame arrives on the wire. Returns whether the driver will see something of it.
    pub fn deliver(&self, frame: &[u8], defect: Defect) -> bool {
        self.0.borrow_mut().deliver(frame, defect)
    }

    /// Sends up to `count` packets, paused or not.
    pub fn transmit(&self, count: usize) {
        self.0.borrow_mut().transmit(count);
    }
}

impl State {
    fn get(&self, offset: u32) -> u32 {
        self.registers.get(&offset).copied().unwrap_or(0)
    }

    fn reset(&mut self) {
        self.registers.clear();
        self.registers.insert(reg::EECD, reg::EECD_AUTO_RD);
        self.registers.insert(reg::RXDCTL, reg::DCTL_WTHRESH_1);
        self.signalled = 0;
        self.load_address();
        self.context = None;
        self.gathered.clear();
    }

    fn load_address(&mut self) {
        let [a, b, c] = self.eeprom.map(u32::from);
        self.registers.insert(reg::RAL0, b << 16 | a);
        self.registers.insert(reg::RAH0, c | reg::RAH_AV);
    }

    fn violation(&mut self, what: String) {
        self.violations.push(what);
    }

    fn master(&mut self) -> bool {
        let on = self.get(reg::CTRL) & reg::CTRL_GIO_MASTER_DISABLE == 0;
        if !on {
            self.violation("rings run while the master is disabled".into());
        }
        on
    }

    fn page(&mut self, address: u64, len: usize) -> Option<(Page, usize)> {
        let at = usize::try_from(address % 4096).ok()?;
        let frame = address / 4096;
        let page = match &self.bus {
            Some(Bus(memory)) => memory(frame),
            None => self.pages.get(&frame).cloned(),
        };
        let page = page.filter(|_| at + len <= 4096);
        if page.is_none() {
            self.violation(format!("access to {len} bytes at {address:#x}"));
        }
        Some((page?, at))
    }

    fn descriptor(&mut self, low: u32, high: u32, index: u32) -> Option<(Page, usize)> {
        let base = u64::from(self.get(high)) << 32 | u64::from(self.get(low));
        self.page(base + u64::from(index) * DESCRIPTOR_BYTES as u64, DESCRIPTOR_BYTES)
    }

    fn slots(&mut self, length: u32) -> u32 {
        let bytes = self.get(length);
        if bytes == 0 || !bytes.is_multiple_of(128) {
            self.violation(format!("ring of {bytes} bytes"));
        }
        bytes / 16
    }

    fn raise(&mut self, causes: u32) {
        let icr = self.get(reg::ICR) | causes;
        let other = if icr & reg::OTHER_CAUSES != 0 { reg::INT_OTHER } else { 0 };
        self.registers.insert(reg::ICR, icr | other);
        self.signal();
    }

    /// Sends messages for causes that are set, unmasked, and were not so before.
    fn signal(&mut self) {
        let active = self.get(reg::ICR) & self.get(reg::IMS);
        self.signalled &= active;
        let shifts = [
            (reg::INT_RXQ0, reg::IVAR_RXQ0_SHIFT),
            (reg::INT_TXQ0, reg::IVAR_TXQ0_SHIFT),
            (reg::INT_OTHER, reg::IVAR_OTHER_SHIFT),
        ];
        for (cause, shift) in shifts {
            if (active & !self.signalled) & cause != 0 {
                self.message(cause, self.get(reg::IVAR) >> shift);
            }
        }
    }

    fn message(&mut self, cause: u32, field: u32) {
        self.signalled |= cause;
        if field & reg::IVAR_VALID == 0 {
            self.violation(format!("cause {cause:#x} has no vector"));
        } else if !self.faults.lost_interrupts {
            self.messages.push(field & 7);
        }
        let cleared = self.get(reg::EIAC) & cause;
        let masked = match self.dialect {
            Dialect::Lazy => cleared,
            Dialect::Datasheet if self.get(reg::CTRL_EXT) & reg::CTRL_EXT_EIAME != 0 => {
                self.get(reg::IAM) & cause
            }
            Dialect::Datasheet => 0,
        };
        self.registers.insert(reg::ICR, self.get(reg::ICR) & !cleared);
        self.registers.insert(reg::IMS, self.get(reg::IMS) & !masked);
        self.signalled &= !cleared;
    }

    fn deliver(&mut self, frame: &[u8], defect: Defect) -> bool {
        let enabled = self.get(reg::RCTL) & reg::RCTL_EN != 0;
        if !self.link || !enabled || !self.bus_master || !self.master() {
            return false;
        }
        let slots = self.slots(reg::RDLEN);
        let (head, tail) = (self.get(reg::RDH), self.get(reg::RDT));
        let free = (tail + slots - head) % slots;
        let pieces = if defect == Defect::Pieces { 2 } else { 1 };
        if free < pieces {
            self.registers.insert(reg::RNBC, self.get(reg::RNBC) + 1);
            self.raise(reg::INT_RXO);
            return false;
        }
        for piece in 0..pieces {
            let status = if piece + 1 == pieces { STATUS_DD | STATUS_EOP } else { STATUS_DD };
            self.fill((head + piece) % slots, frame, status, defect);
        }
        self.registers.insert(reg::RDH, (head + pieces) % slots);
        self.registers.insert(reg::GPRC, self.get(reg::GPRC) + 1);
        self.raise(reg::INT_RXQ0);
        true
    }

    fn fill(&mut self, slot: u32, frame: &[u8], status: u8, defect: Defect) {
        let Some((ring, at)) = self.descriptor(reg::RDBAL, reg::RDBAH, slot) else { return };
        let mut address = [0; 8];
        ring.read(at, &mut address);
        let Some((page, offset)) = self.page(u64::from_le_bytes(address), 2048) else { return };
        page.write(offset, frame);
        let mut len = u16::try_from(frame.len()).expect("a frame");
        let (found, mut errors) = engine::look(frame, self.get(reg::RXCSUM));
        match defect {
            Defect::Errors(bits) => errors |= bits,
            Defect::Length(other) => len = other,
            Defect::None | Defect::Pieces => {}
        }
        let [low, high] = len.to_le_bytes();
        ring.write(at + 8, &[low, high, 0, 0, status | found, errors, 0, 0]);
    }

    fn transmit(&mut self, count: usize) {
        let on =
            self.get(reg::TCTL) & reg::TCTL_EN != 0 && self.get(reg::TARC0) & reg::TARC_ENABLE != 0;
        let (mut any, mut ended) = (false, 0);
        while ended < count {
            let (head, tail) = (self.get(reg::TDH), self.get(reg::TDT));
            if !on || head == tail || !self.master() {
                break;
            }
            let slots = self.slots(reg::TDLEN);
            ended += usize::from(self.process(head));
            self.registers.insert(reg::TDH, (head + 1) % slots);
            any = true;
        }
        if any {
            self.raise(reg::INT_TXQ0);
        }
    }

    /// Processes a transmit descriptor. True when it ended a packet.
    fn process(&mut self, slot: u32) -> bool {
        let Some((ring, at)) = self.descriptor(reg::TDBAL, reg::TDBAH, slot) else { return false };
        let half = |at| u64::from_le(ring.u64(at).load(Ordering::Acquire));
        let (first, second) = (half(at), half(at + 8));
        if let Kind::Context(context) = Kind::of(first, second) {
            if !self.gathered.is_empty() {
                self.violation("a context within a packet".into());
            }
            self.context = Some(context);
            return false;
        }
        self.gather(first, second);
        let ended = second & EOP != 0;
        if ended {
            self.send(second);
        }
        if second & RS != 0 {
            ring.write(at + 12, &[STATUS_DD]);
        }
        if ended != (second & RS != 0) {
            self.violation("status is for the ends of packets".into());
        }
        ended
    }

    /// Fetches a part of a packet.
    fn gather(&mut self, address: u64, command: u64) {
        let is_data = command & DEXT != 0;
        let length = if is_data { command & 0xf_ffff } else { command & 0xffff };
        let len = usize::try_from(length).expect("20 bits");
        let kind = command & !(0xf_ffff | EOP | RS);
        if len == 0 || command & 0xff << 32 != 0 || kind & IFCS == 0 {
            self.violation(format!("transmit descriptor {address:#x} {command:#x}"));
        }
        if !self.gathered.is_empty() && self.kind != kind {
            self.violation("descriptors of two kinds in a packet".into());
        }
        self.kind = kind;
        let Some((page, offset)) = self.page(address, len) else { return };
        let at = self.gathered.len();
        self.gathered.resize(at + len, 0);
        page.read(offset, &mut self.gathered[at..]);
    }

    fn send(&mut self, command: u64) {
        let packet = core::mem::take(&mut self.gathered);
        let frames = match command & DEXT {
            0 if self.kind != IFCS => Err(format!("legacy command {command:#x}")),
            0 => Ok(alloc::vec![packet]),
            _ => engine::send(&packet, command, self.context),
        };
        for frame in frames.unwrap_or_else(|what| {
            self.violation(what);
            Vec::new()
        }) {
            if !(14..=1518).contains(&frame.len()) {
                self.violation(format!("a frame of {} bytes", frame.len()));
            }
            self.sent.push_back(frame);
            self.registers.insert(reg::GPTC, self.get(reg::GPTC) + 1);
        }
    }

    fn read(&mut self, offset: u32) -> u32 {
        if self.faults.gone {
            return u32::MAX;
        }
        let value = self.get(offset);
        match offset {
            reg::STATUS => self.status(),
            reg::CTRL if self.faults.stuck_reset => value,
            reg::CTRL => value & !reg::CTRL_RST,
            reg::EECD if self.faults.stuck_auto_read => value & !reg::EECD_AUTO_RD,
            reg::ICR if self.get(reg::IMS) == 0 => {
                self.registers.insert(reg::ICR, 0);
                value
            }
            // Statistics.
            0x4000..0x4100 => self.registers.remove(&offset).unwrap_or(0),
            _ => value,
        }
    }

    fn status(&self) -> u32 {
        let control = self.get(reg::CTRL);
        let up = self.link && control & reg::CTRL_SLU != 0;
        let master = self.faults.stuck_master || control & reg::CTRL_GIO_MASTER_DISABLE == 0;
        let bit = |on, bit| if on { bit } else { 0 };
        let speed = if self.slow { 1 << 6 } else { reg::STATUS_SPEED_1000 };
        speed | bit(up, reg::STATUS_LU) | bit(master, reg::STATUS_GIO_MASTER_ENABLE)
    }

    fn write(&mut self, offset: u32, value: u32) {
        if self.faults.gone {
            return;
        }
        let old = self.get(offset);
        match offset {
            reg::CTRL => self.write_control(value),
            reg::ICR => {
                self.registers.insert(reg::ICR, old & !value);
                self.signal();
            }
            reg::ICS => self.raise(value),
            reg::IMS => {
                self.registers.insert(reg::IMS, old | value);
                self.signal();
            }
            reg::IMC => {
                self.registers.insert(reg::IMS, self.get(reg::IMS) & !value);
                self.signal();
            }
            reg::EERD => self.read_eeprom(value),
            reg::EXTCNF_CTRL if self.faults.stuck_firmware => {}
            reg::MDIC => {
                self.negotiations += 1;
                self.link = false;
            }
            reg::TDT => {
                self.write_tail(offset, value, reg::TDLEN);
                if !self.faults.paused_transmitter {
                    self.transmit(usize::MAX);
                }
            }
            reg::RDT => self.write_tail(offset, value, reg::RDLEN),
            _ => {
                self.registers.insert(offset, value);
            }
        }
    }

    fn write_tail(&mut self, offset: u32, value: u32, length: u32) {
        if value >= self.slots(length) {
            self.violation(format!("tail {offset:#x} set to {value}"));
        }
        self.registers.insert(offset, value);
    }

    fn write_control(&mut self, value: u32) {
        if value & reg::CTRL_PHY_RST != 0 {
            self.negotiations += 1;
            self.link = false;
        }
        if value & reg::CTRL_RST == 0 {
            self.registers.insert(reg::CTRL, value);
            return;
        }
        if self.status() & reg::STATUS_GIO_MASTER_ENABLE != 0 && !self.faults.stuck_master {
            self.violation("reset while the master was enabled".into());
        }
        match self.dialect {
            Dialect::Datasheet => {
                self.reset();
                if self.faults.stuck_reset {
                    self.registers.insert(reg::CTRL, reg::CTRL_RST);
                }
            }
            Dialect::Lazy => {
                self.registers.insert(reg::CTRL, value);
                self.load_address();
            }
        }
    }

    fn read_eeprom(&mut self, value: u32) {
        let word = (value >> reg::EERD_ADDR_SHIFT) as usize;
        let data = self.eeprom.get(word).copied().map_or(0, u32::from);
        let done = if self.faults.dead_eeprom { 0 } else { reg::EERD_DONE };
        self.registers.insert(reg::EERD, data << reg::EERD_DATA_SHIFT | done);
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
        // Above 4 GiB, so that a driver that forgets half of an address fails.
        let frame = 0x10_0000 + state.pages.len() as u64 * 3;
        state.pages.insert(frame, page.clone());
        Ok(DmaPage { page, bus_address: frame * 4096 })
    }
}

impl Clock for Model {
    fn now_ns(&self) -> u64 {
        let mut state = self.0.borrow_mut();
        state.now_ns += 200;
        state.now_ns
    }
}
