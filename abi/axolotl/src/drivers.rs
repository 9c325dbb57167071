//! Which driver serves which PCI function.
//!
//! The host tool uses the table for the machines that it emulates, the control domain for
//! whatever it finds.
//!
//! Source: PCI Code and ID Assignment Specification (classes); virtio 1.1, §4.1.2 (ids).

/// What a driver domain serves its guests.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Service {
    /// Network interfaces: vifs.
    Network,
    /// Disks: vbds.
    Block,
}

/// A driver.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Driver {
    /// Its name in system files.
    pub name: &'static str,
    /// The package of its domain's image.
    pub package: &'static str,
    /// What it serves.
    pub service: Service,
    /// QEMU's names of devices that it drives.
    pub models: &'static [&'static str],
    /// Vendor and device ids that it drives.
    pub ids: &'static [(u16, u16)],
    /// Class, subclass and programming interface that it drives, whatever the ids are.
    pub class: Option<u32>,
}

/// All drivers.
pub const DRIVERS: &[Driver] = &[
    Driver {
        name: "e1000e",
        package: "net-domain",
        service: Service::Network,
        models: &["e1000e"],
        ids: &[(0x8086, 0x10d3)],
        class: None,
    },
    Driver {
        name: "virtio-net",
        package: "virtio-net-domain",
        service: Service::Network,
        models: &["virtio-net-pci"],
        ids: &[(0x1af4, 0x1041), (0x1af4, 0x1000)],
        class: None,
    },
    Driver {
        name: "nvme",
        package: "nvme-domain",
        service: Service::Block,
        models: &["nvme"],
        ids: &[],
        class: Some(0x01_08_02),
    },
    Driver {
        name: "ahci",
        package: "ahci-domain",
        service: Service::Block,
        models: &["ahci"],
        ids: &[],
        class: Some(0x01_06_01),
    },
    Driver {
        name: "virtio-blk",
        package: "virtio-blk-domain",
        service: Service::Block,
        models: &["virtio-blk-pci"],
        ids: &[(0x1af4, 0x1042), (0x1af4, 0x1001)],
        class: None,
    },
];

/// The driver of that name.
#[must_use]
pub fn by_name(name: &str) -> Option<&'static Driver> {
    DRIVERS.iter().find(|driver| driver.name == name)
}

/// The driver of a function: one that knows its ids, or else one that knows its `class` (class,
/// subclass and programming interface, 24 bits).
#[must_use]
pub fn for_function(vendor: u16, device: u16, class: u32) -> Option<&'static Driver> {
    let by_id = DRIVERS.iter().find(|driver| driver.ids.contains(&(vendor, device)));
    by_id.or_else(|| DRIVERS.iter().find(|driver| driver.class == Some(class & 0xff_ffff)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_come_before_classes() {
        let name = |vendor, device, class| for_function(vendor, device, class).map(|d| d.name);
        assert_eq!(name(0x8086, 0x10d3, 0x02_00_00), Some("e1000e"));
        assert_eq!(name(0x1b36, 0x0010, 0x01_08_02), Some("nvme"));
        assert_eq!(name(0x8086, 0x2922, 0x01_06_01), Some("ahci"));
        assert_eq!(name(0x1af4, 0x1042, 0x01_00_00), Some("virtio-blk"));
        assert_eq!(name(0x8086, 0x1234, 0x03_00_00), None);
    }
}
