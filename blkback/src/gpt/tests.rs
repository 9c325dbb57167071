use super::*;
use proptest::prelude::*;

const BLOCKS: u64 = 4096;
const GUID: &str = "12345678-9abc-def0-1234-56789abcdef0";
const GUID_BYTES: [u8; 16] = [
    0x78, 0x56, 0x34, 0x12, 0xbc, 0x9a, 0xf0, 0xde, 0x12, 0x34, 0x56, 0x78, 0x9a, 0xbc, 0xde, 0xf0,
];

fn geometry(sector_size: u32) -> Geometry {
    Geometry {
        sectors: BLOCKS * u64::from(sector_size) / SECTOR,
        sector_size,
        physical_sector_size: sector_size,
        read_only: false,
        volatile_cache: false,
        max_discard_sectors: 0,
        max_write_zeroes_sectors: 0,
        max_sectors: 8,
        max_buffers: 1,
        whole_pages: false,
        queue_depth: 1,
    }
}

/// A partition: name, GUID, first and last block.
type Partition = (&'static str, [u8; 16], u64, u64);

/// A disk with both tables, made from the specification by other code than what reads it.
struct Image {
    bytes: Vec<u8>,
    block: usize,
    entry: usize,
    count: usize,
}

impl Image {
    fn new(sector_size: u32, entry: usize, partitions: &[Partition]) -> Self {
        let block = sector_size as usize;
        let bytes = vec![0; block * usize::try_from(BLOCKS).unwrap()];
        let mut image = Self { bytes, block, entry, count: 128 };
        for (at, &(name, guid, first, last)) in partitions.iter().enumerate() {
            for table in [2, image.backup()] {
                image.entry_at(table, at, name, guid, first, last);
            }
        }
        image.seal();
        image
    }

    /// First block of the backup's entries.
    fn backup(&self) -> usize {
        usize::try_from(BLOCKS).unwrap() - 1 - (self.count * self.entry).div_ceil(self.block)
    }

    fn entry_at(
        &mut self,
        table: usize,
        at: usize,
        name: &str,
        guid: [u8; 16],
        first: u64,
        last: u64,
    ) {
        let from = table * self.block + at * self.entry;
        let entry = &mut self.bytes[from..from + 128];
        entry.fill(0);
        entry[..16].fill(0xaf);
        entry[16..32].copy_from_slice(&guid);
        entry[32..40].copy_from_slice(&first.to_le_bytes());
        entry[40..48].copy_from_slice(&last.to_le_bytes());
        for (unit, place) in name.encode_utf16().zip(entry[56..].chunks_mut(2)) {
            place.copy_from_slice(&unit.to_le_bytes());
        }
    }

    /// Writes both headers, with right checksums.
    fn seal(&mut self) {
        let last = usize::try_from(BLOCKS).unwrap() - 1;
        for (own, other, table) in [(1, last, 2), (last, 1, self.backup())] {
            let entries = table * self.block..table * self.block + self.count * self.entry;
            let entries_crc = crc32(&self.bytes[entries]);
            let header = &mut self.bytes[own * self.block..own * self.block + 92];
            header[..8].copy_from_slice(b"EFI PART");
            let mut put = |at: usize, value: u32| {
                header[at..at + 4].copy_from_slice(&value.to_le_bytes());
            };
            put(8, 0x1_0000);
            put(12, 92);
            put(16, 0);
            put(24, u32::try_from(own).unwrap());
            put(32, u32::try_from(other).unwrap());
            put(72, u32::try_from(table).unwrap());
            put(80, u32::try_from(self.count).unwrap());
            put(84, u32::try_from(self.entry).unwrap());
            put(88, entries_crc);
            let crc = crc32(&self.bytes[own * self.block..own * self.block + 92]);
            let at = own * self.block + 16;
            self.bytes[at..at + 4].copy_from_slice(&crc.to_le_bytes());
        }
    }

    fn find(&self, wanted: Wanted) -> Step {
        let geometry = geometry(u32::try_from(self.block).unwrap());
        let mut search = Search::new(wanted, &geometry);
        for _ in 0..1000 {
            match search.step() {
                Step::Read { sector, sectors } => {
                    assert!((1..=8).contains(&sectors) && sector + sectors <= geometry.sectors);
                    assert_eq!(sectors % (geometry.sector_size as u64 / SECTOR), 0);
                    let from = usize::try_from(sector * SECTOR).unwrap();
                    let len = usize::try_from(sectors * SECTOR).unwrap();
                    search.take(Ok(&self.bytes[from..from + len]));
                }
                end => return end,
            }
        }
        panic!("it reads for ever");
    }

    fn named(&self, name: &str) -> Step {
        self.find(Wanted::Name(name.to_string()))
    }
}

/// Bit by bit, unlike the code under test.
fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = crc >> 1 ^ if crc & 1 == 1 { 0xedb8_8320 } else { 0 };
        }
    }
    !crc
}

const PARTITIONS: [Partition; 4] = [
    ("boot", [1; 16], 100, 199),
    ("root", GUID_BYTES, 200, 1999),
    ("größe", [3; 16], 2000, 2000),
    ("abcdefghijklmnopqrstuvwxyz0123456789", [4; 16], 2001, 2002),
];

fn is_failure(step: &Step, words: &str) -> bool {
    matches!(step, Step::Failed(message) if message.contains(words))
}

#[test]
fn partitions_are_found_by_name_and_by_guid() {
    for (sector_size, entry) in [(512, 128), (4096, 128), (512, 256), (4096, 4096)] {
        let image = Image::new(sector_size, entry, &PARTITIONS);
        let unit = u64::from(sector_size) / SECTOR;
        let root = Step::Found { sector: 200 * unit, sectors: 1800 * unit };
        assert_eq!(image.named("root"), root);
        assert_eq!(image.find(Wanted::Guid(GUID.to_string())), root);
        assert_eq!(image.named("größe"), Step::Found { sector: 2000 * unit, sectors: unit });
        let long = Step::Found { sector: 2001 * unit, sectors: 2 * unit };
        assert_eq!(image.named(PARTITIONS[3].0), long);
        for none in ["roo", "root2", "", "ROOT"] {
            assert!(is_failure(&image.named(none), "no such partition"));
        }
    }
}

#[test]
fn what_is_ambiguous_or_impossible_is_refused() {
    let twice = [PARTITIONS[0], ("boot", [9; 16], 300, 301)];
    assert!(is_failure(&Image::new(512, 128, &twice).named("boot"), "several"));
    for (first, last) in [(200, 199), (1, 5), (4000, BLOCKS), (0, u64::MAX)] {
        let image = Image::new(512, 128, &[PARTITIONS[0], ("bad", [9; 16], first, last)]);
        assert!(is_failure(&image.named("boot"), "outside of the disk"));
    }
    let empty = Image { bytes: vec![0; 512 * 4096], block: 512, entry: 128, count: 128 };
    assert!(is_failure(&empty.named("boot"), "no signature"));
}

#[test]
fn the_backup_helps_when_the_primary_table_is_damaged() {
    let whole = Image::new(512, 128, &PARTITIONS);
    for damage in [512, 512 + 16, 512 + 80, 2 * 512 + 3 * 128, 2 * 512 + 127 * 128] {
        let mut image = Image { bytes: whole.bytes.clone(), ..whole };
        image.bytes[damage] ^= 1;
        assert_eq!(image.named("root"), whole.named("root"), "{damage}");
    }
}

#[test]
fn a_disk_that_cannot_be_read_has_no_table() {
    let mut search = Search::new(Wanted::Name("x".to_string()), &geometry(512));
    search.take(Err(DiskError::Medium));
    assert_eq!(search.step(), Step::Read { sector: BLOCKS - 1, sectors: 1 });
    search.take(Err(DiskError::Medium));
    assert!(is_failure(&search.step(), "cannot be read"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whatever the tables hold, the search ends, reads nothing outside of the disk, and finds
    /// nothing but a range of it.
    #[test]
    fn any_table_ends_the_search(
        damage in proptest::collection::vec((0_usize..0x60, any::<u8>()), 0..6),
        sealed in any::<bool>(),
        both in any::<bool>(),
    ) {
        let mut image = Image::new(512, 128, &PARTITIONS);
        let last = usize::try_from(BLOCKS).unwrap() - 1;
        for block in if both { vec![1, last] } else { vec![1] } {
            for &(at, value) in &damage {
                image.bytes[block * 512 + at] = value;
            }
            if sealed {
                let header = &mut image.bytes[block * 512..block * 512 + 92];
                header[16..20].fill(0);
                let crc = crc32(header);
                header[16..20].copy_from_slice(&crc.to_le_bytes());
            }
        }
        if let Step::Found { sector, sectors } = image.named("root") {
            prop_assert!(sector + sectors <= BLOCKS);
        }
    }
}
