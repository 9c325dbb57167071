//! The first serial port: the machine's console. Output only.
//!
//! At 115,200 baud a line takes milliseconds, in which nobody shall wait: a death is reported
//! before the domain is restarted. So what is written is kept in a buffer, and leaves it by
//! interrupt. Until the interrupt works, when the buffer is full, and in a panic, the port is
//! polled.
//!
//! Source: National Semiconductor PC16550D data sheet, section 8.

#![expect(unsafe_code, reason = "port I/O")]

use core::fmt;
use core::sync::atomic::{AtomicUsize, Ordering};
use heapless::Deque;
use spin::Mutex;
use x86_64::instructions::port::Port;

const BASE: u16 = 0x3f8;
const DATA: u16 = 0;
const INTERRUPT_ENABLE: u16 = 1;
const INTERRUPT_IDENTIFICATION: u16 = 2;
const LINE_STATUS: u16 = 5;

const ENABLE_EMPTY: u8 = 2;
const TRANSMITTER_EMPTY: u8 = 0x20;
/// In the interrupt identification: FIFOs are on, and work.
const FIFO_WORKS: u8 = 0xc0;
const FIFO_BYTES: usize = 16;
/// Bytes that can wait.
const BUFFER_BYTES: usize = 16 * 1024;

/// Keeps the lines of several processors apart. Innermost lock: nothing is locked under it.
static CONSOLE: Mutex<Console> =
    Mutex::new(Console { waiting: Deque::new(), by_interrupt: false, enabled: false });

/// What has not left yet.
struct Console {
    waiting: Deque<u8, BUFFER_BYTES>,
    /// The port's interrupt arrives.
    by_interrupt: bool,
    /// The port raises it.
    enabled: bool,
}

fn out(register: u16, value: u8) {
    // SAFETY: the UART's registers affect nothing but the serial line.
    unsafe { Port::new(BASE + register).write(value) };
}

fn read(register: u16) -> u8 {
    // SAFETY: reading status has no effect on memory.
    unsafe { Port::new(BASE + register).read() }
}

fn is_empty() -> bool {
    read(LINE_STATUS) & TRANSMITTER_EMPTY != 0
}

/// Bytes that an empty transmitter takes at once: 1 without a FIFO.
static ROOM: AtomicUsize = AtomicUsize::new(1);

/// Sets 115,200 baud, 8N1, FIFOs on, no interrupts, and OUT2, which on a PC lets them out.
pub fn init() {
    for (register, value) in [(1, 0), (3, 0x80), (0, 1), (1, 0), (3, 3), (2, 7), (4, 0xb)] {
        out(register, value);
    }
    // No interrupt is pending that this could take back.
    if read(INTERRUPT_IDENTIFICATION) & FIFO_WORKS == FIFO_WORKS {
        ROOM.store(FIFO_BYTES, Ordering::Relaxed);
    }
}

/// A full FIFO takes 1.4 ms; a port that does not get ready is not waited for.
fn wait_until_empty() {
    for _ in 0..100_000 {
        if is_empty() {
            break;
        }
        core::hint::spin_loop();
    }
}

impl Console {
    fn push(&mut self, byte: u8) {
        if self.waiting.is_full() {
            wait_until_empty();
            self.fill();
        }
        let _ = self.waiting.push_back(byte);
    }

    /// Gives the port, which is empty, what it can take.
    fn fill(&mut self) {
        for _ in 0..ROOM.load(Ordering::Relaxed) {
            let Some(byte) = self.waiting.pop_front() else { break };
            out(DATA, byte);
        }
    }

    fn drain(&mut self) {
        while !self.waiting.is_empty() {
            wait_until_empty();
            self.fill();
        }
    }

    /// Lets the port interrupt as long as something waits.
    fn arm(&mut self) {
        let enable = !self.waiting.is_empty();
        if enable != self.enabled {
            out(INTERRUPT_ENABLE, if enable { ENABLE_EMPTY } else { 0 });
            self.enabled = enable;
        }
    }
}

/// Writes all bytes, with a carriage return before each line feed.
pub fn write(bytes: &[u8]) {
    let mut console = CONSOLE.lock();
    for &byte in bytes {
        if byte == b'\n' {
            console.push(b'\r');
        }
        console.push(byte);
    }
    if console.by_interrupt {
        console.arm();
    } else {
        console.drain();
    }
}

/// From now on the port's interrupt arrives, and ends in [`service`].
pub fn by_interrupt() {
    CONSOLE.lock().by_interrupt = true;
}

/// Goes on after the port's interrupt.
pub fn service() {
    let mut console = CONSOLE.lock();
    // Takes the request back, so that the next one is seen.
    read(INTERRUPT_IDENTIFICATION);
    if is_empty() {
        console.fill();
    }
    console.arm();
}

/// The port for a panic, which does not wait long for whoever holds the lock: they were stopped.
pub struct Emergency;

impl fmt::Write for Emergency {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for _ in 0..1000 {
            if let Some(mut console) = CONSOLE.try_lock() {
                // What was said before, first.
                console.drain();
                console.arm();
                break;
            }
            core::hint::spin_loop();
        }
        for &byte in text.as_bytes() {
            for byte in (byte == b'\n').then_some(b'\r').into_iter().chain([byte]) {
                wait_until_empty();
                out(DATA, byte);
            }
        }
        Ok(())
    }
}
