//! The ELF file of a kernel, of either class: what is loaded where, and where it begins.

use crate::KernelError;
use crate::flat::{self, Piece};
use axolotl_abi::image::MAX_SEGMENTS;

const PT_LOAD: u64 = 1;
const PT_NOTE: u64 = 4;
/// Type of the note with the physical address of the PVH entry, of owner "Xen".
const NOTE_ENTRY: u64 = 18;
const PAGE: u64 = 4096;

/// A file whose numbers have one of two widths.
struct File<'a> {
    bytes: &'a [u8],
    is_wide: bool,
}

/// A program header.
struct Program {
    kind: u64,
    offset: u64,
    address: u64,
    file_bytes: u64,
    memory_bytes: u64,
}

impl<'a> File<'a> {
    fn parse(bytes: &'a [u8]) -> Result<Self, KernelError> {
        match bytes.get(..6) {
            // Little-endian only.
            Some([0x7f, b'E', b'L', b'F', class @ (1 | 2), 1]) => {
                Ok(Self { bytes, is_wide: *class == 2 })
            }
            _ => Err(KernelError::Unknown),
        }
    }

    /// The number of `len` bytes at an offset.
    fn number(&self, at: u64, len: usize) -> Option<u64> {
        let start = usize::try_from(at).ok()?;
        let mut raw = [0; 8];
        raw[..len].copy_from_slice(self.bytes.get(start..start.checked_add(len)?)?);
        Some(u64::from_le_bytes(raw))
    }

    /// A number that is a word of the file's class.
    fn word(&self, narrow: u64, wide: u64, base: u64) -> Option<u64> {
        let (at, len) = if self.is_wide { (wide, 8) } else { (narrow, 4) };
        self.number(base.checked_add(at)?, len)
    }

    fn part(&self, offset: u64, len: u64) -> Option<&'a [u8]> {
        let start = usize::try_from(offset).ok()?;
        self.bytes.get(start..start.checked_add(usize::try_from(len).ok()?)?)
    }

    fn programs(&self) -> Option<Vec<Program>> {
        let table = self.word(0x1c, 0x20, 0)?;
        let (size, count) = if self.is_wide { (0x36, 0x38) } else { (0x2a, 0x2c) };
        let (size, count) = (self.number(size, 2)?, self.number(count, 2)?);
        (0..count)
            .map(|index| {
                let base = table.checked_add(index * size)?;
                Some(Program {
                    kind: self.number(base, 4)?,
                    offset: self.word(0x04, 0x08, base)?,
                    address: self.word(0x0c, 0x18, base)?,
                    file_bytes: self.word(0x10, 0x20, base)?,
                    memory_bytes: self.word(0x14, 0x28, base)?,
                })
            })
            .collect()
    }

    /// The entry that a note names, of 4 or 8 bytes.
    fn entry_in(&self, program: &Program) -> Option<u64> {
        let mut at = program.offset;
        let end = program.offset.checked_add(program.file_bytes)?;
        while at < end {
            let (owner, len) = (self.number(at, 4)?, self.number(at + 4, 4)?);
            let kind = self.number(at + 8, 4)?;
            let name = at + 12;
            let content = name.checked_add(owner.next_multiple_of(4))?;
            if kind == NOTE_ENTRY && self.part(name, owner)? == b"Xen\0" && matches!(len, 4 | 8) {
                return self.number(content, usize::try_from(len).ok()?);
            }
            at = content.checked_add(len.next_multiple_of(4))?;
        }
        None
    }
}

/// The flat image of an ELF kernel.
pub(crate) fn flatten(elf: &[u8]) -> Result<Vec<u8>, KernelError> {
    let file = File::parse(elf)?;
    let programs = file.programs().ok_or(KernelError::Truncated("program headers"))?;
    let mut notes = programs.iter().filter(|program| program.kind == PT_NOTE);
    let entry = notes.find_map(|program| file.entry_in(program)).ok_or(KernelError::NoEntry)?;
    let mut pieces = Vec::new();
    for program in programs.iter().filter(|p| p.kind == PT_LOAD && p.memory_bytes > 0) {
        pieces.push(piece(&file, program)?);
    }
    pieces.sort_by_key(|piece| piece.gfn);
    let end = |piece: &Piece<'_>| piece.gfn + u64::from(piece.pages);
    if pieces.windows(2).any(|pair| end(&pair[0]) > pair[1].gfn) {
        return Err(KernelError::Layout("share a page"));
    }
    if pieces.is_empty() || pieces.len() > MAX_SEGMENTS as usize {
        return Err(KernelError::Layout("are too many, or none"));
    }
    if !pieces.iter().any(|piece| (piece.gfn..end(piece)).contains(&(entry / PAGE))) {
        return Err(KernelError::Layout("do not hold its entry"));
    }
    Ok(flat::write(entry, &pieces))
}

fn piece<'a>(file: &File<'a>, program: &Program) -> Result<Piece<'a>, KernelError> {
    let end = program.address.checked_add(program.memory_bytes).filter(|&end| end <= 1 << 32);
    let end = end.ok_or(KernelError::Layout("leave the first 4 GiB"))?;
    if program.file_bytes > program.memory_bytes || program.address < PAGE {
        return Err(KernelError::Layout("are at no place for a kernel"));
    }
    let bytes = file.part(program.offset, program.file_bytes);
    let gfn = program.address / PAGE;
    Ok(Piece {
        gfn,
        pages: u32::try_from(end.div_ceil(PAGE) - gfn).unwrap_or(u32::MAX),
        lead: usize::try_from(program.address % PAGE).unwrap_or(0),
        bytes: bytes.ok_or(KernelError::Truncated("segments"))?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use axolotl_abi::image::ImageHeader;
    use proptest::prelude::*;

    /// A kernel of one class with one segment at 1 MiB and the note that names its entry.
    fn sample(is_wide: bool) -> Vec<u8> {
        let mut file = vec![0; 0x1000];
        file[..6].copy_from_slice(&[0x7f, b'E', b'L', b'F', 1 + u8::from(is_wide), 1]);
        let mut put = |at: usize, value: u64, len: usize| {
            file[at..at + len].copy_from_slice(&value.to_le_bytes()[..len]);
        };
        let (word, size) = if is_wide { (8, 0x38) } else { (4, 0x20) };
        put(if is_wide { 0x20 } else { 0x1c }, 0x40, word);
        put(if is_wide { 0x36 } else { 0x2a }, size, 2);
        put(if is_wide { 0x38 } else { 0x2c }, 2, 2);
        for (index, [kind, offset, address, file_bytes, memory_bytes]) in
            (0..).zip([[1, 0x800, 0x10_0010, 0x100, 0x2000], [4, 0x400, 0, 0x18, 0x18]])
        {
            let base = 0x40 + index * usize::try_from(size).expect("small");
            let at = |narrow: usize, wide: usize| base + if is_wide { wide } else { narrow };
            put(base, kind, 4);
            put(at(0x04, 0x08), offset, word);
            put(at(0x0c, 0x18), address, word);
            put(at(0x10, 0x20), file_bytes, word);
            put(at(0x14, 0x28), memory_bytes, word);
        }
        put(0x400, 4, 4);
        put(0x404, word as u64, 4);
        put(0x408, 18, 4);
        put(0x40c, u64::from(u32::from_le_bytes(*b"Xen\0")), 4);
        put(0x410, 0x10_0020, word);
        file[0x800..0x900].fill(0x5a);
        file
    }

    #[test]
    fn kernels_of_both_classes_become_images() {
        for is_wide in [false, true] {
            let flat = flatten(&sample(is_wide)).expect("a kernel");
            // As its readers want it: at an address of a page.
            let mut words = vec![0_u64; flat.len() / 8];
            zerocopy::IntoBytes::as_mut_bytes(words.as_mut_slice()).copy_from_slice(&flat);
            let flat = zerocopy::IntoBytes::as_bytes(words.as_slice());
            let (header, segments) = ImageHeader::check(flat).expect("a sound image");
            assert_eq!(header.entry, 0x10_0020);
            let [only] = segments else { panic!("one segment") };
            assert_eq!((only.gfn, only.pages, only.file_bytes), (0x100, 3, 0x110));
            let start = usize::try_from(only.file_offset).expect("small");
            assert_eq!(flat[start..start + 0x10], [0; 0x10]);
            assert_eq!(flat[start + 0x10..start + 0x110], [0x5a; 0x100]);
        }
    }

    #[test]
    fn what_cannot_run_is_refused() {
        assert_eq!(flatten(b"#!/bin/sh"), Err(KernelError::Unknown));
        let mut file = sample(true);
        file[0x408] = 17;
        assert_eq!(flatten(&file), Err(KernelError::NoEntry));
        let mut file = sample(true);
        file[0x412] = 0x20;
        assert_eq!(flatten(&file), Err(KernelError::Layout("do not hold its entry")));
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

        /// Whatever the headers say, nothing outside of the file is read.
        #[test]
        fn damaged_files_are_refused_or_sound(
            is_wide: bool,
            damage in prop::collection::vec((6_usize..0x420, any::<u8>()), 1..6),
        ) {
            let mut file = sample(is_wide);
            for (at, value) in damage {
                file[at] = value;
            }
            let _ = flatten(&file);
        }
    }
}
