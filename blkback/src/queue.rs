//! One queue: a ring, and the window of its requests that are under way.
//!
//! Requests are numbered in ring order. Four counters run over them, each behind the next:
//!
//! ```text
//!   answered ──── submitted ──── prepared ──── taken
//!       │  with the disk  │ mapped, wait  │ wait for │
//!       │   or done       │ for the disk  │ mapping  │
//! ```
//!
//! The disk may be done in any order; a request that is done stays in the window until all in
//! front of it are, so that responses come in ring order (`xen-abi.md` §10.2, R3).

use crate::Env;
use crate::grants::Mappings;
use crate::request::{Decoded, Part, SLOT_32, Wish, widen};
use crate::split::Cursor;
use alloc::vec::Vec;
use domain_api::{EventPort, MappedDmaGrant, MappedGrant};
use shmem::PeerError;
use shmem::ring::BackRing;
use xen_abi::blkif::{RSP_OKAY, Request, Response};

/// A ring in one of the two layouts of x86.
#[derive(Debug)]
pub enum Ring {
    /// `x86_64-abi`.
    Wide(BackRing<Request, Response>),
    /// `x86_32-abi`: the same fields without padding.
    Narrow(BackRing<[u8; SLOT_32], [u8; 12]>),
}

impl Ring {
    /// Number of slots.
    pub fn len(&self) -> u32 {
        match self {
            Self::Wide(ring) => ring.len(),
            Self::Narrow(ring) => ring.len(),
        }
    }

    /// Requests that come out of a dead incarnation's table.
    pub fn replayed(&self) -> u32 {
        match self {
            Self::Wide(ring) => ring.replayed(),
            Self::Narrow(ring) => ring.replayed(),
        }
    }

    /// Takes the next request; it is in the in-flight table then.
    #[inline]
    pub fn take(&mut self) -> Result<Option<Request>, PeerError> {
        match self {
            Self::Wide(ring) => ring.take(),
            Self::Narrow(ring) => Ok(ring.take()?.as_ref().map(widen)),
        }
    }

    /// Answers the oldest request.
    #[inline]
    fn respond(&mut self, id: u64, operation: u8, status: i16) {
        match self {
            Self::Wide(ring) => ring.respond(&Response { id, operation, pad: 0, status, pad2: 0 }),
            Self::Narrow(ring) => {
                let mut bytes = [0; 12];
                bytes[..8].copy_from_slice(&id.to_le_bytes());
                bytes[8] = operation;
                bytes[10..].copy_from_slice(&status.to_le_bytes());
                ring.respond(&bytes);
            }
        }
    }

    fn publish(&mut self) -> bool {
        match self {
            Self::Wide(ring) => ring.publish(),
            Self::Narrow(ring) => ring.publish(),
        }
    }

    /// Asks for an event with the next request. True: there is one.
    pub fn arm(&mut self) -> bool {
        match self {
            Self::Wide(ring) => ring.arm(),
            Self::Narrow(ring) => ring.arm(),
        }
    }
}

/// How far a request is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    /// It is checked; its pages are not mapped yet.
    Taken,
    /// The disk may have it.
    Ready,
    /// The disk has all of it that it will get.
    Submitted,
    /// It can be answered.
    Done,
}

/// A request under way. Slots are used again and again, so that a request costs no allocation.
#[derive(Debug)]
pub struct Slot {
    /// Echoed.
    pub id: u64,
    /// As the response names it.
    pub operation: u8,
    /// The answer so far; the first error stays.
    pub status: i16,
    /// What is wanted.
    pub wish: Wish,
    /// How far it is.
    pub phase: Phase,
    /// Where its data are.
    pub parts: Vec<Part>,
    /// What of the data the disk does not have yet.
    pub cursor: Cursor,
    /// Sectors, of whatever is wanted, that the disk already has.
    pub submitted: u64,
    /// Requests of the disk that are not completed.
    pub outstanding: u16,
}

impl Slot {
    fn new() -> Self {
        Self {
            id: 0,
            operation: 0,
            status: RSP_OKAY,
            wish: Wish::Flush,
            phase: Phase::Done,
            parts: Vec::with_capacity(xen_abi::blkif::MAX_SEGMENTS),
            cursor: Cursor::default(),
            submitted: 0,
            outstanding: 0,
        }
    }

    /// Becomes a request that was just taken.
    #[inline]
    pub fn start(&mut self, decoded: Decoded) {
        let Decoded { id, operation, wish } = decoded;
        (self.id, self.operation, self.wish) = (id, operation, wish);
        (self.status, self.submitted, self.cursor) = (RSP_OKAY, 0, Cursor::default());
        match wish {
            Wish::Refused(status) => self.refuse(status),
            Wish::Transfer { .. } | Wish::Indirect { .. } => self.phase = Phase::Taken,
            Wish::Flush | Wish::Discard { .. } => self.phase = Phase::Ready,
        }
    }

    /// Ends it with an error before any of its pages was mapped.
    pub fn refuse(&mut self, status: i16) {
        self.parts.clear();
        self.fail(status);
    }

    /// Ends it with an error. What the disk has of it still comes back.
    pub fn fail(&mut self, status: i16) {
        if self.status == RSP_OKAY {
            self.status = status;
        }
        self.phase = Phase::Submitted;
        self.settle();
    }

    /// Whether the disk has all of it.
    #[inline]
    pub fn is_submitted(&self) -> bool {
        match self.wish {
            Wish::Transfer { .. } => self.cursor.is_end(&self.parts),
            Wish::Discard { sectors, .. } => self.submitted == sectors,
            _ => self.outstanding > 0,
        }
    }

    /// The disk has all of it.
    #[inline]
    pub fn sent(&mut self) {
        self.phase = Phase::Submitted;
        self.settle();
    }

    /// One of its requests of the disk ended.
    #[inline]
    pub fn completed(&mut self, status: i16) {
        self.outstanding -= 1;
        if status == RSP_OKAY {
            self.settle();
        } else {
            self.fail(status);
        }
    }

    fn settle(&mut self) {
        if self.phase == Phase::Submitted && self.outstanding == 0 {
            self.phase = Phase::Done;
        }
    }
}

/// A queue of a connected vbd.
#[derive(Debug)]
pub struct Queue {
    /// The ring; `None` once the connection has ended.
    pub ring: Option<Ring>,
    /// The ring's pages.
    maps: Vec<MappedGrant>,
    /// Our end of the event channel.
    pub port: EventPort,
    /// There may be requests in the ring.
    pub ready: bool,
    /// The frontend has to be told once, whatever its event index says.
    greet: bool,
    /// Pages that are mapped for requests.
    pub mappings: Mappings,
    slots: Vec<Slot>,
    /// As in the module's description.
    pub submitted: u32,
    /// As in the module's description.
    pub prepared: u32,
    /// As in the module's description.
    pub taken: u32,
    answered: u32,
    /// Requests below this are done and their pages are given back: answer them.
    finished: u32,
}

impl Queue {
    /// A queue that is attached to its ring.
    pub fn new(ring: Ring, maps: Vec<MappedGrant>, port: EventPort) -> Self {
        let slots = (0..ring.len()).map(|_| Slot::new()).collect();
        Self {
            ring: Some(ring),
            maps,
            port,
            ready: true,
            greet: true,
            mappings: Mappings::new(),
            slots,
            submitted: 0,
            prepared: 0,
            taken: 0,
            answered: 0,
            finished: 0,
        }
    }

    /// The slot of a request in the window.
    #[inline]
    pub fn slot(&mut self, index: u32) -> &mut Slot {
        let mask = self.slots.len() - 1;
        &mut self.slots[index as usize & mask]
    }

    /// The slot of a request, and the mapped pages.
    #[inline]
    pub fn slot_and_mappings(&mut self, index: u32) -> (&mut Slot, &mut Mappings) {
        let mask = self.slots.len() - 1;
        (&mut self.slots[index as usize & mask], &mut self.mappings)
    }

    /// The ring, and the slot that the next request goes into.
    pub fn ring_and_next(&mut self) -> Option<(&mut Ring, &mut Slot)> {
        let mask = self.slots.len() - 1;
        Some((self.ring.as_mut()?, &mut self.slots[self.taken as usize & mask]))
    }

    /// Whether requests wait that were taken.
    #[inline]
    pub fn has_backlog(&self) -> bool {
        self.submitted != self.taken
    }

    /// Finds the requests that are done and have none in front of them that is not, and gives
    /// their pages back: those that do not stay mapped are added to `unmap`.
    #[inline]
    pub fn finish(&mut self, unmap: &mut Vec<MappedDmaGrant>) {
        let mask = self.slots.len() - 1;
        while self.finished != self.submitted {
            let slot = &mut self.slots[self.finished as usize & mask];
            if slot.phase != Phase::Done {
                return;
            }
            for part in slot.parts.drain(..) {
                self.mappings.release(part.mapping, unmap);
            }
            self.finished = self.finished.wrapping_add(1);
        }
    }

    /// Answers what is finished, now that its pages are unmapped, and tells the frontend if it
    /// wants to be told. `count` is called for each request.
    #[inline]
    pub fn answer<E: Env>(&mut self, env: &mut E, mut count: impl FnMut(&Slot)) {
        let mask = self.slots.len() - 1;
        let Some(ring) = &mut self.ring else { return };
        while self.answered != self.finished {
            let slot = &self.slots[self.answered as usize & mask];
            ring.respond(slot.id, slot.operation, slot.status);
            count(slot);
            self.answered = self.answered.wrapping_add(1);
        }
        if ring.publish() | core::mem::take(&mut self.greet) {
            env.notify(self.port);
        }
    }

    /// Lets go of the ring and of the event channel. Pages that the disk uses stay mapped.
    pub fn detach<E: Env>(&mut self, env: &mut E) {
        if self.ring.take().is_none() {
            return;
        }
        for mapping in self.maps.drain(..) {
            env.unmap(mapping);
        }
        env.close(self.port);
        self.ready = false;
    }
}
