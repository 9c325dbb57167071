//! The buffers of a network card: memory that the card reaches, cut into pieces of one size, and who
//! has each piece.
//!
//! Drivers of network cards share this. When the device is done with a buffer is theirs to find
//! out; what is in it is nobody's matter here.
//!
//! Receive buffers, [`Buffers`], are halves of pages: a frame fits. Transmit buffers,
//! [`TransmitBuffers`], are whole pages, as a packet that the card shall cut is up to 64 KiB: of pages it
//! takes 16 or 17, and as many copies from the guest's pages; of halves twice as many. A frame
//! then wastes more than half of a page, but memory is not what limits a card's queue: what is
//! under way should not be more than the wire carries in a few milliseconds.

#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

mod transmit;

#[cfg(test)]
mod tests;

use alloc::vec::Vec;
use domain_api::nic::{Buffer, MAX_FRAME, MAX_HEADERS};
use domain_api::{Dma, DmaPage, Errno, Page};

pub use transmit::{Part, TransmitBuffers};

const PAGE_BYTES: u16 = 4096;

/// Who has a buffer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Holder {
    /// We.
    Free,
    /// The device.
    Device,
    /// The layer above.
    Lent,
}

/// How pages are cut into buffers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shape {
    bytes: u16,
    headroom: u16,
}

impl Shape {
    /// Two in a page, each with `headroom` bytes in front of its content for what the device wants
    /// there. Panics, at compile time, unless a frame fits.
    #[must_use]
    pub const fn half_page(headroom: u16) -> Self {
        Self::new(PAGE_BYTES / 2, headroom)
    }

    /// The same with one in a page.
    #[must_use]
    pub const fn page(headroom: u16) -> Self {
        Self::new(PAGE_BYTES, headroom)
    }

    const fn new(bytes: u16, headroom: u16) -> Self {
        let shape = Self { bytes, headroom };
        assert!(shape.room() as usize >= MAX_FRAME && shape.room() as usize >= MAX_HEADERS);
        shape
    }

    /// Bytes of content that fit.
    #[must_use]
    pub const fn room(self) -> u16 {
        self.bytes - self.headroom
    }
}

/// A set of buffers, named by tokens from `first` on.
#[derive(Debug)]
pub struct Buffers {
    places: Vec<Place>,
    first: u16,
    headroom: u16,
}

/// A buffer.
#[derive(Debug)]
struct Place {
    /// The page, and where its content starts in the memory of the device.
    page: Page,
    content: u64,
    /// Where it starts in the page.
    offset: u16,
    holder: Holder,
}

impl Buffers {
    /// Allocates `count` buffers; all are free.
    ///
    /// # Errors
    /// No memory.
    pub fn new(dma: &mut impl Dma, first: u16, count: u16, shape: Shape) -> Result<Self, Errno> {
        let Shape { bytes, headroom } = shape;
        let mut places = Vec::with_capacity(count.into());
        for _ in 0..count.div_ceil(PAGE_BYTES / bytes) {
            let DmaPage { page, bus_address } = dma.alloc()?;
            let left = usize::from(count) - places.len();
            let starts = (0..PAGE_BYTES).step_by(bytes.into()).take(left);
            places.extend(starts.map(|start| Place {
                page: page.clone(),
                content: bus_address + u64::from(start + headroom),
                offset: start + headroom,
                holder: Holder::Free,
            }));
        }
        Ok(Self { places, first, headroom })
    }

    /// Number of buffers.
    #[must_use]
    pub fn count(&self) -> u16 {
        u16::try_from(self.places.len()).unwrap_or(u16::MAX)
    }

    /// Number of buffers that `holder` has.
    #[must_use]
    pub fn held(&self, holder: Holder) -> usize {
        self.places.iter().filter(|place| place.holder == holder).count()
    }

    /// The page of a buffer, and where its content starts there.
    #[must_use]
    pub fn content(&self, index: u16) -> (&Page, usize) {
        let place = &self.places[usize::from(index)];
        (&place.page, place.offset.into())
    }

    /// Where the device finds a buffer's headroom; its content follows.
    #[must_use]
    pub fn headroom_address(&self, index: u16) -> u64 {
        self.content_address(index) - u64::from(self.headroom)
    }

    /// Where the device finds a buffer's content.
    #[must_use]
    pub fn content_address(&self, index: u16) -> u64 {
        self.places[usize::from(index)].content
    }

    /// The page of a buffer, and where the `bytes` at the start of its headroom are.
    fn headroom(&self, index: u16, bytes: usize) -> (&Page, usize) {
        assert!(bytes <= usize::from(self.headroom));
        let (page, at) = self.content(index);
        (page, at - usize::from(self.headroom))
    }

    /// Reads from a buffer's headroom.
    ///
    /// # Panics
    /// When `bytes` are more than it has.
    pub fn read_headroom(&self, index: u16, bytes: &mut [u8]) {
        let (page, at) = self.headroom(index, bytes.len());
        page.read(at, bytes);
    }

    /// Writes to a buffer's headroom.
    ///
    /// # Panics
    /// When `bytes` are more than it has.
    pub fn write_headroom(&self, index: u16, bytes: &[u8]) {
        let (page, at) = self.headroom(index, bytes.len());
        page.write(at, bytes);
    }

    /// Notes who has a buffer now.
    pub fn set(&mut self, index: u16, holder: Holder) {
        self.places[usize::from(index)].holder = holder;
    }

    /// Lends a buffer out, with `len` as its length.
    pub fn lend(&mut self, index: u16, len: u16) -> Buffer {
        let place = &mut self.places[usize::from(index)];
        place.holder = Holder::Lent;
        Buffer { page: place.page.clone(), offset: place.offset, len, token: self.first + index }
    }

    /// The index of a buffer that comes back, if it was lent.
    #[must_use]
    pub fn returned(&self, buffer: &Buffer) -> Option<u16> {
        let index = buffer.token.checked_sub(self.first)?;
        let lent = self.places.get(usize::from(index))?.holder == Holder::Lent;
        lent.then_some(index)
    }
}
