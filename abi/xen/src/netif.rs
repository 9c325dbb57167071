//! Network ring entries. "tx" is from the guest to the backend.
//!
//! Source: `xen/include/public/io/netif.h`.

use crate::GrantRef;
use core::mem::{offset_of, size_of};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bytes of a slot of the transmit ring.
pub const TX_SLOT: usize = 12;
/// Bytes of a slot of the receive ring.
pub const RX_SLOT: usize = 8;
/// Most data slots of one packet that a backend must accept.
pub const MAX_TX_SLOTS: usize = 18;

/// `TxRequest::flags`: the checksum field holds the pseudo-header sum only.
pub const TXF_CSUM_BLANK: u16 = 1;
/// `TxRequest::flags`: the data was checked.
pub const TXF_DATA_VALIDATED: u16 = 2;
/// `TxRequest::flags`: the packet goes on in the next data slot.
pub const TXF_MORE_DATA: u16 = 4;
/// `TxRequest::flags`: the next slot is an [`ExtraInfo`].
pub const TXF_EXTRA_INFO: u16 = 8;

/// `struct xen_netif_tx_request`. The first slot's `size` is that of the whole packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct TxRequest {
    /// The page with the data.
    pub gref: GrantRef,
    /// Where in the page.
    pub offset: u16,
    /// `TXF_*`.
    pub flags: u16,
    /// Echoed in the response.
    pub id: u16,
    /// Bytes.
    pub size: u16,
}
const _: () = assert!(size_of::<TxRequest>() == TX_SLOT && offset_of!(TxRequest, id) == 8);

/// Response status: sent.
pub const RSP_OKAY: i16 = 0;
/// Response status: refused.
pub const RSP_ERROR: i16 = -1;
/// Response status: dropped.
pub const RSP_DROPPED: i16 = -2;
/// Response status of a slot that held an [`ExtraInfo`].
pub const RSP_NULL: i16 = 1;

/// `struct xen_netif_tx_response`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct TxResponse {
    /// From the request.
    pub id: u16,
    /// `RSP_*`.
    pub status: i16,
}
const _: () = assert!(size_of::<TxResponse>() == 4);

/// `struct xen_netif_rx_request`: an empty page for a received packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RxRequest {
    /// Echoed in the response.
    pub id: u16,
    /// Padding.
    pub pad: u16,
    /// The page.
    pub gref: GrantRef,
}
const _: () = assert!(size_of::<RxRequest>() == RX_SLOT);

/// `RxResponse::flags`: the data was checked.
pub const RXF_DATA_VALIDATED: u16 = 1;
/// `RxResponse::flags`: the checksum field holds the pseudo-header sum only.
pub const RXF_CSUM_BLANK: u16 = 2;
/// `RxResponse::flags`: the packet goes on in the next slot.
pub const RXF_MORE_DATA: u16 = 4;
/// `RxResponse::flags`: the next slot is an [`ExtraInfo`].
pub const RXF_EXTRA_INFO: u16 = 8;

/// `struct xen_netif_rx_response`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RxResponse {
    /// From the request.
    pub id: u16,
    /// Where in the page the data starts.
    pub offset: u16,
    /// `RXF_*`.
    pub flags: u16,
    /// Bytes, or a negative `RSP_*`.
    pub status: i16,
}
const _: () = assert!(size_of::<RxResponse>() == RX_SLOT);

/// `ExtraInfo::kind`: segmentation offload.
pub const EXTRA_GSO: u8 = 1;
/// `ExtraInfo::kind`: a multicast group that the guest wants to hear, as [`McastInfo`].
pub const EXTRA_MCAST_ADD: u8 = 2;
/// `ExtraInfo::kind`: one that it no longer wants to hear, as [`McastInfo`].
pub const EXTRA_MCAST_DEL: u8 = 3;
/// `ExtraInfo::kind`: the packet's hash.
pub const EXTRA_HASH: u8 = 4;
/// `ExtraInfo::gso_type`: TCP over IPv4.
pub const GSO_TCPV4: u8 = 1;
/// `ExtraInfo::gso_type`: TCP over IPv6.
pub const GSO_TCPV6: u8 = 2;
/// `ExtraInfo::flags`: another one follows.
pub const EXTRA_FLAG_MORE: u8 = 1;

/// `struct xen_netif_extra_info`, with the payload of a GSO one.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ExtraInfo {
    /// `EXTRA_*`.
    pub kind: u8,
    /// `EXTRA_FLAG_*`.
    pub flags: u8,
    /// GSO: maximum segment size.
    pub gso_size: u16,
    /// GSO: 1 TCP over IPv4, 2 TCP over IPv6.
    pub gso_type: u8,
    /// Padding.
    pub pad: u8,
    /// GSO: features.
    pub gso_features: u16,
}
const _: () = assert!(size_of::<ExtraInfo>() == 8 && offset_of!(ExtraInfo, gso_type) == 4);

/// `struct xen_netif_extra_info`, with the payload of a multicast one.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct McastInfo {
    /// [`EXTRA_MCAST_ADD`] or [`EXTRA_MCAST_DEL`].
    pub kind: u8,
    /// `EXTRA_FLAG_*`.
    pub flags: u8,
    /// The group's address.
    pub address: [u8; 6],
}
const _: () = assert!(size_of::<McastInfo>() == 8 && offset_of!(McastInfo, address) == 2);
