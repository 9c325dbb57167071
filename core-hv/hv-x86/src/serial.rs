//! The first serial port: the machine's console. Output only, polled.
//!
//! Source: National Semiconductor PC16550D data sheet, section 8.

#![expect(unsafe_code, reason = "port I/O")]

use core::fmt;
use spin::Mutex;
use x86_64::instructions::port::Port;

const BASE: u16 = 0x3f8;
const TRANSMITTER_EMPTY: u8 = 0x20;

/// Keeps the lines of several processors apart. Innermost lock: nothing is locked under it.
static LOCK: Mutex<()> = Mutex::new(());

fn out(register: u16, value: u8) {
    // SAFETY: the UART's registers affect nothing but the serial line.
    unsafe { Port::new(BASE + register).write(value) };
}

fn status() -> u8 {
    // SAFETY: reading the line status has no effect on memory.
    unsafe { Port::new(BASE + 5).read() }
}

/// Sets 115,200 baud, 8N1, FIFOs on, no interrupts.
pub fn init() {
    for (register, value) in [(1, 0), (3, 0x80), (0, 1), (1, 0), (3, 3), (2, 7), (4, 3)] {
        out(register, value);
    }
}

/// A byte takes 87 µs; a port that does not get ready is not waited for.
fn put(byte: u8) {
    for _ in 0..100_000 {
        if status() & TRANSMITTER_EMPTY != 0 {
            break;
        }
        core::hint::spin_loop();
    }
    out(0, byte);
}

fn put_all(bytes: &[u8]) {
    for &byte in bytes {
        if byte == b'\n' {
            put(b'\r');
        }
        put(byte);
    }
}

/// Writes all bytes, with a carriage return before each line feed.
pub fn write(bytes: &[u8]) {
    let _guard = LOCK.lock();
    put_all(bytes);
}

/// The port for a panic, which does not wait for whoever holds the lock: they were stopped.
pub struct Emergency;

impl fmt::Write for Emergency {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        put_all(text.as_bytes());
        Ok(())
    }
}
