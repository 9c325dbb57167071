//! Disks in memory that do what they are asked when a test says so, in the order it says.

use domain_api::disk::{Buffer, Busy, DiskError, Geometry, Operation};
use domain_api::{DmaPage, Page};
use qcow2::{File, Lower, LowerRequest, LowerTag};
use std::collections::BTreeMap;
use std::sync::Arc;

pub const SECTOR: usize = 512;

/// A disk of 512-byte sectors with a volatile cache, what passes through NVMe's PRP lists.
pub const GEOMETRY: Geometry = Geometry {
    sectors: 0,
    sector_size: 512,
    physical_sector_size: 4096,
    read_only: false,
    volatile_cache: true,
    max_discard_sectors: 0,
    max_write_zeroes_sectors: 0,
    max_sectors: 256,
    max_buffers: 33,
    whole_pages: true,
    queue_depth: 32,
};

/// Numbers that look random and are the same in every run.
#[derive(Clone, Debug)]
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5555)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ word >> 31
    }

    /// A number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }

    pub fn one_in(&mut self, number: u64) -> bool {
        self.below(number) == 0
    }
}

/// Bytes that are mostly zeros, in pages.
#[derive(Clone, Debug, Default)]
pub struct Sparse {
    pages: BTreeMap<u64, Box<[u8; 4096]>>,
    pub len: u64,
}

impl Sparse {
    pub fn new(len: u64) -> Self {
        Self { pages: BTreeMap::new(), len }
    }

    pub fn from_bytes(bytes: &[u8], len: u64) -> Self {
        let mut sparse = Self::new(len.max(bytes.len() as u64));
        for (index, page) in bytes.chunks(4096).enumerate() {
            if page.iter().any(|&byte| byte != 0) {
                sparse.write(index as u64 * 4096, page);
            }
        }
        sparse
    }

    pub fn read(&self, mut at: u64, mut buffer: &mut [u8]) {
        assert!(at + buffer.len() as u64 <= self.len.next_multiple_of(4096), "outside");
        while !buffer.is_empty() {
            let inside = (at % 4096) as usize;
            let (part, rest) = buffer.split_at_mut(buffer.len().min(4096 - inside));
            match self.pages.get(&(at / 4096)) {
                Some(page) => part.copy_from_slice(&page[inside..inside + part.len()]),
                None => part.fill(0),
            }
            at += part.len() as u64;
            buffer = rest;
        }
    }

    pub fn write(&mut self, mut at: u64, mut bytes: &[u8]) {
        assert!(at + bytes.len() as u64 <= self.len.next_multiple_of(4096), "outside");
        while !bytes.is_empty() {
            let inside = (at % 4096) as usize;
            let (part, rest) = bytes.split_at(bytes.len().min(4096 - inside));
            let page = self.pages.entry(at / 4096).or_insert_with(|| Box::new([0; 4096]));
            page[inside..inside + part.len()].copy_from_slice(part);
            at += part.len() as u64;
            bytes = rest;
        }
    }

    /// Writes all to a host file.
    pub fn save(&self, path: &std::path::Path) {
        use std::os::unix::fs::FileExt;
        let file = std::fs::File::create(path).unwrap();
        file.set_len(self.len).unwrap();
        for (&number, page) in &self.pages {
            file.write_all_at(&page[..], number * 4096).unwrap();
        }
    }

    pub fn check(&self) -> qcow2::check::Report {
        let read = |at: u64, bytes: &mut [u8]| -> Result<(), ()> {
            self.read(at, bytes);
            Ok(())
        };
        qcow2::check::check(self.len, read).unwrap()
    }
}

/// A request that was submitted and not yet done.
#[derive(Clone, Debug)]
pub struct Pending {
    pub file: File,
    pub tag: LowerTag,
    pub operation: Operation,
    at: u64,
    len: u64,
    buffers: Vec<(DmaPage, u16, u16)>,
}

/// A write that a power cut may take back: where, and what was there.
#[derive(Clone, Debug)]
struct Undo {
    at: u64,
    sector: [u8; SECTOR],
}

/// The disks below an image.
#[derive(Clone, Debug)]
pub struct Disks {
    pub image: Sparse,
    pub backing: Arc<Sparse>,
    pub geometry: Geometry,
    pub pending: Vec<Pending>,
    /// Written since the last flush.
    unflushed: Vec<Undo>,
    /// Requests done so far.
    pub steps: u64,
    /// Reads that fail, by what is left over when their number is divided by the first one.
    pub fail: Option<(u64, Operation)>,
}

impl Disks {
    pub fn new(image: Sparse, backing: Arc<Sparse>, geometry: Geometry) -> Self {
        Self {
            image,
            backing,
            geometry,
            pending: Vec::new(),
            unflushed: Vec::new(),
            steps: 0,
            fail: None,
        }
    }

    /// Does a pending request.
    pub fn execute(&mut self, index: usize) -> (LowerTag, Result<(), DiskError>) {
        let pending = self.pending.remove(index);
        self.steps += 1;
        if let Some((every, operation)) = self.fail
            && pending.operation == operation
            && self.steps.is_multiple_of(every)
        {
            return (pending.tag, Err(DiskError::Medium));
        }
        self.perform(&pending, usize::MAX);
        (pending.tag, Ok(()))
    }

    /// Does the first `sectors` of a request.
    fn perform(&mut self, pending: &Pending, mut sectors: usize) {
        match pending.operation {
            Operation::Flush => self.unflushed.clear(),
            Operation::WriteZeroes => {
                for sector in 0..pending.len / SECTOR as u64 {
                    if sectors > 0 {
                        self.store(pending.at + sector * SECTOR as u64, &[0; SECTOR]);
                        sectors -= 1;
                    }
                }
            }
            _ => {
                let mut at = pending.at;
                for (page, offset, len) in &pending.buffers {
                    for inside in (*offset..*offset + *len).step_by(SECTOR) {
                        if sectors == 0 {
                            return;
                        }
                        sectors -= 1;
                        self.move_sector(pending, &page.page, usize::from(inside), at);
                        at += SECTOR as u64;
                    }
                }
            }
        }
    }

    fn move_sector(&mut self, pending: &Pending, page: &Page, offset: usize, at: u64) {
        let mut sector = [0; SECTOR];
        if pending.operation == Operation::Write {
            page.read(offset, &mut sector);
            self.store(at, &sector);
        } else {
            match pending.file {
                File::Image => self.image.read(at, &mut sector),
                File::Backing => self.backing.read(at, &mut sector),
            }
            page.write(offset, &sector);
        }
    }

    fn store(&mut self, at: u64, sector: &[u8; SECTOR]) {
        let mut before = [0; SECTOR];
        self.image.read(at, &mut before);
        if self.geometry.volatile_cache {
            self.unflushed.push(Undo { at, sector: before });
        }
        self.image.write(at, sector);
    }

    /// The driver domain dies: each request in flight is done, or not, or in part.
    pub fn driver_dies(&mut self, mut fate: impl FnMut() -> u64) {
        for pending in core::mem::take(&mut self.pending) {
            if matches!(pending.operation, Operation::Write | Operation::WriteZeroes) {
                match fate() % 4 {
                    0 => self.perform(&pending, usize::MAX),
                    1 => self.perform(&pending, (fate() % (pending.len / 512 + 1)) as usize),
                    _ => {}
                }
            }
        }
    }

    /// The power fails as well: each sector that was written since the last flush keeps its
    /// content, or what it had at any time since.
    pub fn power_fails(&mut self, dice: &mut Dice) {
        let mut fate = dice.clone();
        dice.next();
        self.driver_dies(|| fate.next());
        let mut kept = std::collections::BTreeSet::new();
        for undo in core::mem::take(&mut self.unflushed).into_iter().rev() {
            if !kept.contains(&undo.at) && dice.one_in(2) {
                kept.insert(undo.at);
            }
            if !kept.contains(&undo.at) {
                self.image.write(undo.at, &undo.sector);
            }
        }
    }
}

impl Lower for Disks {
    fn geometry(&self, _: File) -> Geometry {
        self.geometry
    }

    fn submit(&mut self, request: LowerRequest<'_>) -> Result<(), Busy> {
        if self.pending.len() >= usize::from(self.geometry.queue_depth) {
            return Err(Busy);
        }
        let bytes: u64 = request.buffers.iter().map(|buffer| u64::from(buffer.len)).sum();
        let disk = match request.file {
            File::Image => &self.image,
            File::Backing => &*self.backing,
        };
        let unit = u64::from(self.geometry.sector_size / 512);
        assert!((request.sector + request.sectors) * 512 <= disk.len, "{request:?} is outside");
        assert!(request.sector.is_multiple_of(unit) && request.sectors.is_multiple_of(unit));
        assert!(self.pending.iter().all(|it| it.tag != request.tag), "tag in use");
        match request.operation {
            Operation::Read | Operation::Write => {
                assert!(self.geometry.takes(request.buffers), "{request:?} is not taken");
                assert_eq!(bytes, request.sectors * 512);
            }
            Operation::WriteZeroes => {
                assert!(request.sectors <= u64::from(self.geometry.max_write_zeroes_sectors))
            }
            Operation::Flush => assert_eq!(request.sectors, 0),
            Operation::Discard => panic!("not asked for"),
        }
        let is_written = request.operation != Operation::Read;
        assert!(request.file == File::Image || !is_written, "the backing volume is only read");
        let keep = |buffer: &Buffer<'_>| (buffer.page.clone(), buffer.offset, buffer.len);
        self.pending.push(Pending {
            file: request.file,
            tag: request.tag,
            operation: request.operation,
            at: request.sector * 512,
            len: request.sectors * 512,
            buffers: request.buffers.iter().map(keep).collect(),
        });
        Ok(())
    }
}

/// Pages with garbage, as an incarnation finds them.
pub fn pages(count: usize) -> Vec<DmaPage> {
    let page = |index: usize| {
        let page = Page::new_zeroed();
        page.write(0, &[0xd5; 4096]);
        DmaPage { page, bus_address: 0x1_0000_0000 + index as u64 * 4096 }
    };
    (0..count).map(page).collect()
}
