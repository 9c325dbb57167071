//! Frame buffers: halves of pages, and who has each of them.
//!
//! A frame is preceded by the header that virtio wants, in the same piece of memory: one
//! descriptor has both. Without offloads the header of a sent frame is all zero (VIRTIO 1.1,
//! §5.1.6.2), and stays so.

use alloc::vec::Vec;
use domain_api::nic::Buffer;
use domain_api::{Dma, DmaPage, Errno};
use virtio::Part;

/// Bytes of a buffer, with its header.
const BUFFER_BYTES: u16 = 2048;
/// Bytes of the header (§5.1.6).
pub const HEADER: u16 = 12;

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

/// A set of buffers, named by tokens from `first` on.
#[derive(Debug)]
pub struct Buffers {
    pages: Vec<DmaPage>,
    holders: Vec<Holder>,
    first: u16,
}

impl Buffers {
    /// Allocates `count` buffers, an even number.
    ///
    /// # Errors
    /// No memory.
    pub fn new(dma: &mut impl Dma, first: u16, count: u16) -> Result<Self, Errno> {
        let pages = (0..count / 2).map(|_| dma.alloc()).collect::<Result<_, _>>()?;
        Ok(Self { pages, holders: alloc::vec![Holder::Free; usize::from(count)], first })
    }

    /// Number of buffers.
    pub fn count(&self) -> u16 {
        u16::try_from(self.holders.len()).unwrap_or(u16::MAX)
    }

    fn offset(index: u16) -> u16 {
        index % 2 * BUFFER_BYTES
    }

    /// For the device: header and a frame of `len` bytes.
    pub fn part(&self, index: u16, len: u16, writable: bool) -> Part {
        let page = self.pages[usize::from(index / 2)].bus_address;
        let len = u32::from(HEADER) + u32::from(len);
        Part { address: page + u64::from(Self::offset(index)), len, writable }
    }

    /// Bytes of the largest frame.
    pub const fn room() -> u16 {
        BUFFER_BYTES - HEADER
    }

    /// Who has it.
    pub fn holder(&self, index: u16) -> Option<Holder> {
        self.holders.get(usize::from(index)).copied()
    }

    /// Notes who has a buffer now.
    pub fn set(&mut self, index: u16, holder: Holder) {
        self.holders[usize::from(index)] = holder;
    }

    /// Lends buffer `index` out, with `len` as its length.
    pub fn lend(&mut self, index: u16, len: u16) -> Buffer {
        self.set(index, Holder::Lent);
        Buffer {
            page: self.pages[usize::from(index / 2)].page.clone(),
            offset: Self::offset(index) + HEADER,
            len,
            token: self.first + index,
        }
    }

    /// The index of a buffer that comes back, if it was lent.
    pub fn returned(&self, buffer: &Buffer) -> Option<u16> {
        let index = buffer.token.checked_sub(self.first)?;
        (self.holder(index)? == Holder::Lent).then_some(index)
    }
}
