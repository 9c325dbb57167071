//! What a sector of 512 bytes says about itself.
//!
//! | bytes    | field        | meaning                                                      |
//! |----------|--------------|--------------------------------------------------------------|
//! | 0..8     | `magic`      | [`MAGIC`]                                                    |
//! | 8..16    | `disk`       | a number for the disk                                        |
//! | 16..24   | `run`        | a number for the run                                         |
//! | 24..32   | `sector`     | where on the disk it belongs                                 |
//! | 32..36   | `generation` | which request wrote it, from 1                               |
//! | 36..40   | –            | 0                                                            |
//! | 40..508  | –            | a pattern made of the fields above                           |
//! | 508..512 | `crc`        | CRC-32 (ISO-HDLC) of bytes 0..508                            |
//!
//! So a sector that was lost, misplaced, mixed from two or altered shows what happened to it.

use crc::{CRC_32_ISO_HDLC, Crc, Table};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bytes of a sector.
pub const SECTOR: usize = 512;
/// First word of a sector: "AXDISKT1".
pub const MAGIC: u64 = u64::from_le_bytes(*b"AXDISKT1");
const CRC_AT: usize = SECTOR - 4;
const CRC: Crc<u32, Table<16>> = Crc::<u32, Table<16>>::new(&CRC_32_ISO_HDLC);

/// A sector's fields.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Header {
    /// [`MAGIC`].
    pub magic: u64,
    /// Which disk.
    pub disk: u64,
    /// Which run.
    pub run: u64,
    /// Where on the disk.
    pub sector: u64,
    /// Which request wrote it, from 1.
    pub generation: u32,
    /// 0.
    pub zero: u32,
}
const HEADER: usize = size_of::<Header>();
const _: () = assert!(HEADER == 40);

/// Which sectors belong to a run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Owner {
    /// The disk's number.
    pub disk: u64,
    /// The run's.
    pub run: u64,
}

/// What a sector holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Content {
    /// Zeros throughout.
    Zeros,
    /// A whole sector of ours; its fields.
    Whole(Header),
    /// It begins like one of ours, but the checksum is wrong: parts of it are something else.
    Torn(Header),
    /// Nothing of ours.
    Foreign,
}

/// The checksum of `bytes`, also used by the log.
#[must_use]
pub fn crc32(bytes: &[u8]) -> u32 {
    static TABLE: Crc<u32, Table<16>> = CRC;
    TABLE.checksum(bytes)
}

/// Makes the content of `sector`, as request `generation` writes it.
#[must_use]
pub fn compose(owner: Owner, sector: u64, generation: u32) -> [u8; SECTOR] {
    let Owner { disk, run } = owner;
    let header = Header { magic: MAGIC, disk, run, sector, generation, zero: 0 };
    let mut bytes = [0; SECTOR];
    bytes[..HEADER].copy_from_slice(header.as_bytes());
    let mut word = mix(disk ^ run.rotate_left(17) ^ sector << 32 ^ u64::from(generation));
    for place in bytes[HEADER..].as_chunks_mut::<8>().0 {
        word = word.wrapping_mul(0xd134_2543_de82_ef95).wrapping_add(1);
        *place = word.to_le_bytes();
    }
    let crc = crc32(&bytes[..CRC_AT]);
    bytes[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// Spreads a number over all bits (the output function of SplitMix64).
#[must_use]
pub const fn mix(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Says what a sector holds.
///
/// # Panics
/// When `bytes` is no sector.
#[must_use]
pub fn classify(bytes: &[u8]) -> Content {
    assert_eq!(bytes.len(), SECTOR, "a sector has 512 bytes");
    // The length was checked.
    let Ok((header, _)) = Header::read_from_prefix(bytes) else { return Content::Foreign };
    if header.magic != MAGIC {
        let zeros = bytes.iter().all(|byte| *byte == 0);
        return if zeros { Content::Zeros } else { Content::Foreign };
    }
    match crc32(&bytes[..CRC_AT]).to_le_bytes() == bytes[CRC_AT..] {
        true => Content::Whole(header),
        false => Content::Torn(header),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWNER: Owner = Owner { disk: 51712, run: 77 };

    #[test]
    fn a_sector_says_what_it_is() {
        let bytes = compose(OWNER, 12345, 9);
        let Content::Whole(header) = classify(&bytes) else { panic!("not whole") };
        assert_eq!((header.disk, header.run), (51712, 77));
        assert_eq!((header.sector, header.generation), (12345, 9));
        assert_eq!(&bytes[..8], b"AXDISKT1");
        assert_eq!(classify(&[0; SECTOR]), Content::Zeros);
        assert_eq!(classify(&[1; SECTOR]), Content::Foreign);
    }

    /// Any single byte that differs shows.
    #[test]
    fn no_byte_can_change_unseen() {
        let whole = compose(OWNER, 5, 6);
        for at in 0..SECTOR {
            let mut bytes = whole;
            bytes[at] ^= 1;
            let seen = classify(&bytes);
            assert!(matches!(seen, Content::Torn(_) | Content::Foreign), "byte {at}: {seen:?}");
        }
        let mut half = whole;
        half[256..].copy_from_slice(&compose(OWNER, 5, 7)[256..]);
        assert!(matches!(classify(&half), Content::Torn(_)));
    }
}
