//! The transmit queue.
//!
//! A packet is a chain with one descriptor for each of its buffers, the first of which has the
//! header too. The chain is named by its first buffer; where the packet goes on, and whether its
//! header has to be cleared before the buffer serves again, is noted there. Of a plain frame
//! nothing is noted, and its header is never written.

use crate::Counters;
use crate::header::{HEADER, PLAIN, outgoing};
use alloc::vec;
use alloc::vec::{Drain, Vec};
use card_buffers::{Buffers, Part, Shape, TransmitBuffers};
use domain_api::nic::{Buffer, MAX_PACKET, Offload, Offloads, is_frame};
use domain_api::{Dma, Errno};
use virtio::Queue;

/// Most buffers: 120 frames, or 7 of the longest packets.
const MOST_BUFFERS: u16 = 120;
/// First token of a transmit buffer; receive buffers are below.
const FIRST_TOKEN: u16 = 0x8000;
const SHAPE: Shape = Shape::page(HEADER);

/// What is noted of a buffer that the device has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Note {
    /// It is a plain frame, or the last part of a packet.
    Nothing,
    /// Its header is not plain.
    Header,
    /// The packet goes on in another buffer.
    Next { buffer: u16, header: bool },
}

/// The transmit half.
#[derive(Debug)]
pub struct Transmitter {
    queue: Queue,
    buffers: TransmitBuffers,
    /// For each buffer.
    notes: Vec<Note>,
    /// The packet that is being queued.
    parts: Vec<Part>,
    /// Packets that came back.
    sent: u64,
}

impl Transmitter {
    /// Allocates buffers for `queue`.
    ///
    /// # Errors
    /// No memory.
    pub fn new(queue: Queue, dma: &mut impl Dma) -> Result<Self, Errno> {
        // There is a descriptor for each buffer.
        let count = queue.size().min(MOST_BUFFERS);
        let mut transmitter = Self {
            queue,
            buffers: TransmitBuffers::new(dma, FIRST_TOKEN, count, SHAPE)?,
            notes: vec![Note::Nothing; count.into()],
            parts: Vec::new(),
            sent: 0,
        };
        transmitter.queue.disarm();
        Ok(transmitter)
    }

    /// Whether the longest packets find room when all buffers are free.
    pub fn can_hold_packets(&self) -> bool {
        self.buffers.can_hold(MAX_PACKET)
    }

    /// Packets that came back so far.
    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// Whether the device has nothing.
    pub fn is_idle(&self) -> bool {
        self.queue.free() == self.queue.size()
    }

    /// Whether the device returned what it did not have.
    pub fn is_broken(&self) -> bool {
        self.queue.is_broken()
    }

    /// Lends out buffers for `bytes`. Those of sent packets are collected only when no others are
    /// left.
    pub fn lend(&mut self, bytes: usize, buffers: &mut Vec<Buffer>) -> bool {
        let was_short = self.buffers.is_short();
        let lent = self.buffers.lend(bytes, buffers) || {
            self.collect();
            self.buffers.lend(bytes, buffers)
        };
        if was_short && lent {
            self.queue.disarm();
        }
        lent
    }

    /// Asks for an interrupt, if somebody waits for buffers. Returns whether there are enough of
    /// them already.
    pub fn arm(&mut self) -> bool {
        while self.buffers.is_short() && self.queue.arm() {
            self.collect();
            if self.buffers.relieve() {
                self.queue.disarm();
                return true;
            }
        }
        false
    }

    /// Takes back the buffers of sent packets.
    pub fn collect(&mut self) {
        while let Some((mut index, _)) = self.queue.take() {
            self.sent += 1;
            while let Some(next) = self.release(index) {
                index = next;
            }
        }
    }

    /// Takes back a buffer, and returns the next one of its packet.
    fn release(&mut self, index: u16) -> Option<u16> {
        let note = core::mem::replace(&mut self.notes[usize::from(index)], Note::Nothing);
        let (next, header) = match note {
            Note::Nothing => (None, false),
            Note::Header => (None, true),
            Note::Next { buffer, header } => (Some(buffer), header),
        };
        if header {
            self.buffers.buffers().write_headroom(index, &PLAIN);
        }
        self.buffers.release(index);
        next
    }

    /// Takes an unused buffer back.
    pub fn cancel(&mut self, buffer: &Buffer, counters: &mut Counters) {
        counters.bad_buffers += u64::from(!self.buffers.cancel(buffer));
    }

    /// Queues a packet. `offers` is what the device does.
    pub fn send(
        &mut self,
        packet: Drain<'_, Buffer>,
        offload: Offload,
        offers: Offloads,
        counters: &mut Counters,
    ) {
        if let ([frame], Offload::Nothing) = (packet.as_slice(), offload) {
            self.send_frame(frame, counters);
        } else {
            self.send_packet(packet, offload, offers, counters);
        }
    }

    /// Queues a finished frame.
    fn send_frame(&mut self, buffer: &Buffer, counters: &mut Counters) {
        let Some(index) = self.buffers.take(buffer) else {
            counters.bad_buffers += 1;
            return;
        };
        let part = descriptor(self.buffers.buffers(), Part { index, len: buffer.len }, HEADER);
        if is_frame(buffer.len.into()) && self.queue.add(index, [part].into_iter()) {
            counters.queued += 1;
        } else {
            counters.refused += 1;
            self.buffers.release(index);
        }
    }

    /// Queues a packet of which something is left to do, or of several buffers. Most are not, and
    /// need not pay for this.
    #[inline(never)]
    fn send_packet(
        &mut self,
        packet: Drain<'_, Buffer>,
        offload: Offload,
        offers: Offloads,
        counters: &mut Counters,
    ) {
        if !self.buffers.take_packet(packet, &mut self.parts) {
            counters.bad_buffers += 1;
            return;
        }
        let first = self.parts[0];
        let bytes = self.parts.iter().map(|part| usize::from(part.len)).sum();
        let good = self.buffers.are_filled(&self.parts)
            && offload.is_possible(offers, first.len, bytes)
            && self.queue.add(
                first.index,
                self.parts.iter().map(|part| {
                    let headroom = if *part == first { HEADER } else { 0 };
                    descriptor(self.buffers.buffers(), *part, headroom)
                }),
            );
        if good {
            self.note(offload);
            counters.queued += 1;
        } else {
            self.buffers.release_packet(&mut self.parts);
            counters.refused += 1;
        }
    }

    /// Writes the header of the packet in `parts`, and notes what it is.
    fn note(&mut self, offload: Offload) {
        let header = outgoing(&offload);
        let mut marked = header != PLAIN;
        if marked {
            self.buffers.buffers().write_headroom(self.parts[0].index, &header);
        }
        for (at, part) in self.parts.iter().enumerate() {
            self.notes[usize::from(part.index)] = match self.parts.get(at + 1) {
                Some(next) => Note::Next { buffer: next.index, header: marked },
                None if marked => Note::Header,
                None => Note::Nothing,
            };
            marked = false;
        }
        self.parts.clear();
    }

    /// Lets the device see what was queued. Returns whether it wants to be notified.
    pub fn publish(&mut self) -> bool {
        self.queue.publish()
    }
}

/// For the device: a buffer's content, with the last `headroom` bytes before it.
fn descriptor(buffers: &Buffers, part: Part, headroom: u16) -> virtio::Part {
    virtio::Part {
        address: buffers.content_address(part.index) - u64::from(headroom),
        len: u32::from(headroom) + u32::from(part.len),
        writable: false,
    }
}
