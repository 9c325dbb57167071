//! The format on the medium: header, table entries, and the parts of a new image.
//!
//! All numbers are big-endian. The header's fields, of version 3:
//!
//! | bytes    | field                     | here                                                  |
//! |----------|---------------------------|-------------------------------------------------------|
//! | 0..4     | magic                     | [`MAGIC`]                                             |
//! | 4..8     | version                   | 3                                                     |
//! | 8..16    | backing file name: offset | 0: none                                               |
//! | 16..20   | its length                |                                                       |
//! | 20..24   | cluster bits              | 12 to 21: clusters of 4 KiB to 2 MiB                  |
//! | 24..32   | virtual size in bytes     | whole sectors of 512                                  |
//! | 32..36   | encryption                | 0                                                     |
//! | 36..40   | entries of the L1 table   | enough for the virtual size                           |
//! | 40..48   | its offset                |                                                       |
//! | 48..56   | refcount table: offset    |                                                       |
//! | 56..60   | its clusters              |                                                       |
//! | 60..64   | internal snapshots        | left alone                                            |
//! | 64..72   | their table's offset      |                                                       |
//! | 72..80   | incompatible features     | none but "dirty" and "corrupt", see [`Header::usable`]|
//! | 80..88   | compatible features       | not looked at                                         |
//! | 88..96   | autoclear features        | must be none for writing                              |
//! | 96..100  | refcount order            | 4 (16 bits) for writing                               |
//! | 100..104 | length of the header      | at least 104; extensions follow                       |
//!
//! Source: `docs/interop/qcow2.txt` of QEMU.

use alloc::vec;
use alloc::vec::Vec;
use core::fmt;

/// First word of an image: "QFI" and 0xfb.
pub const MAGIC: u32 = 0x5146_49fb;
/// Cluster sizes, as powers of two.
pub const CLUSTER_BITS: core::ops::RangeInclusive<u32> = 12..=21;
/// The usual cluster size: 64 KiB.
pub const USUAL_CLUSTER_BITS: u32 = 16;
/// Most entries of the L1 table, and of the refcount table as far as it is about clusters of the
/// volume: they are held in memory.
pub const MOST_TABLE_ENTRIES: u64 = 1 << 17;
/// Largest refcount table, in bytes: QEMU takes no larger one.
const MOST_REFTABLE: u64 = 8 << 20;
/// Largest virtual disk, in bytes.
pub const MOST_BYTES: u64 = 1 << 50;
/// Longest name of a backing file, in bytes.
pub const MOST_NAME: usize = 1023;
/// Bytes of the header that are looked at: the fields, and the extensions as far as they are here.
pub const HEADER_BYTES: usize = 4096;

/// Entry of the L1 or an L2 table: its cluster has no other user.
pub const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
/// Entry of an L2 table: reads as zeros.
pub const ZERO: u64 = 1;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

const DIRTY: u64 = 1;
const CORRUPT: u64 = 2;
const EXTERNAL_DATA: u64 = 4;
const COMPRESSION_TYPE: u64 = 8;
const EXTENDED_L2: u64 = 16;

const EXTENSION_END: u32 = 0;
const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;

/// Why something is no image that can be used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FormatError {
    /// It does not begin as an image does.
    NoImage,
    /// Another version than 3.
    Version(u32),
    /// Cluster size out of range.
    ClusterBits(u32),
    /// Virtual size: not whole sectors, or too large.
    Size(u64),
    /// Encrypted.
    Encrypted,
    /// Data in another file.
    ExternalData,
    /// Clusters compressed in another way than by default.
    CompressionType,
    /// Subclusters.
    ExtendedL2,
    /// Features that nobody here knows.
    Unknown(u64),
    /// Not closed in good order by a writer that keeps its refcounts in memory.
    Dirty,
    /// Features such as bitmaps that would have to be kept up to date.
    Autoclear(u64),
    /// Refcounts of another width than 16 bits.
    RefcountOrder(u32),
    /// The L1 table is shorter than the virtual size needs.
    ShortL1,
    /// L1 or refcount table larger than is held in memory.
    LargeTables,
    /// A header of an impossible length.
    HeaderLength(u32),
    /// A table that is not where a table can be: its name.
    Place(&'static str),
    /// A backing file name that is too long.
    Name,
    /// The volume is too small for the tables of a new image.
    NoRoom,
}

impl fmt::Display for FormatError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::NoImage => f.write_str("no qcow2 image there"),
            Self::Version(version) => {
                write!(f, "qcow2 version {version}; version 3 is needed (compat=1.1)")
            }
            Self::ClusterBits(bits) => {
                write!(f, "clusters of 2^{bits} bytes; 4 KiB to 2 MiB are supported")
            }
            Self::Size(bytes) => write!(f, "a virtual size of {bytes} bytes is not supported"),
            Self::Encrypted => f.write_str("encrypted images are not supported"),
            Self::ExternalData => {
                f.write_str("images with an external data file are not supported")
            }
            Self::CompressionType => f.write_str("only the default compression type is supported"),
            Self::ExtendedL2 => f.write_str("images with subclusters are not supported"),
            Self::Unknown(bits) => write!(f, "unknown incompatible features {bits:#x}"),
            Self::Dirty => f.write_str(
                "the image was not closed in good order: run `qemu-img check -r all` on it",
            ),
            Self::Autoclear(bits) => write!(
                f,
                "the image has bitmaps or other features {bits:#x} that a writer must know: \
                 remove them, or open it read-only"
            ),
            Self::RefcountOrder(order) => write!(
                f,
                "refcounts of {} bits: only 16 can be written (refcount_bits=16)",
                1_u64 << order.min(63)
            ),
            Self::ShortL1 => f.write_str("the L1 table is too short for the virtual size"),
            Self::LargeTables => f.write_str("the tables are too large: use larger clusters"),
            Self::HeaderLength(bytes) => write!(f, "a header of {bytes} bytes is impossible"),
            Self::Place(name) => write!(f, "the image is damaged: the {name} is not in it"),
            Self::Name => {
                write!(f, "the name of the backing file has more than {MOST_NAME} bytes")
            }
            Self::NoRoom => f.write_str("the volume is too small for the tables of the image"),
        }
    }
}

impl core::error::Error for FormatError {}

/// What the backing file is, as far as the image says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BackingFormat {
    /// Plain sectors. Also where nothing is said.
    Raw,
    /// An image.
    Qcow2,
    /// Something else.
    Other,
}

/// What the header says, with everything checked that can be checked without more of the image.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Header {
    /// Cluster size: 2 to the power of this.
    pub cluster_bits: u32,
    /// Virtual size, in bytes.
    pub size: u64,
    /// Entries of the L1 table.
    pub l1_entries: u32,
    /// Its place.
    pub l1_offset: u64,
    /// Place of the refcount table.
    pub reftable_offset: u64,
    /// Its clusters.
    pub reftable_clusters: u32,
    /// Internal snapshots.
    pub snapshots: u32,
    /// Their table's place.
    pub snapshots_offset: u64,
    /// Refcounts have 2 to the power of this bits.
    pub refcount_order: u32,
    /// Features that a reader must know.
    pub incompatible: u64,
    /// Features that a writer must know.
    pub autoclear: u64,
    /// Where the name of the backing file is, and its bytes; none when 0.
    pub backing_name: (u64, u32),
    /// What the backing file is.
    pub backing_format: BackingFormat,
}

pub(crate) fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).map_or(0, |it| u32::from_be_bytes([it[0], it[1], it[2], it[3]]))
}

pub(crate) fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from(be32(bytes, at)) << 32 | u64::from(be32(bytes, at + 4))
}

impl Header {
    /// Reads a header from the first [`HEADER_BYTES`] of an image.
    ///
    /// # Errors
    /// Anything but what only matters for writing, see [`Self::usable`].
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        if be32(bytes, 0) != MAGIC {
            return Err(FormatError::NoImage);
        }
        if be32(bytes, 4) != 3 {
            return Err(FormatError::Version(be32(bytes, 4)));
        }
        let length = be32(bytes, 100);
        if length < 104 || !length.is_multiple_of(8) || length as usize > bytes.len() {
            return Err(FormatError::HeaderLength(length));
        }
        let header = Self {
            cluster_bits: be32(bytes, 20),
            size: be64(bytes, 24),
            l1_entries: be32(bytes, 36),
            l1_offset: be64(bytes, 40),
            reftable_offset: be64(bytes, 48),
            reftable_clusters: be32(bytes, 56),
            snapshots: be32(bytes, 60),
            snapshots_offset: be64(bytes, 64),
            refcount_order: be32(bytes, 96),
            incompatible: be64(bytes, 72),
            autoclear: be64(bytes, 88),
            backing_name: (be64(bytes, 8), be32(bytes, 16)),
            backing_format: backing_format(bytes, length as usize),
        };
        if be32(bytes, 32) != 0 {
            return Err(FormatError::Encrypted);
        }
        header.features()?;
        header.sizes()?;
        Ok(header)
    }

    fn features(&self) -> Result<(), FormatError> {
        let known = [
            (EXTERNAL_DATA, FormatError::ExternalData),
            (COMPRESSION_TYPE, FormatError::CompressionType),
            (EXTENDED_L2, FormatError::ExtendedL2),
        ];
        match known.iter().find(|(bit, _)| self.incompatible & bit != 0) {
            Some(&(_, error)) => Err(error),
            None if self.incompatible & !(DIRTY | CORRUPT) != 0 => {
                Err(FormatError::Unknown(self.incompatible & !(DIRTY | CORRUPT)))
            }
            None => Ok(()),
        }
    }

    fn sizes(&self) -> Result<(), FormatError> {
        if !CLUSTER_BITS.contains(&self.cluster_bits) {
            return Err(FormatError::ClusterBits(self.cluster_bits));
        }
        if !self.size.is_multiple_of(512) || self.size > MOST_BYTES || self.size == 0 {
            return Err(FormatError::Size(self.size));
        }
        if self.refcount_order > 6 {
            return Err(FormatError::RefcountOrder(self.refcount_order));
        }
        let needed = self.size.div_ceil(1 << self.l1_shift());
        let reftable_bytes = u64::from(self.reftable_clusters) << self.cluster_bits;
        if u64::from(self.l1_entries) < needed {
            return Err(FormatError::ShortL1);
        }
        if u64::from(self.l1_entries) > MOST_TABLE_ENTRIES || reftable_bytes > MOST_REFTABLE {
            return Err(FormatError::LargeTables);
        }
        if self.backing_name.1 as usize > MOST_NAME {
            return Err(FormatError::Name);
        }
        Ok(())
    }

    /// Whether the image can be used; for reading only it can be worse than for writing. Returns
    /// whether it can be written after all.
    ///
    /// # Errors
    /// What must be mended before it is written.
    pub fn usable(&self, writable: bool) -> Result<bool, FormatError> {
        if !writable || self.incompatible & CORRUPT != 0 {
            return Ok(false);
        }
        if self.incompatible & DIRTY != 0 {
            return Err(FormatError::Dirty);
        }
        if self.autoclear != 0 {
            return Err(FormatError::Autoclear(self.autoclear));
        }
        if self.refcount_order != 4 {
            return Err(FormatError::RefcountOrder(self.refcount_order));
        }
        Ok(true)
    }

    /// Whether a writer found the image damaged and marked it.
    #[must_use]
    pub fn is_corrupt(&self) -> bool {
        self.incompatible & CORRUPT != 0
    }

    /// Whether a writer did not close it in good order.
    #[must_use]
    pub fn is_dirty(&self) -> bool {
        self.incompatible & DIRTY != 0
    }

    /// Whether the image wants something behind it.
    #[must_use]
    pub fn has_backing(&self) -> bool {
        self.backing_name.0 != 0 && self.backing_name.1 != 0
    }

    /// Bytes of a cluster.
    #[must_use]
    pub fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// An entry of the L1 table stands for 2 to the power of this bytes.
    #[must_use]
    pub fn l1_shift(&self) -> u32 {
        2 * self.cluster_bits - 3
    }

    /// Entries of an L2 table.
    #[must_use]
    pub fn l2_entries(&self) -> u64 {
        1 << (self.cluster_bits - 3)
    }

    /// Clusters that a refcount block of 16-bit refcounts describes.
    #[must_use]
    pub fn block_entries(&self) -> u64 {
        1 << (self.cluster_bits - 1)
    }

    /// Clusters of the L1 table.
    #[must_use]
    pub fn l1_clusters(&self) -> u64 {
        (u64::from(self.l1_entries) * 8).div_ceil(self.cluster()).max(1)
    }

    /// Checks that L1 and refcount table lie behind the header in an image of `bytes`, apart from
    /// each other.
    ///
    /// # Errors
    /// [`FormatError::Place`].
    pub fn places(&self, bytes: u64) -> Result<(), FormatError> {
        let inside = |offset: u64, clusters: u64| {
            offset.is_multiple_of(self.cluster())
                && offset >= self.cluster()
                && offset < bytes
                && clusters * self.cluster() <= bytes - offset
        };
        if !inside(self.l1_offset, self.l1_clusters()) {
            return Err(FormatError::Place("L1 table"));
        }
        let reftable = u64::from(self.reftable_clusters);
        if reftable == 0 || !inside(self.reftable_offset, reftable) {
            return Err(FormatError::Place("refcount table"));
        }
        let l1_end = self.l1_offset + self.l1_clusters() * self.cluster();
        let reftable_end = self.reftable_offset + reftable * self.cluster();
        if self.l1_offset < reftable_end && self.reftable_offset < l1_end {
            return Err(FormatError::Place("L1 table"));
        }
        Ok(())
    }
}

/// Looks for the extension that names the backing file's format.
fn backing_format(bytes: &[u8], length: usize) -> BackingFormat {
    let mut at = length;
    while at + 8 <= bytes.len() {
        let (kind, len) = (be32(bytes, at), be32(bytes, at + 4) as usize);
        let Some(data) = bytes.get(at + 8..).and_then(|rest| rest.get(..len)) else { break };
        match kind {
            EXTENSION_END => break,
            EXTENSION_BACKING_FORMAT => {
                return match data {
                    b"raw" | b"host_device" | b"file" => BackingFormat::Raw,
                    b"qcow2" => BackingFormat::Qcow2,
                    _ => BackingFormat::Other,
                };
            }
            _ => at += 8 + len.next_multiple_of(8),
        }
    }
    BackingFormat::Raw
}

/// What an entry of an L2 table says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Entry {
    /// Nothing: the backing file shines through, or zeros.
    Unallocated,
    /// Zeros; perhaps with a cluster kept for later.
    Zero {
        /// The cluster's offset, and whether it has no other user.
        kept: Option<(u64, bool)>,
    },
    /// A cluster of data.
    Data {
        /// Its offset.
        offset: u64,
        /// Whether it has no other user.
        copied: bool,
    },
    /// Compressed data.
    Compressed,
    /// No valid entry.
    Bad,
}

impl Entry {
    /// Takes an entry apart. An offset is valid when a whole cluster lies there behind the first
    /// one, and in front of `end`.
    #[must_use]
    pub fn parse(word: u64, cluster_bits: u32, end: u64) -> Self {
        if word & COMPRESSED != 0 {
            return Self::Compressed;
        }
        if word & !(COPIED | OFFSET | ZERO) != 0 {
            return Self::Bad;
        }
        let (offset, copied) = (word & OFFSET, word & COPIED != 0);
        if offset != 0 && !is_cluster(offset, cluster_bits, end) {
            return Self::Bad;
        }
        match (word & ZERO != 0, offset) {
            (true, 0) => Self::Zero { kept: None },
            (true, offset) => Self::Zero { kept: Some((offset, copied)) },
            (false, 0) => Self::Unallocated,
            (false, offset) => Self::Data { offset, copied },
        }
    }

    /// The cluster that the entry refers to, and whether it has no other user.
    #[must_use]
    pub fn cluster(self) -> Option<(u64, bool)> {
        match self {
            Self::Zero { kept } => kept,
            Self::Data { offset, copied } => Some((offset, copied)),
            Self::Unallocated | Self::Compressed | Self::Bad => None,
        }
    }
}

/// What an entry of the L1 table says: the offset of an L2 table, and whether it has no other user.
///
/// # Errors
/// `()`: no valid entry.
#[expect(clippy::result_unit_err, reason = "valid or not, nothing else is known")]
pub fn l1_entry(word: u64, cluster_bits: u32, end: u64) -> Result<Option<(u64, bool)>, ()> {
    let offset = word & OFFSET;
    if offset == 0 {
        return Ok(None);
    }
    if word & !(COPIED | OFFSET) != 0 || !is_cluster(offset, cluster_bits, end) {
        return Err(());
    }
    Ok(Some((offset, word & COPIED != 0)))
}

/// Whether a whole cluster lies at `offset`, behind the first one and in front of `end`.
#[must_use]
pub fn is_cluster(offset: u64, cluster_bits: u32, end: u64) -> bool {
    let cluster = 1 << cluster_bits;
    offset.is_multiple_of(cluster) && offset >= cluster && offset < end && end - offset >= cluster
}

/// What a new image shall be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Create<'a> {
    /// Virtual size in bytes, whole sectors of 512.
    pub size: u64,
    /// Clusters of 2 to the power of this bytes.
    pub cluster_bits: u32,
    /// Bytes that the image may come to take; where it is put has as many.
    pub extent: u64,
    /// Name and format of the backing file, for those who read the image by themselves.
    pub backing: Option<(&'a str, BackingFormat)>,
}

/// Something to write at the given offset.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Part {
    /// Where.
    pub offset: u64,
    /// What.
    pub bytes: Vec<u8>,
}

/// Bytes that an image of this virtual size takes when all of it has been written.
#[must_use]
pub fn full_extent(size: u64, cluster_bits: u32) -> u64 {
    let cluster = 1_u64 << cluster_bits;
    let data = size.div_ceil(cluster);
    let tables = data.div_ceil(cluster / 8);
    let l1 = tables.div_ceil(cluster / 8);
    let mut total = 1 + data + tables + l1;
    // Refcounts describe themselves too; one round more than it ever takes.
    for _ in 0..8 {
        let blocks = total.div_ceil(cluster / 2);
        let reftable = blocks.div_ceil(cluster / 8);
        total = 1 + data + tables + l1 + blocks + reftable;
    }
    total << cluster_bits
}

/// The parts of a new image: header, refcount table, refcount blocks, L1 table. What is not
/// written does not matter, as nothing refers to it.
///
/// The refcount table is made large enough for the whole extent, the L1 table for the whole size.
///
/// # Errors
/// What is wrong with the wishes.
pub fn create(wish: &Create<'_>) -> Result<Vec<Part>, FormatError> {
    if !CLUSTER_BITS.contains(&wish.cluster_bits) {
        return Err(FormatError::ClusterBits(wish.cluster_bits));
    }
    if wish.size == 0 || !wish.size.is_multiple_of(512) || wish.size > MOST_BYTES {
        return Err(FormatError::Size(wish.size));
    }
    let cluster = 1_u64 << wish.cluster_bits;
    let l1_entries = wish.size.div_ceil(1 << (2 * wish.cluster_bits - 3));
    let l1_clusters = (l1_entries * 8).div_ceil(cluster);
    let reftable_entries = (wish.extent / cluster).div_ceil(cluster / 2).max(1);
    let reftable_clusters = (reftable_entries * 8).div_ceil(cluster);
    let most = MOST_TABLE_ENTRIES;
    if l1_entries > most || reftable_clusters * (cluster / 8) > most.max(cluster / 8) {
        return Err(FormatError::LargeTables);
    }
    let mut blocks = 1;
    while 1 + reftable_clusters + l1_clusters + blocks > blocks * (cluster / 2) {
        blocks += 1;
    }
    let used = 1 + reftable_clusters + blocks + l1_clusters;
    if used * cluster > wish.extent {
        return Err(FormatError::NoRoom);
    }
    let blocks_at = (1 + reftable_clusters) * cluster;
    let l1_at = blocks_at + blocks * cluster;
    let mut reftable = vec![0; len(reftable_clusters * cluster)];
    for (entry, offset) in
        reftable.chunks_exact_mut(8).zip((blocks_at..l1_at).step_by(len(cluster)))
    {
        entry.copy_from_slice(&offset.to_be_bytes());
    }
    let mut counts = vec![0; len(blocks * cluster)];
    for count in counts.chunks_exact_mut(2).take(len(used)) {
        count[1] = 1;
    }
    let header = Header {
        cluster_bits: wish.cluster_bits,
        size: wish.size,
        l1_entries: u32::try_from(l1_entries).map_err(|_| FormatError::LargeTables)?,
        l1_offset: l1_at,
        reftable_offset: cluster,
        reftable_clusters: u32::try_from(reftable_clusters)
            .map_err(|_| FormatError::LargeTables)?,
        snapshots: 0,
        snapshots_offset: 0,
        refcount_order: 4,
        incompatible: 0,
        autoclear: 0,
        backing_name: (0, 0),
        backing_format: BackingFormat::Raw,
    };
    Ok(vec![
        Part { offset: 0, bytes: header_bytes(&header, wish.backing)? },
        Part { offset: cluster, bytes: reftable },
        Part { offset: blocks_at, bytes: counts },
        Part { offset: l1_at, bytes: vec![0; len(l1_clusters * cluster)] },
    ])
}

/// The first cluster of a new image.
fn header_bytes(
    header: &Header,
    backing: Option<(&str, BackingFormat)>,
) -> Result<Vec<u8>, FormatError> {
    let mut bytes = vec![0; len(header.cluster())];
    let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
    put(0, &MAGIC.to_be_bytes());
    put(4, &3_u32.to_be_bytes());
    put(20, &header.cluster_bits.to_be_bytes());
    put(24, &header.size.to_be_bytes());
    put(36, &header.l1_entries.to_be_bytes());
    put(40, &header.l1_offset.to_be_bytes());
    put(48, &header.reftable_offset.to_be_bytes());
    put(56, &header.reftable_clusters.to_be_bytes());
    put(96, &header.refcount_order.to_be_bytes());
    // 104 bytes and the compression type, padded.
    put(100, &112_u32.to_be_bytes());
    let mut at = 112;
    if let Some((name, format)) = backing {
        let format: &[u8] = match format {
            BackingFormat::Qcow2 => b"qcow2",
            _ => b"raw",
        };
        let length = u32::try_from(format.len()).map_err(|_| FormatError::Name)?;
        put(at, &EXTENSION_BACKING_FORMAT.to_be_bytes());
        put(at + 4, &length.to_be_bytes());
        put(at + 8, format);
        at += 16;
        // The end of the extensions is 8 zeros; the name follows.
        at += 8;
        let length = u32::try_from(name.len()).map_err(|_| FormatError::Name)?;
        if name.is_empty() || name.len() > MOST_NAME {
            return Err(FormatError::Name);
        }
        put(8, &(at as u64).to_be_bytes());
        put(16, &length.to_be_bytes());
        put(at, name.as_bytes());
    }
    Ok(bytes)
}

/// A length that was bounded before; on a 32-bit host nothing larger could be allocated anyway.
fn len(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}
