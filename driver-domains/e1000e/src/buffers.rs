//! Frame buffers: halves of pages, and who has each of them.

use alloc::vec::Vec;
use domain_api::nic::Buffer;
use domain_api::{Dma, DmaPage, Errno};

/// Bytes of a buffer; what the receiver assumes too.
pub const BUFFER_BYTES: u16 = 2048;

/// Who has a buffer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Holder {
    /// We.
    Free,
    /// The device, by a descriptor.
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

    fn offset(index: u16) -> u16 {
        index % 2 * BUFFER_BYTES
    }

    /// For the device.
    pub fn bus_address(&self, index: u16) -> u64 {
        self.pages[usize::from(index / 2)].bus_address + u64::from(Self::offset(index))
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
            offset: Self::offset(index),
            len,
            token: self.first + index,
        }
    }

    /// The index of a buffer that comes back, if it was lent.
    pub fn returned(&self, buffer: &Buffer) -> Option<u16> {
        let index = buffer.token.checked_sub(self.first)?;
        let lent = *self.holders.get(usize::from(index))? == Holder::Lent;
        lent.then_some(index)
    }

    /// Number of buffers with `holder`.
    #[cfg(test)]
    pub fn count(&self, holder: Holder) -> usize {
        self.holders.iter().filter(|h| **h == holder).count()
    }
}
