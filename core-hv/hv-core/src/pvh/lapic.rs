//! The local APIC of a vCPU, as far as a kernel that uses event channels needs one: its id,
//! interrupts between vCPUs, priorities. Its timer never fires (`xen-abi.md` §5.1).
//!
//! Registers have the numbers of x2APIC MSRs less 0x800; in the register page each is at 16 times
//! that. Source: AMD64 APM volume 2, chapter 16.

/// Where the register page is.
pub const PAGE: u64 = 0xfee0_0000;

const ID: u32 = 0x02;
const VERSION: u32 = 0x03;
const TASK_PRIORITY: u32 = 0x08;
const PROCESSOR_PRIORITY: u32 = 0x0a;
const EOI: u32 = 0x0b;
const LOGICAL_ID: u32 = 0x0d;
const DESTINATION_FORMAT: u32 = 0x0e;
const SPURIOUS: u32 = 0x0f;
const IN_SERVICE: u32 = 0x10;
const TRIGGER_MODE: u32 = 0x18;
const REQUESTED: u32 = 0x20;
const ERROR_STATUS: u32 = 0x28;
const COMMAND: u32 = 0x30;
const COMMAND_HIGH: u32 = 0x31;
const LVT: u32 = 0x32;
const INITIAL_COUNT: u32 = 0x38;
const CURRENT_COUNT: u32 = 0x39;
const DIVIDE: u32 = 0x3e;
const SELF_IPI: u32 = 0x3f;

const MASKED: u32 = 1 << 16;
const ENABLED: u32 = 1 << 8;
/// In the base register: enabled, x2APIC mode, first processor.
const BASE_ENABLED: u64 = 1 << 11;
const BASE_X2APIC: u64 = 1 << 10;
const BASE_FIRST: u64 = 1 << 8;
/// Version 0x14, six entries in the local vector table.
const VERSION_VALUE: u32 = 0x5_0014;

/// A set of vectors.
#[derive(Clone, Copy, Default, Debug)]
struct Vectors([u64; 4]);

impl Vectors {
    fn set(&mut self, vector: u8) {
        self.0[usize::from(vector / 64)] |= 1 << (vector % 64);
    }

    fn clear(&mut self, vector: u8) {
        self.0[usize::from(vector / 64)] &= !(1 << (vector % 64));
    }

    #[expect(clippy::cast_possible_truncation, reason = "256 vectors")]
    fn highest(&self) -> Option<u8> {
        let word = self.0.iter().rposition(|&word| word != 0)?;
        Some((word as u32 * 64 + 63 - self.0[word].leading_zeros()) as u8)
    }

    #[expect(clippy::cast_possible_truncation, reason = "takes words apart")]
    fn word(&self, index: u32) -> u32 {
        (self.0[index as usize / 2] >> (32 * (index % 2))) as u32
    }
}

/// An interrupt that a vCPU sends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Command {
    /// Low half of the command register: vector, delivery, shorthand.
    pub low: u32,
    /// Whom, by the low half.
    pub destination: u32,
    /// By the rules of x2APIC mode.
    pub wide: bool,
}

/// What a local APIC knows.
#[derive(Clone, Copy, Debug)]
pub struct Lapic {
    base: u64,
    task_priority: u8,
    spurious: u32,
    logical_id: u32,
    command: u64,
    lvt: [u32; 6],
    divide: u32,
    initial_count: u32,
    requested: Vectors,
    in_service: Vectors,
}

impl Lapic {
    /// As after a reset.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            base: PAGE | BASE_ENABLED,
            task_priority: 0,
            spurious: 0xff,
            logical_id: 0,
            command: 0,
            lvt: [MASKED; 6],
            divide: 0,
            initial_count: 0,
            requested: Vectors([0; 4]),
            in_service: Vectors([0; 4]),
        }
    }

    /// The base register of vCPU `index`.
    #[must_use]
    pub const fn base(&self, index: u8) -> u64 {
        self.base | if index == 0 { BASE_FIRST } else { 0 }
    }

    /// Writes the base register. `false`: not a value that it takes.
    pub fn set_base(&mut self, value: u64) -> bool {
        let modes = BASE_ENABLED | BASE_X2APIC;
        let known = PAGE | modes | BASE_FIRST;
        // x2APIC mode is left by way of the disabled state, and only with the APIC on.
        let leaves = self.is_wide() && value & modes == BASE_ENABLED;
        let is_strange = value & modes == BASE_X2APIC;
        if value & !known != 0 || value & PAGE != PAGE || leaves || is_strange {
            return false;
        }
        self.base = value & !BASE_FIRST;
        true
    }

    /// Whether its registers are MSRs.
    #[must_use]
    pub const fn is_wide(&self) -> bool {
        self.base & BASE_X2APIC != 0
    }

    /// Whether its registers are in memory.
    #[must_use]
    pub const fn is_in_memory(&self) -> bool {
        self.base & (BASE_ENABLED | BASE_X2APIC) == BASE_ENABLED
    }

    /// The id of vCPU `index`.
    #[must_use]
    pub const fn id(index: u8) -> u32 {
        2 * index as u32
    }

    /// Reads a register; nothing if there is none.
    #[must_use]
    pub fn read(&self, register: u32, index: u8) -> Option<u64> {
        let id = Self::id(index);
        let value = match register {
            ID if self.is_wide() => id,
            ID => id << 24,
            VERSION => VERSION_VALUE,
            TASK_PRIORITY => self.task_priority.into(),
            PROCESSOR_PRIORITY => self.priority().into(),
            LOGICAL_ID if self.is_wide() => wide_logical_id(id),
            LOGICAL_ID => self.logical_id,
            DESTINATION_FORMAT if !self.is_wide() => u32::MAX,
            SPURIOUS => self.spurious,
            IN_SERVICE..TRIGGER_MODE => self.in_service.word(register - IN_SERVICE),
            TRIGGER_MODE..REQUESTED | ERROR_STATUS | CURRENT_COUNT => 0,
            REQUESTED..ERROR_STATUS => self.requested.word(register - REQUESTED),
            COMMAND if self.is_wide() => return Some(self.command),
            COMMAND => low(self.command),
            COMMAND_HIGH if !self.is_wide() => low(self.command >> 32),
            LVT..INITIAL_COUNT => self.lvt[(register - LVT) as usize],
            INITIAL_COUNT => self.initial_count,
            DIVIDE => self.divide,
            _ => return None,
        };
        Some(value.into())
    }

    /// Writes a register. `Err`: there is none, or not such a value. An interrupt that is to be
    /// sent is the answer.
    #[expect(clippy::result_unit_err, reason = "the caller knows the only consequence")]
    pub fn write(&mut self, register: u32, value: u64) -> Result<Option<Command>, ()> {
        let word = low(value);
        match register {
            TASK_PRIORITY => self.task_priority = word.to_le_bytes()[0],
            EOI => self.end_of_interrupt(),
            LOGICAL_ID if !self.is_wide() => self.logical_id = word & 0xff00_0000,
            DESTINATION_FORMAT if !self.is_wide() => {}
            SPURIOUS => self.spurious = word & 0x3ff,
            ERROR_STATUS => {}
            COMMAND if self.is_wide() => {
                self.command = value & !(1 << 12);
                let destination = low(value >> 32);
                return Ok(Some(Command { low: word, destination, wide: true }));
            }
            COMMAND => {
                self.command = self.command & !0xffff_ffff | u64::from(word & !(1 << 12));
                let destination = low(self.command >> 56);
                return Ok(Some(Command { low: word, destination, wide: false }));
            }
            COMMAND_HIGH if !self.is_wide() => {
                self.command = u64::from(word) << 32 | u64::from(low(self.command));
            }
            LVT..INITIAL_COUNT => self.lvt[(register - LVT) as usize] = word,
            INITIAL_COUNT => self.initial_count = word,
            DIVIDE => self.divide = word,
            SELF_IPI if self.is_wide() => {
                let low = word & 0xff | SHORTHAND_SELF << 18;
                return Ok(Some(Command { low, destination: 0, wide: true }));
            }
            // Read only.
            ID | VERSION if !self.is_wide() => {}
            _ => return Err(()),
        }
        Ok(None)
    }

    /// Whether an interrupt with this destination is for vCPU `index`, whose APIC this is.
    #[must_use]
    pub fn is_meant(&self, command: Command, index: u8, sender: u8) -> bool {
        match command.low >> 18 & 3 {
            0 => {}
            SHORTHAND_SELF => return index == sender,
            2 => return true,
            _ => return index != sender,
        }
        let (id, to) = (Self::id(index), command.destination);
        let is_logical = command.low & 1 << 11 != 0;
        match (command.wide, is_logical) {
            (true, false) => to == id || to == u32::MAX,
            (true, true) => {
                let own = wide_logical_id(id);
                own >> 16 == to >> 16 && own & to & 0xffff != 0
            }
            (false, false) => to == id || to == 0xff,
            (false, true) => self.logical_id >> 24 & to != 0,
        }
    }

    /// Takes an interrupt. One with a vector below 16 is none.
    pub fn request(&mut self, vector: u8) {
        if vector >= 16 && self.spurious & ENABLED != 0 {
            self.requested.set(vector);
        }
    }

    /// The vector that is to be delivered next, if its priority allows it.
    #[must_use]
    pub fn pending(&self) -> Option<u8> {
        self.requested.highest().filter(|vector| vector >> 4 > self.priority() >> 4)
    }

    /// Notes that [`Self::pending`] is being delivered.
    pub fn accept(&mut self, vector: u8) {
        self.requested.clear(vector);
        self.in_service.set(vector);
    }

    fn end_of_interrupt(&mut self) {
        if let Some(vector) = self.in_service.highest() {
            self.in_service.clear(vector);
        }
    }

    fn priority(&self) -> u8 {
        let served = self.in_service.highest().unwrap_or(0) & 0xf0;
        if self.task_priority >> 4 >= served >> 4 { self.task_priority } else { served }
    }
}

impl Default for Lapic {
    fn default() -> Self {
        Self::new()
    }
}

const SHORTHAND_SELF: u32 = 1;

const fn wide_logical_id(id: u32) -> u32 {
    (id >> 4) << 16 | 1 << (id & 15)
}

#[expect(clippy::cast_possible_truncation, reason = "takes words apart")]
const fn low(value: u64) -> u32 {
    value as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn enabled() -> Lapic {
        let mut lapic = Lapic::new();
        assert!(lapic.set_base(PAGE | BASE_ENABLED | BASE_X2APIC));
        assert_eq!(lapic.write(SPURIOUS, 0x1ff), Ok(None));
        lapic
    }

    #[test]
    fn the_highest_priority_comes_first_and_blocks_lower_ones() {
        let mut lapic = enabled();
        lapic.request(0x41);
        lapic.request(0xf6);
        assert_eq!(lapic.pending(), Some(0xf6));
        lapic.accept(0xf6);
        assert_eq!(lapic.pending(), None, "0x41 waits for the end of 0xf6");
        lapic.request(0xf8);
        assert_eq!(lapic.pending(), None, "same class");
        assert_eq!(lapic.write(EOI, 0), Ok(None));
        assert_eq!(lapic.pending(), Some(0xf8));
    }

    #[test]
    fn the_task_priority_keeps_interrupts_away() {
        let mut lapic = enabled();
        lapic.request(0x35);
        assert_eq!(lapic.write(TASK_PRIORITY, 0x30), Ok(None));
        assert_eq!(lapic.pending(), None);
        assert_eq!(lapic.write(TASK_PRIORITY, 0x2f), Ok(None));
        assert_eq!(lapic.pending(), Some(0x35));
    }

    #[test]
    fn reset_values_are_the_architecture_s() {
        let lapic = Lapic::new();
        assert_eq!(lapic.base(0), 0xfee0_0900);
        assert_eq!(lapic.base(1), 0xfee0_0800);
        assert_eq!(lapic.read(ID, 3), Some(6 << 24));
        assert_eq!(lapic.read(VERSION, 0), Some(0x5_0014));
        assert_eq!(lapic.read(SPURIOUS, 0), Some(0xff));
        assert_eq!(lapic.read(0x32, 0), Some(0x1_0000));
        assert_eq!(lapic.read(0x2f, 0), None);
    }

    #[test]
    fn modes_change_as_they_may() {
        let mut lapic = Lapic::new();
        assert!(!lapic.set_base(PAGE | BASE_X2APIC), "x2APIC without APIC");
        assert!(!lapic.set_base(0xfed0_0000 | BASE_ENABLED), "it stays where it is");
        assert!(lapic.set_base(PAGE | BASE_ENABLED | BASE_X2APIC));
        assert!(!lapic.set_base(PAGE | BASE_ENABLED), "not straight back");
        assert!(lapic.set_base(PAGE));
        assert!(lapic.set_base(PAGE | BASE_ENABLED));
        assert!(lapic.is_in_memory());
    }

    /// The sequence that Linux starts a processor with (§5.1).
    #[test]
    fn commands_name_their_target() {
        let mut lapic = enabled();
        let sent = lapic.write(COMMAND, 0x2_0000_c500).expect("a register");
        let init = Command { low: 0xc500, destination: 2, wide: true };
        assert_eq!(sent, Some(init));
        assert!(lapic.is_meant(init, 1, 0) && !lapic.is_meant(init, 0, 0));
        let others = Command { low: 3 << 18, destination: 0, wide: true };
        assert!(lapic.is_meant(others, 1, 0) && !lapic.is_meant(others, 0, 0));
        let logical = Command { low: 1 << 11, destination: 0b101, wide: true };
        assert!(lapic.is_meant(logical, 0, 3) && lapic.is_meant(logical, 1, 3));
        assert!(!lapic.is_meant(logical, 2, 3));
        let own = lapic.write(SELF_IPI, 0xf6).expect("a register").expect("an interrupt");
        assert!(lapic.is_meant(own, 2, 2) && !lapic.is_meant(own, 1, 2));
    }
}
