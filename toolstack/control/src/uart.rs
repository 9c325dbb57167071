//! The 16550 serial port that leads to `axl`.
//!
//! Interrupt-driven in both directions, with the FIFO on. Reads only what the port says is
//! there, and at most [`MAX_RECEIVE`] bytes at a time, so that neither a sender that never stops
//! nor a port that is not there (all ones) can hold the control domain up.
//!
//! Source: National Semiconductor PC16550D data sheet, section 8.

use alloc::collections::VecDeque;

/// The port's eight I/O ports.
pub trait Ports {
    /// Reads the port at `offset`, 0..8.
    fn read(&mut self, offset: u16) -> u8;
    /// Writes it.
    fn write(&mut self, offset: u16, value: u8);
}

const DATA: u16 = 0;
const INTERRUPT_ENABLE: u16 = 1;
const FIFO_CONTROL: u16 = 2;
const LINE_CONTROL: u16 = 3;
const MODEM_CONTROL: u16 = 4;
const LINE_STATUS: u16 = 5;
const SCRATCH: u16 = 7;

const ENABLE_RECEIVED: u8 = 1;
const ENABLE_EMPTY: u8 = 2;
/// FIFO on, both cleared, interrupt at 8 bytes (and after a pause at fewer).
const FIFO_ON: u8 = 0x87;
const DIVISOR_ACCESS: u8 = 0x80;
const EIGHT_BITS: u8 = 3;
/// DTR, RTS, and OUT2, which on a PC lets the interrupt out.
const MODEM: u8 = 0x0b;
const DATA_READY: u8 = 1;
const TRANSMITTER_EMPTY: u8 = 0x20;
const FIFO_BYTES: usize = 16;
/// Most bytes taken by one call of [`Uart::service`].
pub const MAX_RECEIVE: usize = 4096;

/// The driver.
#[derive(Debug)]
pub struct Uart<P> {
    ports: P,
    waits_for_empty: bool,
    present: bool,
}

impl<P: Ports> Uart<P> {
    /// Takes the port over: 115,200 baud, 8 bits, no parity, FIFO, interrupt on receipt.
    pub fn new(mut ports: P) -> Self {
        ports.write(SCRATCH, 0xa5);
        let present = ports.read(SCRATCH) == 0xa5;
        ports.write(INTERRUPT_ENABLE, 0);
        ports.write(LINE_CONTROL, DIVISOR_ACCESS);
        ports.write(DATA, 1);
        ports.write(INTERRUPT_ENABLE, 0);
        ports.write(LINE_CONTROL, EIGHT_BITS);
        ports.write(FIFO_CONTROL, FIFO_ON);
        ports.write(MODEM_CONTROL, MODEM);
        ports.write(INTERRUPT_ENABLE, ENABLE_RECEIVED);
        Self { ports, waits_for_empty: false, present }
    }

    /// Whether there is a port at all.
    pub const fn present(&self) -> bool {
        self.present
    }

    /// Moves bytes both ways, as far as the port can without waiting. Call on its interrupt, and
    /// after adding to `outgoing`. Returns whether there may be more to receive at once: then
    /// call again before sleeping.
    #[must_use = "input that is left in the port may raise no further interrupt"]
    pub fn service(&mut self, mut received: impl FnMut(u8), outgoing: &mut VecDeque<u8>) -> bool {
        if !self.present {
            outgoing.clear();
            return false;
        }
        let mut room = MAX_RECEIVE;
        while room > 0 && self.ports.read(LINE_STATUS) & DATA_READY != 0 {
            received(self.ports.read(DATA));
            room -= 1;
        }
        self.transmit(outgoing);
        room == 0
    }

    fn transmit(&mut self, outgoing: &mut VecDeque<u8>) {
        if !outgoing.is_empty() && self.ports.read(LINE_STATUS) & TRANSMITTER_EMPTY != 0 {
            for byte in outgoing.drain(..outgoing.len().min(FIFO_BYTES)) {
                self.ports.write(DATA, byte);
            }
        }
        let wait = !outgoing.is_empty();
        if wait != self.waits_for_empty {
            // Enabling it while the transmitter is empty raises it at once.
            let enable = if wait { ENABLE_RECEIVED | ENABLE_EMPTY } else { ENABLE_RECEIVED };
            self.ports.write(INTERRUPT_ENABLE, enable);
            self.waits_for_empty = wait;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    /// As much of a 16550 as a driver can tell.
    #[derive(Default)]
    struct Model {
        registers: [u8; 8],
        incoming: VecDeque<u8>,
        fifo: Vec<u8>,
        sent: Vec<u8>,
        absent: bool,
    }

    impl Ports for &mut Model {
        fn read(&mut self, offset: u16) -> u8 {
            match offset {
                _ if self.absent => 0xff,
                DATA => self.incoming.pop_front().unwrap_or(0),
                LINE_STATUS => {
                    let ready = if self.incoming.is_empty() { 0 } else { DATA_READY };
                    ready | if self.fifo.is_empty() { TRANSMITTER_EMPTY } else { 0 }
                }
                _ => self.registers[usize::from(offset)],
            }
        }

        fn write(&mut self, offset: u16, value: u8) {
            let divisor = self.registers[usize::from(LINE_CONTROL)] & DIVISOR_ACCESS != 0;
            if offset == DATA && !divisor {
                assert!(self.fifo.len() < FIFO_BYTES, "the FIFO overflows");
                self.fifo.push(value);
            } else {
                self.registers[usize::from(offset)] = value;
            }
        }
    }

    #[test]
    fn all_bytes_leave_in_order_and_the_interrupt_ends() {
        let mut model = Model::default();
        let mut outgoing: VecDeque<u8> = (0..100).collect();
        let mut rounds = 0;
        let mut uart = Uart::new(&mut model);
        while !outgoing.is_empty() {
            assert!(!uart.service(|_| (), &mut outgoing));
            let fifo = core::mem::take(&mut uart.ports.fifo);
            uart.ports.sent.extend(fifo);
            let enabled = uart.ports.registers[usize::from(INTERRUPT_ENABLE)];
            assert_eq!(enabled & ENABLE_EMPTY != 0, !outgoing.is_empty());
            rounds += 1;
        }
        assert_eq!(rounds, 7);
        assert_eq!(model.sent, (0..100).collect::<Vec<u8>>());
    }

    #[test]
    fn a_flood_is_taken_in_parts() {
        let incoming = (0..=255).cycle().take(MAX_RECEIVE + 10).collect();
        let mut model = Model { incoming, ..Model::default() };
        let mut uart = Uart::new(&mut model);
        let mut taken = 0;
        assert!(uart.service(|_| taken += 1, &mut VecDeque::new()));
        assert_eq!(taken, MAX_RECEIVE);
        assert!(!uart.service(|_| taken += 1, &mut VecDeque::new()));
        assert_eq!(taken, MAX_RECEIVE + 10);
    }

    #[test]
    fn a_port_that_is_not_there_is_left_alone() {
        let mut model = Model { absent: true, ..Model::default() };
        let mut uart = Uart::new(&mut model);
        let mut outgoing = VecDeque::from([1, 2, 3]);
        assert!(!uart.present());
        assert!(!uart.service(|_| panic!("nothing is received"), &mut outgoing));
        assert!(outgoing.is_empty());
    }
}
