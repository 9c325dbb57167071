//! What a unikernel domain finds at its start, and where things are in its address space.
//!
//! A unikernel runs at virtual address = guest-physical address. Its builder lays the space out
//! as the constants of this module say; everything not listed is empty, and an access to it ends
//! the domain. At the first instruction `rip` is the image's entry, `rsp` is
//! [`STACK_TOP_GPA`] - 8 (as after a call), `rdi` is [`START_INFO_GPA`], interrupts are on as
//! far as ring 3 can tell, and every other general register is 0.

use core::mem::{offset_of, size_of};
use xen_abi::{DomainId, EventPort};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// [`StartInfo`], one page, read-only. The configuration follows in the same mapping.
pub const START_INFO_GPA: u64 = 0x1_0000;
/// Most pages of start info and configuration together.
pub const START_INFO_PAGES: u64 = 16;
/// The xenstore ring, one page.
pub const XENSTORE_RING_GPA: u64 = 0x2_0000;
/// Where the runtime puts the shared-info page.
pub const SHARED_INFO_GPA: u64 = 0x3_0000;
/// Where the runtime puts its grant table frames, the first one lowest.
pub const GRANT_TABLE_GPA: u64 = 0x4_0000;
/// End of the stack. An unmapped page lies below its first page, another one here.
pub const STACK_TOP_GPA: u64 = 0x10_0000;
/// Pages of stack.
pub const STACK_PAGES: u64 = 32;
/// Link address of unikernel images.
pub const IMAGE_GPA: u64 = 0x20_0000;
/// Preserved pages: their content outlives an incarnation.
pub const PRESERVED_GPA: u64 = 0x800_0000;
/// The heap: the rest of the domain's memory.
pub const HEAP_GPA: u64 = 0x1000_0000;
/// Where the runtime maps pages that others granted to it. Empty at start.
pub const GRANT_WINDOW_GPA: u64 = 0x4000_0000;
/// Pages of that window.
pub const GRANT_WINDOW_PAGES: u64 = 0x4000;
/// Device registers: the builder assigns devices here, see [`crate::control::AssignDevice`].
pub const MMIO_GPA: u64 = 0x8000_0000;
/// The bundle, read-only; in the control domain only.
pub const BUNDLE_GPA: u64 = 0x1_0000_0000;

/// `StartInfo::magic`: "AXOLOTL1".
pub const START_MAGIC: u64 = u64::from_le_bytes(*b"AXOLOTL1");

/// First thing in the start-info page.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct StartInfo {
    /// [`START_MAGIC`].
    pub magic: u64,
    /// The domain's own id.
    pub domid: DomainId,
    /// The store domain's id.
    pub store_domid: DomainId,
    /// Which life this is, from 1.
    pub incarnation: u32,
    /// Bytes of heap at [`HEAP_GPA`].
    pub heap_bytes: u64,
    /// Preserved pages at [`PRESERVED_GPA`].
    pub preserved_pages: u32,
    /// The domain's own xenstore port, or 0 when it has no xenstore connection.
    pub xenstore_port: EventPort,
    /// Bytes of configuration that follow this structure; meaning set by the domain's role.
    pub config_bytes: u32,
    /// Devices that the domain owns.
    pub devices: u32,
    /// Bytes of the bundle at [`BUNDLE_GPA`], control domain only.
    pub bundle_bytes: u64,
    /// NUL-padded name from the system file.
    pub name: [u8; 32],
}
const _: () = assert!(size_of::<StartInfo>() == 80 && offset_of!(StartInfo, name) == 48);
