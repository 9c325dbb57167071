//! The receive ring.
//!
//! ```text
//!   next ──────────▶ tail          slots of the ring, wrapping
//!   │ device owns    │ nobody
//! ```
//!
//! Descriptors from `next` up to `published` belong to the device; from there to `tail` they are
//! filled but the device has not been told. `tail - next` never exceeds the number of buffers,
//! which is below the number of slots, so head = tail always means empty.

use crate::Counters;
use crate::descriptor::{ERRORS, RING, Received, Ring, STATUS_EOP};
use crate::registers as reg;
use card_buffers::{Buffers, Holder, Shape};
use core::sync::atomic::{Ordering, fence};
use domain_api::nic::{self, Buffer, Checksum, is_frame};
use domain_api::{Dma, Errno, Registers};

/// Buffers for reception: 1.5 ms of full-sized frames at line rate.
pub const RECEIVE_BUFFERS: u16 = 128;
/// What `RCTL` says: 2048 bytes.
const SHAPE: Shape = Shape::half_page(0);
/// Buffers that are given back to the device at once: telling it costs an access over the bus.
const BATCH: u16 = 16;
const _: () = assert!(RECEIVE_BUFFERS < RING);

/// The receive half.
#[derive(Debug)]
pub struct Receiver {
    ring: Ring,
    pub(crate) buffers: Buffers,
    /// Which buffer a slot's descriptor names.
    slots: [u16; RING as usize],
    /// Wrapping positions; a slot is a position modulo the ring.
    next: u16,
    published: u16,
    tail: u16,
    /// Between the first descriptor of a frame in pieces and its last.
    in_pieces: bool,
}

impl Receiver {
    /// Allocates ring and buffers, and fills the ring.
    ///
    /// # Errors
    /// No memory.
    pub fn new(dma: &mut impl Dma) -> Result<Self, Errno> {
        let mut receiver = Self {
            ring: Ring::new(dma.alloc()?),
            buffers: Buffers::new(dma, 0, RECEIVE_BUFFERS, SHAPE)?,
            slots: [0; RING as usize],
            next: 0,
            published: 0,
            tail: 0,
            in_pieces: false,
        };
        (0..RECEIVE_BUFFERS).for_each(|index| receiver.offer(index));
        Ok(receiver)
    }

    /// Where the device finds the ring.
    pub fn ring_address(&self) -> u64 {
        self.ring.bus_address()
    }

    fn offer(&mut self, index: u16) {
        self.ring.offer(self.tail, self.buffers.content_address(index));
        self.slots[usize::from(self.tail % RING)] = index;
        self.buffers.set(index, Holder::Device);
        self.tail = self.tail.wrapping_add(1);
    }

    /// What the device wrote into the next descriptor, if that is its to write.
    fn arrived(&self) -> Option<Received> {
        (self.next != self.published).then(|| self.ring.received(self.next)).flatten()
    }

    /// Whether [`Self::take`] has something to look at.
    pub fn has_frame(&self) -> bool {
        self.arrived().is_some()
    }

    /// The next good frame.
    pub fn take(&mut self, counters: &mut Counters) -> Option<nic::Received> {
        loop {
            let received = self.arrived()?;
            let index = self.slots[usize::from(self.next % RING)];
            self.next = self.next.wrapping_add(1);
            if self.is_good(received, counters) {
                counters.received += 1;
                let good = received.is_checksum_good();
                let checksum = if good { Checksum::Good } else { Checksum::Unknown };
                return Some(nic::Received {
                    buffer: self.buffers.lend(index, received.len),
                    checksum,
                });
            }
            self.offer(index);
        }
    }

    /// Judges a descriptor, and counts what is wrong with it.
    fn is_good(&mut self, received: Received, counters: &mut Counters) -> bool {
        let last = received.status & STATUS_EOP != 0;
        let piece = self.in_pieces || !last;
        self.in_pieces = !last;
        if piece {
            // Every frame fits into one buffer, so this one is too long.
            counters.bad_pieces += u64::from(last);
        } else if received.errors & ERRORS != 0 {
            counters.bad_frames += 1;
        } else if !is_frame(received.len.into()) {
            counters.bad_lengths += 1;
        } else {
            return true;
        }
        false
    }

    /// Takes a frame's buffer back.
    pub fn recycle(&mut self, buffer: &Buffer, counters: &mut Counters) {
        match self.buffers.returned(buffer) {
            Some(index) => self.offer(index),
            None => counters.bad_buffers += 1,
        }
    }

    /// Tells the device of new descriptors, when there are enough of them or it runs short.
    pub fn publish(&mut self, registers: &mut impl Registers) {
        let unpublished = self.tail.wrapping_sub(self.published);
        let left = self.published.wrapping_sub(self.next);
        if unpublished >= BATCH || (unpublished != 0 && left < BATCH) {
            self.publish_all(registers);
        }
    }

    /// Tells the device of all new descriptors.
    pub fn publish_all(&mut self, registers: &mut impl Registers) {
        self.published = self.tail;
        fence(Ordering::SeqCst); // Descriptors before the register that passes them on.
        registers.write(reg::RDT, u32::from(self.tail % RING));
    }
}
