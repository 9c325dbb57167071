//! Opening the volumes of vbds.
//!
//! A volume is opened when its vbd gets a frontend, and that may take reads of the disk. While
//! that goes on the frontend waits in state 3; what comes out is told in the store by
//! [`crate::Blkback::settle`].
//!
//! Two vbds may share a sector only when neither may write. The one that was there first stays;
//! at the start, these are the ones that a dead incarnation had connected.

use crate::image::{Claims, Image};
use crate::plane::{Plane, Station};
use crate::preserved::{BOUNCE_PAGES_PER_VBD, Preserved};
use crate::request::Limits;
use crate::tags::Owner;
use crate::transfer::Desk;
use crate::volume::{Finder, Place, Step};
use alloc::boxed::Box;
use alloc::format;
use alloc::string::{String, ToString};
use domain_api::disk::{Buffer, Busy, Disk, DiskError, Geometry, Operation, Request, SECTOR, Tag};
use qcow2::LowerTag;
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
    /// The volume holds an image.
    pub image: Option<ImageWanted>,
}

/// What the toolstack wrote of an image.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ImageWanted {
    /// The text of the volume that shines through it.
    pub backing: Option<String>,
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

    /// The image, if it is one.
    pub fn image(&mut self) -> Option<&mut Image> {
        match self {
            Self::Open(volume) => match &mut volume.source {
                Source::Image(image) => Some(image),
                Source::Place(_) => None,
            },
            Self::Opening(opening) => match &mut opening.stage {
                Stage::Mount(image) => Some(image),
                _ => None,
            },
            _ => None,
        }
    }

    /// Whether no disk works for it. A search is called off at any time.
    pub fn is_idle(&mut self) -> bool {
        self.image().is_none_or(|image| image.is_idle())
    }

    /// What it uses, or is about to use.
    fn claims(&self) -> Option<Claims> {
        match self {
            Self::Open(volume) => Some(match &volume.source {
                Source::Image(image) => *image.claims(),
                Source::Place(place) => {
                    Claims { place: *place, backing: None, read_only: volume.limits.read_only }
                }
            }),
            Self::Opening(opening) => match &opening.stage {
                Stage::Mount(image) => Some(*image.claims()),
                _ => None,
            },
            _ => None,
        }
    }
}

/// A volume that is being opened.
pub struct Opening {
    wanted: Wanted,
    finder: Finder,
    /// Differs between searches.
    search: u32,
    /// A disk reads so many bytes for the search.
    reading: usize,
    /// It has to wait for something that only another event brings.
    waits: bool,
    stage: Stage,
}

enum Stage {
    /// The volume is looked for; or, when that is found, what shines through it.
    Find { image: Option<Place> },
    /// All is found, or not.
    Found(Result<Claims, String>),
    /// The image reads its tables.
    Mount(Box<Image>),
}

/// A volume that works.
pub struct OpenVolume {
    source: Source,
    /// What requests may ask of it.
    pub limits: Limits,
    /// What it takes.
    pub geometry: Geometry,
    /// How a range is discarded, and how many sectors at a time, if it can be.
    pub discard: Option<(Operation, u64)>,
}

enum Source {
    Place(Place),
    Image(Box<Image>),
}

impl OpenVolume {
    fn new(source: Source, sectors: u64, read_only: bool, geometry: &Geometry) -> Self {
        let unit = u64::from(geometry.sector_size) / SECTOR;
        let whole = |sectors: u32| u64::from(sectors) / unit * unit;
        let discard = match (whole(geometry.max_discard_sectors), geometry) {
            (0, disk) => (Operation::WriteZeroes, whole(disk.max_write_zeroes_sectors)),
            (most, _) => (Operation::Discard, most),
        };
        let discard = Some(discard).filter(|&(_, most)| most > 0);
        let read_only = read_only || geometry.read_only;
        let limits = Limits { sectors, unit, read_only, discard: discard.is_some() };
        Self { source, limits, geometry: *geometry, discard }
    }

    /// Gives a request to the disk, or to the image. Sectors count from the volume's start.
    ///
    /// # Errors
    /// It takes no more at the moment.
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
        match &mut self.source {
            Source::Place(place) => {
                let sector = if sectors == 0 { 0 } else { place.start + first };
                let request = Request { tag: Tag(0), operation, sector, sectors, buffers };
                desk.issue(disks, place.disk, owner, request)?;
            }
            Source::Image(image) => {
                let Owner::Request { station, .. } = owner else { return Err(Busy) };
                let tag = desk.tags.open(owner);
                let request = Request { tag, operation, sector: first, sectors, buffers };
                if let Err(Busy) = image.submit(desk, disks, station, request) {
                    let _ = desk.tags.close(tag);
                    return Err(Busy);
                }
            }
        }
        desk.accepted += 1;
        Ok(())
    }

    /// Bytes that can be discarded at once.
    #[must_use]
    pub fn discard_granularity(&self) -> u64 {
        match &self.source {
            Source::Place(_) => u64::from(self.geometry.physical_sector_size.max(512)),
            Source::Image(image) => u64::from(image.cluster_bytes()),
        }
    }

    /// Bytes from the volume's start to where the disk's own blocks begin.
    #[must_use]
    pub fn discard_alignment(&self) -> u64 {
        let Source::Place(place) = &self.source else { return 0 };
        let granularity = self.discard_granularity();
        let start = place.start * SECTOR % granularity;
        (granularity - start) % granularity
    }
}

impl Plane {
    /// Begins to open a vbd's volume.
    pub fn open(&mut self, place: usize, wanted: Wanted) {
        let finder = match Finder::new(&wanted.params) {
            Ok(finder) => finder,
            Err(message) => return self.refuse(place, message),
        };
        let (search, stage) = (self.next_search(), Stage::Find { image: None });
        let opening = Opening { wanted, finder, search, reading: 0, waits: false, stage };
        if let Some(Some(station)) = self.stations.get_mut(place) {
            station.volume = VolumeState::Opening(Box::new(opening));
        }
    }

    /// A vbd's volume cannot be used.
    pub fn refuse(&mut self, place: usize, message: String) {
        if let Some(Some(station)) = self.stations.get_mut(place) {
            station.news = true;
            station.volume = VolumeState::Failed(message);
        }
    }

    /// Goes on with all volumes that are being opened.
    pub fn open_volumes<D: Disk>(&mut self, preserved: &mut Preserved, disks: &mut [D]) {
        let (mut any, mut pending) = (false, false);
        for place in 0..self.stations.len() {
            if let Some(Some(Station { volume: VolumeState::Opening(opening), .. })) =
                self.stations.get_mut(place)
            {
                any = true;
                opening.look(&mut self.desk, disks, place);
                // Those that were connected before come first, wherever they stand in the list.
                pending |= opening.wanted.inherited && matches!(opening.stage, Stage::Find { .. });
            }
        }
        if !any {
            return;
        }
        for inherited in [true, false] {
            for place in 0..self.stations.len() {
                self.conclude(preserved, disks, place, inherited, pending);
            }
        }
    }

    /// Opens a volume when all of it is found, and no one else has it.
    fn conclude<D: Disk>(
        &mut self,
        preserved: &mut Preserved,
        disks: &mut [D],
        place: usize,
        inherited: bool,
        pending: bool,
    ) {
        let Some(Some(Station { volume: VolumeState::Opening(opening), .. })) =
            self.stations.get_mut(place)
        else {
            return;
        };
        match &opening.stage {
            Stage::Find { .. } => return,
            Stage::Mount(_) => return self.mounted(preserved, place),
            Stage::Found(_) if opening.wanted.inherited != inherited => return,
            Stage::Found(_) => {}
        }
        opening.waits = pending && !inherited;
        if opening.waits {
            return;
        }
        let Stage::Found(found) = core::mem::replace(&mut opening.stage, NOTHING) else { return };
        let wanted = opening.wanted.clone();
        let claims = match found.and_then(|claims| self.check(place, claims, &wanted)) {
            Ok(claims) => claims,
            Err(message) => return self.refuse(place, message),
        };
        if wanted.image.is_some() {
            return self.mount(preserved, disks, place, claims, &wanted.params);
        }
        let (geometry, source) = (disks[claims.place.disk].geometry(), Source::Place(claims.place));
        let volume = OpenVolume::new(source, claims.place.sectors, claims.read_only, geometry);
        self.opened(place, volume);
    }

    /// Nobody else may have what is claimed, unless neither may write.
    fn check(&self, place: usize, claims: Claims, wanted: &Wanted) -> Result<Claims, String> {
        let others = self.stations.iter().enumerate().filter(|(other, _)| *other != place);
        for (_, station) in others {
            if let Some(Station { id, volume, .. }) = station
                && volume.claims().is_some_and(|other| claims.conflicts(&other))
            {
                let volume = &wanted.params;
                return Err(format!("volume `{volume}` is in use by {id}, and not read-only"));
            }
        }
        Ok(claims)
    }

    fn mount<D: Disk>(
        &mut self,
        preserved: &mut Preserved,
        disks: &mut [D],
        place: usize,
        claims: Claims,
        volume: &str,
    ) {
        let keep = BOUNCE_PAGES_PER_VBD * self.stations.len();
        let image = match Image::mount(&mut self.desk, preserved, claims, volume, keep) {
            Ok(image) => image,
            Err(message) => return self.refuse(place, message),
        };
        if let Some(Some(Station { volume: VolumeState::Opening(opening), .. })) =
            self.stations.get_mut(place)
        {
            // What it waits for is told by its disk.
            (opening.waits, opening.stage) = (true, Stage::Mount(Box::new(image)));
        }
        self.resume_images(disks);
        self.mounted(preserved, place);
    }

    /// An image may have been opened, or may have turned out to be none.
    fn mounted(&mut self, preserved: &mut Preserved, place: usize) {
        let Some(Some(station)) = self.stations.get_mut(place) else { return };
        let Some(image) = station.volume.image() else { return };
        let geometry = match image.geometry() {
            Ok(None) => return,
            Err(_) if !image.is_idle() => return,
            other => other,
        };
        let VolumeState::Opening(opening) =
            core::mem::replace(&mut station.volume, VolumeState::Closed)
        else {
            return;
        };
        let Stage::Mount(image) = opening.stage else { return };
        match geometry {
            Ok(Some(geometry)) => {
                let read_only = image.claims().read_only;
                let source = Source::Image(image);
                let volume = OpenVolume::new(source, geometry.sectors, read_only, &geometry);
                self.opened(place, volume);
            }
            Ok(None) => {}
            Err(message) => {
                image.unmount(&mut self.desk, preserved);
                self.refuse(place, message);
            }
        }
    }

    fn opened(&mut self, place: usize, volume: OpenVolume) {
        if let Some(Some(station)) = self.stations.get_mut(place) {
            log::debug!("{}: its volume has {} sectors", station.id, volume.limits.sectors);
            station.news = true;
            station.volume = VolumeState::Open(Box::new(volume));
        }
    }

    /// Closes a vbd's volume. False: a disk still works for it; there is news when it does not.
    pub fn close_volume(&mut self, place: usize, preserved: &mut Preserved) -> bool {
        let Some(station) = &mut self.stations[place] else { return true };
        station.closes = station.link.is_some() || !station.volume.is_idle();
        if station.closes {
            return false;
        }
        let image = match core::mem::replace(&mut station.volume, VolumeState::Closed) {
            VolumeState::Open(volume) => match volume.source {
                Source::Image(image) => Some(image),
                Source::Place(_) => None,
            },
            VolumeState::Opening(opening) => match opening.stage {
                Stage::Mount(image) => Some(image),
                _ => None,
            },
            _ => None,
        };
        if let Some(image) = image {
            image.unmount(&mut self.desk, preserved);
        }
        true
    }

    /// Takes the end of an image's own request.
    pub fn completed_below<D: Disk>(
        &mut self,
        disks: &mut [D],
        place: usize,
        tag: LowerTag,
        result: Result<(), DiskError>,
    ) {
        let Some(Some(station)) = self.stations.get_mut(place) else { return };
        let Some(image) = station.volume.image() else { return };
        let number = u16::try_from(place).unwrap_or(u16::MAX);
        image.completed(&mut self.desk, disks, number, (tag, result));
    }

    /// Has images go on that a disk was too busy for, and takes what they are done with. True
    /// when that was anything.
    pub fn resume_images<D: Disk>(&mut self, disks: &mut [D]) -> bool {
        let mut any = false;
        for place in 0..self.stations.len() {
            let number = u16::try_from(place).unwrap_or(u16::MAX);
            while let Some(Some(station)) = self.stations.get_mut(place)
                && let Some(image) = station.volume.image()
            {
                image.resume(&mut self.desk, disks, number);
                let Some(completion) = image.next_done() else { break };
                any = true;
                self.completed(disks, completion);
            }
        }
        any
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

/// Stands where a stage was taken from.
const NOTHING: Stage = Stage::Find { image: None };

impl Opening {
    /// Goes on with the search.
    fn look<D: Disk>(&mut self, desk: &mut Desk, disks: &mut [D], place: usize) {
        while self.reading == 0
            && let Stage::Find { image } = &self.stage
        {
            self.waits = false;
            let image = *image;
            match self.finder.step(|disk| disks.get(disk).map(|it| *it.geometry())) {
                Step::Read(read) => return self.read(desk, disks, place, read),
                Step::Found(found) => self.stage = self.next_stage(image, found),
                Step::Failed(message) => self.stage = Stage::Found(Err(message)),
            }
        }
    }

    /// What comes after a volume was found.
    fn next_stage(&mut self, image: Option<Place>, found: Place) -> Stage {
        let read_only = self.wanted.read_only;
        if let Some(image) = image {
            return Stage::Found(Ok(Claims { place: image, backing: Some(found), read_only }));
        }
        match self.wanted.image.as_ref().and_then(|it| it.backing.as_deref()) {
            None => Stage::Found(Ok(Claims { place: found, backing: None, read_only })),
            Some(backing) => match Finder::new(backing) {
                Ok(finder) => {
                    self.finder = finder;
                    Stage::Find { image: Some(found) }
                }
                Err(message) => Stage::Found(Err(message)),
            },
        }
    }

    fn read<D: Disk>(&mut self, desk: &mut Desk, disks: &mut [D], place: usize, read: Place) {
        let Some(page) = desk.pool.take() else {
            if desk.tags.len() == 0 {
                // Nothing that is under way would bring one.
                let message = "this driver domain has no pages to read a partition table into";
                self.stage = Stage::Found(Err(message.to_string()));
            }
            self.waits = true;
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
        let owner = Owner::Search { station, search: self.search, page };
        match desk.issue(disks, read.disk, owner, request) {
            Ok(()) => self.reading = usize::from(len),
            Err(Busy) => {
                desk.pool.give(page);
                self.waits = true;
            }
        }
    }
}
