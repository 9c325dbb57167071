//! bzImage: a setup part, and a compressed ELF file behind it.
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0x1f1 | 1 | sectors of the setup part; 0 means 4 |
//! | 0x1fe | 2 | 0x55 0xaa |
//! | 0x202 | 4 | "HdrS" |
//! | 0x206 | 2 | version of the boot protocol |
//! | 0x248 | 4 | start of the payload, from the end of the setup part |
//! | 0x24c | 4 | bytes of it |
//!
//! The last four bytes of a payload are the size of what is in it, but for gzip, which has that
//! at its own end anyway.

use crate::KernelError;
use std::io::Read;

/// Most bytes that a kernel may unpack to.
const MAX_BYTES: u64 = 1 << 30;
/// Bytes of one block in LZ4's legacy format.
const LZ4_BLOCK: usize = 8 << 20;

pub(crate) fn is_bzimage(file: &[u8]) -> bool {
    file.get(0x1fe..0x200) == Some(&[0x55, 0xaa]) && file.get(0x202..0x206) == Some(b"HdrS")
}

fn word(file: &[u8], at: usize) -> Option<usize> {
    let bytes = file.get(at..at.checked_add(4)?)?.try_into().ok()?;
    usize::try_from(u32::from_le_bytes(bytes)).ok()
}

/// The ELF file in a bzImage.
pub(crate) fn payload(file: &[u8]) -> Result<Vec<u8>, KernelError> {
    let truncated = KernelError::Truncated("setup header");
    let header = file.get(..0x250).ok_or(truncated.clone())?;
    let version = u16::from_le_bytes([header[0x206], header[0x207]]);
    if version < 0x208 {
        return Err(KernelError::Old(version));
    }
    let sectors = match header[0x1f1] {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let offset = word(header, 0x248).ok_or(truncated.clone())?;
    let len = word(header, 0x24c).ok_or(truncated)?;
    let start = (sectors + 1) * 512 + offset;
    let packed = file.get(start..).and_then(|rest| rest.get(..len));
    unpack(packed.ok_or(KernelError::Truncated("payload"))?)
}

fn unpack(packed: &[u8]) -> Result<Vec<u8>, KernelError> {
    let magic: [u8; 4] =
        packed.get(..4).and_then(|m| m.try_into().ok()).ok_or(KernelError::Truncated("payload"))?;
    let without_size = &packed[..packed.len() - 4];
    match magic {
        [0x1f, 0x8b, ..] => read_all(flate2::read::GzDecoder::new(packed)),
        [0x02, 0x21, 0x4c, 0x18] => lz4(&without_size[4..]),
        [0xfd, b'7', b'z', b'X'] => read_all(lzma_rust2::XzReader::new(without_size, false)),
        [0x28, 0xb5, 0x2f, 0xfd] => {
            let decoder = ruzstd::decoding::StreamingDecoder::new(without_size);
            read_all(decoder.map_err(|error| KernelError::Payload(error.to_string()))?)
        }
        _ => Err(KernelError::Compression(magic)),
    }
}

fn read_all(reader: impl Read) -> Result<Vec<u8>, KernelError> {
    let mut bytes = Vec::new();
    let read = reader.take(MAX_BYTES).read_to_end(&mut bytes);
    read.map_err(|error| KernelError::Payload(error.to_string()))?;
    Ok(bytes)
}

/// LZ4's legacy format behind its magic: blocks, each with its size before it.
fn lz4(mut packed: &[u8]) -> Result<Vec<u8>, KernelError> {
    let mut bytes = Vec::new();
    while !packed.is_empty() {
        let len = word(packed, 0).ok_or(KernelError::Truncated("block"))?;
        let block = packed[4..].get(..len).ok_or(KernelError::Truncated("block"))?;
        let before = bytes.len();
        bytes.resize(before + LZ4_BLOCK, 0);
        let unpacked = lz4_flex::block::decompress_into(block, &mut bytes[before..]);
        let unpacked = unpacked.map_err(|error| KernelError::Payload(error.to_string()))?;
        bytes.truncate(before + unpacked);
        packed = &packed[4 + len..];
        if bytes.len() as u64 > MAX_BYTES {
            return Err(KernelError::Payload("too large".into()));
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    /// A bzImage with a payload.
    fn bzimage(payload: &[u8]) -> Vec<u8> {
        let mut file = vec![0; 1024];
        file[0x1f1] = 1;
        file[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
        file[0x202..0x206].copy_from_slice(b"HdrS");
        file[0x206..0x208].copy_from_slice(&[0x0f, 2]);
        file[0x248..0x24c].copy_from_slice(&8_u32.to_le_bytes());
        let len = u32::try_from(payload.len()).expect("small");
        file[0x24c..0x250].copy_from_slice(&len.to_le_bytes());
        file.extend_from_slice(&[0xee; 8]);
        file.extend_from_slice(payload);
        file
    }

    fn text() -> Vec<u8> {
        (0..100_000_u32).flat_map(|n| (n / 7).to_le_bytes()).collect()
    }

    #[test]
    fn gzip_is_unpacked() {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(&text()).expect("memory");
        let file = bzimage(&encoder.finish().expect("memory"));
        assert!(is_bzimage(&file));
        assert_eq!(payload(&file), Ok(text()));
    }

    #[test]
    fn blocks_of_lz4_follow_each_other() {
        let mut packed = vec![0x02, 0x21, 0x4c, 0x18];
        for part in text().chunks(150_000) {
            let block = lz4_flex::block::compress(part);
            packed.extend_from_slice(&u32::try_from(block.len()).expect("small").to_le_bytes());
            packed.extend_from_slice(&block);
        }
        packed.extend_from_slice(&u32::try_from(text().len()).expect("small").to_le_bytes());
        assert_eq!(payload(&bzimage(&packed)), Ok(text()));
    }

    /// As Linux packs itself: by `zstd -22 --ultra` from a pipe, whose window is 128 MiB for any size.
    #[test]
    fn zstd_with_its_largest_window_is_unpacked() {
        let level = ruzstd::encoding::CompressionLevel::Fastest;
        let mut file = ruzstd::encoding::compress_to_vec(&text()[..], level);
        // RFC 8878, section 3.1.1.1.
        assert_eq!(file[4] & 0xe3, 0, "the header has no size and no dictionary, but a window");
        file[5] = (27 - 10) << 3;
        file.extend_from_slice(&u32::try_from(text().len()).expect("small").to_le_bytes());
        assert_eq!(payload(&bzimage(&file)), Ok(text()));
    }

    #[test]
    fn what_is_damaged_or_unknown_is_refused() {
        assert_eq!(payload(&bzimage(&[1, 2, 3, 4])), Err(KernelError::Compression([1, 2, 3, 4])));
        let lz4 = [0x02, 0x21, 0x4c, 0x18, 0xff, 0, 0, 0, 1, 2, 3, 4, 5];
        assert_eq!(payload(&bzimage(&lz4)), Err(KernelError::Truncated("block")));
        let mut old = bzimage(&[0; 8]);
        old[0x206] = 7;
        assert_eq!(payload(&old), Err(KernelError::Old(0x207)));
        let whole = bzimage(&[0; 8]);
        assert_eq!(payload(&whole[..whole.len() - 1]), Err(KernelError::Truncated("payload")));
    }
}
