//! The driver against a disk behind the model's queue.

use super::*;
use proptest::collection::vec;
use proptest::prelude::*;
use std::collections::BTreeMap;
use virtio::model::{Chain, Faults, Model};

const ALL: u64 = feature::WANTED & !feature::READ_ONLY | EVENT_IDX;

/// A configuration: 1 MiB.
fn config(sector_size: u32) -> [u8; 60] {
    let mut config = [0; 60];
    let mut put = |at: usize, value: u32| config[at..at + 4].copy_from_slice(&value.to_le_bytes());
    put(0, 2048);
    put(8, 65536);
    put(12, 254);
    put(20, sector_size);
    put(36, 1000);
    put(40, 1);
    put(48, 500);
    put(52, 1);
    config
}

fn model(features: u64, size: u16) -> Model {
    Model::new(DeviceType::Block, features, &config(512), &[size])
}

fn try_start(model: &Model) -> Result<VirtioBlk<Model>, StartError> {
    model.set_bus_master(false);
    let master = || {
        assert!(model.get_status().is_empty(), "the reset comes first");
        model.set_bus_master(true);
        Ok(())
    };
    let route = |cause| cause == Cause::Queue(0);
    VirtioBlk::start(model.clone(), &mut model.clone(), model, master, route)
}

fn start(model: &Model) -> VirtioBlk<Model> {
    try_start(model).expect("a good device")
}

/// A disk that executes what the device took, in any order.
#[derive(Default)]
struct Medium {
    sectors: BTreeMap<u64, [u8; 512]>,
    held: Vec<Chain>,
    kinds: Vec<u32>,
    bad: Option<u64>,
}

impl Medium {
    fn take(&mut self, model: &Model) {
        while let Some(chain) = model.take(0) {
            self.held.push(chain);
        }
    }

    /// Executes one request. Whether the driver wants an interrupt.
    fn execute(&mut self, model: &Model, choice: usize) -> bool {
        if self.held.is_empty() {
            return false;
        }
        let chain = self.held.remove(choice % self.held.len());
        let word = |at: usize| {
            u32::from_le_bytes(chain.readable[at..at + 4].try_into().expect("four bytes"))
        };
        let long = |at: usize| {
            u64::from_le_bytes(chain.readable[at..at + 8].try_into().expect("eight bytes"))
        };
        let (code, sector) = (word(0), long(8));
        self.kinds.push(code);
        assert_eq!(word(4), 0, "reserved");
        let room: usize = chain.writable.iter().map(|part| part.len as usize).sum();
        let mut answer = Vec::new();
        match code {
            kind::IN => {
                for at in 0..(room as u64 - 1) / 512 {
                    answer.extend(self.sectors.get(&(sector + at)).unwrap_or(&[0; 512]));
                }
            }
            kind::OUT => {
                for (at, bytes) in (sector..).zip(chain.readable[16..].chunks_exact(512)) {
                    self.sectors.insert(at, bytes.try_into().expect("a sector"));
                }
            }
            kind::FLUSH => assert_eq!((sector, chain.readable.len()), (0, 16)),
            kind::DISCARD | kind::WRITE_ZEROES => {
                assert_eq!((sector, chain.readable.len(), word(28)), (0, 32, 0));
                for at in long(16)..long(16) + u64::from(word(24)) {
                    self.sectors.remove(&at);
                }
            }
            other => panic!("request {other}"),
        }
        assert_eq!(answer.len() + 1, room);
        let failed = code <= kind::OUT && self.bad.is_some_and(|bad| bad == sector);
        answer.push(if failed { status::IO_ERROR } else { status::OK });
        model.give(0, &chain, &answer)
    }
}

fn page(model: &Model) -> DmaPage {
    model.clone().alloc().expect("memory")
}

fn submit(
    disk: &mut VirtioBlk<Model>,
    tag: u32,
    operation: Operation,
    (sector, sectors): (u64, u64),
    pages: &[DmaPage],
) -> bool {
    let buffers: Vec<_> = (0..)
        .zip(pages)
        .map(|(at, page)| {
            let len = (sectors - at * 8).min(8) * 512;
            Buffer { page, offset: 0, len: u16::try_from(len).expect("a page") }
        })
        .collect();
    disk.submit(Request { tag: Tag(tag), operation, sector, sectors, buffers: &buffers }).is_ok()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Requests that do not overlap end once, in any order, and do what they say.
    #[test]
    fn every_request_ends_once_and_right(
        event_idx in any::<bool>(),
        size in 4_u32..9,
        steps in vec((0_u8..6, 0_u64..64, 1_u64..32, any::<usize>()), 1..100),
    ) {
        let features = if event_idx { ALL } else { ALL & !EVENT_IDX };
        let model = model(features, 1 << size);
        let mut disk = start(&model);
        let mut medium = Medium::default();
        let mut expected: BTreeMap<u64, [u8; 512]> = BTreeMap::new();
        let mut flying: BTreeMap<u32, (Operation, u64, u64, Vec<DmaPage>)> = BTreeMap::new();
        let mut tag = 0;
        let mut rounds = steps.clone();
        // Enough to end everything.
        rounds.extend(std::iter::repeat_n((5, 0, 1, 0), 3 * steps.len()));
        for (kind, at, len, choice) in rounds {
            let (sector, mut sectors) = (at * 32, len);
            let busy = flying.values().any(|(_, at, _, _)| *at == sector);
            let operation = match kind {
                0 | 1 => Operation::Write,
                2 | 3 => Operation::Read,
                4 => [Operation::Discard, Operation::WriteZeroes][choice % 2],
                _ => {
                    medium.take(&model);
                    medium.execute(&model, choice);
                    while let Some(Completion { tag, result }) = disk.complete() {
                        prop_assert_eq!(result, Ok(()));
                        let (operation, at, len, pages) = flying.remove(&tag.0).expect("once");
                        for n in 0..len {
                            let page = pages.get(usize::try_from(n / 8).expect("small"));
                            let mut bytes = [0; 512];
                            if let Some(page) = page {
                                page.page.read(usize::try_from(n % 8 * 512).expect("small"), &mut bytes);
                            }
                            if operation == Operation::Read {
                                let zero = [0; 512];
                                let old = expected.get(&(at + n)).unwrap_or(&zero);
                                prop_assert_eq!(&bytes, old);
                            } else {
                                expected.insert(at + n, bytes);
                            }
                        }
                    }
                    disk.kick();
                    continue;
                }
            };
            if busy {
                continue;
            }
            sectors = sectors.min(disk.geometry().max_sectors.into());
            let is_transfer = kind < 4;
            let pages: Vec<_> = match is_transfer {
                true => (0..sectors.div_ceil(8)).map(|_| page(&model)).collect(),
                false => Vec::new(),
            };
            for page in pages.iter().filter(|_| operation == Operation::Write) {
                for n in 0..8 {
                    page.page.write(n * 512, &u64::from(tag + 1).to_le_bytes());
                }
            }
            if submit(&mut disk, tag, operation, (sector, sectors), &pages) {
                flying.insert(tag, (operation, sector, sectors, pages));
                tag += 1;
            }
        }
        prop_assert!(flying.is_empty(), "{:?} never ended", flying.keys());
        expected.retain(|_, bytes| *bytes != [0; 512]);
        medium.sectors.retain(|_, bytes| *bytes != [0; 512]);
        prop_assert_eq!(medium.sectors, expected);
        prop_assert_eq!(model.violations(), Vec::<String>::new());
    }
}

#[test]
fn a_geometry_is_what_the_device_says_and_the_queue_allows() {
    let geometry = *start(&model(ALL, 256)).geometry();
    assert_eq!((geometry.sectors, geometry.sector_size, geometry.queue_depth), (2048, 512, 64));
    assert_eq!((geometry.max_buffers, geometry.max_sectors), (64, 512));
    assert_eq!((geometry.max_discard_sectors, geometry.max_write_zeroes_sectors), (1000, 500));
    assert!(geometry.volatile_cache && !geometry.read_only && !geometry.whole_pages);
    let small = *start(&model(ALL, 16)).geometry();
    assert_eq!((small.max_buffers, small.queue_depth), (14, 5));
    let plain = *start(&model(0, 256)).geometry();
    assert_eq!((plain.max_buffers, plain.max_discard_sectors), (1, 0));
    assert!(!plain.volatile_cache);
    let read_only = *start(&model(ALL | feature::READ_ONLY, 256)).geometry();
    assert!(read_only.read_only);
    let large = model(ALL, 256);
    large.set_config(&config(4096));
    let large = *start(&large).geometry();
    assert_eq!((large.sector_size, large.max_write_zeroes_sectors), (4096, 496));
}

#[test]
fn a_configuration_that_cannot_be_is_an_error() {
    for (sector_size, change) in [(512, (1, 1_u8)), (520, (0, 0)), (512, (12, 0)), (512, (10, 0))] {
        let model = model(ALL, 256);
        let mut bytes = config(sector_size);
        bytes[change.0] ^= change.1;
        if change.0 >= 10 {
            bytes[change.0] = 0; // No buffers; buffers of no bytes.
        }
        if sector_size == 512 && change.0 < 10 {
            bytes[7] = 0xff; // A size beyond reason.
        }
        model.set_config(&bytes);
        let error = try_start(&model).expect_err("wrong");
        assert!(matches!(error, StartError::Config(_)), "{error}");
    }
    let short = model(ALL, 256);
    short.set_config(&[0; 20]);
    assert!(matches!(try_start(&short), Err(StartError::Config(_))));
    let none = model(ALL, 2);
    assert_eq!(try_start(&none).expect_err("too small"), StartError::Queue(0));
    let model = model(ALL, 256);
    let master = || Ok(());
    let result = VirtioBlk::start(model.clone(), &mut model.clone(), &model, master, |_| false);
    assert_eq!(result.expect_err("no message"), StartError::Interrupt);
}

#[test]
fn requests_that_do_not_fit_are_failed_and_not_issued() {
    let model = model(ALL, 256);
    let mut disk = start(&model);
    let mut result = |operation, range, pages: &[DmaPage]| {
        assert!(submit(&mut disk, 1, operation, range, pages));
        disk.kick();
        disk.complete().expect("at once").result
    };
    let one = [page(&model)];
    assert_eq!(result(Operation::Read, (2048, 8), &one), Err(DiskError::OutOfRange));
    assert_eq!(result(Operation::Read, (2044, 8), &one), Err(DiskError::OutOfRange));
    assert_eq!(result(Operation::Read, (u64::MAX, 8), &one), Err(DiskError::OutOfRange));
    assert_eq!(result(Operation::Read, (0, 0), &[]), Err(DiskError::Unsupported));
    assert_eq!(result(Operation::Discard, (0, 1001), &[]), Err(DiskError::Unsupported));
    assert_eq!(result(Operation::WriteZeroes, (0, 501), &[]), Err(DiskError::Unsupported));
    let many: Vec<_> = (0..65).map(|_| page(&model)).collect();
    assert_eq!(result(Operation::Write, (0, 520), &many), Err(DiskError::Unsupported));
    assert!(model.take(0).is_none());
    let read_only = self::model(ALL | feature::READ_ONLY, 256);
    let mut disk = start(&read_only);
    assert!(submit(&mut disk, 1, Operation::Write, (0, 8), &one));
    assert_eq!(disk.complete().expect("at once").result, Err(DiskError::ReadOnly));
}

#[test]
fn a_full_queue_is_busy_and_a_completion_makes_room() {
    let model = model(ALL, 16);
    let mut disk = start(&model);
    let pages: Vec<_> = (0..8).map(|_| page(&model)).collect();
    assert!(submit(&mut disk, 0, Operation::Write, (0, 64), &pages));
    assert!(!submit(&mut disk, 1, Operation::Write, (64, 64), &pages), "10 of 16 are in use");
    assert!(submit(&mut disk, 1, Operation::Write, (64, 8), &pages[..1]));
    disk.kick();
    let mut medium = Medium::default();
    medium.take(&model);
    medium.execute(&model, 0);
    assert_eq!(disk.complete(), Some(Completion { tag: Tag(0), result: Ok(()) }));
    assert!(submit(&mut disk, 2, Operation::Write, (128, 64), &pages));
}

/// A batch notifies once, a sleeping device alone; a burst interrupts once.
#[test]
fn notifications_and_interrupts_are_few() {
    let model = model(ALL, 256);
    let mut disk = start(&model);
    let page = [page(&model)];
    model.want_notification(0);
    for at in 0..4 {
        assert!(submit(&mut disk, at, Operation::Write, (u64::from(at) * 8, 8), &page));
    }
    assert!(model.notified().is_empty());
    disk.kick();
    assert_eq!(model.notified(), [0]);
    assert!(submit(&mut disk, 4, Operation::Write, (80, 8), &page));
    disk.kick();
    assert!(model.notified().is_empty(), "the device works already");
    assert!(!disk.arm());
    let mut medium = Medium::default();
    medium.take(&model);
    let told: Vec<bool> = (0..4).map(|_| medium.execute(&model, 0)).collect();
    assert_eq!(told, [true, false, false, false]);
    assert!(disk.arm(), "there are completions");
    assert_eq!(std::iter::from_fn(|| disk.complete()).count(), 4);
    assert!(!disk.arm());
    assert!(medium.execute(&model, 0));
}

#[test]
fn an_error_of_the_device_is_that_requests_alone() {
    let model = model(ALL, 256);
    let mut disk = start(&model);
    let page = [page(&model)];
    let mut medium = Medium { bad: Some(8), ..Medium::default() };
    for at in 0..3 {
        assert!(submit(&mut disk, at, Operation::Read, (u64::from(at) * 8, 8), &page));
    }
    disk.kick();
    medium.take(&model);
    while medium.execute(&model, 0) || !medium.held.is_empty() {}
    let results: Vec<_> = std::iter::from_fn(|| disk.complete()).map(|c| c.result).collect();
    assert_eq!(results, [Ok(()), Err(DiskError::Medium), Ok(())]);
}

/// The slot still holds how its last request ended.
#[test]
fn a_request_without_a_status_has_failed() {
    let model = model(ALL, 256);
    let mut disk = start(&model);
    let page = [page(&model)];
    for (status, expected) in [(&[status::OK][..], Ok(())), (&[], Err(DiskError::Failed))] {
        assert!(submit(&mut disk, 0, Operation::Write, (0, 8), &page));
        disk.kick();
        let chain = model.take(0).expect("published");
        model.give(0, &chain, status);
        assert_eq!(disk.complete().expect("returned").result, expected);
    }
}

#[test]
fn a_flush_without_a_cache_is_no_request() {
    let model = model(ALL & !feature::FLUSH, 256);
    let mut disk = start(&model);
    assert!(submit(&mut disk, 7, Operation::Flush, (0, 0), &[]));
    assert!(disk.arm(), "it is complete");
    assert_eq!(disk.complete(), Some(Completion { tag: Tag(7), result: Ok(()) }));
    assert!(model.take(0).is_none());
}

#[test]
fn a_device_that_stops_is_a_hang() {
    let model = model(ALL, 256);
    let mut disk = start(&model);
    let page = [page(&model)];
    assert!(submit(&mut disk, 0, Operation::Read, (0, 8), &page));
    disk.kick();
    let mut medium = Medium::default();
    medium.take(&model);
    medium.execute(&model, 0);
    assert!(disk.complete().is_some());
    assert_eq!(disk.check(PATIENCE_NS * 10), Ok(()), "nothing is asked of it");
    assert!(submit(&mut disk, 0, Operation::Read, (0, 8), &page));
    disk.kick();
    let begin = PATIENCE_NS * 10;
    assert_eq!(disk.check(begin + PATIENCE_NS), Ok(()));
    assert_eq!(disk.check(begin + PATIENCE_NS + 1), Err(Hang::Stuck(60)));
    model.set_faults(Faults { needs_reset: true, ..Faults::default() });
    assert_eq!(disk.check(0), Err(Hang::NeedsReset));
    model.lie(0, 99);
    assert_eq!(disk.complete(), None);
    assert_eq!(disk.check(0), Err(Hang::Broken));
}

/// The next owner's reset ends what the last one began.
#[test]
fn a_restart_begins_anew() {
    let model = model(ALL, 256);
    let mut first = start(&model);
    let page = [page(&model)];
    assert!(submit(&mut first, 0, Operation::Write, (0, 8), &page));
    first.kick();
    drop(first);
    let mut second = start(&model);
    assert!(model.take(0).is_none());
    assert!(submit(&mut second, 9, Operation::Write, (0, 8), &page));
    second.kick();
    let mut medium = Medium::default();
    medium.take(&model);
    medium.execute(&model, 0);
    assert_eq!(second.complete(), Some(Completion { tag: Tag(9), result: Ok(()) }));
    assert_eq!(model.violations(), Vec::<String>::new());
}
