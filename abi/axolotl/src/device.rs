//! The device hypercall group: what the owner of a PCI function may ask.
//!
//! `rdi` is the operation, `rsi` a pointer to its argument structure. Devices are named by their
//! index in the order of assignment, from 0. An index that the caller does not have is `ENODEV`.

use core::mem::{offset_of, size_of};
use xen_abi::EventPort;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// [`DeviceInfo`].
pub const GET_DEVICE: u64 = 0;
/// [`Config`]: reads configuration space.
pub const CONFIG_READ: u64 = 1;
/// [`Config`]: writes configuration space. Only the command register (memory space, bus master,
/// interrupt disable) and capabilities that cannot redirect memory or interrupts take effect;
/// other writes are `EPERM`.
pub const CONFIG_WRITE: u64 = 2;
/// [`BindInterrupt`].
pub const BIND_INTERRUPT: u64 = 3;
/// [`Translate`].
pub const TRANSLATE: u64 = 4;

/// A BAR as the owner sees it; all zero when there is none, or when it holds only what the core
/// keeps to itself.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Bar {
    /// Where it is mapped in the owner.
    pub gpa: u64,
    /// Its size in bytes. A page that holds the MSI-X table is mapped read-only.
    pub bytes: u64,
}
const _: () = assert!(size_of::<Bar>() == 16 && offset_of!(Bar, bytes) == 8);

/// A device of the caller.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DeviceInfo {
    /// In: which.
    pub index: u32,
    /// As in [`crate::control::PciFunction`].
    pub bdf: u32,
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// As in [`crate::control::PciFunction`].
    pub class: u32,
    /// MSI-X vectors.
    pub msix_vectors: u16,
    /// MSI vectors.
    pub msi_vectors: u16,
    /// 1 when DMA addresses must come from [`TRANSLATE`]; 0 when an IOMMU makes them equal to
    /// guest-physical addresses.
    pub dma_translated: u32,
    /// The six BARs.
    pub bars: [Bar; 6],
}
const _: () = assert!(size_of::<DeviceInfo>() == 120 && offset_of!(DeviceInfo, bars) == 24);

/// An access to configuration space.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Config {
    /// Which device.
    pub index: u32,
    /// Byte offset, aligned to `width`.
    pub offset: u16,
    /// 1, 2 or 4 bytes.
    pub width: u16,
    /// In or out.
    pub value: u32,
}
const _: () = assert!(size_of::<Config>() == 12);

/// Routes an MSI-X (or, where there is none, MSI) vector of a device to a new event port.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct BindInterrupt {
    /// Which device.
    pub index: u32,
    /// Which of its vectors.
    pub vector: u32,
    /// Out: the port.
    pub port: EventPort,
}
const _: () = assert!(size_of::<BindInterrupt>() == 12);

/// Bus addresses of pages of the caller: its own memory, or grants mapped with
/// `GNTMAP_device_map`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Translate {
    /// Which device.
    pub index: u32,
    /// Pages, at most 512.
    pub count: u32,
    /// First page.
    pub gfn: u64,
    /// Pointer to `count` numbers of 64 bits, filled with the address of each page's first byte.
    pub addresses: u64,
}
const _: () = assert!(size_of::<Translate>() == 24);
