//! Headers of tar archives, as far as an archive of plain files has them.
//!
//! | bytes    | field      | meaning                                                     |
//! |----------|------------|-------------------------------------------------------------|
//! | 0..100   | `name`     | ends with 0 if it is shorter                                |
//! | 124..136 | `size`     | octal digits                                                |
//! | 148..156 | `chksum`   | octal digits: the sum of all bytes, these taken as blanks   |
//! | 156      | `typeflag` | `0` or 0: a file                                            |
//! | 257..263 | `magic`    | `ustar` and 0, or for GNU's tar a blank                     |
//! | 345..500 | `prefix`   | goes before the name, with a slash                          |
//!
//! The data follow in whole sectors, then the next header; two sectors of zeros end the archive.
//! The `tar-no-std` crate wants a whole archive in memory; ours is larger than the memory.
//!
//! Source: POSIX.1-2024, pax, "ustar Interchange Format".

use alloc::string::String;

/// Bytes of a header, and the unit of everything.
pub const SECTOR: usize = 512;

/// What a header says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Header {
    /// A file, and its data behind the header.
    File {
        /// Its name.
        name: String,
        /// Its bytes.
        bytes: u64,
    },
    /// Something else, with so many bytes of data behind the header.
    Other {
        /// How many.
        bytes: u64,
    },
    /// The archive's end.
    End,
}

/// This is no tar archive, or a damaged one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NoTar;

/// Reads a header.
///
/// # Errors
/// The checksum is wrong, or a field is not what it should be.
pub fn header(sector: &[u8; SECTOR]) -> Result<Header, NoTar> {
    if sector.iter().all(|byte| *byte == 0) {
        return Ok(Header::End);
    }
    let sum =
        |(at, byte): (usize, &u8)| u64::from(if (148..156).contains(&at) { b' ' } else { *byte });
    let ustar = matches!(&sector[257..263], b"ustar\0" | b"ustar ");
    if !ustar || octal(&sector[148..156])? != sector.iter().enumerate().map(sum).sum::<u64>() {
        return Err(NoTar);
    }
    let bytes = octal(&sector[124..136])?;
    if !matches!(sector[156], b'0' | 0) {
        return Ok(Header::Other { bytes });
    }
    let mut name = String::from(text(&sector[345..500])?);
    // GNU's format keeps other things there.
    if &sector[257..263] == b"ustar " {
        name.clear();
    } else if !name.is_empty() {
        name.push('/');
    }
    name.push_str(text(&sector[..100])?);
    Ok(Header::File { name, bytes })
}

/// Sectors that data of this length take.
#[must_use]
pub const fn sectors(bytes: u64) -> u64 {
    bytes.div_ceil(SECTOR as u64)
}

fn text(field: &[u8]) -> Result<&str, NoTar> {
    let end = field.iter().position(|byte| *byte == 0).unwrap_or(field.len());
    core::str::from_utf8(&field[..end]).map_err(|_| NoTar)
}

fn octal(field: &[u8]) -> Result<u64, NoTar> {
    let digits = text(field)?.trim_matches(' ');
    if digits.starts_with('+') {
        return Err(NoTar);
    }
    u64::from_str_radix(digits, 8).map_err(|_| NoTar)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec::Vec;

    /// An archive of these files, as the crate writes it that makes the demo's disk.
    pub(crate) fn archive(files: &[(&str, Vec<u8>)]) -> Vec<u8> {
        let mut builder = ::tar::Builder::new(Vec::new());
        for (name, content) in files {
            let mut header = ::tar::Header::new_ustar();
            header.set_size(content.len() as u64);
            header.set_mode(0o644);
            builder.append_data(&mut header, name, content.as_slice()).expect("a valid name");
        }
        builder.into_inner().expect("in memory")
    }

    fn first(archive: &[u8]) -> Result<Header, NoTar> {
        header(archive[..SECTOR].try_into().expect("a sector"))
    }

    #[test]
    fn what_the_tar_crate_writes_is_read() {
        let long = format!("{}/{}", "d".repeat(90), "f".repeat(90));
        for (name, len) in [("a.txt", 0), ("b", 511), (long.as_str(), 70_000)] {
            let archive = archive(&[(name, vec![7; len])]);
            let found = first(&archive);
            assert_eq!(found, Ok(Header::File { name: name.into(), bytes: len as u64 }));
            let next = SECTOR * (1 + usize::try_from(sectors(len as u64)).unwrap());
            assert_eq!(first(&archive[next..]), Ok(Header::End));
        }
    }

    #[test]
    fn directories_are_something_else() {
        let mut header = ::tar::Header::new_gnu();
        header.set_entry_type(::tar::EntryType::Directory);
        header.set_path("x/").unwrap();
        header.set_size(0);
        header.set_cksum();
        assert_eq!(super::header(header.as_bytes()), Ok(Header::Other { bytes: 0 }));
    }

    #[test]
    fn a_damaged_header_is_refused() {
        let archive = archive(&[("name", vec![1; 9])]);
        for at in (0..SECTOR).filter(|at| !(500..512).contains(at)) {
            let mut damaged = archive.clone();
            damaged[at] ^= 0x15;
            assert_ne!(first(&damaged), first(&archive), "byte {at}");
        }
    }

    proptest! {
        #[test]
        fn no_sector_is_too_strange(
            noise in prop::collection::vec((0_usize..SECTOR, any::<u8>()), 0..64),
        ) {
            let mut bytes = archive(&[("name", vec![1; 9])]);
            for (at, value) in noise {
                bytes[at] = value;
            }
            let _ = first(&bytes);
        }
    }
}
