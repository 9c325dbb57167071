//! `event_channel_op` and the two-level port numbers.
//!
//! Source: `xen/include/public/event_channel.h`.

use crate::{DomainId, EventPort};
use core::mem::{offset_of, size_of};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Ports of the two-level layout with 64-bit words: 64 words of 64 bits.
pub const MAX_PORTS: u32 = 4096;

/// [`BindInterdomain`].
pub const BIND_INTERDOMAIN: u64 = 0;
/// [`BindVirq`].
pub const BIND_VIRQ: u64 = 1;
/// [`PortOp`]; answers `EINVAL`, we have no pirqs.
pub const BIND_PIRQ: u64 = 2;
/// [`PortOp`].
pub const CLOSE: u64 = 3;
/// [`PortOp`].
pub const SEND: u64 = 4;
/// [`Status`].
pub const STATUS: u64 = 5;
/// [`AllocUnbound`].
pub const ALLOC_UNBOUND: u64 = 6;
/// [`BindIpi`].
pub const BIND_IPI: u64 = 7;
/// [`BindVcpu`].
pub const BIND_VCPU: u64 = 8;
/// [`PortOp`].
pub const UNMASK: u64 = 9;
/// Closes all ports of a domain; the argument is a `u16` domid.
pub const RESET: u64 = 10;

/// The vCPU's own timer; per vCPU.
pub const VIRQ_TIMER: u32 = 0;
/// Debug request; per vCPU.
pub const VIRQ_DEBUG: u32 = 1;
/// The serial port that the holder of the console right drives has an interrupt; global.
pub const VIRQ_CONSOLE: u32 = 2;
/// A domain died, shut down, or stopped answering its watchdog; global, `build` right.
pub const VIRQ_DOM_EXC: u32 = 3;
/// Some domain wrote to its console; global, `console` right.
pub const VIRQ_CON_RING: u32 = 8;
/// Number of virtual interrupts.
pub const NR_VIRQS: u32 = 24;

/// `struct evtchn_bind_interdomain`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct BindInterdomain {
    /// The domain that allocated the port.
    pub remote_dom: DomainId,
    /// Padding.
    pub pad: u16,
    /// Its port, unbound for the caller.
    pub remote_port: EventPort,
    /// Out: the caller's new port.
    pub local_port: EventPort,
}
const _: () = assert!(size_of::<BindInterdomain>() == 12);

/// `struct evtchn_bind_virq`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct BindVirq {
    /// `VIRQ_*`.
    pub virq: u32,
    /// Whose; 0 for a global one.
    pub vcpu: u32,
    /// Out: the new port.
    pub port: EventPort,
}
const _: () = assert!(size_of::<BindVirq>() == 12);

/// `struct evtchn_bind_ipi`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct BindIpi {
    /// The vCPU that the port interrupts.
    pub vcpu: u32,
    /// Out: the new port.
    pub port: EventPort,
}
const _: () = assert!(size_of::<BindIpi>() == 8 && offset_of!(BindIpi, port) == 4);

/// `struct evtchn_bind_vcpu`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct BindVcpu {
    /// A port of the caller.
    pub port: EventPort,
    /// Where its events go from now on.
    pub vcpu: u32,
}
const _: () = assert!(size_of::<BindVcpu>() == 8 && offset_of!(BindVcpu, vcpu) == 4);

/// `struct evtchn_alloc_unbound`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct AllocUnbound {
    /// Where the port is made; `SELF`, or a domain that the caller built.
    pub dom: DomainId,
    /// Who may bind to it.
    pub remote_dom: DomainId,
    /// Out: the new port.
    pub port: EventPort,
}
const _: () = assert!(size_of::<AllocUnbound>() == 8);

/// `struct evtchn_close`, `evtchn_send`, `evtchn_unmask`: one port of the caller.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct PortOp {
    /// The port.
    pub port: EventPort,
}
const _: () = assert!(size_of::<PortOp>() == 4);

/// `Status::status`: free.
pub const STATUS_CLOSED: u32 = 0;
/// `Status::status`: allocated, waiting for `remote_dom`.
pub const STATUS_UNBOUND: u32 = 1;
/// `Status::status`: connected.
pub const STATUS_INTERDOMAIN: u32 = 2;
/// `Status::status`: a physical interrupt; ours are MSI and MSI-X vectors of a device.
pub const STATUS_PIRQ: u32 = 3;
/// `Status::status`: a virtual interrupt.
pub const STATUS_VIRQ: u32 = 4;
/// `Status::status`: an interrupt between vCPUs.
pub const STATUS_IPI: u32 = 5;

/// `struct evtchn_status`.
///
/// | bytes  | field    | meaning                                              |
/// |--------|----------|------------------------------------------------------|
/// | 0..2   | `dom`    | in: whose port                                       |
/// | 4..8   | `port`   | in: which                                            |
/// | 8..12  | `status` | out: `STATUS_*`                                      |
/// | 12..16 | `vcpu`   | out                                                  |
/// | 16..20 | `detail` | out: remote domid, virq or pirq number               |
/// | 20..24 | `remote_port` | out: interdomain only                           |
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Status {
    /// In: whose port.
    pub dom: DomainId,
    /// Padding.
    pub pad: u16,
    /// In: which port.
    pub port: EventPort,
    /// Out: `STATUS_*`.
    pub status: u32,
    /// Out: the vCPU that gets the events.
    pub vcpu: u32,
    /// Out: remote domid, virq or pirq number.
    pub detail: u32,
    /// Out: the peer's port, for an interdomain one.
    pub remote_port: EventPort,
}
const _: () = assert!(size_of::<Status>() == 24 && offset_of!(Status, detail) == 16);
