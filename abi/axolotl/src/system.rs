//! The system description inside a bundle: what the control domain shall build.
//!
//! The host tool has checked every rule of the schema; the control domain still treats the bytes
//! as input, because a bundle can be damaged on its way.

use alloc::string::String;
use alloc::vec::Vec;
use serde::{Deserialize, Serialize};

/// Version of this encoding; the first field, so that an old reader can refuse a new bundle.
pub const VERSION: u32 = 1;

/// [`Domain::image`]: the one among [`System::drivers`] that serves the domain's first device.
pub const FIND_DRIVER: u32 = u32::MAX;

/// A whole system.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct System {
    /// [`VERSION`].
    pub version: u32,
    /// From the system file.
    pub name: String,
    /// The domains to build, in the file's order; the control domain itself is not among them,
    /// the store domain is.
    pub domains: Vec<Domain>,
    /// Images of driver domains that are in the bundle for domains with [`FIND_DRIVER`].
    pub drivers: Vec<DriverImage>,
}

/// The image of a driver domain.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DriverImage {
    /// Its name in [`crate::drivers::DRIVERS`].
    pub driver: String,
    /// Index of its flat image in the bundle.
    pub image: u32,
}

/// What a domain is for; decides rights, class and what its builder writes to the store.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Role {
    /// The control domain.
    Control,
    /// Xenstore.
    Store,
    /// Owns devices and serves them.
    Driver,
    /// Uses what others serve.
    Guest,
}

/// One domain.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Domain {
    /// Unique name.
    pub name: String,
    /// What it is for.
    pub role: Role,
    /// Index of its flat image in the bundle. A driver domain whose driver is to be found from
    /// its first PCI function has [`FIND_DRIVER`].
    pub image: u32,
    /// Memory, all included.
    pub memory_pages: u32,
    /// Preserved pages, part of the memory.
    pub preserved_pages: u32,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// What to do when it crashes or its watchdog runs out.
    pub on_crash: OnEnd,
    /// What to do when it powers off.
    pub on_poweroff: OnEnd,
    /// What to do when it asks for a reboot.
    pub on_reboot: OnEnd,
    /// Bounds for [`OnEnd::Restart`].
    pub restart: RestartLimits,
    /// CPU budget in µs per `period_us`; 0: none.
    pub budget_us: u32,
    /// The budget's period.
    pub period_us: u32,
    /// PCI functions that it owns.
    pub devices: Vec<Device>,
    /// Its network interfaces.
    pub vifs: Vec<Vif>,
    /// Its disks.
    pub disks: Vec<Disk>,
    /// `extra` of the system file: free text for the domain, handed over as its configuration.
    pub extra: String,
    /// Its image is a kernel of its own, which runs under hardware virtualization.
    pub kernel: Option<Kernel>,
}

/// What a kernel gets beside memory.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Kernel {
    /// Index of the flat image, of one segment, whose bytes are its ramdisk.
    pub ramdisk: Option<u32>,
    /// Its command line.
    pub cmdline: String,
}

/// What happens to a domain that ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum OnEnd {
    /// Restart in place, within [`RestartLimits`].
    Restart,
    /// Leave it dead with its memory, for inspection.
    Preserve,
    /// Free all it had.
    Destroy,
}

/// Bounds of automatic restarts, as Hubris has them: a domain that dies sooner than
/// `min_runtime_ms` after its start, more than `max_quick_deaths` times in a row, is held.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RestartLimits {
    /// A shorter life counts as quick.
    pub min_runtime_ms: u32,
    /// Quick deaths in a row that are tolerated; then the domain is held until `axl restart`.
    pub max_quick_deaths: u32,
    /// Restarts per minute above which the next ones are delayed; 0: no cap.
    pub max_per_minute: u32,
}

/// A PCI function of a domain.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Device {
    /// As in [`crate::control::PciFunction`].
    pub bdf: u32,
    /// How its DMA is confined.
    pub dma: Dma,
}

/// How a device's DMA is confined.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Dma {
    /// By an IOMMU.
    Iommu,
    /// Not at all: the driver is trusted with all memory.
    Trusted,
}

/// A network interface of a guest.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Vif {
    /// Name of the driver domain that serves it.
    pub backend: String,
    /// Ethernet address.
    pub mac: [u8; 6],
}

/// A disk of a guest.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Disk {
    /// Name of the driver domain that serves it.
    pub backend: String,
    /// What it is called in the guest, such as `xvda`.
    pub dev: String,
    /// What of the backend's disk it is, in the form of [`crate::volume::Volume`].
    pub volume: String,
    /// Whether the guest may write it.
    pub writable: bool,
    /// Whether the volume holds a qcow2 image, whose content is the disk.
    pub cow: bool,
    /// The volume that a qcow2 image's unwritten parts come from, if any; it is never written.
    pub backing: Option<String>,
}
