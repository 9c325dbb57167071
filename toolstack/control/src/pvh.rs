//! How a PVH domain is laid out, and what it finds: start info, memory map, ACPI tables.
//!
//! | guest-physical | what |
//! |---|---|
//! | 0 | memory, up to 3 GiB of it: the kernel where it wants to be, behind it the ramdisk and the start info |
//! | `fc000000` | ACPI tables |
//! | `feffc000` | the xenstore ring |
//! | `fefff000` | the console ring |
//! | 4 GiB | the rest of the memory |
//!
//! Source: `xen-abi.md` §1; ACPI specification 6.5, chapter 5.

use alloc::vec::Vec;
use axolotl_abi::image::{ImageError, ImageHeader, Segment};
use core::ops::Range;

const PAGE: u64 = 4096;
const GIB: u64 = 1 << 30;
/// Where memory gives way to devices.
const HOLE: u64 = 3 * GIB;
const BEHIND_HOLE: u64 = 4 * GIB;
/// ACPI tables.
const ACPI_GPA: u64 = 0xfc00_0000;
const ACPI_BYTES: u64 = PAGE;
/// Pages that the guest shares with services.
const SPECIAL: Range<u64> = 0xfeff_8000..0xff00_0000;
/// The xenstore ring.
pub(crate) const XENSTORE_GPA: u64 = 0xfeff_c000;
/// The console ring.
pub(crate) const CONSOLE_GPA: u64 = 0xfeff_f000;
/// Most bytes of a command line, with its NUL: Linux reads no more.
const CMDLINE_BYTES: usize = 2048;
/// Bytes of one `LOAD`.
const LOAD_BYTES: usize = 65_536;
/// Ramdisks and start info begin at such addresses.
const ALIGN: u64 = 2 << 20;
/// What the core keeps for a domain beside its memory and page tables for that: page tables for the
/// places above, three frames for each vCPU, grant tables, event ports.
const OVERHEAD_PAGES: u32 = 192;

/// Pages that a domain with so much memory is charged in all.
pub(crate) const fn charged_pages(memory: u32) -> u32 {
    memory + memory.div_ceil(512) + OVERHEAD_PAGES
}

/// Why a domain cannot be laid out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum LayoutError {
    /// An image is damaged.
    Image(ImageError),
    /// Kernel, ramdisk and start info do not fit.
    Memory,
    /// The command line is too long.
    Cmdline,
}

impl core::fmt::Display for LayoutError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Image(error) => write!(f, "its image is damaged ({error:?})"),
            Self::Memory => f.write_str("its memory does not hold its kernel and ramdisk"),
            Self::Cmdline => f.write_str("its `cmdline` is longer than 2047 bytes"),
        }
    }
}

/// Bytes of an image, and where they go; at most 64 KiB.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Load {
    pub(crate) gpa: u64,
    /// Of the ramdisk, not the kernel.
    pub(crate) of_ramdisk: bool,
    pub(crate) bytes: Range<usize>,
}

/// Where everything is.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    pub(crate) entry: u64,
    pub(crate) start_info: u64,
    /// First page and number of pages.
    pub(crate) regions: Vec<(u64, u32)>,
    pub(crate) loads: Vec<Load>,
    /// Start info with everything that it points to, at `start_info`.
    pub(crate) block: Vec<u8>,
    /// ACPI tables, at [`ACPI_GPA`].
    pub(crate) acpi: Vec<u8>,
}

/// Where the ACPI tables go.
pub(crate) const fn acpi_gpa() -> u64 {
    ACPI_GPA
}

impl Layout {
    /// Lays out a domain of `memory` pages that runs `kernel`.
    pub(crate) fn new(
        kernel: &[u8],
        ramdisk: Option<&[u8]>,
        cmdline: &str,
        memory: u32,
        vcpus: u32,
    ) -> Result<Self, LayoutError> {
        let (header, segments) = ImageHeader::check(kernel).map_err(LayoutError::Image)?;
        let bytes = u64::from(memory) * PAGE;
        let low = bytes.min(HOLE);
        let mut loads: Vec<Load> = Vec::new();
        for segment in segments {
            loads.extend(load_steps(segment, segment.gfn * PAGE, false));
        }
        let end = |segment: &Segment| (segment.gfn + u64::from(segment.pages)) * PAGE;
        let mut next = segments.iter().map(end).max().unwrap_or(0).next_multiple_of(ALIGN);
        let mut module = None;
        if let Some(ramdisk) = ramdisk {
            let (_, segments) = ImageHeader::check(ramdisk).map_err(LayoutError::Image)?;
            let segment = segments.first().ok_or(LayoutError::Image(ImageError::BadCount))?;
            module = Some((next, segment.file_bytes));
            loads.extend(load_steps(segment, next, true));
            next = (next + segment.file_bytes).next_multiple_of(ALIGN);
        }
        let regions = memory_map(bytes);
        let block = start_block(next, module, cmdline, &regions).ok_or(LayoutError::Cmdline)?;
        // What is below 1 GiB can be reached by a kernel's first page tables.
        if next + block.len() as u64 > low.min(GIB) {
            return Err(LayoutError::Memory);
        }
        Ok(Self {
            entry: header.entry,
            start_info: next,
            regions: populated(bytes),
            loads,
            block,
            acpi: acpi(vcpus),
        })
    }
}

/// Ranges to populate: memory, tables, rings.
fn populated(bytes: u64) -> Vec<(u64, u32)> {
    let region =
        |start: u64, len: u64| (start / PAGE, u32::try_from(len / PAGE).unwrap_or(u32::MAX));
    let all = [
        region(0, bytes.min(HOLE)),
        region(BEHIND_HOLE, bytes.saturating_sub(HOLE)),
        region(ACPI_GPA, ACPI_BYTES),
        region(XENSTORE_GPA, PAGE),
        region(CONSOLE_GPA, PAGE),
    ];
    all.into_iter().filter(|(_, pages)| *pages > 0).collect()
}

#[expect(clippy::cast_possible_truncation, reason = "offsets into an image in memory")]
fn load_steps(segment: &Segment, gpa: u64, of_ramdisk: bool) -> impl Iterator<Item = Load> {
    // `ImageHeader::check` saw that these bytes lie within the image, which is in memory.
    let start = segment.file_offset as usize;
    let bytes = segment.file_bytes as usize;
    (0..bytes).step_by(LOAD_BYTES).map(move |at| Load {
        gpa: gpa + at as u64,
        of_ramdisk,
        bytes: start + at..start + bytes.min(at + LOAD_BYTES),
    })
}

/// An entry of the memory map: address, size, type.
type Entry = (u64, u64, u32);
const RAM: u32 = 1;
const RESERVED: u32 = 2;
const ACPI: u32 = 3;

fn memory_map(bytes: u64) -> Vec<Entry> {
    let mut map = Vec::from([
        (0, bytes.min(HOLE), RAM),
        (ACPI_GPA, ACPI_BYTES, ACPI),
        (SPECIAL.start, SPECIAL.end - SPECIAL.start, RESERVED),
    ]);
    if bytes > HOLE {
        map.push((BEHIND_HOLE, bytes - HOLE, RAM));
    }
    map
}

/// Appends numbers of given widths.
struct Bytes(Vec<u8>);

impl Bytes {
    fn u8(&mut self, value: u8) -> &mut Self {
        self.0.push(value);
        self
    }

    fn u32(&mut self, value: u32) -> &mut Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    fn u64(&mut self, value: u64) -> &mut Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }
}

/// `hvm_start_info`, its module list, memory map and command line, at `gpa` (§1.3).
fn start_block(
    gpa: u64,
    module: Option<(u64, u64)>,
    cmdline: &str,
    map: &[Entry],
) -> Option<Vec<u8>> {
    const HEADER: u64 = 56;
    const MODULE: u64 = 32;
    const ENTRY: u64 = 24;
    if cmdline.len() >= CMDLINE_BYTES || cmdline.contains('\0') {
        return None;
    }
    let modules = gpa + HEADER;
    let entries = modules + MODULE;
    let text = entries + ENTRY * map.len() as u64;
    let mut out = Bytes(Vec::new());
    out.u32(0x336e_c578).u32(1).u32(0).u32(u32::from(module.is_some()));
    out.u64(modules).u64(text).u64(ACPI_GPA).u64(entries);
    out.u32(u32::try_from(map.len()).unwrap_or(0)).u32(0);
    let (start, len) = module.unwrap_or_default();
    out.u64(start).u64(len).u64(0).u64(0);
    for &(address, size, kind) in map {
        out.u64(address).u64(size).u32(kind).u32(0);
    }
    out.0.extend_from_slice(cmdline.as_bytes());
    out.u8(0);
    Some(out.0)
}

/// The byte that makes the sum of all zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0_u8, |sum, &byte| sum.wrapping_sub(byte))
}

/// A table: header, content, checksum.
fn table(signature: &[u8; 4], revision: u8, content: &[u8]) -> Vec<u8> {
    let mut out = Bytes(signature.to_vec());
    out.u32(u32::try_from(36 + content.len()).unwrap_or(0)).u8(revision).u8(0);
    out.0.extend_from_slice(b"AXOLOTAXOLOTL ");
    out.u32(1).u32(u32::from_le_bytes(*b"AXOL")).u32(1);
    out.0.extend_from_slice(content);
    out.0[9] = checksum(&out.0);
    out.0
}

/// RSDP, XSDT, FADT, MADT and an empty DSDT, one behind the other (§1.4).
fn acpi(vcpus: u32) -> Vec<u8> {
    const RSDP_BYTES: u64 = 40;
    const XSDT_BYTES: u64 = 56;
    const FADT_BYTES: u64 = 272;
    let xsdt_at = ACPI_GPA + RSDP_BYTES;
    let fadt_at = xsdt_at + XSDT_BYTES;
    let dsdt_at = fadt_at + FADT_BYTES;
    let madt_at = dsdt_at + 40;

    let mut out = b"RSD PTR \0AXOLOT\x02".to_vec();
    let mut tail = Bytes(Vec::new());
    tail.u32(0).u32(36).u64(xsdt_at).u32(0);
    out.append(&mut tail.0);
    out[8] = checksum(&out[..20]);
    out[32] = checksum(&out);

    let mut pointers = Bytes(Vec::new());
    pointers.u64(fadt_at).u64(madt_at);
    let tables = [
        (xsdt_at, table(b"XSDT", 1, &pointers.0)),
        (fadt_at, fadt(dsdt_at)),
        (dsdt_at, table(b"DSDT", 2, &[])),
        (madt_at, madt(vcpus)),
    ];
    for (at, table) in tables {
        out.resize(usize::try_from(at - ACPI_GPA).unwrap_or(0), 0);
        out.extend_from_slice(&table);
    }
    out
}

/// No VGA, no clock of the CMOS; reduced hardware, WBINVD, no fixed buttons.
fn fadt(dsdt: u64) -> Vec<u8> {
    const ARCHITECTURE: u16 = 0x24;
    const FLAGS: u32 = 1 << 20 | 1 | 1 << 4 | 1 << 5;
    let mut content = [0_u8; 268 - 36];
    let mut put = |at: usize, bytes: &[u8]| {
        content[at - 36..at - 36 + bytes.len()].copy_from_slice(bytes);
    };
    let low = u32::try_from(dsdt).unwrap_or(0);
    put(40, &low.to_le_bytes());
    put(109, &ARCHITECTURE.to_le_bytes());
    put(112, &FLAGS.to_le_bytes());
    put(140, &dsdt.to_le_bytes());
    table(b"FACP", 5, &content)
}

/// A local APIC for each vCPU: processor id = vCPU, APIC id = twice that.
fn madt(vcpus: u32) -> Vec<u8> {
    let mut content = Bytes(Vec::new());
    content.u32(0xfee0_0000).u32(0);
    for vcpu in 0..u8::try_from(vcpus).unwrap_or(0) {
        content.u8(0).u8(8).u8(vcpu).u8(2 * vcpu).u32(1);
    }
    table(b"APIC", 3, &content.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use axolotl_abi::image::{ACCESS_READ, IMAGE_MAGIC};
    use zerocopy::IntoBytes;

    /// A flat image with one segment of `len` bytes, in words so that it is aligned.
    fn image(gfn: u64, pages: u32, len: usize) -> Vec<u64> {
        let header =
            ImageHeader { magic: IMAGE_MAGIC, entry: gfn * PAGE, segments: 1, reserved: 0 };
        let segment =
            Segment { gfn, pages, access: ACCESS_READ, file_offset: PAGE, file_bytes: len as u64 };
        let mut words = alloc::vec![0_u64; 512 + len.div_ceil(8)];
        let bytes = words.as_mut_bytes();
        bytes[..24].copy_from_slice(header.as_bytes());
        bytes[24..56].copy_from_slice(segment.as_bytes());
        words
    }

    fn number(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
    }

    #[test]
    fn everything_has_a_place_of_its_own() {
        let kernel = image(0x1000, 0x2000, 100_000);
        let ramdisk = image(0, 30, 100_001);
        let layout = Layout::new(kernel.as_bytes(), Some(ramdisk.as_bytes()), "quiet", 131_072, 2)
            .expect("fits");
        assert_eq!(layout.entry, 0x100_0000);
        let gpas: Vec<u64> = layout.loads.iter().map(|load| load.gpa).collect();
        assert_eq!(gpas, [0x100_0000, 0x101_0000, 0x300_0000, 0x301_0000]);
        assert_eq!(layout.start_info, 0x320_0000);
        let all = layout.regions.iter().map(|(_, pages)| u64::from(*pages)).sum::<u64>();
        assert_eq!(all, 131_072 + 3);
        // The module, and where the start info says it is.
        let modules = usize::try_from(number(&layout.block, 16) - layout.start_info).expect("near");
        assert_eq!(number(&layout.block, modules), 0x300_0000);
        assert_eq!(number(&layout.block, modules + 8), 100_001);
        let text = usize::try_from(number(&layout.block, 24) - layout.start_info).expect("near");
        assert_eq!(&layout.block[text..], b"quiet\0");
    }

    #[test]
    fn memory_goes_on_behind_the_hole() {
        let map = memory_map(5 * GIB);
        assert_eq!(map[0], (0, 3 * GIB, RAM));
        assert_eq!(map[3], (4 * GIB, 2 * GIB, RAM));
        assert_eq!(populated(5 * GIB)[1], (1 << 20, 1 << 19));
    }

    #[test]
    fn too_little_memory_and_long_command_lines_are_refused() {
        let kernel = image(0x1000, 0x2000, 4096);
        let new = |cmdline: &str, memory| Layout::new(kernel.as_bytes(), None, cmdline, memory, 1);
        assert_eq!(new("", 0x3000).err(), Some(LayoutError::Memory));
        let long = "x".repeat(2048);
        assert_eq!(new(&long, 0x8000).err(), Some(LayoutError::Cmdline));
        assert!(new(&long[1..], 0x8000).is_ok());
    }

    /// §1.4, and that a reader which checks sums accepts them.
    #[test]
    fn acpi_tables_are_found_from_their_root_and_sound() {
        let tables = acpi(4);
        assert!(tables.len() as u64 <= ACPI_BYTES);
        let sum = |bytes: &[u8]| bytes.iter().fold(0_u8, |sum, &byte| sum.wrapping_add(byte));
        assert_eq!((sum(&tables[..20]), sum(&tables[..36])), (0, 0));
        let at = |gpa: u64| usize::try_from(gpa - ACPI_GPA).expect("near");
        let whole = |gpa: u64| {
            let start = at(gpa);
            let len = u32::from_le_bytes(tables[start + 4..start + 8].try_into().expect("4"));
            let bytes = &tables[start..start + len as usize];
            assert_eq!(sum(bytes), 0);
            bytes
        };
        let xsdt = whole(number(&tables, 24));
        let fadt = whole(number(xsdt, 36));
        let madt = whole(number(xsdt, 44));
        assert_eq!((&fadt[..4], fadt.len()), (&b"FACP"[..], 268));
        assert_eq!(u32::from_le_bytes(fadt[112..116].try_into().expect("4")) >> 20, 1);
        assert_eq!(&whole(number(fadt, 140))[..4], b"DSDT");
        assert_eq!((&madt[..4], madt.len()), (&b"APIC"[..], 44 + 4 * 8));
        assert_eq!(&madt[40..44], &[0; 4], "no 8259");
        assert_eq!(&madt[44 + 8..44 + 16], &[0, 8, 1, 2, 1, 0, 0, 0]);
    }
}
