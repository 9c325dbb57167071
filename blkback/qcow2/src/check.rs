//! Whether an image is in order: every cluster is referred to as often as its refcount says.
//!
//! This is for hosts and tests; a driver domain never looks at a whole image. It finds what
//! `qemu-img check` finds (whose word counts, where it is at hand): refcounts that are too small
//! or too large, entries outside of the image, and flags that say something else than the
//! refcounts.

use crate::format::{self, COPIED, Entry, FormatError, HEADER_BYTES, Header, be32, be64};
use alloc::collections::BTreeMap;
use alloc::format as text;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

/// Most messages of a [`Report`].
const MOST_MESSAGES: usize = 16;

/// What a check found.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Report {
    /// Clusters of the virtual disk that have a place of their own.
    pub allocated: u64,
    /// Clusters in use, tables included.
    pub used: u64,
    /// Clusters with a refcount that is too large: room is lost, nothing else.
    pub leaks: u64,
    /// Everything that is worse.
    pub errors: u64,
    /// The first things that were found, in words.
    pub messages: Vec<String>,
}

impl Report {
    /// Whether nothing was found.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.leaks == 0 && self.errors == 0
    }

    fn say(&mut self, message: String) {
        if self.messages.len() < MOST_MESSAGES {
            self.messages.push(message);
        }
    }

    fn error(&mut self, message: String) {
        self.errors += 1;
        self.say(message);
    }
}

/// Why a check came to no end.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum CheckError<E> {
    /// No image that is understood.
    Format(FormatError),
    /// It could not be read.
    Read(E),
}

impl<E> From<FormatError> for CheckError<E> {
    fn from(error: FormatError) -> Self {
        Self::Format(error)
    }
}

/// Checks the image in the first `bytes` bytes of what `read` reads: it fills the buffer from
/// the given byte on.
///
/// # Errors
/// When the image cannot be read, or its header not be used.
pub fn check<E>(
    bytes: u64,
    read: impl FnMut(u64, &mut [u8]) -> Result<(), E>,
) -> Result<Report, CheckError<E>> {
    let mut reader = Reader { read };
    let header = Header::parse(&reader.bytes(0, HEADER_BYTES)?)?;
    header.places(bytes)?;
    let mut check = Check {
        reader,
        end: bytes,
        references: BTreeMap::new(),
        report: Report::default(),
        flagged: Vec::new(),
        header,
    };
    check.run()?;
    Ok(check.report)
}

struct Reader<R> {
    read: R,
}

impl<E, R: FnMut(u64, &mut [u8]) -> Result<(), E>> Reader<R> {
    fn bytes(&mut self, at: u64, len: usize) -> Result<Vec<u8>, CheckError<E>> {
        let mut bytes = vec![0; len];
        (self.read)(at, &mut bytes).map_err(CheckError::Read)?;
        Ok(bytes)
    }

    fn words(&mut self, at: u64, count: usize) -> Result<Vec<u64>, CheckError<E>> {
        let bytes = self.bytes(at, count * 8)?;
        Ok((0..count).map(|index| be64(&bytes, 8 * index)).collect())
    }
}

struct Check<R> {
    reader: Reader<R>,
    header: Header,
    end: u64,
    /// How often each cluster is referred to.
    references: BTreeMap<u64, u64>,
    /// Clusters that entries in use refer to, and whether these say that nobody else does.
    flagged: Vec<(u64, bool)>,
    report: Report,
}

impl<E, R: FnMut(u64, &mut [u8]) -> Result<(), E>> Check<R> {
    fn run(&mut self) -> Result<(), CheckError<E>> {
        let header = self.header.clone();
        self.refer(0, 1);
        self.refer(header.l1_offset, header.l1_clusters());
        self.refer(header.reftable_offset, u64::from(header.reftable_clusters));
        self.tables(header.l1_offset, header.l1_entries, true)?;
        self.snapshots()?;
        let entries = header.reftable_clusters as usize * (self.cluster_len() / 8);
        let reftable = self.reader.words(header.reftable_offset, entries)?;
        for (index, &block) in reftable.iter().enumerate() {
            if block == 0 {
                continue;
            }
            if format::is_cluster(block, header.cluster_bits, self.end) {
                self.refer(block, 1);
            } else {
                self.report.error(text!("refcount block {index} is not in the image"));
            }
        }
        self.compare(&reftable)
    }

    fn cluster_len(&self) -> usize {
        1 << self.header.cluster_bits
    }

    fn refer(&mut self, offset: u64, clusters: u64) {
        let first = offset >> self.header.cluster_bits;
        for cluster in first..first + clusters {
            *self.references.entry(cluster).or_default() += 1;
        }
    }

    /// Counts what an L1 table refers to. The flags of a snapshot's table mean nothing.
    fn tables(&mut self, offset: u64, entries: u32, is_active: bool) -> Result<(), CheckError<E>> {
        let bits = self.header.cluster_bits;
        for word in self.reader.words(offset, entries as usize)? {
            let table = match format::l1_entry(word, bits, self.end) {
                Ok(None) => continue,
                Ok(Some((table, copied))) => {
                    self.refer(table, 1);
                    if is_active {
                        self.flagged.push((table >> bits, copied));
                    }
                    table
                }
                Err(()) => {
                    self.report.error(text!("L1 entry {word:#x} is invalid"));
                    continue;
                }
            };
            let count = self.cluster_len() / 8;
            for word in self.reader.words(table, count)? {
                self.entry(word, is_active);
            }
        }
        Ok(())
    }

    fn entry(&mut self, word: u64, is_active: bool) {
        let bits = self.header.cluster_bits;
        let entry = Entry::parse(word, bits, self.end);
        match entry {
            Entry::Bad => self.report.error(text!("L2 entry {word:#x} is invalid")),
            Entry::Compressed => self.compressed(word),
            _ => {}
        }
        if let Some((offset, copied)) = entry.cluster() {
            self.refer(offset, 1);
            if is_active {
                self.flagged.push((offset >> bits, copied));
            }
        }
        self.report.allocated += u64::from(is_active && matches!(entry, Entry::Data { .. }));
    }

    /// A compressed cluster: a byte offset, and how many sectors of 512 bytes behind its own.
    fn compressed(&mut self, word: u64) {
        let split = 62 - (self.header.cluster_bits - 8);
        let offset = word & ((1 << split) - 1);
        let sectors = ((word & !COPIED & !(1 << 62)) >> split) + 1;
        let last = (offset & !511) + sectors * 512 - 1;
        let bits = self.header.cluster_bits;
        if last >= self.end {
            return self.report.error(text!("L2 entry {word:#x} is invalid"));
        }
        for cluster in offset >> bits..=last >> bits {
            self.refer(cluster << bits, 1);
        }
    }

    /// Counts what internal snapshots refer to: their table, and their L1 tables.
    fn snapshots(&mut self) -> Result<(), CheckError<E>> {
        let start = self.header.snapshots_offset;
        let mut at = start;
        for index in 0..self.header.snapshots {
            let fixed = self.reader.bytes(at, 40)?;
            let (l1_offset, l1_entries) = (be64(&fixed, 0), be32(&fixed, 8));
            let names = u64::from(be32(&fixed, 12) >> 16) + u64::from(be32(&fixed, 12) & 0xffff);
            let length = 40 + u64::from(be32(&fixed, 36)) + names;
            at += length.next_multiple_of(8);
            let clusters = (u64::from(l1_entries) * 8).div_ceil(self.header.cluster()).max(1);
            if u64::from(l1_entries) > format::MOST_TABLE_ENTRIES
                || !format::is_cluster(l1_offset, self.header.cluster_bits, self.end)
                || l1_offset + clusters * self.header.cluster() > self.end
            {
                self.report.error(text!("snapshot {index} has no valid L1 table"));
                continue;
            }
            self.refer(l1_offset, clusters);
            self.tables(l1_offset, l1_entries, false)?;
        }
        if self.header.snapshots > 0 {
            self.refer(start, (at - start).div_ceil(self.header.cluster()));
        }
        Ok(())
    }

    /// Compares the refcounts with the references.
    fn compare(&mut self, reftable: &[u64]) -> Result<(), CheckError<E>> {
        let order = self.header.refcount_order;
        let per_block = (self.cluster_len() as u64 * 8) >> order;
        let mut counts = BTreeMap::new();
        for (index, &block) in reftable.iter().enumerate() {
            if block == 0 || !format::is_cluster(block, self.header.cluster_bits, self.end) {
                continue;
            }
            let bytes = self.reader.bytes(block, self.cluster_len())?;
            for inner in 0..per_block {
                let count = refcount(&bytes, inner, order);
                if count > 0 {
                    counts.insert(index as u64 * per_block + inner, count);
                }
            }
        }
        for (&cluster, &count) in &counts {
            let references = self.references.get(&cluster).copied().unwrap_or(0);
            if count > references {
                self.report.leaks += 1;
                self.report.say(text!("cluster {cluster}: refcount {count}, {references} used"));
            }
        }
        for (&cluster, &references) in &self.references {
            let count = counts.get(&cluster).copied().unwrap_or(0);
            if count < references {
                let message = text!("cluster {cluster}: refcount {count}, {references} used");
                self.report.error(message);
            }
        }
        for (cluster, copied) in core::mem::take(&mut self.flagged) {
            let is_single = counts.get(&cluster) == Some(&1);
            if copied != is_single {
                self.report.error(text!("cluster {cluster}: the flag COPIED is wrong"));
            }
        }
        self.report.used = self.references.len() as u64;
        Ok(())
    }
}

/// A refcount of 2 to the power of `order` bits.
fn refcount(block: &[u8], index: u64, order: u32) -> u64 {
    let at = usize::try_from(index).unwrap_or(usize::MAX);
    let width = 1_usize << order;
    if width < 8 {
        let (byte, shift) = (at * width / 8, at * width % 8);
        return block.get(byte).map_or(0, |it| u64::from(it >> shift) & ((1 << width) - 1));
    }
    let bytes = block.get(at * width / 8..(at + 1) * width / 8).unwrap_or_default();
    bytes.iter().fold(0, |sum, &byte| sum << 8 | u64::from(byte))
}
