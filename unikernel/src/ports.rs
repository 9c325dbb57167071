//! The second serial port's I/O ports, for the holder of the console right.
#![expect(unsafe_code, reason = "in and out")]

use core::arch::asm;

/// First I/O port of COM2.
const BASE: u16 = 0x2f8;

/// The eight registers of a 16550 at COM2.
#[derive(Debug)]
pub struct SerialPort(());

impl SerialPort {
    pub(crate) fn new() -> Self {
        Self(())
    }

    fn port(register: u8) -> u16 {
        assert!(register < 8, "a 16550 has eight registers");
        BASE + u16::from(register)
    }

    /// Reads a register, 0 to 7.
    #[must_use]
    pub fn read(&self, register: u8) -> u8 {
        let value: u8;
        // SAFETY: touches a register of a 16550, never memory; without the right, it ends us.
        unsafe {
            asm!("in al, dx", in("dx") Self::port(register), out("al") value,
                options(nomem, nostack, preserves_flags));
        }
        value
    }

    /// Writes a register, 0 to 7.
    pub fn write(&mut self, register: u8, value: u8) {
        // SAFETY: as for `read`.
        unsafe {
            asm!("out dx, al", in("dx") Self::port(register), in("al") value,
                options(nomem, nostack, preserves_flags));
        }
    }
}
