//! Where on the disks a vbd's data are.
//!
//! A [`Finder`] turns a volume's text into a [`Place`]; for a partition it reads the partition
//! table ([`crate::gpt`]), which takes several reads of the disk. It does no I/O itself: it says
//! what it wants to read, and is given that.

use crate::gpt;
use alloc::boxed::Box;
use alloc::format;
use alloc::string::{String, ToString};
use axolotl_abi::volume::{Extent, Volume};
use domain_api::disk::{DiskError, Geometry, SECTOR};

/// A range of a disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    /// Which disk of the controller, from 0.
    pub disk: usize,
    /// First sector (of 512 bytes).
    pub start: u64,
    /// How many.
    pub sectors: u64,
}

impl Place {
    /// Whether they share a sector.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        self.disk == other.disk
            && self.start < other.start.saturating_add(other.sectors)
            && other.start < self.start.saturating_add(self.sectors)
    }
}

/// What a [`Finder`] does next.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Step {
    /// These sectors have to be read, at most a page of them; [`Finder::take`] gets them.
    Read(Place),
    /// The volume is found.
    Found(Place),
    /// There is no such volume, or it cannot be used. Why, in words.
    Failed(String),
}

/// Looks for a volume.
pub struct Finder {
    volume: Volume,
    search: Option<Box<gpt::Search>>,
}

impl Finder {
    /// Begins to look for the volume with this text.
    ///
    /// # Errors
    /// It is not a volume's text; says so in words.
    pub fn new(text: &str) -> Result<Self, String> {
        let volume = Volume::parse(text).map_err(|error| format!("volume `{text}`: {error}"))?;
        Ok(Self { volume, search: None })
    }

    /// What is to be done. `geometry` tells of the controller's disks, from 0.
    pub fn step(&mut self, geometry: impl Fn(usize) -> Option<Geometry>) -> Step {
        let disk = self.volume.disk as usize - 1;
        let Some(geometry) = geometry(disk) else {
            return Step::Failed(format!("volume `{}`: there is no such disk", self.volume));
        };
        let found = match &self.volume.extent {
            Extent::Whole => Ok((0, geometry.sectors)),
            Extent::Range { offset, bytes } => Ok((offset / SECTOR, bytes / SECTOR)),
            Extent::PartitionName(_) | Extent::PartitionGuid(_) => {
                match self.partition(&geometry) {
                    gpt::Step::Read { sector, sectors } => {
                        return Step::Read(Place { disk, start: sector, sectors });
                    }
                    gpt::Step::Found { sector, sectors } => Ok((sector, sectors)),
                    gpt::Step::Failed(message) => Err(message),
                }
            }
        };
        let checked = found.and_then(|(start, sectors)| {
            check(start, sectors, &geometry)?;
            Ok(Place { disk, start, sectors })
        });
        match checked {
            Ok(place) => Step::Found(place),
            Err(message) => Step::Failed(format!("volume `{}`: {message}", self.volume)),
        }
    }

    fn partition(&mut self, geometry: &Geometry) -> gpt::Step {
        let extent = &self.volume.extent;
        let search = self.search.get_or_insert_with(|| {
            let wanted = match extent {
                Extent::PartitionGuid(guid) => gpt::Wanted::Guid(guid.clone()),
                Extent::PartitionName(name) => gpt::Wanted::Name(name.clone()),
                _ => gpt::Wanted::Name(String::new()),
            };
            Box::new(gpt::Search::new(wanted, geometry))
        });
        search.step()
    }

    /// Takes what was read.
    pub fn take(&mut self, data: Result<&[u8], DiskError>) {
        if let Some(search) = &mut self.search {
            search.take(data);
        }
    }
}

/// A volume is whole sectors of its disk, and on it.
fn check(start: u64, sectors: u64, geometry: &Geometry) -> Result<(), String> {
    let unit = u64::from(geometry.sector_size) / SECTOR;
    if unit == 0 || geometry.sector_size > 4096 {
        return Err(format!("a disk with sectors of {} bytes", geometry.sector_size));
    }
    if start.checked_add(sectors).is_none_or(|end| end > geometry.sectors) {
        return Err(format!("it ends behind the disk's {} sectors", geometry.sectors));
    }
    if sectors == 0 {
        return Err("it is empty".to_string());
    }
    if !start.is_multiple_of(unit) || !sectors.is_multiple_of(unit) {
        return Err(format!("it is not whole sectors of {} bytes", geometry.sector_size));
    }
    Ok(())
}
