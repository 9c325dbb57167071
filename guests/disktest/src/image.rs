//! Verifies what a run left, from the bytes of the disk alone.

use crate::log::Record;
use crate::model::Mismatch;
use crate::sector::SECTOR;
use crate::stream::LOG_SECTORS;
use alloc::vec;
use alloc::vec::Vec;
use core::fmt;

/// Sectors read at a time.
const PIECE: u64 = 512;

/// What a verification found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Report {
    /// The record that it went by.
    pub record: Record,
    /// Sectors that hold what they may.
    pub verified: u64,
    /// Those that do not, in order; at most [`MOST`].
    pub mismatches: Vec<Mismatch>,
}

/// Mismatches that are reported.
pub const MOST: usize = 16;

/// Why nothing was verified.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Error<E> {
    /// The image cannot be read.
    Read(E),
    /// There is no record of a run in the log.
    NoLog,
}

impl<E: fmt::Display> fmt::Display for Error<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Read(error) => write!(f, "{error}"),
            Self::NoLog => write!(f, "no log of a run is in the image"),
        }
    }
}

/// Verifies the run whose log is at sector `area`. `read` fills a buffer from a sector on.
///
/// # Errors
/// See [`Error`].
pub fn verify<E>(
    area: u64,
    mut read: impl FnMut(u64, &mut [u8]) -> Result<(), E>,
) -> Result<Report, Error<E>> {
    let mut log = vec![0; SECTOR * usize::try_from(LOG_SECTORS).unwrap_or(0)];
    read(area, &mut log).map_err(Error::Read)?;
    let record = Record::newest(&log).ok_or(Error::NoLog)?;
    // A record tells where it thinks it is.
    if record.parameters.area != area {
        return Err(Error::NoLog);
    }
    let model = record.model();
    let mut report = Report { record, verified: 0, mismatches: Vec::new() };
    let (mut at, end) = (record.parameters.data(), area + record.parameters.area_sectors);
    let mut piece = vec![0; SECTOR * usize::try_from(PIECE).unwrap_or(0)];
    while at < end && report.mismatches.len() < MOST {
        let sectors = usize::try_from((end - at).min(PIECE)).unwrap_or(0);
        let bytes = &mut piece[..sectors * SECTOR];
        read(at, bytes).map_err(Error::Read)?;
        for (sector, bytes) in (at..).zip(bytes.chunks(SECTOR)) {
            match model.judge(sector, model.floor(sector), 0, 0, bytes) {
                Ok(()) => report.verified += 1,
                Err(mismatch) if report.mismatches.len() < MOST => report.mismatches.push(mismatch),
                Err(_) => {}
            }
        }
        at += sectors as u64;
    }
    Ok(report)
}
