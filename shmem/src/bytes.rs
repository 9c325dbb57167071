//! Two byte streams in one page: the xenstore ring and the paravirtual console.
//!
//! Each direction is a buffer whose size is a power of two, a producer's and a consumer's
//! counter, running freely modulo 2^32. Unlike request rings there are no event indices: whoever
//! moves a counter tells the other side.
//!
//! Order: the producer writes bytes, then stores its counter with `Release`; the consumer loads
//! it with `Acquire`, reads bytes, then stores its own counter with `Release`, which the producer
//! loads with `Acquire` before it writes over them.

use crate::page::Page;
use crate::sync::Ordering::{Acquire, Release};
use crate::{PeerError, check_counter};
use xen_abi::xenstore;

/// Where one direction is in the page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Direction {
    /// Offset of the buffer.
    pub buffer: usize,
    /// Its size: a power of two.
    pub size: usize,
    /// Offset of the producer's counter.
    pub prod: usize,
    /// Offset of the consumer's counter.
    pub cons: usize,
}

/// Xenstore, from a domain to the store.
pub const XENSTORE_REQUESTS: Direction = Direction {
    buffer: xenstore::REQ,
    size: xenstore::RING_SIZE,
    prod: xenstore::REQ_PROD,
    cons: xenstore::REQ_CONS,
};

/// Xenstore, from the store to a domain.
pub const XENSTORE_REPLIES: Direction = Direction {
    buffer: xenstore::RSP,
    size: xenstore::RING_SIZE,
    prod: xenstore::RSP_PROD,
    cons: xenstore::RSP_CONS,
};

/// Console, to the guest (`xencons_interface`, `xen/include/public/io/console.h`).
pub const CONSOLE_IN: Direction = Direction { buffer: 0, size: 1024, prod: 3076, cons: 3072 };

/// Console, from the guest.
pub const CONSOLE_OUT: Direction = Direction { buffer: 1024, size: 2048, prod: 3084, cons: 3080 };

/// One side's view of both directions.
#[derive(Debug)]
pub struct ByteRing {
    page: Page,
    outgoing: Direction,
    incoming: Direction,
    /// Our counter of `outgoing`.
    produced: u32,
    /// Our counter of `incoming`.
    consumed: u32,
}

impl ByteRing {
    /// Goes on at the counters found in `page`, which was zeroed or used by this side before.
    ///
    /// # Panics
    /// When a size is no power of two.
    #[must_use]
    pub fn attach(page: Page, outgoing: Direction, incoming: Direction) -> Self {
        assert!(outgoing.size.is_power_of_two() && incoming.size.is_power_of_two());
        let produced = page.u32(outgoing.prod).load(Acquire);
        let consumed = page.u32(incoming.cons).load(Acquire);
        Self { page, outgoing, incoming, produced, consumed }
    }

    /// A domain's side of its xenstore ring.
    #[must_use]
    pub fn xenstore_client(page: Page) -> Self {
        Self::attach(page, XENSTORE_REQUESTS, XENSTORE_REPLIES)
    }

    /// The store's side of a domain's xenstore ring.
    #[must_use]
    pub fn xenstore_server(page: Page) -> Self {
        Self::attach(page, XENSTORE_REPLIES, XENSTORE_REQUESTS)
    }

    /// Bytes that can be written now.
    ///
    /// # Errors
    /// The peer's counter is impossible.
    pub fn writable(&self) -> Result<usize, PeerError> {
        let size = to_u32(self.outgoing.size);
        let read = self.page.u32(self.outgoing.cons).load(Acquire);
        check_counter(read, self.produced.wrapping_sub(size), self.produced)?;
        Ok((size - self.produced.wrapping_sub(read)) as usize)
    }

    /// Bytes that can be read now.
    ///
    /// # Errors
    /// The peer's counter is impossible.
    pub fn readable(&self) -> Result<usize, PeerError> {
        let size = to_u32(self.incoming.size);
        let written = self.page.u32(self.incoming.prod).load(Acquire);
        check_counter(written, self.consumed, self.consumed.wrapping_add(size))?;
        Ok(written.wrapping_sub(self.consumed) as usize)
    }

    /// Writes as many bytes as there is room for, and returns how many. Unless that is 0, the
    /// peer must be told.
    ///
    /// # Errors
    /// The peer's counter is impossible.
    pub fn write(&mut self, bytes: &[u8]) -> Result<usize, PeerError> {
        let count = self.writable()?.min(bytes.len());
        let at = self.produced as usize & (self.outgoing.size - 1);
        let (head, tail) = bytes[..count].split_at(count.min(self.outgoing.size - at));
        self.page.write(self.outgoing.buffer + at, head);
        self.page.write(self.outgoing.buffer, tail);
        self.produced = self.produced.wrapping_add(to_u32(count));
        self.page.u32(self.outgoing.prod).store(self.produced, Release);
        Ok(count)
    }

    /// Reads as many bytes as there are, up to `buffer.len()`, and returns how many. Unless that
    /// is 0, the peer must be told.
    ///
    /// # Errors
    /// The peer's counter is impossible.
    pub fn read(&mut self, buffer: &mut [u8]) -> Result<usize, PeerError> {
        let count = self.readable()?.min(buffer.len());
        let at = self.consumed as usize & (self.incoming.size - 1);
        let (head, tail) = buffer[..count].split_at_mut(count.min(self.incoming.size - at));
        self.page.read(self.incoming.buffer + at, head);
        self.page.read(self.incoming.buffer, tail);
        self.consumed = self.consumed.wrapping_add(to_u32(count));
        self.page.u32(self.incoming.cons).store(self.consumed, Release);
        Ok(count)
    }

    /// The page, for what it holds beside the streams.
    #[must_use]
    pub fn page(&self) -> &Page {
        &self.page
    }
}

#[expect(clippy::cast_possible_truncation, reason = "sizes of parts of a page")]
fn to_u32(size: usize) -> u32 {
    size as u32
}
