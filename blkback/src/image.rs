//! A copy-on-write image between a vbd and the disks ([`qcow2`]).

use crate::preserved::Preserved;
use crate::tags::Owner;
use crate::transfer::Desk;
use crate::volume::Place;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use domain_api::disk::{Busy, Completion, Disk, DiskError, Geometry, Request, Tag};
use qcow2::{File, Lower, LowerRequest, LowerTag, MIN_PAGES, Qcow2, Setup, State, USUAL_PAGES};

/// Where an image is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Claims {
    /// The volume itself, or that which holds the image.
    pub place: Place,
    /// What shines through an image.
    pub backing: Option<Place>,
    /// Whether nothing is ever written.
    pub read_only: bool,
}

impl Claims {
    /// The places, and whether they may be written.
    fn places(&self) -> impl Iterator<Item = (Place, bool)> {
        let backing = self.backing.map(|place| (place, false));
        core::iter::once((self.place, !self.read_only)).chain(backing)
    }

    /// Whether a place is in both that one of the two may write.
    #[must_use]
    pub fn conflicts(&self, other: &Self) -> bool {
        self.places().any(|(place, writes)| {
            other.places().any(|(its, it_writes)| (writes || it_writes) && place.overlaps(&its))
        })
    }
}

/// An image.
pub struct Image {
    qcow: Qcow2,
    claims: Claims,
    /// The volume's text, by which its journal is found again.
    volume: String,
    /// Pages of the pool that it has.
    pages: Vec<u16>,
    /// Its requests that disks have.
    outstanding: u32,
    /// A disk was busy when it wanted something.
    stalled: bool,
}

impl Image {
    /// Begins to open an image. `keep` pages are left for other uses, if that can be.
    ///
    /// # Errors
    /// There are too few pages; in words.
    pub fn mount(
        desk: &mut Desk,
        preserved: &mut Preserved,
        claims: Claims,
        volume: &str,
        keep: usize,
    ) -> Result<Self, String> {
        let journal = preserved.journal(volume, &mut desk.pool);
        let free = desk.pool.free();
        let (Some(journal), true) = (journal, free >= MIN_PAGES) else {
            return Err(format!(
                "volume `{volume}`: an image needs {MIN_PAGES} preserved pages, {free} are left"
            ));
        };
        let wanted = free.saturating_sub(keep).clamp(MIN_PAGES, USUAL_PAGES);
        let pages: Vec<u16> = (0..wanted).filter_map(|_| desk.pool.take()).collect();
        let setup = Setup {
            image_sectors: claims.place.sectors,
            backing_sectors: claims.backing.map(|place| place.sectors),
            writable: !claims.read_only,
            pages: pages.iter().map(|&name| desk.pool.page(name).clone()).collect(),
            journal,
        };
        Ok(Self {
            qcow: Qcow2::open(setup),
            claims,
            volume: volume.to_string(),
            pages,
            outstanding: 0,
            // That gets it going.
            stalled: true,
        })
    }

    /// Where it is.
    #[must_use]
    pub fn claims(&self) -> &Claims {
        &self.claims
    }

    /// What the guest sees, once it is open.
    ///
    /// # Errors
    /// Why it cannot be used.
    pub fn geometry(&self) -> Result<Option<Geometry>, String> {
        match self.qcow.state() {
            State::Opening => Ok(None),
            State::Ready(geometry) => Ok(Some(*geometry)),
            State::Failed(message) => Err(format!("volume `{}`: {message}", self.volume)),
        }
    }

    /// Bytes that a discard frees at once.
    #[must_use]
    pub fn cluster_bytes(&self) -> u32 {
        self.qcow.cluster_bytes()
    }

    /// Whether no disk works for it.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.outstanding == 0
            && (self.qcow.is_idle() || !matches!(self.qcow.state(), State::Ready(_)))
    }

    /// Gives back what it had. Its journal goes, if it is in order without it.
    pub fn unmount(self, desk: &mut Desk, preserved: &mut Preserved) {
        let Self { qcow, pages, volume, .. } = self;
        let in_order = matches!(qcow.state(), State::Ready(_));
        drop(qcow);
        pages.into_iter().for_each(|name| desk.pool.give(name));
        if in_order {
            preserved.drop_journal(&volume, &mut desk.pool);
        }
    }

    /// Takes a request of the guest.
    ///
    /// # Errors
    /// It takes no more at the moment.
    pub fn submit<D: Disk>(
        &mut self,
        desk: &mut Desk,
        disks: &mut [D],
        station: u16,
        request: Request<'_>,
    ) -> Result<(), Busy> {
        let (qcow, mut below) = self.below(desk, disks, station);
        let submitted = qcow.submit(&mut below, request);
        desk.image_work = true;
        submitted
    }

    /// Takes the end of a request of its own.
    pub fn completed<D: Disk>(
        &mut self,
        desk: &mut Desk,
        disks: &mut [D],
        station: u16,
        (tag, result): (LowerTag, Result<(), DiskError>),
    ) {
        self.outstanding -= 1;
        let (qcow, mut below) = self.below(desk, disks, station);
        qcow.completed(&mut below, tag, result);
    }

    /// Goes on, if a disk was busy.
    pub fn resume<D: Disk>(&mut self, desk: &mut Desk, disks: &mut [D], station: u16) {
        if core::mem::take(&mut self.stalled) {
            let (qcow, mut below) = self.below(desk, disks, station);
            qcow.resume(&mut below);
        }
    }

    /// The next request of the guest that ended.
    pub fn next_done(&mut self) -> Option<Completion> {
        self.qcow.next_done()
    }

    fn below<'a, D: Disk>(
        &'a mut self,
        desk: &'a mut Desk,
        disks: &'a mut [D],
        station: u16,
    ) -> (&'a mut Qcow2, Below<'a, D>) {
        let Self { qcow, claims, outstanding, stalled, .. } = self;
        (qcow, Below { desk, disks, station, claims, outstanding, stalled })
    }
}

/// The volumes below an image.
struct Below<'a, D> {
    desk: &'a mut Desk,
    disks: &'a mut [D],
    station: u16,
    claims: &'a Claims,
    outstanding: &'a mut u32,
    stalled: &'a mut bool,
}

impl<D> Below<'_, D> {
    fn place(&self, file: File) -> Place {
        match (file, self.claims.backing) {
            (File::Backing, Some(backing)) => backing,
            _ => self.claims.place,
        }
    }
}

impl<D: Disk> Lower for Below<'_, D> {
    fn geometry(&self, file: File) -> Geometry {
        *self.disks[self.place(file).disk].geometry()
    }

    fn submit(&mut self, request: LowerRequest<'_>) -> Result<(), Busy> {
        let LowerRequest { file, tag, operation, sector, sectors, buffers } = request;
        let place = self.place(file);
        let end = sector.checked_add(sectors);
        assert!(end.is_some_and(|end| end <= place.sectors), "an image stays in its volume");
        let sector = if sectors == 0 { 0 } else { place.start + sector };
        let owner = Owner::Image { station: self.station, tag };
        let request = Request { tag: Tag(0), operation, sector, sectors, buffers };
        let submitted = self.desk.issue(self.disks, place.disk, owner, request);
        match submitted {
            Ok(()) => *self.outstanding += 1,
            Err(Busy) => *self.stalled = true,
        }
        submitted
    }
}
