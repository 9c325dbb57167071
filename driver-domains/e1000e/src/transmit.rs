//! The transmit ring.
//!
//! ```text
//!   done ────────▶ published ────────▶ tail     slots of the ring, wrapping
//!   │ device owns  │ filled, device not told │
//! ```
//!
//! A packet is one descriptor for each of its buffers, and one in front of them when the device has
//! to be told where its headers are. It is done when its last descriptor is. There are so few
//! buffers that packets always find their slots.

use crate::descriptor::{Context, EOP, RING, RS, Ring, command};
use crate::registers as reg;
use crate::{Counters, TRANSMIT_TIMEOUT_NS, offload};
use alloc::vec::{Drain, Vec};
use card_buffers::{Part, Shape, TransmitBuffers};
use core::sync::atomic::{Ordering, fence};
use domain_api::nic::{Buffer, MAX_PACKET, Offload, Offloads, is_frame};
use domain_api::{Dma, Errno, Registers};

/// Buffers for transmission: 120 frames, or 7 of the longest packets, which take 17 each; in both cases
/// more than the wire carries in a millisecond.
pub const TRANSMIT_BUFFERS: u16 = 120;
/// First token of a transmit buffer; receive buffers are below.
pub const FIRST_TOKEN: u16 = 0x4000;
const SHAPE: Shape = Shape::page(0);
// In the worst case each buffer is a packet with a context, and head = tail means empty.
const _: () = assert!(2 * TRANSMIT_BUFFERS < RING);
const _: () = assert!(MAX_PACKET.div_ceil(SHAPE.room() as usize) <= TRANSMIT_BUFFERS as usize);

/// What a slot's descriptor is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Slot {
    /// Not of a buffer.
    Context,
    /// A packet's part in this buffer; there are more.
    Part(u16),
    /// A packet's last part.
    Last(u16),
}

/// The transmit half.
#[derive(Debug)]
pub struct Transmitter {
    ring: Ring,
    pub(crate) buffers: TransmitBuffers,
    slots: [Slot; RING as usize],
    /// Wrapping positions; a slot is a position modulo the ring.
    done: u16,
    published: u16,
    tail: u16,
    /// What the device remembers for packets whose checksum is blank.
    context: Option<Context>,
    /// The packet that is being queued.
    parts: Vec<Part>,
    /// Where `done` was, and when it was first seen there with packets under way.
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
            buffers: TransmitBuffers::new(dma, FIRST_TOKEN, TRANSMIT_BUFFERS, SHAPE)?,
            slots: [Slot::Context; RING as usize],
            done: 0,
            published: 0,
            tail: 0,
            context: None,
            parts: Vec::new(),
            progress: None,
        })
    }

    /// Where the device finds the ring.
    pub fn ring_address(&self) -> u64 {
        self.ring.bus_address()
    }

    /// Lends out buffers for `bytes`. Those of sent packets are collected only when no others are
    /// left.
    pub fn lend(&mut self, bytes: usize, buffers: &mut Vec<Buffer>) -> bool {
        if self.buffers.lend(bytes, buffers) {
            return true;
        }
        self.reclaim();
        self.buffers.lend(bytes, buffers)
    }

    /// Whether the last call of [`Self::lend`] was in vain.
    pub fn is_short(&self) -> bool {
        self.buffers.is_short()
    }

    /// Collects sent buffers if somebody waits for some; returns whether there are enough now.
    pub fn relieve(&mut self) -> bool {
        if self.is_short() {
            self.reclaim();
        }
        self.buffers.relieve()
    }

    fn slot(&self, position: u16) -> Slot {
        self.slots[usize::from(position % RING)]
    }

    /// Collects the buffers of packets that the device has sent.
    fn reclaim(&mut self) {
        while self.done != self.published {
            if let Slot::Last(index) = self.slot(self.done) {
                if !self.ring.sent(self.done) {
                    return;
                }
                self.buffers.release(index);
                self.done = self.done.wrapping_add(1);
            } else if !self.reclaim_parts() {
                return;
            }
        }
    }

    /// Collects the oldest packet up to its last part, if the device has sent it.
    fn reclaim_parts(&mut self) -> bool {
        let mut last = self.done;
        while !matches!(self.slot(last), Slot::Last(_)) {
            last = last.wrapping_add(1);
        }
        let sent = self.ring.sent(last);
        while sent && self.done != last {
            if let Slot::Part(index) = self.slot(self.done) {
                self.buffers.release(index);
            }
            self.done = self.done.wrapping_add(1);
        }
        sent
    }

    /// Takes an unused buffer back.
    pub fn cancel(&mut self, buffer: &Buffer, counters: &mut Counters) {
        counters.bad_buffers += u64::from(!self.buffers.cancel(buffer));
    }

    /// Queues a packet. `offers` is what the device does at the moment.
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
        } else if self.prepare(&offload, offers) {
            self.send_parts(&offload);
            counters.queued += 1;
        } else {
            self.buffers.release_packet(&mut self.parts);
            counters.refused += 1;
        }
    }

    /// Queues a finished frame.
    fn send_frame(&mut self, buffer: &Buffer, counters: &mut Counters) {
        let Some(index) = self.buffers.take(buffer) else {
            counters.bad_buffers += 1;
            return;
        };
        if !is_frame(buffer.len.into()) {
            counters.refused += 1;
            self.buffers.release(index);
            return;
        }
        let address = self.buffers.buffers().content_address(index);
        self.ring.send(self.tail, address, buffer.len, command(&Offload::Nothing) | EOP | RS);
        self.advance(Slot::Last(index));
        counters.queued += 1;
    }

    /// Checks the packet in `parts`, and prepares its headers. False when the device cannot do it.
    fn prepare(&mut self, offload: &Offload, offers: Offloads) -> bool {
        let [first, ..] = *self.parts else { return false };
        let bytes = self.parts.iter().map(|part| usize::from(part.len)).sum();
        self.buffers.are_filled(&self.parts)
            && offload.is_possible(offers, first.len, bytes)
            && match offload {
                Offload::Segment { headers, .. } => {
                    let (page, at) = self.buffers.buffers().content(first.index);
                    offload::prepare(page, at, headers)
                }
                Offload::Nothing | Offload::Checksum(_) => true,
            }
    }

    /// Queues the packet in `parts`.
    fn send_parts(&mut self, offload: &Offload) {
        match offload {
            Offload::Nothing => {}
            Offload::Checksum(headers) => {
                let context = Some(Context::checksum(headers));
                if self.context != context {
                    self.context = context;
                    self.send_context(Context::checksum(headers));
                }
            }
            Offload::Segment { headers, mss } => {
                let bytes: u32 = self.parts.iter().map(|part| u32::from(part.len)).sum();
                // The device counts in it, so that it is good for one packet.
                self.context = None;
                self.send_context(Context::segment(headers, *mss, bytes - u32::from(headers.end)));
            }
        }
        let command = command(offload);
        let count = self.parts.len();
        for at in 0..count {
            let part = self.parts[at];
            let (end, slot) = if at + 1 == count {
                (EOP | RS, Slot::Last(part.index))
            } else {
                (0, Slot::Part(part.index))
            };
            let address = self.buffers.buffers().content_address(part.index);
            self.ring.send(self.tail, address, part.len, command | end);
            self.advance(slot);
        }
        self.parts.clear();
    }

    fn send_context(&mut self, context: Context) {
        self.ring.set_context(self.tail, context);
        self.advance(Slot::Context);
    }

    fn advance(&mut self, slot: Slot) {
        self.slots[usize::from(self.tail % RING)] = slot;
        self.tail = self.tail.wrapping_add(1);
    }

    /// Tells the device of queued packets.
    pub fn publish(&mut self, registers: &mut impl Registers) {
        if self.published != self.tail {
            self.published = self.tail;
            fence(Ordering::SeqCst); // Descriptors before the register that passes them on.
            registers.write(reg::TDT, u32::from(self.tail % RING));
        }
    }

    /// Whether the device has sat on the same packet for too long. Without a link it may.
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
