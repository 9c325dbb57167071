//! The load and its verification, over any [`Disk`].
//!
//! ```text
//!                    ┌──────────── every `scan_every` requests ───────────┐
//!                    ▼                                                    │
//!  Opening ───▶ Scanning ───▶ Running ──────────────────────────────▶ Ending ───▶ Scanning ───▶ Done
//!  reads the    verifies an   makes the stream's requests, verifies   flushes and  verifies
//!  log          earlier run   what it reads, keeps the log             logs         everything
//! ```
//!
//! Nothing waits: [`Engine::step`] takes what was completed, submits what can be submitted, and
//! returns. The first violation ends it.

use crate::log::{Record, SLOT_SECTORS};
use crate::model::{Mismatch, Model};
use crate::sector::{Owner, SECTOR, compose};
use crate::stream::{Kind, LOG_SECTORS, MAX_AHEAD, Parameters, Step};
use alloc::vec;
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::Ordering::Relaxed;
use domain_api::DmaPage;
use domain_api::disk::{Buffer, Completion, Disk, DiskError, Operation, Request, Tag};

/// Most requests in flight.
pub const MAX_DEPTH: u32 = 192;
/// Completions and submissions of one step.
const BATCH: u32 = 256;
/// A gap with requests waiting counts as a pause from here on.
pub const PAUSE_NS: u64 = 3_000_000;
const SECTORS_PER_PAGE: u32 = 8;
/// What a buffer holds where nothing was read into it.
const POISON: u64 = 0x5eed_0bad_5eed_0bad;

/// What to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// Starts a run.
    Run,
    /// Verifies what the last run left, as its log tells.
    Verify,
    /// Verifies what the last run left, if any, then starts a run.
    VerifyThenRun,
}

/// How to do it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Options {
    /// The stream.
    pub parameters: Parameters,
    /// The disk, and a number for this run that no other run has.
    pub owner: Owner,
    /// What to do.
    pub mode: Mode,
    /// Most requests in flight.
    pub depth: u32,
    /// How many requests to make; `None`: until [`Engine::finish`].
    pub requests: Option<u32>,
    /// Verify everything each time that so many requests were made.
    pub scan_every: Option<u32>,
}

/// What must not happen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Violation {
    /// A sector holds what it must not.
    Sector {
        /// The request that read it, from 0; `None` in a pass over everything.
        request: Option<u32>,
        /// The sector.
        mismatch: Mismatch,
    },
    /// A request failed.
    Failed {
        /// Which; `None` for the log, and for a pass over everything.
        request: Option<u32>,
        /// What it was.
        operation: Operation,
        /// Where.
        sector: u64,
        /// How many sectors.
        sectors: u32,
        /// Why.
        error: DiskError,
    },
    /// A completion for a request that was not in flight.
    Completion(Tag),
    /// A run shall be verified, but no record of one is on the disk.
    NoLog,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sector { request: Some(request), mismatch } => {
                write!(f, "{mismatch} (read by request {request})")
            }
            Self::Sector { request: None, mismatch } => write!(f, "{mismatch}"),
            Self::Failed { request, operation, sector, sectors, error } => {
                write!(f, "{operation:?} of {sectors} sectors at {sector}: {error}")?;
                request.map_or(Ok(()), |request| write!(f, " (request {request})"))
            }
            Self::Completion(tag) => write!(f, "completion for request {tag:?}, not in flight"),
            Self::NoLog => write!(f, "no log of a run is on the disk"),
        }
    }
}

impl core::error::Error for Violation {}

/// Counters.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Stats {
    /// Requests completed, those for the log and for passes included.
    pub requests: u64,
    /// Sectors read and found right.
    pub verified: u64,
    /// Sectors written.
    pub written: u64,
    /// Flushes completed.
    pub flushes: u64,
    /// Discards completed.
    pub discards: u64,
    /// Passes over everything.
    pub passes: u64,
    /// Gaps between completions of at least [`PAUSE_NS`], with requests in flight.
    pub pauses: u64,
    /// The longest gap.
    pub longest_pause_ns: u64,
}

/// Where an engine is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    /// Reads the log.
    Opening,
    /// Verifies everything.
    Scanning,
    /// Makes requests.
    Running,
    /// Makes everything durable.
    Ending,
    /// All is done, and nothing was wrong.
    Done,
}

/// What a request in flight is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Work {
    /// Request `n` of the stream.
    Step(u32, Step),
    /// A flush of our own.
    Flush,
    /// A record of the log.
    Log(Record),
    /// Reads slot `k` of the log.
    LogRead(u64),
    /// Part of a pass.
    Scan,
}

#[derive(Debug)]
struct InFlight {
    work: Work,
    serial: u32,
    operation: Operation,
    sector: u64,
    sectors: u32,
    skew: u32,
    pages: Vec<u16>,
    /// For each sector of a read, its floor at the time of submission.
    floors: Vec<u32>,
    /// A flush: changes of so many requests were completed before it, and the record of the log.
    covers: (u32, Option<u32>),
}

/// See the module.
pub struct Engine {
    options: Options,
    model: Model,
    phase: Phase,
    /// What comes after a pass.
    after_scan: Phase,
    pages: Vec<DmaPage>,
    free_pages: Vec<u16>,
    slots: Vec<Option<InFlight>>,
    free_slots: Vec<u16>,
    serial: u32,
    /// Where a pass is, or the next slot of the log to read.
    cursor: u64,
    log: Vec<u8>,
    counter: u64,
    next: u32,
    finish: bool,
    scanned_at: u32,
    /// Changes of so many requests are durable.
    flushed: u32,
    /// As the last record says whose write was completed; as the last durable one says.
    logged: Option<u32>,
    durable: Option<u32>,
    ended: bool,
    waiting_since: Option<u64>,
    stats: Stats,
}

impl Engine {
    /// An engine that uses `pages`, which the disk reaches.
    ///
    /// # Panics
    /// When the parameters are unsound, or there are too few pages for the largest request.
    #[must_use]
    pub fn new(options: Options, pages: Vec<DmaPage>) -> Self {
        assert!(options.parameters.is_sound(), "unsound parameters");
        let largest = options.parameters.max_sectors.div_ceil(SECTORS_PER_PAGE) as usize + 1;
        assert!(pages.len() >= largest, "a request takes {largest} pages");
        let depth = options.depth.clamp(1, MAX_DEPTH);
        // Two for the log and its flushes.
        let slots = u16::try_from(depth + 2).unwrap_or(u16::MAX);
        let count = u16::try_from(pages.len()).unwrap_or(u16::MAX);
        Self {
            options: Options { depth, ..options },
            model: Model::new(options.parameters, options.owner),
            phase: Phase::Opening,
            after_scan: Phase::Running,
            pages,
            free_pages: (0..count).rev().collect(),
            slots: (0..slots).map(|_| None).collect(),
            free_slots: (0..slots).rev().collect(),
            serial: 0,
            cursor: 0,
            log: vec![0; SECTOR * usize::try_from(LOG_SECTORS).unwrap_or(0)],
            counter: 0,
            next: 0,
            finish: false,
            scanned_at: 0,
            flushed: 0,
            logged: None,
            durable: None,
            ended: false,
            waiting_since: None,
            stats: Stats::default(),
        }
    }

    /// Where it is.
    #[must_use]
    pub const fn phase(&self) -> Phase {
        self.phase
    }

    /// The counters.
    #[must_use]
    pub const fn stats(&self) -> Stats {
        self.stats
    }

    /// Requests of the stream that were made.
    #[must_use]
    pub const fn made(&self) -> u32 {
        self.next
    }

    /// Requests in flight.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.slots.len() - self.free_slots.len()
    }

    /// Makes no further requests; verifies everything and ends.
    pub const fn finish(&mut self) {
        self.finish = true;
    }

    /// Goes on. `true`: there is more to do at once.
    ///
    /// # Errors
    /// Something happened that must not. The engine is of no use afterwards.
    pub fn step<D: Disk>(&mut self, disk: &mut D, now_ns: u64) -> Result<bool, Violation> {
        let mut taken = 0;
        while taken < BATCH
            && let Some(completion) = disk.complete()
        {
            self.completed(completion)?;
            taken += 1;
        }
        let submitted = self.submit_all(disk)?;
        if submitted > 0 {
            disk.kick();
        }
        self.watch_for_pauses(now_ns, taken > 0);
        Ok(taken == BATCH || submitted == BATCH)
    }

    fn watch_for_pauses(&mut self, now_ns: u64, progress: bool) {
        let since = *self.waiting_since.get_or_insert(now_ns);
        if progress {
            let gap = now_ns.saturating_sub(since);
            self.stats.pauses += u64::from(gap >= PAUSE_NS);
            self.stats.longest_pause_ns = self.stats.longest_pause_ns.max(gap);
        }
        if self.in_flight() == 0 {
            self.waiting_since = None;
        } else if progress {
            self.waiting_since = Some(now_ns);
        }
    }

    /// Submits what can be submitted.
    fn submit_all<D: Disk>(&mut self, disk: &mut D) -> Result<u32, Violation> {
        let mut submitted = 0;
        while submitted < BATCH {
            let done = match self.phase {
                Phase::Opening => self.open(disk)?,
                Phase::Scanning => self.scan(disk),
                Phase::Running => self.keep_log(disk) || self.run(disk),
                Phase::Ending => self.end(disk),
                Phase::Done => false,
            };
            if !done {
                break;
            }
            submitted += 1;
        }
        Ok(submitted)
    }

    /// Reads the log; when it is there, decides what to do. True: something changed.
    fn open<D: Disk>(&mut self, disk: &mut D) -> Result<bool, Violation> {
        let area = self.options.parameters.area;
        if self.cursor < LOG_SECTORS {
            let slot = self.cursor;
            let sectors = u32::try_from(SLOT_SECTORS).unwrap_or(0);
            let read =
                self.submit(disk, Work::LogRead(slot), Operation::Read, area + slot, sectors, 0);
            self.cursor += if read { SLOT_SECTORS } else { 0 };
            return Ok(read);
        }
        if self.in_flight() > 0 {
            return Ok(false);
        }
        self.cursor = 0;
        let newest = Record::newest(&self.log);
        self.counter = newest.map_or(0, |record| record.counter + 1);
        match (self.options.mode, newest) {
            (Mode::Run, _) | (Mode::VerifyThenRun, None) => self.phase = Phase::Running,
            (Mode::Verify, None) => return Err(Violation::NoLog),
            (mode, Some(record)) => {
                self.model = record.model();
                self.phase = Phase::Scanning;
                let run = mode == Mode::VerifyThenRun;
                self.after_scan = if run { Phase::Running } else { Phase::Done };
            }
        }
        Ok(true)
    }

    /// Goes on with a pass over everything. True: something changed.
    fn scan<D: Disk>(&mut self, disk: &mut D) -> bool {
        let p = self.model.parameters;
        let left = p.data_sectors() - self.cursor;
        if left > 0 {
            let most = self.options.parameters.max_sectors.min(128).max(p.unit);
            let sectors = u32::try_from(left).unwrap_or(u32::MAX).min(most);
            let at = p.data() + self.cursor;
            let read = self.submit(disk, Work::Scan, Operation::Read, at, sectors, 0);
            self.cursor += if read { u64::from(sectors) } else { 0 };
            return read;
        }
        if self.in_flight() > 0 {
            return false;
        }
        self.stats.passes += 1;
        self.cursor = 0;
        self.phase = self.after_scan;
        self.after_scan = Phase::Running;
        // An earlier run was verified; ours begins.
        if self.phase == Phase::Running && self.model.owner != self.options.owner {
            self.model = Model::new(self.options.parameters, self.options.owner);
        }
        true
    }

    /// Makes the next request of the stream, if it can be made.
    fn run<D: Disk>(&mut self, disk: &mut D) -> bool {
        if self.finish || self.options.requests.is_some_and(|requests| self.next >= requests) {
            self.phase = Phase::Ending;
            return true;
        }
        let n = self.next;
        let due = self.options.scan_every.is_some_and(|every| n.is_multiple_of(every.max(1)));
        if due && n > self.scanned_at {
            if self.in_flight() == 0 {
                self.scanned_at = n;
                self.phase = Phase::Scanning;
            }
            return self.in_flight() == 0;
        }
        let ahead = self.durable.is_none_or(|durable| n - durable >= MAX_AHEAD);
        let depth = self.options.parameters.depth(n, self.options.depth) as usize;
        if ahead || n == u32::MAX - 1 || self.in_flight() >= depth {
            return false;
        }
        let step = self.options.parameters.step(n);
        if step.changes() && self.meets(&step) {
            return false;
        }
        let operation = match step.kind {
            Kind::Read => Operation::Read,
            Kind::Write => Operation::Write,
            Kind::Flush => Operation::Flush,
            Kind::Discard => Operation::Discard,
        };
        let work = Work::Step(n, step);
        let made = self.submit(disk, work, operation, step.sector, step.sectors, step.skew.into());
        if made {
            self.next += 1;
            if step.kind == Kind::Discard {
                self.model.discarded(step.sector, step.sectors, n + 1);
            }
        }
        made
    }

    /// Whether a change in flight touches a sector of `step`.
    fn meets(&self, step: &Step) -> bool {
        let end = |sector: u64, sectors: u32| sector + u64::from(sectors);
        self.slots.iter().flatten().any(|other| {
            matches!(other.operation, Operation::Write | Operation::Discard)
                && other.sector < end(step.sector, step.sectors)
                && step.sector < end(other.sector, other.sectors)
        })
    }

    fn is_under_way(&self, wanted: impl Fn(&InFlight) -> bool) -> bool {
        self.slots.iter().flatten().any(wanted)
    }

    /// Writes a record when there is news, and flushes when the log is far behind.
    fn keep_log<D: Disk>(&mut self, disk: &mut D) -> bool {
        if self.logged.is_none_or(|logged| logged < self.flushed) {
            return self.write_log(disk, false);
        }
        let behind = self.durable.is_none_or(|durable| self.next - durable >= MAX_AHEAD / 2);
        behind && self.flush(disk)
    }

    fn write_log<D: Disk>(&mut self, disk: &mut D, ended: bool) -> bool {
        if self.is_under_way(|other| matches!(other.work, Work::Log(_))) {
            return false;
        }
        let Owner { disk: number, run } = self.options.owner;
        let record = Record {
            magic: crate::log::MAGIC,
            disk: number,
            run,
            counter: self.counter,
            flushed: self.flushed,
            ended: u32::from(ended),
            parameters: self.options.parameters,
        };
        let sectors = self.options.parameters.unit;
        let work = Work::Log(record);
        let made = self.submit(disk, work, Operation::Write, record.sector(), sectors, 0);
        self.counter += u64::from(made);
        made
    }

    /// A flush of our own, unless something is under way that it would have to wait for.
    fn flush<D: Disk>(&mut self, disk: &mut D) -> bool {
        let busy = |other: &InFlight| {
            other.operation == Operation::Flush || matches!(other.work, Work::Log(_))
        };
        !self.is_under_way(busy) && self.submit(disk, Work::Flush, Operation::Flush, 0, 0, 0)
    }

    /// Makes everything durable, and says so in the log; then everything is verified.
    fn end<D: Disk>(&mut self, disk: &mut D) -> bool {
        if self.in_flight() > 0 {
            return false;
        }
        if self.flushed < self.next {
            return self.flush(disk);
        }
        if !self.ended {
            return self.write_log(disk, true);
        }
        if self.durable != Some(self.next) {
            return self.flush(disk);
        }
        self.phase = Phase::Scanning;
        self.after_scan = Phase::Done;
        true
    }

    fn submit<D: Disk>(
        &mut self,
        disk: &mut D,
        work: Work,
        operation: Operation,
        sector: u64,
        sectors: u32,
        skew: u32,
    ) -> bool {
        let data = matches!(operation, Operation::Read | Operation::Write);
        let wanted = if data { (skew + sectors).div_ceil(SECTORS_PER_PAGE) as usize } else { 0 };
        if self.free_pages.len() < wanted {
            return false;
        }
        let Some(slot) = self.free_slots.pop() else { return false };
        let pages = self.free_pages.split_off(self.free_pages.len() - wanted);
        let first_page = &self.pages;
        let buffers: Vec<Buffer<'_>> = pages
            .iter()
            .zip(extents(skew, sectors))
            .map(|(&page, (offset, len))| Buffer {
                page: &first_page[usize::from(page)],
                offset,
                len,
            })
            .collect();
        let mut floors = Vec::new();
        match operation {
            Operation::Write => self.fill(&work, sector, &buffers),
            Operation::Read => {
                poison(&buffers);
                if !matches!(work, Work::LogRead(_)) {
                    let all = (sector..).take(sectors as usize);
                    floors = all.map(|sector| self.model.floor(sector)).collect();
                }
            }
            _ => {}
        }
        self.serial = self.serial.wrapping_add(1) & 0xff_ffff;
        let tag = Tag(self.serial << 8 | u32::from(slot));
        let request =
            Request { tag, operation, sector, sectors: sectors.into(), buffers: &buffers };
        let taken = disk.submit(request).is_ok();
        drop(buffers);
        if !taken {
            self.free_pages.extend(pages);
            self.free_slots.push(slot);
            return false;
        }
        let covers = (self.completed_before(), self.logged);
        let serial = self.serial;
        let flight =
            InFlight { work, serial, operation, sector, sectors, skew, pages, floors, covers };
        self.slots[usize::from(slot)] = Some(flight);
        true
    }

    /// The changes of how many requests are all completed.
    fn completed_before(&self) -> u32 {
        let open = self.slots.iter().flatten().filter_map(|other| match other.work {
            Work::Step(n, step) if step.changes() => Some(n),
            _ => None,
        });
        open.min().unwrap_or(self.next)
    }

    /// Writes the content of a request to its buffers.
    fn fill(&self, work: &Work, sector: u64, buffers: &[Buffer<'_>]) {
        for (at, (page, offset)) in (sector..).zip(places(buffers)) {
            match work {
                Work::Log(record) if at == sector => page.page.write(offset, &record.compose()),
                Work::Log(_) => page.page.write(offset, &[0; SECTOR]),
                Work::Step(n, _) => {
                    page.page.write(offset, &compose(self.options.owner, at, n + 1));
                }
                Work::Flush | Work::LogRead(_) | Work::Scan => {}
            }
        }
    }

    fn completed(&mut self, completion: Completion) -> Result<(), Violation> {
        let Completion { tag, result } = completion;
        let slot = tag.0 & 0xff;
        let place = self.slots.get_mut(slot as usize);
        let flight = place.and_then(|place| place.take_if(|flight| flight.serial == tag.0 >> 8));
        let flight = flight.ok_or(Violation::Completion(tag))?;
        let unsupported = result == Err(DiskError::Unsupported);
        if let Err(error) = result
            && !(unsupported && flight.operation == Operation::Discard)
        {
            let InFlight { operation, sector, sectors, .. } = flight;
            let request = flight.request();
            return Err(Violation::Failed { request, operation, sector, sectors, error });
        }
        self.finished(&flight)?;
        self.stats.requests += 1;
        self.free_slots.extend(u16::try_from(slot));
        self.free_pages.extend(flight.pages);
        Ok(())
    }

    fn finished(&mut self, flight: &InFlight) -> Result<(), Violation> {
        match (flight.work, flight.operation) {
            (Work::Step(n, step), Operation::Write) => {
                self.model.written(step.sector, step.sectors, n + 1);
                self.stats.written += u64::from(step.sectors);
            }
            (Work::LogRead(slot), _) => self.keep_slot(slot, flight),
            (Work::Log(record), _) => {
                self.logged = Some(record.flushed);
                if record.ended == 1 {
                    self.ended = true;
                    // One more flush, for this record.
                    self.durable = None;
                }
            }
            (Work::Step(..) | Work::Scan, Operation::Read) => self.verify(flight)?,
            (_, Operation::Flush) => {
                let (completed, logged) = flight.covers;
                self.flushed = self.flushed.max(completed);
                self.durable = self.durable.max(logged);
                self.stats.flushes += 1;
            }
            _ => self.stats.discards += 1,
        }
        Ok(())
    }

    /// Keeps a slot of the log that was read.
    fn keep_slot(&mut self, slot: u64, flight: &InFlight) {
        let from = usize::try_from(slot).unwrap_or(0) * SECTOR;
        for (n, page) in flight.pages.iter().enumerate() {
            let from = from + n * 4096;
            self.pages[usize::from(*page)].page.read(0, &mut self.log[from..from + 4096]);
        }
    }

    /// Compares what was read with what may be there.
    fn verify(&mut self, flight: &InFlight) -> Result<(), Violation> {
        let mut bytes = [0; SECTOR];
        for (at, (sector, &floor)) in (flight.skew..).zip((flight.sector..).zip(&flight.floors)) {
            let page = flight.pages[(at / SECTORS_PER_PAGE) as usize];
            let offset = (at % SECTORS_PER_PAGE) as usize * SECTOR;
            self.pages[usize::from(page)].page.read(offset, &mut bytes);
            let request = flight.request();
            self.model
                .judge(sector, floor, flight.covers.0, self.next, &bytes)
                .map_err(|mismatch| Violation::Sector { request, mismatch })?;
        }
        self.stats.verified += u64::from(flight.sectors);
        Ok(())
    }
}

impl InFlight {
    const fn request(&self) -> Option<u32> {
        match self.work {
            Work::Step(n, _) => Some(n),
            _ => None,
        }
    }
}

impl Record {
    /// What the sectors of its run may hold.
    #[must_use]
    pub fn model(&self) -> Model {
        match self.ended {
            0 => Model::recover(self.parameters, self.owner(), self.flushed),
            _ => Model::ended(self.parameters, self.owner(), self.flushed),
        }
    }
}

/// The parts of pages that `sectors` take which begin `skew` sectors into the first page: offset
/// and length, in bytes.
fn extents(skew: u32, sectors: u32) -> impl Iterator<Item = (u16, u16)> {
    let end = skew + sectors;
    (0..end.div_ceil(SECTORS_PER_PAGE)).map(move |page| {
        let from = skew.max(page * SECTORS_PER_PAGE);
        let until = end.min((page + 1) * SECTORS_PER_PAGE);
        let bytes = |sectors: u32| u16::try_from(sectors as usize * SECTOR).unwrap_or(0);
        (bytes(from % SECTORS_PER_PAGE), bytes(until - from))
    })
}

/// Each sector of the buffers, in order.
fn places<'a>(buffers: &'a [Buffer<'a>]) -> impl Iterator<Item = (&'a DmaPage, usize)> {
    buffers.iter().flat_map(|buffer| {
        let from = usize::from(buffer.offset);
        let until = from + usize::from(buffer.len);
        (from..until).step_by(SECTOR).map(|offset| (buffer.page, offset))
    })
}

/// So that a read which moves no data is found out, even if the page holds a good copy.
fn poison(buffers: &[Buffer<'_>]) {
    for (page, offset) in places(buffers) {
        page.page.u64(offset).store(POISON, Relaxed);
        page.page.u64(offset + SECTOR - 8).store(POISON, Relaxed);
    }
}
