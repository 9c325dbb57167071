//! What a network backend needs of a network card, whatever card it is.

use shmem::Page;

/// Bytes of an Ethernet frame without FCS, at most: 14 of header, 4 of VLAN tag, 1500 of payload.
pub const MAX_FRAME: usize = 1518;

/// Room for one frame, or the frame itself, in memory that the device may reach.
#[derive(Debug)]
#[must_use = "a buffer that is dropped is lost to its card"]
pub struct Buffer {
    /// The page; shared with nobody but the device.
    pub page: Page,
    /// Where the buffer starts in the page.
    pub offset: u16,
    /// Frame: its length. Empty buffer: its capacity.
    pub len: u16,
    /// The card's own name for it.
    pub token: u16,
}

/// A network card.
///
/// Buffers belong to the card and are lent out: an empty one by [`Self::tx_buffer`], until
/// [`Self::transmit`] or [`Self::cancel`]; a full one by [`Self::receive`], until
/// [`Self::recycle`].
pub trait Nic {
    /// Its Ethernet address.
    fn mac(&self) -> [u8; 6];

    /// Whether the link is up.
    fn link_up(&self) -> bool;

    /// An empty buffer of at least [`MAX_FRAME`] bytes, or `None` while all are in use.
    fn tx_buffer(&mut self) -> Option<Buffer>;

    /// Queues the frame in `buffer`, whose `len` was set to the frame's length. The device is
    /// told by [`Self::flush`].
    fn transmit(&mut self, buffer: Buffer);

    /// Takes an unused transmit buffer back.
    fn cancel(&mut self, buffer: Buffer);

    /// Makes the device aware of queued frames and recycled buffers.
    fn flush(&mut self);

    /// The next received frame, if any. Frames with errors were dropped and counted.
    fn receive(&mut self) -> Option<Buffer>;

    /// Gives a received frame's buffer back.
    fn recycle(&mut self, buffer: Buffer);
}
