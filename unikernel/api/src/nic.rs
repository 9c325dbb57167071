//! What a network backend needs of a network card, whatever card it is.
//!
//! A packet lies in buffers of its card. Most packets are one frame in one buffer. A card may offer to
//! finish what the sender left undone ([`Offloads`]): the checksum of TCP and UDP, or the cutting
//! of a long TCP packet into frames. What is left undone, a packet's [`Offload`] says.
//!
//! # Checksums left blank
//!
//! A *blank* checksum's field holds the sum over the pseudo header, that is, over addresses, length and
//! protocol, folded to 16 bits and not complemented. The checksum is finished by adding up everything
//! from the beginning of the TCP or UDP header on, that field included, and storing the complement
//! there. Linux, Xen (`NETTXF_csum_blank`) and virtio (`VIRTIO_NET_HDR_F_NEEDS_CSUM`) agree on
//! this, so that such a packet can be passed on as it is. In a packet that is to be cut, the
//! length is that of the whole packet.

use alloc::vec::{Drain, Vec};
use shmem::Page;

/// Bytes of an Ethernet frame, at least: its header. The card pads it.
pub const MIN_FRAME: usize = 14;
/// Bytes of an Ethernet frame without FCS, at most: 14 of header, 4 of VLAN tag, 1500 of payload.
pub const MAX_FRAME: usize = 1518;
/// Bytes of a packet that is to be cut into frames, with its headers, at most.
pub const MAX_PACKET: usize = 65_535;
/// Bytes of all headers of a packet with something left to do, at most: cards store positions of
/// headers in a byte. Ethernet with a VLAN tag, IPv4 and TCP with all options are 138.
pub const MAX_HEADERS: usize = 240;

/// Whether `bytes` can be a frame's.
#[must_use]
pub fn is_frame(bytes: usize) -> bool {
    (MIN_FRAME..=MAX_FRAME).contains(&bytes)
}

/// Room for a frame or a part of a packet, or that part itself, in memory that the device may
/// reach.
#[derive(Debug)]
#[must_use = "a buffer that is dropped is lost to its card"]
pub struct Buffer {
    /// The page; shared with nobody but the device.
    pub page: Page,
    /// Where the buffer starts in the page. It ends in the same page.
    pub offset: u16,
    /// Content: its length. Empty buffer: its capacity.
    pub len: u16,
    /// The card's own name for it.
    pub token: u16,
}

/// What a card can do to packets on their way out.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Offloads {
    /// Finishes checksums of TCP and UDP over IPv4.
    pub checksum_v4: bool,
    /// Finishes checksums of TCP and UDP over IPv6.
    pub checksum_v6: bool,
    /// Cuts TCP packets of up to [`MAX_PACKET`] bytes over IPv4 into frames.
    pub segment_v4: bool,
    /// Cuts TCP packets of up to [`MAX_PACKET`] bytes over IPv6 into frames.
    pub segment_v6: bool,
}

/// Where a packet's headers are: positions in its first buffer's content.
///
/// Whoever fills it in has found that the headers are there, as said, and [`Self::are_sound`]; and
/// that the IP packet ends where the content of the last buffer does, not before padding: cards
/// add up everything to the end. A driver checks again what its device would stumble over, and
/// refuses the packet then.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Headers {
    /// IPv6, else IPv4.
    pub ipv6: bool,
    /// TCP, else UDP.
    pub tcp: bool,
    /// Where the IP header starts.
    pub l3: u16,
    /// Where the TCP or UDP header starts. Options of IPv4 are before it, or extension headers of
    /// IPv6, but no routing header: with one, the checksum is not over the header's address.
    pub l4: u16,
    /// Where the payload starts.
    pub end: u16,
}

impl Headers {
    /// Whether they can be what they are said to be, in a packet whose first buffer has `first`
    /// bytes of content.
    #[must_use]
    pub fn are_sound(&self, first: u16) -> bool {
        let least_l3 = if self.ipv6 { 40 } else { 20 };
        let least_l4 = if self.tcp { 20 } else { 8 };
        usize::from(self.l3) >= MIN_FRAME
            && self.l4.checked_sub(self.l3).is_some_and(|bytes| bytes >= least_l3)
            && self.end.checked_sub(self.l4).is_some_and(|bytes| bytes >= least_l4)
            && self.end <= first
            && usize::from(self.end) <= MAX_HEADERS
    }
}

/// What is left to do for a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Offload {
    /// Nothing: it is a finished frame.
    Nothing,
    /// The checksum of TCP or UDP is blank.
    Checksum(Headers),
    /// It is a TCP packet with a blank checksum, to be cut into frames of at most `mss` bytes of
    /// payload. Each frame gets a copy of the headers, with lengths, identification, sequence
    /// number and flags adapted, and both checksums finished.
    Segment {
        /// Its headers.
        headers: Headers,
        /// Bytes of payload of all frames but the last. Not 0; with the headers no more than
        /// [`MAX_FRAME`].
        mss: u16,
    },
}

impl Offload {
    /// Whether a card that does `offers` can do this for a packet of `bytes`, `first` of them in its
    /// first buffer.
    #[must_use]
    pub fn is_possible(&self, offers: Offloads, first: u16, bytes: usize) -> bool {
        match self {
            Self::Nothing => is_frame(bytes),
            Self::Checksum(headers) => {
                let offered = if headers.ipv6 { offers.checksum_v6 } else { offers.checksum_v4 };
                offered && headers.are_sound(first) && is_frame(bytes)
            }
            Self::Segment { headers, mss } => {
                let offered = if headers.ipv6 { offers.segment_v6 } else { offers.segment_v4 };
                let end = usize::from(headers.end);
                offered
                    && headers.tcp
                    && headers.are_sound(first)
                    && *mss != 0
                    && end + usize::from(*mss) <= MAX_FRAME
                    && (end + 1..=MAX_PACKET).contains(&bytes)
            }
        }
    }
}

/// What is known of the checksum of TCP or UDP in a received frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Checksum {
    /// Nothing. There may be none, or it may be wrong: whoever gets the frame finds out.
    Unknown,
    /// The card has found it right.
    Good,
    /// It is blank: the frame comes from a sender in the same machine, and was never on a wire. It
    /// may be passed on as it is to a guest that takes blank checksums, and must be finished for
    /// others. It is that of a TCP or UDP header that follows the frame's Ethernet header and
    /// IPv4 header, or IPv6 header without extension headers.
    Blank,
}

/// A received frame.
#[derive(Debug)]
#[must_use = "a buffer that is dropped is lost to its card"]
pub struct Received {
    /// The frame.
    pub buffer: Buffer,
    /// What is known of it.
    pub checksum: Checksum,
}

/// A network card.
///
/// Buffers belong to the card and are lent out: empty ones by [`Self::tx_buffers`], until
/// [`Self::transmit`] or [`Self::cancel`]; a full one by [`Self::receive`], until
/// [`Self::recycle`].
pub trait Nic {
    /// Its Ethernet address.
    fn mac(&self) -> [u8; 6];

    /// Whether the link is up.
    fn link_up(&self) -> bool;

    /// What it does for packets at the moment. It can change with the link, of which the owner is
    /// told; a packet for which the card was asked too much is refused, that is, dropped and
    /// counted.
    fn offloads(&self) -> Offloads;

    /// Lends empty buffers with room for `bytes` together, at most [`MAX_PACKET`], and appends them
    /// to `buffers`. For up to [`MAX_FRAME`] bytes it is one buffer; of several, the first has
    /// room for [`MAX_HEADERS`].
    ///
    /// False while there are too few of them; then none is lent, and the owner is woken when there
    /// are enough.
    fn tx_buffers(&mut self, bytes: usize, buffers: &mut Vec<Buffer>) -> bool;

    /// Queues a packet: its parts in order, their `len` set. It has at most [`MAX_FRAME`] bytes
    /// unless it is to be cut. The device is told by [`Self::flush`].
    fn transmit(&mut self, packet: Drain<'_, Buffer>, offload: Offload);

    /// Takes an unused transmit buffer back.
    fn cancel(&mut self, buffer: Buffer);

    /// Makes the device aware of queued packets and recycled buffers.
    fn flush(&mut self);

    /// The next received frame, if any. Frames with errors were dropped and counted, but for
    /// those of which only a checksum is wrong: whether that matters is the guest's affair.
    fn receive(&mut self) -> Option<Received>;

    /// Gives a received frame's buffer back.
    fn recycle(&mut self, buffer: Buffer);
}
