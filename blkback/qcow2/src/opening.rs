//! From the first sector of an image to its first request.

use crate::api::{File, Lower, Setup};
use crate::cache::Cache;
use crate::engine::{Backing, Engine, Layer};
use crate::format::{self, BackingFormat, FormatError, HEADER_BYTES, Header};
use crate::journal::{Journal, Link, Place, Record};
use crate::ops::{FlushTicket, Flushes, Ops, Stop};
use crate::space::Space;
use alloc::collections::VecDeque;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use alloc::{format, vec};
use domain_api::Page;
use domain_api::disk::{DiskError, Geometry, SECTOR};

/// Pages for copies, among those of a [`Setup`].
const COPY_PAGES: usize = 8;
/// Most sectors of a discard or a write of zeros: 1 GiB.
const MOST_UNLINKED: u32 = 1 << 21;

/// How far the opening of an image is.
#[derive(Debug)]
pub(crate) struct Opening {
    setup: Wanted,
    step: Step,
}

/// What remains of a [`Setup`].
#[derive(Debug)]
struct Wanted {
    image_bytes: u64,
    backing_bytes: Option<u64>,
    writable: bool,
    journal: Page,
}

#[derive(Debug)]
enum Step {
    Header,
    L1(Header),
    Reftable(Header),
    Behind(BackingFormat),
    BackingL1(Header),
    /// Before the journal is acted upon, what the last incarnation wrote has to be durable.
    Flush(FlushTicket),
    Recover(Vec<(Place, Option<Record>)>, usize),
    Recovered(Vec<(Place, Option<Record>)>, u64),
    End,
}

/// Why an image cannot be opened now.
enum Trouble {
    Wait,
    Never(String),
}

impl From<Stop> for Trouble {
    fn from(stop: Stop) -> Self {
        match stop {
            Stop::Wait => Self::Wait,
            Stop::Error(error) => Self::Never(format!("its tables cannot be read: {error}")),
        }
    }
}

impl From<FormatError> for Trouble {
    fn from(error: FormatError) -> Self {
        Self::Never(error.to_string())
    }
}

impl From<&str> for Trouble {
    fn from(text: &str) -> Self {
        Self::Never(text.to_string())
    }
}

/// An engine that knows nothing yet, and how to open it.
pub(crate) fn begin(setup: Setup) -> (Engine, Opening) {
    let mut pages = setup.pages;
    assert!(pages.len() >= crate::MIN_PAGES, "an image needs {} pages", crate::MIN_PAGES);
    let pool = pages.split_off(pages.len() - COPY_PAGES);
    let zeros = pages.swap_remove(0);
    zeros.page.clear();
    let nothing =
        Layer { bits: format::USUAL_CLUSTER_BITS, size: 0, end: 0, l1: Vec::new(), l1_offset: 0 };
    let engine = Engine {
        ops: Ops::new(),
        cache: Cache::new(pages),
        flushes: Flushes::default(),
        pool,
        zeros,
        image: nothing,
        backing: Backing::None,
        space: Space::default(),
        journal: None,
        changes: Vec::new(),
        active_changes: 0,
        driven: None,
        growth: None,
        guests: Vec::new(),
        free_guests: Vec::new(),
        waiting: VecDeque::new(),
        done: VecDeque::new(),
        disk: NO_DISK,
        offered: NO_DISK,
        wake: false,
    };
    let wanted = Wanted {
        image_bytes: setup.image_sectors * SECTOR,
        backing_bytes: setup.backing_sectors.map(|sectors| sectors * SECTOR),
        writable: setup.writable,
        journal: setup.journal,
    };
    (engine, Opening { setup: wanted, step: Step::Header })
}

const NO_DISK: Geometry = Geometry {
    sectors: 0,
    sector_size: 512,
    physical_sector_size: 512,
    read_only: true,
    volatile_cache: false,
    max_discard_sectors: 0,
    max_write_zeroes_sectors: 0,
    max_sectors: 0,
    max_buffers: 0,
    whole_pages: false,
    queue_depth: 0,
};

impl Opening {
    /// Goes on. True: the image is open.
    pub(crate) fn drive(
        &mut self,
        engine: &mut Engine,
        lower: &mut impl Lower,
    ) -> Result<bool, String> {
        let result = loop {
            match self.step(engine, lower) {
                Ok(Step::End) => break Ok(true),
                Ok(step) => self.step = step,
                Err(Trouble::Wait) => break Ok(false),
                Err(Trouble::Never(message)) => break Err(message),
            }
        };
        engine.cache.end_round(lower, &mut engine.ops);
        engine.flushes.start(lower, &mut engine.ops);
        result
    }

    fn step(&mut self, engine: &mut Engine, lower: &mut impl Lower) -> Result<Step, Trouble> {
        match &mut self.step {
            Step::Header => {
                engine.take_disks(lower, self.setup.backing_bytes.is_some())?;
                let header = engine.header(lower, File::Image)?;
                self.setup.writable =
                    self.setup.writable && !engine.disk.read_only && header.usable(true)?;
                if header.is_corrupt() {
                    log::warn!("an image is marked as corrupt; it is only read");
                }
                header.places(self.setup.image_bytes)?;
                if header.has_backing() != self.setup.backing_bytes.is_some() {
                    return Err(match header.has_backing() {
                        true => "the image has a backing file, but no backing volume is named",
                        false => "a backing volume is named, but the image has no backing file",
                    }
                    .into());
                }
                engine.image = layer(&header, self.setup.image_bytes);
                Ok(Step::L1(header))
            }
            Step::L1(header) => {
                engine.read_l1(lower, header)?;
                match self.setup.writable {
                    true => Ok(Step::Reftable(header.clone())),
                    false => Ok(Step::Behind(header.backing_format)),
                }
            }
            Step::Reftable(header) => {
                engine.read_reftable(lower, header, self.setup.image_bytes)?;
                Ok(Step::Behind(header.backing_format))
            }
            Step::Behind(format) => match (*format, self.setup.backing_bytes) {
                (_, None) => self.ready(engine),
                (BackingFormat::Raw, Some(bytes)) => {
                    engine.backing = Backing::Raw(bytes);
                    self.ready(engine)
                }
                (BackingFormat::Other, _) => {
                    Err("the backing file is neither raw nor qcow2".into())
                }
                (BackingFormat::Qcow2, Some(bytes)) => {
                    let header = engine.header(lower, File::Backing)?;
                    header.places(bytes)?;
                    if header.has_backing() {
                        return Err("the backing image has a backing file itself; \
                                    one image behind another is supported"
                            .into());
                    }
                    engine.backing = Backing::Image(layer(&header, bytes));
                    Ok(Step::BackingL1(header))
                }
            },
            Step::BackingL1(header) => {
                engine.read_backing_l1(lower, header)?;
                self.ready(engine)
            }
            Step::Flush(ticket) => {
                engine.flushes.check(*ticket)?;
                let records = engine.journal.as_ref().map_or(Vec::new(), Journal::records);
                Ok(Step::Recover(records, 0))
            }
            Step::Recover(records, index) => {
                while let Some((_, record)) = records.get(*index) {
                    if let Some(record) = record {
                        engine.recover(lower, record)?;
                    }
                    *index += 1;
                }
                Ok(Step::Recovered(core::mem::take(records), engine.cache.mark()))
            }
            Step::Recovered(records, mark) => {
                engine.cache.check_mark(*mark)?;
                for (place, _) in records.drain(..) {
                    engine.end_record(Some(place));
                }
                Ok(Step::End)
            }
            Step::End => Ok(Step::End),
        }
    }

    /// All tables are known.
    fn ready(&self, engine: &mut Engine) -> Result<Step, Trouble> {
        let sectors = engine.image.size / SECTOR;
        let unit = u64::from(engine.offered.sector_size) / SECTOR;
        if !sectors.is_multiple_of(unit) {
            return Err("the virtual size is not made of whole sectors of the disk".into());
        }
        let unlinked = if self.setup.writable { MOST_UNLINKED } else { 0 };
        engine.offered.sectors = sectors;
        engine.offered.read_only = !self.setup.writable;
        engine.offered.max_discard_sectors = unlinked;
        engine.offered.max_write_zeroes_sectors = unlinked;
        if !self.setup.writable {
            return Ok(Step::End);
        }
        let identity = [self.setup.image_bytes, engine.image.size, engine.image.l1_offset];
        let journal = Journal::open(self.setup.journal.clone(), identity);
        engine.space.hint = journal.hint();
        let is_empty = journal.records().is_empty();
        engine.journal = Some(journal);
        Ok(match is_empty {
            true => Step::End,
            false => Step::Flush(engine.want_flush()),
        })
    }
}

fn layer(header: &Header, bytes: u64) -> Layer {
    Layer {
        bits: header.cluster_bits,
        size: header.size,
        end: bytes,
        l1: Vec::new(),
        l1_offset: header.l1_offset,
    }
}

impl Engine {
    /// Asks the disks what they take.
    fn take_disks(&mut self, lower: &impl Lower, has_backing: bool) -> Result<(), Trouble> {
        self.disk = lower.geometry(File::Image);
        let mut offered = self.disk;
        if has_backing {
            let backing = lower.geometry(File::Backing);
            offered.sector_size = offered.sector_size.max(backing.sector_size);
            offered.physical_sector_size =
                offered.physical_sector_size.max(backing.physical_sector_size);
            offered.max_sectors = offered.max_sectors.min(backing.max_sectors);
            offered.max_buffers = offered.max_buffers.min(backing.max_buffers);
            offered.whole_pages |= backing.whole_pages;
        }
        if !matches!(offered.sector_size, 512 | 4096) || offered.max_sectors < 8 {
            return Err("the disk's sectors are not of 512 or 4096 bytes".into());
        }
        self.offered = offered;
        Ok(())
    }

    fn header(&mut self, lower: &mut impl Lower, file: File) -> Result<Header, Trouble> {
        let mut bytes = vec![0; HEADER_BYTES];
        self.cache.copy(lower, &mut self.ops, file, 0, &mut bytes)?;
        Ok(Header::parse(&bytes)?)
    }

    fn read_l1(&mut self, lower: &mut impl Lower, header: &Header) -> Result<(), Stop> {
        while self.image.l1.len() < header.l1_entries as usize {
            let at = header.l1_offset + 8 * self.image.l1.len() as u64;
            let word = self.cache.word(lower, &mut self.ops, File::Image, at)?;
            self.image.l1.push(word);
        }
        Ok(())
    }

    fn read_backing_l1(&mut self, lower: &mut impl Lower, header: &Header) -> Result<(), Stop> {
        let Backing::Image(layer) = &mut self.backing else { return Ok(()) };
        while layer.l1.len() < header.l1_entries as usize {
            let at = header.l1_offset + 8 * layer.l1.len() as u64;
            let word = self.cache.word(lower, &mut self.ops, File::Backing, at)?;
            layer.l1.push(word);
        }
        Ok(())
    }

    fn read_reftable(
        &mut self,
        lower: &mut impl Lower,
        header: &Header,
        bytes: u64,
    ) -> Result<(), Trouble> {
        let needed = (bytes >> header.cluster_bits).div_ceil(header.block_entries());
        let entries = u64::from(header.reftable_clusters) << (header.cluster_bits - 3);
        let entries = entries.min(needed);
        if entries > format::MOST_TABLE_ENTRIES {
            return Err(FormatError::LargeTables.into());
        }
        while (self.space.reftable.len() as u64) < entries {
            let at = header.reftable_offset + 8 * self.space.reftable.len() as u64;
            let word = self.cache.word(lower, &mut self.ops, File::Image, at)?;
            self.space.reftable.push(word);
        }
        self.space.reftable_offset = header.reftable_offset;
        self.space.clusters = bytes >> header.cluster_bits;
        self.note_tables(header)
    }

    /// Notes which clusters hold tables. No two of them may be the same.
    fn note_tables(&mut self, header: &Header) -> Result<(), Trouble> {
        let (bits, end) = (header.cluster_bits, self.image.end);
        let mut offsets = vec![0];
        let l1 = (0..header.l1_clusters()).map(|index| header.l1_offset + (index << bits));
        offsets.extend(l1);
        let reftable = 0..u64::from(header.reftable_clusters);
        offsets.extend(reftable.map(|index| header.reftable_offset + (index << bits)));
        for &block in self.space.reftable.iter().filter(|&&block| block != 0) {
            if !format::is_cluster(block, bits, end) {
                return Err("the image is damaged: a refcount block is not in it".into());
            }
            offsets.push(block);
        }
        for &word in &self.image.l1 {
            let table = format::l1_entry(word, bits, end)
                .map_err(|()| Trouble::from("the image is damaged: an L2 table is not in it"))?;
            offsets.extend(table.map(|(offset, _)| offset));
        }
        if header.snapshots > 0 && format::is_cluster(header.snapshots_offset, bits, end) {
            offsets.push(header.snapshots_offset);
        }
        for offset in offsets {
            if !self.space.tables.insert(offset >> bits) {
                return Err("the image is damaged: two of its tables share a cluster".into());
            }
        }
        Ok(())
    }

    /// Finishes or undoes what a record of the last incarnation tells of.
    fn recover(&mut self, lower: &mut impl Lower, record: &Record) -> Result<(), Stop> {
        let bits = self.image.bits;
        let offset = record.cluster << bits;
        let is_linked = match record.link {
            Link::Cluster(cluster) if cluster << bits < self.image.size => {
                let entry = self.entry(lower, File::Image, cluster)?;
                entry.cluster().is_some_and(|(at, _)| at == offset)
            }
            Link::Table(index) => {
                let place = self.image.l2_place(index << (bits - 3))?;
                place.is_some_and(|place| place.at == offset)
            }
            Link::Reftable => self.space.reftable_offset == offset,
            Link::Cluster(_) => return Ok(()),
        };
        let wanted = if is_linked { record.linked } else { record.unlinked };
        for cluster in record.cluster..record.cluster + u64::from(record.clusters) {
            let count = match cluster < self.space.clusters {
                true => self.count(lower, cluster)?,
                false => wanted,
            };
            if count == wanted {
                if count == 0 {
                    // Its refcount may never have reached the medium; the hint is past it.
                    self.lower_hint(cluster);
                }
                continue;
            }
            if count != record.linked && count != record.unlinked {
                log::warn!("cluster {cluster} has the refcount {count}, which is left alone");
                continue;
            }
            let _ = self.set_count(lower, cluster, wanted)?;
        }
        Ok(())
    }
}

impl From<DiskError> for Trouble {
    fn from(error: DiskError) -> Self {
        Stop::Error(error).into()
    }
}
