//! Opening the volumes of vbds.
//!
//! A volume is opened when its vbd gets a frontend, and that may take reads of the disk. While
//! that goes on the frontend waits in state 3; what comes out is told in the store by
//! [`crate::Blkback::settle`].
//!
//! Two vbds may share a sector only when neither may write. The one that was there first stays;
//! at the start, these are the ones that a dead incarnation had connected.

use crate::plane::{Plane, Station};
use crate::request::Limits;
use crate::tags::Owner;
use crate::transfer::Desk;
use crate::volume::{Finder, Place, Step};
use alloc::boxed::Box;
use alloc::format;
use alloc::string::{String, ToString};
use domain_api::disk::{Buffer, Busy, Disk, DiskError, Geometry, Operation, Request, SECTOR, Tag};
use xen_abi::PAGE_SIZE;

/// What the toolstack wrote of a vbd's volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Wanted {
    /// The volume's text.
    pub params: String,
    /// Whether nothing may be written.
    pub read_only: bool,
    /// Whether a dead incarnation had it connected.
    pub inherited: bool,
}

/// How far a vbd's volume is.
pub enum VolumeState {
    /// Nobody needs it.
    Closed,
    /// It is being looked for.
    Opening(Box<Opening>),
    /// It works.
    Open(Box<OpenVolume>),
    /// It cannot be used; why, in words.
    Failed(String),
}

impl VolumeState {
    /// Whether opening it needs another round, although no event will tell of it.
    pub fn wants_turn(&self) -> bool {
        matches!(self, Self::Opening(opening) if opening.reading == 0 && !opening.waits)
    }
}

/// A volume that is being looked for.
pub struct Opening {
    wanted: Wanted,
    finder: Finder,
    /// Differs between searches.
    search: u32,
    /// A disk reads so many bytes for it.
    reading: usize,
    /// It has to wait for something that only another event brings.
    waits: bool,
    found: Option<Result<Place, String>>,
}

/// A volume that works.
pub struct OpenVolume {
    /// Where it is.
    place: Place,
    /// What requests may ask of it.
    pub limits: Limits,
    /// What its disk takes.
    pub geometry: Geometry,
    /// How a range is discarded, and how many sectors at a time, if it can be.
    pub discard: Option<(Operation, u64)>,
}

impl OpenVolume {
    fn new(place: Place, read_only: bool, geometry: &Geometry) -> Self {
        let unit = u64::from(geometry.sector_size) / SECTOR;
        let whole = |sectors: u32| u64::from(sectors) / unit * unit;
        let discard = match (whole(geometry.max_discard_sectors), geometry) {
            (0, disk) => Some((Operation::WriteZeroes, whole(disk.max_write_zeroes_sectors))),
            (most, _) => Some((Operation::Discard, most)),
        };
        let discard = discard.filter(|&(_, most)| most > 0);
        let read_only = read_only || geometry.read_only;
        let limits = Limits { sectors: place.sectors, unit, read_only, discard: discard.is_some() };
        Self { place, limits, geometry: *geometry, discard }
    }

    /// Gives a request to the disk. Sectors count from the volume's start.
    ///
    /// # Errors
    /// The disk takes no more at the moment.
    #[inline]
    pub fn submit<D: Disk>(
        &mut self,
        desk: &mut Desk,
        disks: &mut [D],
        owner: Owner,
        operation: Operation,
        (first, sectors): (u64, u64),
        buffers: &[Buffer<'_>],
    ) -> Result<(), Busy> {
        let sector = if sectors == 0 { 0 } else { self.place.start + first };
        let request = Request { tag: Tag(0), operation, sector, sectors, buffers };
        desk.issue(disks, self.place.disk, owner, request)
    }

    /// Bytes from the volume's start to where the disk's own blocks begin.
    #[must_use]
    pub fn discard_alignment(&self) -> u64 {
        let granularity = u64::from(self.geometry.physical_sector_size.max(1));
        let start = self.place.start * SECTOR % granularity;
        (granularity - start) % granularity
    }
}

impl Plane {
    /// Begins to open a vbd's volume.
    pub fn open(&mut self, place: usize, wanted: Wanted) {
        let search = self.next_search();
        let Some(Some(station)) = self.stations.get_mut(place) else { return };
        station.volume = match Finder::new(&wanted.params) {
            Ok(finder) => VolumeState::Opening(Box::new(Opening {
                wanted,
                finder,
                search,
                reading: 0,
                waits: false,
                found: None,
            })),
            Err(message) => {
                station.news = true;
                VolumeState::Failed(message)
            }
        };
    }

    /// Goes on with all volumes that are being opened.
    pub fn open_volumes<D: Disk>(&mut self, disks: &mut [D]) {
        for place in 0..self.stations.len() {
            if let Some(Some(Station { volume: VolumeState::Opening(opening), .. })) =
                self.stations.get_mut(place)
            {
                look(&mut self.desk, disks, place, opening);
            }
        }
        // Those that were connected before come first, wherever they stand in the list.
        let searching = |it: &Station| match &it.volume {
            VolumeState::Opening(opening) => opening.wanted.inherited && opening.found.is_none(),
            _ => false,
        };
        let pending = self.stations.iter().flatten().any(searching);
        for inherited in [true, false] {
            for place in 0..self.stations.len() {
                self.conclude(disks, place, inherited, pending);
            }
        }
    }

    /// Ends a search that has found what there is to find.
    fn conclude<D: Disk>(&mut self, disks: &[D], place: usize, inherited: bool, pending: bool) {
        let Some(Some(station)) = self.stations.get_mut(place) else { return };
        let VolumeState::Opening(opening) = &mut station.volume else { return };
        if opening.found.is_none() || opening.wanted.inherited != inherited {
            return;
        }
        opening.waits = pending && !inherited;
        if opening.waits {
            return;
        }
        let Some(found) = opening.found.take() else { return };
        let (id, wanted) = (station.id, opening.wanted.clone());
        let opened = found.and_then(|found| {
            let geometry = disks[found.disk].geometry();
            let volume = OpenVolume::new(found, wanted.read_only, geometry);
            match self.sharer(place, &volume) {
                Some(other) => Err(format!(
                    "volume `{}` is in use by {other}, and not read-only",
                    wanted.params
                )),
                None => Ok(volume),
            }
        });
        let Some(Some(station)) = self.stations.get_mut(place) else { return };
        station.news = true;
        station.volume = match opened {
            Ok(volume) => {
                let sectors = volume.limits.sectors;
                log::debug!("{id}: volume `{}` is open, {sectors} sectors", wanted.params);
                VolumeState::Open(Box::new(volume))
            }
            Err(message) => VolumeState::Failed(message),
        };
    }

    /// Another vbd that has a sector of this volume, where one of the two may write.
    fn sharer(&self, place: usize, volume: &OpenVolume) -> Option<String> {
        let mut others = self.stations.iter().enumerate().filter(|(other, _)| *other != place);
        others.find_map(|(_, station)| {
            let Some(Station { id, volume: VolumeState::Open(other), .. }) = station else {
                return None;
            };
            let writes = !volume.limits.read_only || !other.limits.read_only;
            (writes && volume.place.overlaps(&other.place)).then(|| id.to_string())
        })
    }

    /// Takes what a disk read for a search.
    pub fn found(&mut self, place: usize, search: u32, page: u16, result: Result<(), DiskError>) {
        if let Some(Some(Station { volume: VolumeState::Opening(opening), .. })) =
            self.stations.get_mut(place)
            && opening.search == search
        {
            let mut data = [0; PAGE_SIZE];
            self.desk.pool.page(page).page.read(0, &mut data);
            let bytes = core::mem::take(&mut opening.reading).min(data.len());
            opening.finder.take(result.map(|()| &data[..bytes]));
        }
        self.desk.pool.give(page);
    }
}

/// Goes on with one search.
fn look<D: Disk>(desk: &mut Desk, disks: &mut [D], place: usize, opening: &mut Opening) {
    if opening.reading > 0 || opening.found.is_some() {
        return;
    }
    opening.waits = false;
    let read = match opening.finder.step(|disk| disks.get(disk).map(|it| *it.geometry())) {
        Step::Read(read) => read,
        Step::Found(found) => return opening.found = Some(Ok(found)),
        Step::Failed(message) => return opening.found = Some(Err(message)),
    };
    let Some(page) = desk.pool.take() else {
        if desk.pool.is_empty() {
            let message = "this driver domain has no pages to read a partition table into";
            opening.found = Some(Err(message.to_string()));
        }
        opening.waits = true;
        return;
    };
    let own = desk.pool.page(page).clone();
    let len = u16::try_from(read.sectors * SECTOR).unwrap_or(u16::MAX);
    let buffers = [Buffer { page: &own, offset: 0, len }];
    let request = Request {
        tag: Tag(0),
        operation: Operation::Read,
        sector: read.start,
        sectors: read.sectors,
        buffers: &buffers,
    };
    let station = u16::try_from(place).unwrap_or(u16::MAX);
    let owner = Owner::Search { station, search: opening.search, page };
    match desk.issue(disks, read.disk, owner, request) {
        Ok(()) => opening.reading = usize::from(len),
        Err(Busy) => {
            desk.pool.give(page);
            opening.waits = true;
        }
    }
}
