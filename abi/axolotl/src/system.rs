//! The system description inside a bundle: what the control domain shall build.
//!
//! The host tool has checked every rule of the schema; the control domain still treats the bytes
//! as input, because a bundle can be damaged on its way.

use alloc::string::String;
use alloc::vec::Vec;
use serde::{Deserialize, Serialize};

/// Version of this encoding; the first field, so that an old reader can refuse a new bundle.
pub const VERSION: u32 = 1;

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
    /// Index of its flat image in the bundle.
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
    /// `extra` of the system file: free text for the domain, handed over as its configuration.
    pub extra: String,
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
