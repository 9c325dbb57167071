//! The xenstore ring and message header, and xenbus states.
//!
//! | bytes      | field             | written by |
//! |------------|-------------------|------------|
//! | 0..1024    | requests          | domain     |
//! | 1024..2048 | replies, events   | store      |
//! | 2048..2052 | `req_cons`        | store      |
//! | 2052..2056 | `req_prod`        | domain     |
//! | 2056..2060 | `rsp_cons`        | domain     |
//! | 2060..2064 | `rsp_prod`        | store      |
//! | 2064..2068 | `server_features` | store      |
//! | 2068..2072 | `connection`      | both       |
//! | 2072..2076 | `error`           | store      |
//!
//! Source: `xen/include/public/io/xs_wire.h`, `xenbus.h`.

use core::mem::size_of;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bytes in each direction's ring.
pub const RING_SIZE: usize = 1024;
/// Offset of the request bytes.
pub const REQ: usize = 0;
/// Offset of the reply bytes.
pub const RSP: usize = 1024;
/// Offset of `req_cons`.
pub const REQ_CONS: usize = 2048;
/// Offset of `req_prod`.
pub const REQ_PROD: usize = 2052;
/// Offset of `rsp_cons`.
pub const RSP_CONS: usize = 2056;
/// Offset of `rsp_prod`.
pub const RSP_PROD: usize = 2060;
/// Offset of `server_features`.
pub const SERVER_FEATURES: usize = 2064;
/// Offset of `connection`: [`CONNECTED`] or [`RECONNECT`].
pub const CONNECTION: usize = 2068;
/// `connection`: both sides use the ring.
pub const CONNECTED: u32 = 0;
/// `connection`: the domain waits until the store has emptied the ring.
pub const RECONNECT: u32 = 1;
/// Offset of `error`.
pub const ERROR: usize = 2072;

/// Most payload bytes of a message.
pub const PAYLOAD_MAX: usize = 4096;
/// Longest absolute path.
pub const ABS_PATH_MAX: usize = 3072;
/// Longest relative path.
pub const REL_PATH_MAX: usize = 2048;

/// Message header; `len` bytes of payload follow.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Header {
    /// What is asked or answered.
    pub kind: MessageKind,
    /// Chosen by the client, echoed.
    pub req_id: u32,
    /// Transaction, 0 for none.
    pub tx_id: u32,
    /// Payload bytes.
    pub len: u32,
}
const _: () = assert!(size_of::<Header>() == 16);

/// Type of a message (`enum xsd_sockmsg_type`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(transparent)]
pub struct MessageKind(pub u32);

#[expect(missing_docs, reason = "names and meanings are those of XS_* in xs_wire.h")]
impl MessageKind {
    pub const CONTROL: Self = Self(0);
    pub const DIRECTORY: Self = Self(1);
    pub const READ: Self = Self(2);
    pub const GET_PERMS: Self = Self(3);
    pub const WATCH: Self = Self(4);
    pub const UNWATCH: Self = Self(5);
    pub const TRANSACTION_START: Self = Self(6);
    pub const TRANSACTION_END: Self = Self(7);
    pub const INTRODUCE: Self = Self(8);
    pub const RELEASE: Self = Self(9);
    pub const GET_DOMAIN_PATH: Self = Self(10);
    pub const WRITE: Self = Self(11);
    pub const MKDIR: Self = Self(12);
    pub const RM: Self = Self(13);
    pub const SET_PERMS: Self = Self(14);
    pub const WATCH_EVENT: Self = Self(15);
    pub const ERROR: Self = Self(16);
    pub const IS_DOMAIN_INTRODUCED: Self = Self(17);
    pub const RESUME: Self = Self(18);
    pub const SET_TARGET: Self = Self(19);
    pub const RESET_WATCHES: Self = Self(21);
    pub const DIRECTORY_PART: Self = Self(22);
}

/// State of one end of a split device, as written in decimal to its `state` node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(transparent)]
pub struct XenbusState(pub u8);

#[expect(missing_docs, reason = "names and meanings are those of XenbusState* in xenbus.h")]
impl XenbusState {
    pub const UNKNOWN: Self = Self(0);
    pub const INITIALISING: Self = Self(1);
    pub const INIT_WAIT: Self = Self(2);
    pub const INITIALISED: Self = Self(3);
    pub const CONNECTED: Self = Self(4);
    pub const CLOSING: Self = Self(5);
    pub const CLOSED: Self = Self(6);
    pub const RECONFIGURING: Self = Self(7);
    pub const RECONFIGURED: Self = Self(8);
}
