//! The few ACPI tables that the core needs: MADT, MCFG, FADT.
//!
//! By hand: the tables are flat, and each field below is read once, with its length checked and
//! the table's checksum verified. Nothing here interprets AML. Source: ACPI 6.5, section 5.2; PCI
//! Firmware Specification 3.3, section 4.1.2.

use crate::boot_info::{BootInfo, BootMap, RootTable};
use heapless::Vec;
use hv_core::platform::MAX_CPUS;
use zerocopy::FromBytes;

/// Most IOAPICs that are looked at.
pub const MAX_IOAPICS: usize = 8;
/// Most PCI segment ranges.
pub const MAX_ECAM: usize = 8;

/// What the tables say.
#[derive(Debug, Default)]
pub struct Acpi {
    /// Local APIC ids of usable processors, in the table's order.
    pub apic_ids: Vec<u32, MAX_CPUS>,
    /// Physical address of the local APIC's registers.
    pub local_apic: u64,
    /// The IOAPICs.
    pub ioapics: Vec<IoApicEntry, MAX_IOAPICS>,
    /// Where ISA interrupt 3, of the second serial port, arrives.
    pub serial: Option<Override>,
    /// Where ISA interrupt 4, of the first one, arrives.
    pub console: Option<Override>,
    /// Configuration space.
    pub ecam: Vec<EcamEntry, MAX_ECAM>,
    /// I/O port of the power-management timer.
    pub pm_timer: Option<u16>,
}

/// An IOAPIC.
#[derive(Debug)]
pub struct IoApicEntry {
    /// Physical address of its registers.
    pub address: u32,
    /// First global system interrupt.
    pub first_gsi: u32,
}

/// An ISA interrupt that does not arrive where it did on a PC/AT.
#[derive(Clone, Copy, Debug)]
pub struct Override {
    /// Global system interrupt.
    pub gsi: u32,
    /// Polarity in bits 0..2, trigger mode in bits 2..4; ACPI 6.5, table 5.26.
    pub flags: u16,
}

/// Configuration space of some buses.
#[derive(Debug)]
pub struct EcamEntry {
    /// Physical address of bus 0, whether it is in the range or not.
    pub address: u64,
    /// Segment group.
    pub segment: u16,
    /// First bus.
    pub first_bus: u8,
    /// Last bus.
    pub last_bus: u8,
}

const HEADER_BYTES: usize = 36;

fn field<T: FromBytes>(table: &[u8], offset: usize) -> Option<T> {
    Some(T::read_from_prefix(table.get(offset..)?).ok()?.0)
}

fn checksum_holds(bytes: &[u8]) -> bool {
    bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)) == 0
}

/// Checks a root pointer, of either version, and tells what it points to.
pub fn root_table(rsdp: &[u8]) -> Option<RootTable> {
    if rsdp.get(..8)? != b"RSD PTR " || !checksum_holds(rsdp.get(..20)?) {
        return None;
    }
    let rsdt = RootTable::Rsdt(u64::from(field::<u32>(rsdp, 16)?));
    let revision: u8 = field(rsdp, 15)?;
    let xsdt = field::<u64>(rsdp, 24).filter(|&address| revision >= 2 && address != 0);
    Some(xsdt.map_or(rsdt, RootTable::Xsdt))
}

/// Looks where BIOSes put the root pointer: ACPI 6.5, section 5.2.5.1.
fn scan(map: &BootMap) -> Option<RootTable> {
    let ebda = u64::from(map.read::<u16>(0x40e)?) << 4;
    let areas = [(ebda, 0x400), (0xe_0000, 0x2_0000)];
    areas.into_iter().filter_map(|(start, len)| map.bytes(start, len)).find_map(|area| {
        (0..area.len().saturating_sub(36)).step_by(16).find_map(|at| root_table(&area[at..at + 36]))
    })
}

/// A table with a correct length and checksum.
fn table(map: &BootMap, address: u64) -> Option<&[u8]> {
    let len: u32 = field(map.bytes(address, HEADER_BYTES as u64)?, 4)?;
    let bytes = map.bytes(address, len.into())?;
    (bytes.len() >= HEADER_BYTES && checksum_holds(bytes)).then_some(bytes)
}

/// Reads all that is needed. What is missing stays empty.
pub fn read(map: &BootMap, boot: &BootInfo) -> Acpi {
    let mut acpi = Acpi { local_apic: 0xfee0_0000, ..Acpi::default() };
    let told = boot.rsdp.and_then(|address| root_table(map.bytes(address, 36)?));
    if let Some(root) = told.or(boot.root_table).or_else(|| scan(map)) {
        read_all(map, root, &mut acpi);
    }
    acpi
}

fn read_all(map: &BootMap, root: RootTable, acpi: &mut Acpi) -> Option<()> {
    let (list, width) = match root {
        RootTable::Rsdt(address) => (table(map, address)?, 4),
        RootTable::Xsdt(address) => (table(map, address)?, 8),
    };
    for entry in list.get(HEADER_BYTES..)?.chunks_exact(width) {
        let mut address = [0; 8];
        address[..width].copy_from_slice(entry);
        let Some(table) = table(map, u64::from_le_bytes(address)) else { continue };
        // A table that ends too early gives what it has.
        let _ = match &table[..4] {
            b"APIC" => read_madt(table, acpi),
            b"MCFG" => read_mcfg(table, acpi),
            b"FACP" => read_fadt(table, acpi),
            _ => None,
        };
    }
    Some(())
}

/// Multiple APIC Description Table: ACPI 6.5, section 5.2.12.
fn read_madt(table: &[u8], acpi: &mut Acpi) -> Option<()> {
    acpi.local_apic = field::<u32>(table, 36)?.into();
    let mut rest = table.get(44..)?;
    while let [kind, len, ..] = *rest {
        let entry = rest.get(..usize::from(len)).filter(|entry| entry.len() >= 2)?;
        match kind {
            0 => add_cpu(acpi, field::<u8>(entry, 3)?.into(), field(entry, 4)?),
            1 => {
                let (address, first_gsi) = (field(entry, 4)?, field(entry, 8)?);
                let _ = acpi.ioapics.push(IoApicEntry { address, first_gsi });
            }
            2 => {
                let to = Override { gsi: field(entry, 4)?, flags: field(entry, 8)? };
                match field::<u8>(entry, 3)? {
                    3 => acpi.serial = Some(to),
                    4 => acpi.console = Some(to),
                    _ => {}
                }
            }
            5 => acpi.local_apic = field(entry, 4)?,
            9 => add_cpu(acpi, field(entry, 4)?, field(entry, 8)?),
            _ => {}
        }
        rest = &rest[entry.len()..];
    }
    Some(())
}

fn add_cpu(acpi: &mut Acpi, apic_id: u32, flags: u32) {
    // Processors beyond MAX_CPUS, and those only for hot-plug, are left asleep.
    if flags & 1 != 0 && !acpi.apic_ids.contains(&apic_id) {
        let _ = acpi.apic_ids.push(apic_id);
    }
}

fn read_mcfg(table: &[u8], acpi: &mut Acpi) -> Option<()> {
    for entry in table.get(44..)?.chunks_exact(16) {
        let entry = EcamEntry {
            address: field(entry, 0)?,
            segment: field(entry, 8)?,
            first_bus: field(entry, 10)?,
            last_bus: field(entry, 11)?,
        };
        if entry.first_bus <= entry.last_bus {
            let _ = acpi.ecam.push(entry);
        }
    }
    Some(())
}

/// Fixed ACPI Description Table: ACPI 6.5, section 5.2.9. The extended address, when there, wins.
fn read_fadt(table: &[u8], acpi: &mut Acpi) -> Option<()> {
    let old = field::<u32>(table, 76)?;
    let in_io_space = field::<u8>(table, 208) == Some(1);
    let extended = field::<u64>(table, 212).filter(|&address| in_io_space && address != 0);
    let port = extended.unwrap_or(old.into());
    acpi.pm_timer = u16::try_from(port).ok().filter(|&port| port != 0);
    Some(())
}
