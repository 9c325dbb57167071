//! From the ELF file that the linker made to the flat image that the core and the control domain
//! load, so that neither of them has to know ELF.
//!
//! A flat image (see [`axolotl_abi::image`]) has whole pages with one kind of access each. The rules
//! are enforced here, at the earliest place: nothing is writable and executable at once, no two segments
//! share a page, and nothing is left to relocate.

use axolotl_abi::image::{
    ACCESS_EXECUTE, ACCESS_READ, ACCESS_WRITE, IMAGE_MAGIC, ImageHeader, MAX_SEGMENTS, Segment,
};
use axolotl_abi::start::{IMAGE_GPA, PRESERVED_GPA};
use miette::{Diagnostic, IntoDiagnostic, miette};
use object::elf::{
    EM_X86_64, ET_EXEC, FileHeader64, PF_W, PF_X, PT_DYNAMIC, PT_INTERP, PT_LOAD, PT_TLS,
    ProgramHeader64,
};
use object::read::elf::{FileHeader, ProgramHeader};
use object::{Endianness, read::ReadRef};
use std::fmt;
use zerocopy::IntoBytes;

/// Bytes of a page.
pub const PAGE: u64 = 4096;
/// The same as a length.
const PAGE_BYTES: usize = 4096;

/// Why an ELF file cannot become a flat image.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum FlattenError {
    /// Not an ELF file that the reader understands.
    NotElf(String),
    /// For another processor.
    WrongMachine,
    /// Not linked at fixed addresses.
    NotStatic,
    /// Needs something that the platform does not offer: an interpreter, dynamic linking,
    /// thread-local storage.
    Unsupported(&'static str),
    /// Writable and executable.
    WriteExecute {
        /// Address of the segment.
        address: u64,
    },
    /// Two segments in one page.
    SharedPage {
        /// Address of the second one.
        address: u64,
    },
    /// Outside the addresses of images.
    OutOfRange {
        /// Address of the segment.
        address: u64,
    },
    /// More than [`MAX_SEGMENTS`], or none.
    SegmentCount(usize),
    /// The entry point is not in an executable segment.
    BadEntry(u64),
}

impl fmt::Display for FlattenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotElf(why) => write!(f, "not a usable ELF file: {why}"),
            Self::WrongMachine => write!(f, "not for x86-64"),
            Self::NotStatic => write!(f, "not linked at fixed addresses"),
            Self::Unsupported(what) => write!(f, "needs {what}, which a domain does not have"),
            Self::WriteExecute { address } => {
                write!(f, "the segment at {address:#x} is writable and executable at once")
            }
            Self::SharedPage { address } => {
                write!(f, "the segment at {address:#x} shares its first page with another one")
            }
            Self::OutOfRange { address } => write!(
                f,
                "the segment at {address:#x} is outside {IMAGE_GPA:#x}..{PRESERVED_GPA:#x}"
            ),
            Self::SegmentCount(count) => write!(f, "{count} segments, not 1 to {MAX_SEGMENTS}"),
            Self::BadEntry(entry) => write!(f, "no code at the entry point {entry:#x}"),
        }
    }
}

impl std::error::Error for FlattenError {}

impl Diagnostic for FlattenError {
    fn help<'a>(&'a self) -> Option<Box<dyn fmt::Display + 'a>> {
        let help = match self {
            Self::NotStatic => {
                "link with `relocation-model=static`, as .cargo/config.toml says; RUSTFLAGS in the environment would override that"
            }
            Self::WriteExecute { .. } | Self::SharedPage { .. } => {
                "the linker script must start each kind of section on a page of its own"
            }
            Self::OutOfRange { .. } => "unikernel/unikernel.ld sets the address of images",
            _ => return None,
        };
        Some(Box::new(help))
    }
}

/// Pages of an image with one kind of access, and the bytes at their start.
struct Piece<'a> {
    gfn: u64,
    pages: u32,
    access: u32,
    /// Zero bytes between the page's start and the first byte.
    lead: usize,
    bytes: &'a [u8],
}

/// Makes the flat image of the ELF file `elf`.
///
/// # Errors
/// The first rule that the file breaks.
pub fn flatten(elf: &[u8]) -> Result<Vec<u8>, FlattenError> {
    let broken = |error: object::Error| FlattenError::NotElf(error.to_string());
    let header = FileHeader64::<Endianness>::parse(elf).map_err(broken)?;
    let endian = header.endian().map_err(broken)?;
    if header.e_machine(endian) != EM_X86_64 || !header.is_little_endian() {
        return Err(FlattenError::WrongMachine);
    }
    if header.e_type(endian) != ET_EXEC {
        return Err(FlattenError::NotStatic);
    }
    let mut pieces = Vec::new();
    for program in header.program_headers(endian, elf).map_err(broken)? {
        pieces.extend(piece(program, endian, elf)?);
    }
    check_pieces(&mut pieces, header.e_entry(endian))?;
    Ok(write(&pieces, header.e_entry(endian)))
}

/// What a program header asks to be loaded; `None` when nothing.
fn piece<'a>(
    program: &ProgramHeader64<Endianness>,
    endian: Endianness,
    elf: &'a [u8],
) -> Result<Option<Piece<'a>>, FlattenError> {
    let memory_bytes = program.p_memsz(endian);
    match program.p_type(endian) {
        PT_INTERP => return Err(FlattenError::Unsupported("an interpreter")),
        PT_DYNAMIC => return Err(FlattenError::Unsupported("dynamic linking")),
        PT_TLS if memory_bytes != 0 => {
            return Err(FlattenError::Unsupported("thread-local storage"));
        }
        PT_LOAD if memory_bytes != 0 => {}
        _ => return Ok(None),
    }
    let address = program.p_vaddr(endian);
    let end = address.checked_add(memory_bytes).filter(|end| *end <= PRESERVED_GPA);
    let end = end.filter(|_| address >= IMAGE_GPA).ok_or(FlattenError::OutOfRange { address })?;
    let (offset, file_bytes) = program.file_range(endian);
    if file_bytes > memory_bytes {
        return Err(FlattenError::NotElf(
            "a segment with more bytes in the file than in memory".into(),
        ));
    }
    let bytes = elf
        .read_bytes_at(offset, file_bytes)
        .map_err(|()| FlattenError::NotElf("a segment that leaves the file".into()))?;
    let first = address / PAGE;
    // Both fit: the range was checked against the address space of images.
    let pages = u32::try_from(end.div_ceil(PAGE) - first).unwrap_or(u32::MAX);
    let lead = usize::try_from(address % PAGE).unwrap_or(0);
    let access = access(program.p_flags(endian), address)?;
    Ok(Some(Piece { gfn: first, pages, access, lead, bytes }))
}

fn access(flags: object::elf::ProgramFlags, address: u64) -> Result<u32, FlattenError> {
    let mut access = ACCESS_READ;
    if flags.0 & PF_W.0 != 0 {
        access |= ACCESS_WRITE;
    }
    if flags.0 & PF_X.0 != 0 {
        access |= ACCESS_EXECUTE;
    }
    let both = ACCESS_WRITE | ACCESS_EXECUTE;
    if access & both == both { Err(FlattenError::WriteExecute { address }) } else { Ok(access) }
}

fn check_pieces(pieces: &mut [Piece<'_>], entry: u64) -> Result<(), FlattenError> {
    if pieces.is_empty() || pieces.len() > MAX_SEGMENTS as usize {
        return Err(FlattenError::SegmentCount(pieces.len()));
    }
    pieces.sort_by_key(|piece| piece.gfn);
    for pair in pieces.windows(2) {
        if pair[0].gfn + u64::from(pair[0].pages) > pair[1].gfn {
            let address = pair[1].gfn * PAGE + pair[1].lead as u64;
            return Err(FlattenError::SharedPage { address });
        }
    }
    let holds_entry = |piece: &Piece<'_>| {
        let pages = piece.gfn..piece.gfn + u64::from(piece.pages);
        piece.access & ACCESS_EXECUTE != 0 && pages.contains(&(entry / PAGE))
    };
    if pieces.iter().any(holds_entry) { Ok(()) } else { Err(FlattenError::BadEntry(entry)) }
}

fn write(pieces: &[Piece<'_>], entry: u64) -> Vec<u8> {
    let segments = u32::try_from(pieces.len()).unwrap_or(u32::MAX);
    let header = ImageHeader { magic: IMAGE_MAGIC, entry, segments, reserved: 0 };
    let mut image = header.as_bytes().to_vec();
    let table_bytes = size_of::<Segment>() * pieces.len();
    let mut bytes_at = (size_of::<ImageHeader>() + table_bytes).next_multiple_of(PAGE_BYTES);
    for piece in pieces {
        let file_bytes = if piece.bytes.is_empty() { 0 } else { piece.lead + piece.bytes.len() };
        let segment = Segment {
            gfn: piece.gfn,
            pages: piece.pages,
            access: piece.access,
            file_offset: bytes_at as u64,
            file_bytes: file_bytes as u64,
        };
        image.extend_from_slice(segment.as_bytes());
        bytes_at += file_bytes.next_multiple_of(PAGE_BYTES);
    }
    for piece in pieces.iter().filter(|piece| !piece.bytes.is_empty()) {
        pad(&mut image);
        image.resize(image.len() + piece.lead, 0);
        image.extend_from_slice(piece.bytes);
    }
    pad(&mut image);
    image
}

/// Fills up to a page boundary.
pub(crate) fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(PAGE_BYTES), 0);
}

/// [`flatten`] for a file.
///
/// # Errors
/// As [`flatten`], with the file's name; or the file cannot be read.
pub fn flatten_file(path: &std::path::Path) -> miette::Result<Vec<u8>> {
    let elf = std::fs::read(path).into_diagnostic()?;
    flatten(&elf).map_err(|error| {
        let help = error.help().map(|help| help.to_string());
        let text = format!("{} cannot be loaded by the platform: {error}", path.display());
        match help {
            Some(help) => miette!(help = help, "{text}"),
            None => miette!("{text}"),
        }
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A program header for [`elf_file`].
    #[derive(Clone, Debug)]
    pub(crate) struct Load {
        pub kind: u32,
        pub flags: u32,
        pub address: u64,
        pub bytes: Vec<u8>,
        pub memory_bytes: u64,
    }

    pub(crate) fn load(flags: u32, address: u64, bytes: &[u8], memory_bytes: u64) -> Load {
        Load { kind: 1, flags, address, bytes: bytes.to_vec(), memory_bytes }
    }

    /// A minimal ELF executable, written by the layout of the ELF specification.
    pub(crate) fn elf_file(kind: u16, entry: u64, loads: &[Load]) -> Vec<u8> {
        let mut file = Vec::new();
        file.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
        file.extend_from_slice(&kind.to_le_bytes());
        file.extend_from_slice(&62_u16.to_le_bytes());
        file.extend_from_slice(&1_u32.to_le_bytes());
        for word in [entry, 64, 0] {
            file.extend_from_slice(&word.to_le_bytes());
        }
        file.extend_from_slice(&0_u32.to_le_bytes());
        for half in [64, 56, u16::try_from(loads.len()).expect("few"), 64, 0, 0] {
            file.extend_from_slice(&half.to_le_bytes());
        }
        let mut at = 64 + 56 * loads.len() as u64;
        for load in loads {
            file.extend_from_slice(&load.kind.to_le_bytes());
            file.extend_from_slice(&load.flags.to_le_bytes());
            let len = load.bytes.len() as u64;
            for word in [at, load.address, load.address, len, load.memory_bytes, PAGE] {
                file.extend_from_slice(&word.to_le_bytes());
            }
            at += len;
        }
        loads.iter().for_each(|load| file.extend_from_slice(&load.bytes));
        file
    }

    const R: u32 = 4;
    const RW: u32 = 6;
    const RX: u32 = 5;

    fn typical() -> Vec<Load> {
        vec![
            load(RX, IMAGE_GPA, b"code", 4),
            load(R, IMAGE_GPA + 0x1000, b"constants", 9),
            load(RW, IMAGE_GPA + 0x2010, b"data", 0x3000),
        ]
    }

    #[test]
    fn segments_keep_their_place_access_and_bytes() {
        let image = flatten(&elf_file(2, IMAGE_GPA, &typical())).expect("valid");
        let (header, segments) = ImageHeader::check(&image).expect("sound");
        assert_eq!(header.entry, IMAGE_GPA);
        let seen: Vec<_> = segments.iter().map(|s| (s.gfn, s.pages, s.access)).collect();
        let gfn = IMAGE_GPA / PAGE;
        let expected = [
            (gfn, 1, ACCESS_READ | ACCESS_EXECUTE),
            (gfn + 1, 1, ACCESS_READ),
            (gfn + 2, 4, ACCESS_READ | ACCESS_WRITE),
        ];
        assert_eq!(seen, expected);
        let data = &segments[2];
        let start = usize::try_from(data.file_offset).expect("small");
        let end = start + usize::try_from(data.file_bytes).expect("small");
        assert!(image[start..start + 0x10].iter().all(|byte| *byte == 0));
        assert_eq!(&image[start + 0x10..end], b"data");
    }

    #[test]
    fn an_image_without_bytes_for_its_zeroed_memory_is_small() {
        let loads = [load(RX, IMAGE_GPA, b"code", 4), load(RW, IMAGE_GPA + PAGE, b"", 1 << 20)];
        let image = flatten(&elf_file(2, IMAGE_GPA, &loads)).expect("valid");
        assert_eq!(image.len(), 2 * 4096);
        assert_eq!(ImageHeader::check(&image).expect("sound").1[1].pages, 256);
    }

    #[test]
    fn each_rule_has_its_error() {
        let code = || load(RX, IMAGE_GPA, b"code", 4);
        let dynamic = Load { kind: 2, ..load(RW, IMAGE_GPA + PAGE, b"", 8) };
        let tls = Load { kind: 7, ..load(RW, IMAGE_GPA + PAGE, b"", 8) };
        let next = IMAGE_GPA + PAGE;
        let cases: Vec<(u16, u64, Vec<Load>, FlattenError)> = vec![
            (3, IMAGE_GPA, vec![code()], FlattenError::NotStatic),
            (2, IMAGE_GPA, vec![], FlattenError::SegmentCount(0)),
            (2, IMAGE_GPA, vec![code(), dynamic], FlattenError::Unsupported("dynamic linking")),
            (2, IMAGE_GPA, vec![code(), tls], FlattenError::Unsupported("thread-local storage")),
            (2, next, vec![code()], FlattenError::BadEntry(next)),
            (2, next, vec![code(), load(R, next, b"x", 1)], FlattenError::BadEntry(next)),
            (
                2,
                IMAGE_GPA,
                vec![load(7, IMAGE_GPA, b"x", 1)],
                FlattenError::WriteExecute { address: IMAGE_GPA },
            ),
            (
                2,
                IMAGE_GPA,
                vec![code(), load(RW, IMAGE_GPA + 4, b"x", 1)],
                FlattenError::SharedPage { address: IMAGE_GPA + 4 },
            ),
            (
                2,
                0x1000,
                vec![load(RX, 0x1000, b"x", 1)],
                FlattenError::OutOfRange { address: 0x1000 },
            ),
            (
                2,
                IMAGE_GPA,
                vec![load(RX, IMAGE_GPA, b"x", u64::MAX)],
                FlattenError::OutOfRange { address: IMAGE_GPA },
            ),
        ];
        for (kind, entry, loads, error) in cases {
            assert_eq!(flatten(&elf_file(kind, entry, &loads)), Err(error));
        }
        assert!(matches!(flatten(b"no ELF at all"), Err(FlattenError::NotElf(_))));
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

        /// A damaged file is refused or makes a sound image; it never makes us panic.
        #[test]
        fn damaged_files_never_make_an_unsound_image(
            damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
            cut in any::<prop::sample::Index>(),
        ) {
            let mut file = elf_file(2, IMAGE_GPA, &typical());
            for (at, value) in damage {
                let at = at.index(file.len());
                file[at] = value;
            }
            file.truncate(file.len() - cut.index(64));
            if let Ok(image) = flatten(&file) {
                prop_assert!(ImageHeader::check(&image).is_ok());
            }
        }
    }
}
