//! What each sector may hold, and how a sector that holds something else is told.
//!
//! A sector that is read must hold what the last write left that was completed when the read was
//! submitted (the *floor*), or what a later write left that was submitted before the read was
//! completed. A discard since the floor allows zeros too. Nothing else is allowed: neither an older
//! write, nor half of one, nor what belongs elsewhere. Only a sector that is read *while* it is
//! written may be some of both: an emulated disk whose medium is a file gives what is in the host's
//! page cache at that moment.
//!
//! Two reads during one write may see new content first and old content then: a write that is
//! started again after its driver's death may do so on any disk.

use crate::sector::{Content, Header, Owner, SECTOR, classify};
use crate::stream::{Kind, MAX_AHEAD, Parameters, Step};
use alloc::vec;
use alloc::vec::Vec;
use core::fmt;
use core::ops::Range;

/// What is known of a sector. 0 means "never".
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Cell {
    /// Generation of the last completed write.
    pub written: u32,
    /// Generation of the last discard that was submitted.
    pub discarded: u32,
}

/// What a sector may hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Expected {
    /// Generation of the last write that must be there; 0: none, anything may.
    pub floor: u32,
    /// No write has a higher generation.
    pub limit: u32,
    /// Generation of the last discard.
    pub discarded: u32,
}

/// What is wrong with a sector.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Problem {
    /// An older write than must be there: an acknowledged one is lost.
    Lost,
    /// A write of another run.
    OtherRun,
    /// A write that was meant for another sector or disk.
    Misdirected,
    /// A write that this run never made there.
    NeverWritten,
    /// Parts of different contents.
    Torn,
    /// Zeros that nothing allows.
    Zeroed,
    /// Nothing that was ever written there.
    Overwritten,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Lost => "lost write",
            Self::OtherRun => "content of another run",
            Self::Misdirected => "misdirected write",
            Self::NeverWritten => "write that was never made",
            Self::Torn => "torn sector",
            Self::Zeroed => "zeros",
            Self::Overwritten => "foreign content",
        })
    }
}

/// A sector that holds what it must not.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Mismatch {
    /// Which.
    pub sector: u64,
    /// What is wrong.
    pub problem: Problem,
    /// What it may hold.
    pub expected: Expected,
    /// Its fields, if it has any.
    pub found: Option<Header>,
    /// Its first bytes.
    pub bytes: [u8; 40],
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Expected { floor, limit, discarded } = self.expected;
        write!(
            f,
            "{} in sector {}: generation {floor} or a write up to {limit}",
            self.problem, self.sector
        )?;
        if discarded > floor {
            write!(f, " or zeros (discarded by {discarded})")?;
        }
        if let Some(found) = self.found {
            let Header { disk, run, sector, generation, .. } = found;
            write!(
                f,
                "; found generation {generation} of sector {sector}, disk {disk}, run {run:#x}"
            )?;
        }
        write!(f, "; bytes ")?;
        self.bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl core::error::Error for Mismatch {}

/// The sectors of a run.
#[derive(Debug)]
pub struct Model {
    /// The stream.
    pub parameters: Parameters,
    /// Whose sectors.
    pub owner: Owner,
    cells: Vec<Cell>,
    /// No request that is not in the cells comes behind this one.
    end: u32,
    /// Discards that may have been made, but are not in the cells.
    discards: Vec<Step>,
}

impl Model {
    /// Nothing was written.
    ///
    /// # Panics
    /// When the area has more sectors than there are addresses.
    #[must_use]
    pub fn new(parameters: Parameters, owner: Owner) -> Self {
        let sectors = usize::try_from(parameters.data_sectors()).expect("the area fits memory");
        Self {
            parameters,
            owner,
            cells: vec![Cell::default(); sectors],
            end: 0,
            discards: Vec::new(),
        }
    }

    /// What a log tells that says: the changes among the first `flushed` requests are durable,
    /// and fewer than [`MAX_AHEAD`] further ones were made.
    #[must_use]
    pub fn recover(parameters: Parameters, owner: Owner, flushed: u32) -> Self {
        let mut model = Self::new(parameters, owner);
        for n in 0..flushed {
            let step = parameters.step(n);
            let cells = model.cells(step.sector, step.sectors);
            match step.kind {
                Kind::Write => cells.iter_mut().for_each(|cell| cell.written = n + 1),
                Kind::Discard => cells.iter_mut().for_each(|cell| cell.discarded = n + 1),
                Kind::Read | Kind::Flush => {}
            }
        }
        model.end = flushed.saturating_add(MAX_AHEAD);
        let unknown = (flushed..model.end).map(|n| parameters.step(n));
        model.discards = unknown.filter(|step| step.kind == Kind::Discard).collect();
        model
    }

    /// What a log tells that says that the run ended after `requests`, and that all its changes
    /// are durable.
    #[must_use]
    pub fn ended(parameters: Parameters, owner: Owner, requests: u32) -> Self {
        let mut model = Self::recover(parameters, owner, requests);
        model.end = requests;
        model.discards.clear();
        model
    }

    fn cells(&mut self, sector: u64, sectors: u32) -> &mut [Cell] {
        if sectors == 0 {
            return &mut [];
        }
        let from = self.place(sector);
        &mut self.cells[from..from + sectors as usize]
    }

    fn place(&self, sector: u64) -> usize {
        usize::try_from(sector - self.parameters.data()).expect("a sector of the area")
    }

    /// Notes that a write was completed.
    pub fn written(&mut self, sector: u64, sectors: u32, generation: u32) {
        self.cells(sector, sectors).iter_mut().for_each(|cell| cell.written = generation);
    }

    /// Notes that a discard was submitted.
    pub fn discarded(&mut self, sector: u64, sectors: u32, generation: u32) {
        self.cells(sector, sectors).iter_mut().for_each(|cell| cell.discarded = generation);
    }

    /// The last completed write of a sector.
    #[must_use]
    pub fn floor(&self, sector: u64) -> u32 {
        self.cells[self.place(sector)].written
    }

    /// The highest generation that can be found, when `made` requests were made by this run.
    #[must_use]
    pub fn limit(&self, made: u32) -> u32 {
        made.max(self.end)
    }

    /// Compares a sector with what it may hold, when `floor` was its floor at the time that the
    /// read was submitted, and `made` requests were made so far. The first `began` of them were
    /// over before the read was submitted, so they do not excuse a mixture.
    ///
    /// # Errors
    /// It holds something else.
    pub fn judge(
        &self,
        sector: u64,
        floor: u32,
        began: u32,
        made: u32,
        bytes: &[u8],
    ) -> Result<(), Mismatch> {
        let cell = self.cells[self.place(sector)];
        let limit = self.limit(made);
        let expected = Expected { floor, limit, discarded: cell.discarded };
        let (problem, found) = match classify(bytes) {
            Content::Whole(header) => (self.judge_whole(sector, expected, &header), Some(header)),
            // What lay there before the run may be anything, but not of this run.
            Content::Torn(header) if floor == 0 && !self.is_own(&header) => return Ok(()),
            Content::Torn(_) | Content::Foreign
                if self.may_be_mixed(sector, began.max(floor)..made) =>
            {
                return Ok(());
            }
            Content::Torn(header) => (Some(Problem::Torn), Some(header)),
            Content::Zeros if floor == 0 || self.may_be_zeros(sector, expected) => return Ok(()),
            Content::Zeros => (Some(Problem::Zeroed), None),
            Content::Foreign if floor == 0 => return Ok(()),
            Content::Foreign => (Some(Problem::Overwritten), None),
        };
        let Some(problem) = problem else { return Ok(()) };
        let mut head = [0; 40];
        head.copy_from_slice(&bytes[..40.min(SECTOR)]);
        Err(Mismatch { sector, problem, expected, found, bytes: head })
    }

    const fn is_own(&self, header: &Header) -> bool {
        header.disk == self.owner.disk && header.run == self.owner.run
    }

    fn judge_whole(&self, sector: u64, expected: Expected, header: &Header) -> Option<Problem> {
        let Expected { floor, limit, .. } = expected;
        let generation = header.generation;
        if header.run != self.owner.run {
            return (floor != 0).then_some(Problem::OtherRun);
        }
        if header.sector != sector || header.disk != self.owner.disk {
            return Some(Problem::Misdirected);
        }
        if generation == floor {
            return if floor == 0 { Some(Problem::NeverWritten) } else { None };
        }
        if generation < floor {
            return Some(Problem::Lost);
        }
        let step = self.parameters.step(generation - 1);
        let made = generation <= limit && step.kind == Kind::Write && step.covers(sector);
        (!made).then_some(Problem::NeverWritten)
    }

    /// Whether one of the requests `during` changed the sector.
    fn may_be_mixed(&self, sector: u64, mut during: Range<u32>) -> bool {
        during.any(|n| {
            let step = self.parameters.step(n);
            step.changes() && step.covers(sector)
        })
    }

    /// Whether a discard since the floor allows zeros.
    fn may_be_zeros(&self, sector: u64, expected: Expected) -> bool {
        expected.discarded > expected.floor || self.discards.iter().any(|step| step.covers(sector))
    }
}
