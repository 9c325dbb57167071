//! The PVH entry: `hvm_start_info`.
//!
//! Source: `xen/include/public/arch-x86/hvm/start_info.h`.

use crate::boot_info::{BootInfo, BootMap};
use zerocopy::FromBytes;

const MAGIC: u32 = 0x336e_c578;
const TYPE_RAM: u32 = 1;

#[derive(FromBytes)]
#[repr(C)]
struct StartInfo {
    magic: u32,
    version: u32,
    _flags: u32,
    modules: u32,
    modules_address: u64,
    _command_line: u64,
    rsdp: u64,
    // From version 1 on.
    map_address: u64,
    map_entries: u32,
    _reserved: u32,
}

#[derive(FromBytes)]
#[repr(C)]
struct Module {
    address: u64,
    bytes: u64,
    _command_line: u64,
    _reserved: u64,
}

#[derive(FromBytes)]
#[repr(C)]
struct MapEntry {
    start: u64,
    bytes: u64,
    kind: u32,
    _reserved: u32,
}

/// Reads the information at a physical address; `None` when it is not what the entry promises.
pub fn read(map: &BootMap, address: u64) -> Option<BootInfo> {
    let start: StartInfo = map.read(address)?;
    if start.magic != MAGIC || start.version < 1 {
        return None;
    }
    let rsdp = (start.rsdp != 0).then_some(start.rsdp);
    let mut info = BootInfo { rsdp, ..BootInfo::default() };
    for index in 0..u64::from(start.map_entries) {
        let at = start.map_address.checked_add(index * size_of::<MapEntry>() as u64)?;
        let entry: MapEntry = map.read(at)?;
        info.add_range(entry.start, entry.bytes, entry.kind == TYPE_RAM);
    }
    if start.modules > 0 {
        let module: Module = map.read(start.modules_address)?;
        info.module = Some(module.address..module.address.checked_add(module.bytes)?);
    }
    Some(info)
}
