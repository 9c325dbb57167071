//! The controller as its driver sees it, for tests: registers, queues in memory, MSI-X messages,
//! namespaces in RAM with a volatile cache, and faults on demand.
//!
//! Admin commands are done when their doorbell is rung. I/O commands are fetched then, and wait
//! until the test runs them ([`Model::run`]), in any order and with any [`Fault`]; or they are
//! run at once ([`Setup::eager`]). As in QEMU, the memory that a command names is looked up when
//! it is fetched: a command that outlives its driver still reaches the old pages
//! ([`Setup::late_dma`]).
//!
//! What no driver may do is a panic that begins with "driver:".

mod disk;
mod execute;

pub use crate::status::Status;
pub use disk::RamDisk;

use crate::command::{ENTRY_BYTES, admin};
use crate::queue::COMPLETION_BYTES;
use crate::registers as reg;
use alloc::collections::BTreeMap;
use alloc::rc::Rc;
use alloc::vec::Vec;
use core::cell::RefCell;
use domain_api::{Clock, Page, Registers};

/// What kind of controller.
#[derive(Clone, Debug)]
pub struct Setup {
    /// `VS`.
    pub version: u32,
    /// Most entries of a queue.
    pub queue_entries: u16,
    /// I/O queue pairs that it grants.
    pub queue_pairs: u16,
    /// MSI-X vectors.
    pub vectors: u16,
    /// `CAP.DSTRD`.
    pub doorbell_stride: u32,
    /// `CAP.MPSMIN`.
    pub page_shift_min: u32,
    /// Most pages of a transfer, as a power of two; 0: any number.
    pub mdts: u8,
    /// Whether it has a volatile write cache.
    pub volatile_cache: bool,
    /// Whether it knows dataset management.
    pub discard: bool,
    /// Whether it knows write zeroes.
    pub write_zeroes: bool,
    /// How long it takes to get ready, or to stop.
    pub ready_ns: u64,
    /// I/O commands are run when their doorbell is rung.
    pub eager: bool,
    /// `CSTS.CFS` stays until the controller is enabled again, as in QEMU 7.2.
    pub sticky_fatal: bool,
    /// Commands that are run while bus mastering is off still move their data.
    pub late_dma: bool,
    /// What its clock moves by whenever it is looked at.
    pub tick_ns: u64,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            version: 0x0001_0400,
            queue_entries: 1024,
            queue_pairs: 8,
            vectors: 16,
            doorbell_stride: 0,
            page_shift_min: 0,
            mdts: 7,
            volatile_cache: true,
            discard: true,
            write_zeroes: true,
            ready_ns: 1000,
            eager: false,
            sticky_fatal: false,
            late_dma: false,
            tick_ns: 200,
        }
    }
}

/// Faults of the whole controller.
#[derive(Clone, Copy, Default, Debug)]
pub struct Faults {
    /// Every register reads as ones.
    pub gone: bool,
    /// It does not become ready.
    pub never_ready: bool,
    /// It fails when it is enabled.
    pub fatal_at_enable: bool,
    /// It does not stop.
    pub never_stops: bool,
    /// Admin commands are not answered.
    pub silent_admin: bool,
    /// Messages are lost.
    pub lost_interrupts: bool,
    /// An admin command, by its opcode, is refused.
    pub refuse: Option<(u8, Status)>,
}

/// What goes wrong with a command.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// It is done, but its completion is never posted.
    Lost,
    /// It is not done, and ends with this status.
    Failed(Status),
    /// It is done, and its completion posted with the phase of old ones.
    WrongPhase,
    /// It is done, and its completion posted twice.
    Twice,
    /// It is done, and its completion posted for another command.
    WrongId(u16),
    /// It is done, and its completion posted for another queue.
    WrongQueue(u16),
}

/// A command that was fetched and not done yet.
#[derive(Clone, Debug)]
pub struct Pending {
    /// The submission queue.
    pub queue: u16,
    /// Its identifier.
    pub id: u16,
    words: [u64; 8],
    /// Where its data are.
    memory: Vec<(Page, usize, usize)>,
}

impl Pending {
    /// Its opcode.
    #[must_use]
    pub fn opcode(&self) -> u8 {
        self.words[0].to_le_bytes()[0]
    }

    fn namespace(&self) -> u32 {
        (self.words[0] >> 32) as u32
    }

    fn dword(&self, number: usize) -> u32 {
        let word = self.words[number / 2] >> (32 * (number % 2));
        (word & 0xffff_ffff) as u32
    }

    /// The halves of a dword, the lower one first.
    fn halves(&self, number: usize) -> [u16; 2] {
        let dword = self.dword(number);
        [(dword & 0xffff) as u16, (dword >> 16) as u16]
    }
}

#[derive(Debug)]
struct Submissions {
    base: u64,
    entries: u16,
    tail: u16,
    completions: u16,
}

#[derive(Debug)]
struct Completions {
    base: u64,
    entries: u16,
    head: u16,
    tail: u16,
    phase: bool,
    vector: u16,
}

/// Looks memory up by bus address, with the offset in its page.
type Memory = Rc<dyn Fn(u64) -> Option<(Page, usize)>>;

struct State {
    setup: Setup,
    faults: Faults,
    memory: Memory,
    disks: Vec<RamDisk>,
    bus_master: bool,
    fatal: bool,
    configuration: u32,
    /// When `CC.EN` last changed.
    switched_ns: u64,
    admin_attributes: u32,
    admin_addresses: [u64; 2],
    submissions: BTreeMap<u16, Submissions>,
    completions: BTreeMap<u16, Completions>,
    pending: Vec<Pending>,
    messages: Vec<u16>,
    doorbells: [u64; 2],
    errors: Vec<[u8; 64]>,
    now_ns: u64,
}

/// A controller. Clones are the same one; it serves as registers and as clock.
#[derive(Clone)]
pub struct Model(Rc<RefCell<State>>);

impl core::fmt::Debug for Model {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Model").field("pending", &self.0.borrow().pending.len()).finish()
    }
}

impl Model {
    /// A controller after power-on, which finds memory by asking `memory`.
    #[must_use]
    pub fn new(
        setup: Setup,
        disks: Vec<RamDisk>,
        memory: impl Fn(u64) -> Option<(Page, usize)> + 'static,
    ) -> Self {
        Self(Rc::new(RefCell::new(State {
            setup,
            faults: Faults::default(),
            memory: Rc::new(memory),
            disks,
            bus_master: false,
            fatal: false,
            configuration: 0,
            switched_ns: 0,
            admin_attributes: 0,
            admin_addresses: [0; 2],
            submissions: BTreeMap::new(),
            completions: BTreeMap::new(),
            pending: Vec::new(),
            messages: Vec::new(),
            doorbells: [0; 2],
            errors: Vec::new(),
            now_ns: 0,
        })))
    }

    /// Turns bus mastering on or off, as the PCI command register does.
    pub fn set_bus_master(&self, on: bool) {
        self.0.borrow_mut().bus_master = on;
    }

    /// Sets the faults.
    pub fn set_faults(&self, faults: Faults) {
        self.0.borrow_mut().faults = faults;
    }

    /// Reports a fatal error (`CSTS.CFS`).
    pub fn fail(&self) {
        self.0.borrow_mut().fatal = true;
    }

    /// The power fails: what was not flushed is lost, and so is all else but the disks.
    pub fn lose_power(&self) {
        let mut state = self.0.borrow_mut();
        state.disks.iter_mut().for_each(RamDisk::lose_power);
        state.stop();
        state.configuration = 0;
        state.fatal = false;
        state.bus_master = false;
    }

    /// A look at a disk, counted from 0.
    ///
    /// # Panics
    /// When there is none.
    pub fn with_disk<T>(&self, place: usize, look: impl FnOnce(&mut RamDisk) -> T) -> T {
        look(&mut self.0.borrow_mut().disks[place])
    }

    /// Lets time pass.
    pub fn advance(&self, ns: u64) {
        self.0.borrow_mut().now_ns += ns;
    }

    /// The messages since the last call, as vectors.
    #[must_use]
    pub fn messages(&self) -> Vec<u16> {
        core::mem::take(&mut self.0.borrow_mut().messages)
    }

    /// How often doorbells of submission and completion queues were rung.
    #[must_use]
    pub fn doorbells(&self) -> [u64; 2] {
        self.0.borrow().doorbells
    }

    /// The commands that were fetched and not done yet, oldest first.
    #[must_use]
    pub fn pending(&self) -> Vec<Pending> {
        self.0.borrow().pending.clone()
    }

    /// How many these are.
    #[must_use]
    pub fn pending_count(&self) -> usize {
        self.0.borrow().pending.len()
    }

    /// Does one of them, counted from 0.
    ///
    /// # Panics
    /// When there is none.
    pub fn run(&self, place: usize) {
        self.0.borrow_mut().run(place, None);
    }

    /// The same, with something going wrong.
    ///
    /// # Panics
    /// When there is none.
    pub fn run_with(&self, place: usize, fault: Fault) {
        self.0.borrow_mut().run(place, Some(fault));
    }

    /// Does all of them, oldest first.
    pub fn run_all(&self) {
        let mut state = self.0.borrow_mut();
        while !state.pending.is_empty() {
            state.run(0, None);
        }
    }
}

impl State {
    fn is_ready(&self) -> bool {
        let settled = self.now_ns >= self.switched_ns + self.setup.ready_ns;
        match self.configuration & reg::CC_EN != 0 {
            true => settled && !self.faults.never_ready,
            false => !settled || self.faults.never_stops,
        }
    }

    fn capabilities(&self) -> u64 {
        u64::from(self.setup.queue_entries - 1)
            | 1 << 16 // Queues must be contiguous.
            | 2 << 24 // A second.
            | u64::from(self.setup.doorbell_stride) << 32
            | 1 << 37
            | u64::from(self.setup.page_shift_min) << 48
            | 4 << 52
    }

    fn read(&self, offset: u32) -> u32 {
        if self.faults.gone {
            return u32::MAX;
        }
        let bit = |on, bit| if on { bit } else { 0 };
        match offset {
            reg::CAP => (self.capabilities() & 0xffff_ffff) as u32,
            0x04 => (self.capabilities() >> 32) as u32,
            reg::VS => self.setup.version,
            reg::CC => self.configuration,
            reg::CSTS if self.configuration & reg::CC_EN == 0 && self.switched_ns == 0 => 0,
            reg::CSTS => bit(self.is_ready(), reg::CSTS_RDY) | bit(self.fatal, reg::CSTS_CFS),
            reg::AQA => self.admin_attributes,
            _ => panic!("driver: reads register {offset:#x}"),
        }
    }

    fn write(&mut self, offset: u32, value: u32) {
        if self.faults.gone {
            return;
        }
        if (reg::AQA..=reg::ACQ + 4).contains(&offset) {
            assert!(
                self.configuration & reg::CC_EN == 0,
                "driver: changes the admin queues while the controller is enabled"
            );
        }
        let half = |old: u64, shift: u32| old & !(0xffff_ffff << shift) | u64::from(value) << shift;
        let [asq, acq] = &mut self.admin_addresses;
        match offset {
            reg::CC => self.configure(value),
            reg::AQA => self.admin_attributes = value,
            reg::ASQ => *asq = half(*asq, 0),
            0x2c => *asq = half(*asq, 32),
            reg::ACQ => *acq = half(*acq, 0),
            0x34 => *acq = half(*acq, 32),
            reg::DOORBELLS.. => self.doorbell(offset - reg::DOORBELLS, value),
            _ => panic!("driver: writes register {offset:#x}"),
        }
    }

    fn configure(&mut self, value: u32) {
        let (was, on) = (self.configuration & reg::CC_EN != 0, value & reg::CC_EN != 0);
        match (was, on) {
            (false, true) => self.enable(value),
            (true, false) => {
                assert!(
                    self.is_ready() || self.fatal || self.faults.never_ready,
                    "driver: clears CC.EN before the controller is ready (section 3.1.5)"
                );
                self.stop();
                self.fatal &= self.setup.sticky_fatal;
                self.switched_ns = self.now_ns.max(1);
            }
            _ => {}
        }
        self.configuration = value;
    }

    fn stop(&mut self) {
        self.submissions.clear();
        self.completions.clear();
        self.pending.clear();
        self.messages.clear();
    }

    fn enable(&mut self, value: u32) {
        assert!(!self.is_ready_bit(), "driver: sets CC.EN while CSTS.RDY is 1 (section 3.1.5)");
        let wanted = reg::CC_EN | reg::CC_IOSQES | reg::CC_IOCQES;
        assert_eq!(value, wanted, "driver: a configuration that the model does not know");
        let [base, completions] = self.admin_addresses;
        let entries = |shift: u32| (self.admin_attributes >> shift & 0xfff) as u16 + 1;
        assert!(entries(0) > 1 && entries(16) > 1, "driver: admin queues of one entry");
        assert!(
            base % 4096 == 0 && completions % 4096 == 0 && base != 0 && completions != 0,
            "driver: admin queues at {base:#x} and {completions:#x}"
        );
        let (entries, completion_entries) = (entries(0), entries(16));
        self.add_submissions(0, base, entries, 0);
        self.add_completions(0, completions, completion_entries, 0);
        self.fatal = self.faults.fatal_at_enable;
        self.switched_ns = self.now_ns.max(1);
    }

    fn is_ready_bit(&self) -> bool {
        self.read(reg::CSTS) & reg::CSTS_RDY != 0
    }

    fn add_submissions(&mut self, queue: u16, base: u64, entries: u16, completions: u16) {
        let queues = Submissions { base, entries, tail: 0, completions };
        let old = self.submissions.insert(queue, queues);
        assert!(old.is_none(), "driver: submission queue {queue} exists");
    }

    fn add_completions(&mut self, queue: u16, base: u64, entries: u16, vector: u16) {
        let queues = Completions { base, entries, head: 0, tail: 0, phase: true, vector };
        let old = self.completions.insert(queue, queues);
        assert!(old.is_none(), "driver: completion queue {queue} exists");
    }

    fn doorbell(&mut self, offset: u32, value: u32) {
        assert!(self.is_ready_bit(), "driver: rings a doorbell before the controller is ready");
        let stride = 4 << self.setup.doorbell_stride;
        assert_eq!(offset % stride, 0, "driver: no doorbell at {offset:#x}");
        let number = u16::try_from(offset / stride).expect("few doorbells");
        let value = u16::try_from(value).expect("driver: rings a doorbell with more than 16 bits");
        let side = usize::from(number % 2);
        self.doorbells[side] += 1;
        match side {
            0 => self.fetch(number / 2, value),
            _ => self.release(number / 2, value),
        }
    }

    fn release(&mut self, queue: u16, head: u16) {
        let it = self.completions.get_mut(&queue).expect("driver: no such completion queue");
        assert!(head < it.entries, "driver: head {head} of {} entries", it.entries);
        let held = (it.tail + it.entries - it.head) % it.entries;
        let released = (head + it.entries - it.head) % it.entries;
        assert!(released <= held, "driver: releases {released} completions, but has {held}");
        it.head = head;
    }

    fn fetch(&mut self, queue: u16, tail: u16) {
        let it = self.submissions.get_mut(&queue).expect("driver: no such submission queue");
        assert!(tail < it.entries, "driver: tail {tail} of {} entries", it.entries);
        let (mut at, entries, base) = (it.tail, it.entries, it.base);
        it.tail = tail;
        if !self.bus_master {
            self.fatal = true;
        }
        while at != tail && !self.fatal {
            self.fetch_one(queue, base + u64::from(at) * ENTRY_BYTES as u64);
            at = (at + 1) % entries;
        }
    }

    fn fetch_one(&mut self, queue: u16, address: u64) {
        let (page, at) = (self.memory)(address).expect("driver: a queue is no memory");
        let mut bytes = [0; ENTRY_BYTES];
        page.read(at, &mut bytes);
        let mut words = [0; 8];
        for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = u64::from_le_bytes(bytes.try_into().expect("eight bytes"));
        }
        let id = (words[0] >> 16 & 0xffff) as u16;
        assert!(words[0] >> 8 & 0xff == 0, "driver: flags {:#x} of command {id:#x}", words[0]);
        let again = self.pending.iter().any(|it| (it.queue, it.id) == (queue, id));
        assert!(!again, "driver: command {id:#x} of queue {queue} is under way already");
        let mut command = Pending { queue, id, words, memory: Vec::new() };
        if queue == 0 {
            if !self.faults.silent_admin {
                self.administer(&command);
            }
            return;
        }
        command.memory = self.data(&command);
        self.pending.push(command);
        if self.setup.eager {
            self.run(self.pending.len() - 1, None);
        }
    }

    fn run(&mut self, place: usize, fault: Option<Fault>) {
        let command = self.pending.remove(place);
        let status = match fault {
            Some(Fault::Failed(status)) => status,
            _ if self.bus_master || self.setup.late_dma => self.execute(&command),
            _ => Status::DATA_TRANSFER,
        };
        let (queue, id) = (command.queue, command.id);
        if !status.is_success() {
            self.note_error(&command, status);
        }
        match fault {
            Some(Fault::Lost) => {}
            Some(Fault::WrongPhase) => self.post_as(queue, queue, id, status, 0, true),
            Some(Fault::WrongId(id)) => self.post(queue, id, status, 0),
            Some(Fault::WrongQueue(other)) => self.post_as(queue, other, id, status, 0, false),
            Some(Fault::Twice) => {
                self.post(queue, id, status, 0);
                self.post(queue, id, status, 0);
            }
            Some(Fault::Failed(_)) | None => self.post(queue, id, status, 0),
        }
    }

    fn post(&mut self, queue: u16, id: u16, status: Status, result: u32) {
        self.post_as(queue, queue, id, status, result, false);
    }

    /// Posts a completion for `queue` that says it is for `named`.
    fn post_as(
        &mut self,
        queue: u16,
        named: u16,
        id: u16,
        status: Status,
        result: u32,
        old_phase: bool,
    ) {
        if !self.bus_master {
            self.fatal = true; // As in QEMU.
            return;
        }
        let head = self.submissions[&queue].tail;
        let place = self.submissions[&queue].completions;
        let it = self.completions.get_mut(&place).expect("checked when it was created");
        let address = it.base + u64::from(it.tail) * COMPLETION_BYTES as u64;
        let phase = it.phase != old_phase;
        it.tail = (it.tail + 1) % it.entries;
        it.phase ^= it.tail == 0;
        assert!(it.tail != it.head, "driver: completion queue {place} overflows");
        let vector = it.vector;
        let (page, at) = (self.memory)(address).expect("driver: a queue is no memory");
        page.write(at, &result.to_le_bytes());
        page.write(at + 8, &(u32::from(named) << 16 | u32::from(head)).to_le_bytes());
        let last = u32::from(status.0) << 17 | u32::from(phase) << 16 | u32::from(id);
        page.write(at + 12, &last.to_le_bytes());
        if !self.faults.lost_interrupts {
            self.messages.push(vector);
        }
    }

    fn note_error(&mut self, command: &Pending, status: Status) {
        let mut entry = [0; 64];
        entry[..8].copy_from_slice(&(self.errors.len() as u64 + 1).to_le_bytes());
        entry[8..10].copy_from_slice(&command.queue.to_le_bytes());
        entry[10..12].copy_from_slice(&command.id.to_le_bytes());
        entry[12..14].copy_from_slice(&(status.0 << 1).to_le_bytes());
        entry[16..24].copy_from_slice(&command.words[5].to_le_bytes());
        entry[24..28].copy_from_slice(&command.namespace().to_le_bytes());
        self.errors.push(entry);
    }

    fn administer(&mut self, command: &Pending) {
        let refused = self.faults.refuse.filter(|(opcode, _)| *opcode == command.opcode());
        let (status, result) = match (refused, command.opcode()) {
            (Some((_, status)), _) => (status, 0),
            (None, admin::IDENTIFY) => (self.identify(command), 0),
            (None, admin::SET_FEATURES) => self.set_features(command),
            (None, admin::CREATE_CQ) => (self.create_completions(command), 0),
            (None, admin::CREATE_SQ) => (self.create_submissions(command), 0),
            (None, admin::GET_LOG_PAGE) => (self.read_log(command), 0),
            (None, admin::ABORT) => (Status::SUCCESS, self.abort(command)),
            (None, opcode) => panic!("driver: admin command {opcode:#x}"),
        };
        self.post(0, command.id, status, result);
    }
}

impl Registers for Model {
    fn read(&self, offset: u32) -> u32 {
        self.0.borrow().read(offset)
    }

    fn write(&mut self, offset: u32, value: u32) {
        self.0.borrow_mut().write(offset, value);
    }
}

impl Clock for Model {
    fn now_ns(&self) -> u64 {
        let mut state = self.0.borrow_mut();
        state.now_ns += state.setup.tick_ns;
        state.now_ns
    }
}
