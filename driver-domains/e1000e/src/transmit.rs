//! The transmit ring.
//!
//! ```text
//!   done ────────▶ published ────────▶ tail     slots of the ring, wrapping
//!   │ device owns  │ filled, device not told │
//! ```
//!
//! There are fewer buffers than slots, so a frame in a buffer always finds a slot.

use crate::buffers::{BUFFER_BYTES, Buffers, Holder};
use crate::descriptor::{RING, Ring};
use crate::registers as reg;
use crate::{Counters, TRANSMIT_TIMEOUT_NS, is_frame};
use alloc::vec::Vec;
use core::sync::atomic::{Ordering, fence};
use domain_api::nic::Buffer;
use domain_api::{Dma, Errno, Registers};

/// Buffers for transmission.
pub const TRANSMIT_BUFFERS: u16 = 128;
/// First token of a transmit buffer; receive buffers are below.
pub const FIRST_TOKEN: u16 = 0x4000;
const _: () = assert!(TRANSMIT_BUFFERS < RING);

/// The transmit half.
#[derive(Debug)]
pub struct Transmitter {
    ring: Ring,
    pub(crate) buffers: Buffers,
    free: Vec<u16>,
    /// Which buffer a slot's descriptor names.
    slots: [u16; RING as usize],
    /// Wrapping positions; a slot is a position modulo the ring.
    done: u16,
    published: u16,
    tail: u16,
    /// Somebody was refused a buffer.
    short: bool,
    /// Where `done` was, and when it was first seen there with frames under way.
    progress: Option<(u16, u64)>,
}

impl Transmitter {
    /// Allocates ring and buffers.
    ///
    /// # Errors
    /// No memory.
    pub fn new(dma: &mut impl Dma) -> Result<Self, Errno> {
        Ok(Self {
            ring: Ring::new(dma.alloc()?),
            buffers: Buffers::new(dma, FIRST_TOKEN, TRANSMIT_BUFFERS)?,
            free: (0..TRANSMIT_BUFFERS).rev().collect(),
            slots: [0; RING as usize],
            done: 0,
            published: 0,
            tail: 0,
            short: false,
            progress: None,
        })
    }

    /// Where the device finds the ring.
    pub fn ring_address(&self) -> u64 {
        self.ring.bus_address()
    }

    /// Lends a buffer out. Sent ones are collected only when no other is left.
    pub fn lend(&mut self) -> Option<Buffer> {
        if self.free.is_empty() {
            self.reclaim();
        }
        let index = self.free.pop();
        self.short = index.is_none();
        index.map(|index| self.buffers.lend(index, BUFFER_BYTES))
    }

    /// Whether the last call of [`Self::lend`] found nothing.
    pub fn is_short(&self) -> bool {
        self.short
    }

    /// Collects sent buffers if somebody waits for one; returns whether there is one now.
    pub fn relieve(&mut self) -> bool {
        if !self.short {
            return false;
        }
        self.reclaim();
        self.short = self.free.is_empty();
        !self.short
    }

    /// Whether [`Self::reclaim`] would find something.
    fn has_done(&self) -> bool {
        self.done != self.published && self.ring.sent(self.done)
    }

    /// Collects the buffers of frames that the device has sent.
    fn reclaim(&mut self) {
        while self.has_done() {
            let index = self.slots[usize::from(self.done % RING)];
            self.release(index);
            self.done = self.done.wrapping_add(1);
        }
    }

    fn release(&mut self, index: u16) {
        self.buffers.set(index, Holder::Free);
        self.free.push(index);
    }

    /// Takes an unused buffer back.
    pub fn cancel(&mut self, buffer: &Buffer, counters: &mut Counters) {
        match self.buffers.returned(buffer) {
            Some(index) => self.release(index),
            None => counters.bad_buffers += 1,
        }
    }

    /// Queues a frame.
    pub fn send(&mut self, buffer: &Buffer, counters: &mut Counters) {
        let Some(index) = self.buffers.returned(buffer) else {
            counters.bad_buffers += 1;
            return;
        };
        if !is_frame(buffer.len) {
            counters.refused += 1;
            self.release(index);
            return;
        }
        self.ring.send(self.tail, self.buffers.bus_address(index), buffer.len);
        self.slots[usize::from(self.tail % RING)] = index;
        self.buffers.set(index, Holder::Device);
        self.tail = self.tail.wrapping_add(1);
        counters.queued += 1;
    }

    /// Tells the device of queued frames.
    pub fn publish(&mut self, registers: &mut impl Registers) {
        if self.published != self.tail {
            self.published = self.tail;
            fence(Ordering::SeqCst); // Descriptors before the register that passes them on.
            registers.write(reg::TDT, u32::from(self.tail % RING));
        }
    }

    /// Whether the device has sat on the same frame for too long. Without a link it may.
    pub fn is_stuck(&mut self, now_ns: u64, link: bool) -> bool {
        self.reclaim();
        if self.done == self.published || !link {
            self.progress = None;
            return false;
        }
        match self.progress {
            Some((done, since)) if done == self.done => {
                now_ns.saturating_sub(since) > TRANSMIT_TIMEOUT_NS
            }
            _ => {
                self.progress = Some((self.done, now_ns));
                false
            }
        }
    }
}
