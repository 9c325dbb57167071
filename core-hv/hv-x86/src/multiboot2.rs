//! The Multiboot2 entry: its list of tags.
//!
//! Source: Multiboot2 Specification 1.6, section 3.6.

use crate::acpi;
use crate::boot_info::{BootInfo, BootMap};
use zerocopy::FromBytes;

const TAG_END: u32 = 0;
const TAG_MODULE: u32 = 3;
const TAG_MEMORY_MAP: u32 = 6;
const TAG_RSDP_OLD: u32 = 14;
const TAG_RSDP_NEW: u32 = 15;
const TYPE_RAM: u32 = 1;

#[derive(FromBytes)]
#[repr(C)]
struct Tag {
    kind: u32,
    bytes: u32,
}

#[derive(FromBytes)]
#[repr(C)]
struct Module {
    start: u32,
    end: u32,
}

#[derive(FromBytes)]
#[repr(C)]
struct MapHeader {
    entry_bytes: u32,
    _version: u32,
}

#[derive(FromBytes)]
#[repr(C)]
struct MapEntry {
    start: u64,
    bytes: u64,
    kind: u32,
    _reserved: u32,
}

/// Reads the information at a physical address; `None` when a length in it is wrong.
pub fn read(map: &BootMap, address: u64) -> Option<BootInfo> {
    let total: u32 = map.read(address)?;
    let mut rest = map.bytes(address, total.into())?.get(8..)?;
    let mut info = BootInfo::default();
    loop {
        let (tag, _) = Tag::read_from_prefix(rest).ok()?;
        let content = rest.get(8..tag.bytes as usize)?;
        match tag.kind {
            TAG_END => return Some(info),
            TAG_MODULE if info.module.is_none() => {
                let (module, _) = Module::read_from_prefix(content).ok()?;
                info.module = Some(module.start.into()..module.end.into());
            }
            TAG_MEMORY_MAP => read_map(content, &mut info)?,
            // The newer one, which comes second, wins.
            TAG_RSDP_OLD | TAG_RSDP_NEW => info.root_table = acpi::root_table(content),
            _ => {}
        }
        rest = rest.get((tag.bytes as usize).next_multiple_of(8)..)?;
    }
}

fn read_map(content: &[u8], info: &mut BootInfo) -> Option<()> {
    let (header, entries) = MapHeader::read_from_prefix(content).ok()?;
    let step = header.entry_bytes as usize;
    if step < size_of::<MapEntry>() {
        return None;
    }
    for bytes in entries.chunks_exact(step) {
        let (entry, _) = MapEntry::read_from_prefix(bytes).ok()?;
        info.add_range(entry.start, entry.bytes, entry.kind == TYPE_RAM);
    }
    Some(())
}
