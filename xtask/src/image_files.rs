//! The demo guest's disk: a tar archive of the files in `guests/demo/files`, of one large file that
//! is made here, and of everybody's SHA-256.
//!
//! The image is the archive itself: `tar -tvf` lists it on any host. Same files, same bytes.

use crate::project;
use miette::{IntoDiagnostic, WrapErr};
use sha2::{Digest, Sha256};
use std::fmt::Write as _;
use std::path::Path;

/// Name of the large file on the disk.
pub const PATTERN: &str = "pattern-64M.bin";
/// Its bytes.
pub const PATTERN_BYTES: usize = 64 << 20;
/// Its SHA-256.
pub const PATTERN_SHA256: &str = "2983377f15b061c5035db8fbd6bdfdc5d03db9e366beeb802788dd7861648efe";
/// Name of the list of checksums on the disk, in the format of `sha256sum`.
pub const CHECKSUMS: &str = "SHA256SUMS";
/// The image is so many bytes, or a multiple.
const ROUND: usize = 1 << 20;

/// The large file: words of eight bytes, lowest byte first, of which no two are alike. Word *k* is
/// what the demo guest sends at `/bytes/N`: the output function of SplitMix64 for the state *k*
/// times gamma.
#[must_use]
pub fn pattern(bytes: usize) -> Vec<u8> {
    let word = |k: u64| {
        let mut z = k.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let mut pattern = vec![0; bytes.next_multiple_of(8)];
    for (k, place) in (0..).zip(pattern.as_chunks_mut().0) {
        *place = word(k).to_le_bytes();
    }
    pattern.truncate(bytes);
    pattern
}

/// The SHA-256 of some bytes, in hexadecimal.
#[must_use]
pub fn sha256(bytes: &[u8]) -> String {
    let mut text = String::new();
    for byte in Sha256::digest(bytes) {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// A file of the disk.
struct File {
    name: String,
    bytes: Vec<u8>,
    sha256: String,
}

impl File {
    fn new((name, bytes): (String, Vec<u8>)) -> Self {
        let sha256 = sha256(&bytes);
        Self { name, bytes, sha256 }
    }
}

/// The image of the demo guest's disk.
///
/// # Errors
/// The files cannot be read.
pub fn demo_files() -> miette::Result<Vec<u8>> {
    let folder = project::root().join("guests/demo/files");
    let files = read_folder(&folder)
        .into_diagnostic()
        .wrap_err_with(|| format!("cannot read {}", folder.display()))?;
    let mut files: Vec<File> = files.into_iter().map(File::new).collect();
    let (name, bytes, sha256) = (PATTERN.into(), pattern(PATTERN_BYTES), PATTERN_SHA256.into());
    files.push(File { name, bytes, sha256 });
    archive(files).into_diagnostic()
}

/// The files of a folder, by name; no folders in it.
fn read_folder(folder: &Path) -> std::io::Result<Vec<(String, Vec<u8>)>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            let name = entry.file_name().to_string_lossy().into_owned();
            files.push((name, std::fs::read(entry.path())?));
        }
    }
    files.sort();
    Ok(files)
}

/// An archive of files, behind the list of their checksums.
fn archive(files: Vec<File>) -> std::io::Result<Vec<u8>> {
    let sums: String = files.iter().map(|it| format!("{}  {}\n", it.sha256, it.name)).collect();
    let sums = File::new((CHECKSUMS.into(), sums.into_bytes()));
    let mut builder = tar::Builder::new(Vec::new());
    for File { name, bytes, .. } in std::iter::once(&sums).chain(&files) {
        let mut header = tar::Header::new_ustar();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o444);
        header.set_mtime(0);
        builder.append_data(&mut header, name, bytes.as_slice())?;
    }
    let mut image = builder.into_inner()?;
    image.resize(image.len().next_multiple_of(ROUND), 0);
    Ok(image)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn the_pattern_is_what_is_written_down() {
        assert_eq!(sha256(&pattern(PATTERN_BYTES)), PATTERN_SHA256);
    }

    #[test]
    fn the_image_is_an_archive_with_right_checksums() {
        let files = vec![("a.txt".to_owned(), b"abc".to_vec()), ("b".to_owned(), vec![7; 5000])];
        let make = || archive(files.iter().cloned().map(File::new).collect()).expect("in memory");
        let image = make();
        assert!(image.len().is_multiple_of(ROUND));
        assert_eq!(image, make(), "same files, same bytes");
        let mut found = Vec::new();
        for entry in tar::Archive::new(image.as_slice()).entries().expect("an archive") {
            let mut entry = entry.expect("an entry");
            let name = entry.path().expect("a name").to_string_lossy().into_owned();
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).expect("whole");
            found.push((name, bytes));
        }
        assert_eq!(found[1..], files);
        let sums = String::from_utf8(found[0].1.clone()).expect("text");
        // Of "abc", as FIPS 180-4's example has it.
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad  a.txt\n";
        assert!(sums.starts_with(abc) && sums.lines().count() == 2);
    }
}
