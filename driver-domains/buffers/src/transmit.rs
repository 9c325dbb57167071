//! Transmit buffers: the free ones, and how many of them somebody waits for.

use crate::{Buffers, Holder, Shape};
use alloc::vec::{Drain, Vec};
use domain_api::nic::Buffer;
use domain_api::{Dma, Errno};

/// A buffer with a part of a packet, that the device is about to get.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Part {
    /// Which.
    pub index: u16,
    /// Bytes of content, as the layer above says.
    pub len: u16,
}

/// A set of transmit buffers.
#[derive(Debug)]
pub struct TransmitBuffers {
    buffers: Buffers,
    free: Vec<u16>,
    room: u16,
    /// How many somebody who got none waits for; 0: nobody does.
    wanted: usize,
}

impl TransmitBuffers {
    /// Allocates `count` buffers, named by tokens from `first` on.
    ///
    /// # Errors
    /// No memory.
    pub fn new(dma: &mut impl Dma, first: u16, count: u16, shape: Shape) -> Result<Self, Errno> {
        Ok(Self {
            buffers: Buffers::new(dma, first, count, shape)?,
            free: (0..count).rev().collect(),
            room: shape.room(),
            wanted: 0,
        })
    }

    /// The buffers themselves.
    #[must_use]
    pub fn buffers(&self) -> &Buffers {
        &self.buffers
    }

    /// How many buffers `bytes` take.
    fn needed(&self, bytes: usize) -> usize {
        let room = usize::from(self.room);
        if bytes <= room { 1 } else { bytes.div_ceil(room) }
    }

    /// Whether `bytes` fit when all buffers are free.
    #[must_use]
    pub fn can_hold(&self, bytes: usize) -> bool {
        self.needed(bytes) <= usize::from(self.buffers.count())
    }

    /// Lends out buffers for `bytes`, or none, and notes how many were wanted. The caller then
    /// looks for buffers that the device is done with, and tries again.
    pub fn lend(&mut self, bytes: usize, lent: &mut Vec<Buffer>) -> bool {
        if bytes <= usize::from(self.room)
            && let Some(index) = self.free.pop()
        {
            self.wanted = 0;
            lent.push(self.buffers.lend(index, self.room));
            return true;
        }
        self.lend_several(bytes, lent)
    }

    #[inline(never)]
    fn lend_several(&mut self, bytes: usize, lent: &mut Vec<Buffer>) -> bool {
        let needed = self.needed(bytes);
        let Some(rest) = self.free.len().checked_sub(needed) else {
            self.wanted = needed;
            return false;
        };
        self.wanted = 0;
        for index in self.free.drain(rest..) {
            lent.push(self.buffers.lend(index, self.room));
        }
        true
    }

    /// Whether the last [`Self::lend`] was in vain.
    #[must_use]
    pub fn is_short(&self) -> bool {
        self.wanted != 0
    }

    /// Whether somebody waited and need not any longer.
    pub fn relieve(&mut self) -> bool {
        let relieved = self.is_short() && self.wanted <= self.free.len();
        if relieved {
            self.wanted = 0;
        }
        relieved
    }

    /// Takes a buffer for the device, if it was lent.
    pub fn take(&mut self, buffer: &Buffer) -> Option<u16> {
        let index = self.buffers.returned(buffer)?;
        self.buffers.set(index, Holder::Device);
        Some(index)
    }

    /// Takes a whole packet for the device, as [`Self::take`] does, into `parts`, which is empty.
    /// False when there is nothing, or any of it was not lent; then the rest is free now, and
    /// `parts` empty.
    pub fn take_packet(&mut self, packet: Drain<'_, Buffer>, parts: &mut Vec<Part>) -> bool {
        let mut good = packet.len() != 0;
        for buffer in packet {
            match self.take(&buffer) {
                Some(index) => parts.push(Part { index, len: buffer.len }),
                None => good = false,
            }
        }
        if !good {
            self.release_packet(parts);
        }
        good
    }

    /// Whether each of `parts` has something in it, and not more than fits.
    #[must_use]
    pub fn are_filled(&self, parts: &[Part]) -> bool {
        parts.iter().all(|part| (1..=self.room).contains(&part.len))
    }

    /// Takes back what [`Self::take_packet`] took, and empties `parts`.
    pub fn release_packet(&mut self, parts: &mut Vec<Part>) {
        parts.drain(..).for_each(|part| self.release(part.index));
    }

    /// Takes back a buffer that the device is done with.
    pub fn release(&mut self, index: u16) {
        self.buffers.set(index, Holder::Free);
        self.free.push(index);
    }

    /// Takes back an unused buffer. False when it was not lent.
    pub fn cancel(&mut self, buffer: &Buffer) -> bool {
        let index = self.buffers.returned(buffer);
        index.into_iter().for_each(|index| self.release(index));
        index.is_some()
    }
}
