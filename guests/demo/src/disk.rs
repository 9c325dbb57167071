//! The guest's disk: its frontend, and the files on it.

use alloc::boxed::Box;
use alloc::string::ToString;
use core::cell::RefCell;
use demo_guest::page::DiskStatus;
use demo_guest::pauses::Pauses;
use demo_guest::shelf::{PIECE, Shelf, State};
use frontends::blkfront::{self, Blkfront, FrontDisk, GrantPolicy};
use unikernel::{Domain, XenstoreRing, log};
use xenbus::{Client, Errno, Event, XenbusState};

/// Room for a piece of a file for each of 16 connections.
const BUFFERS: blkfront::Config = blkfront::Config {
    queues: 1,
    ring_page_order: 0,
    indirect_segments: 0,
    grants: GrantPolicy::Persistent,
    #[expect(clippy::cast_possible_truncation, reason = "128")]
    buffers: (16 * PIECE / 4096) as u16,
};

/// The first disk of the domain.
pub struct GuestDisk {
    domain: Domain,
    link: Link,
    pauses: Pauses,
    reconnect_ns: u64,
    told: Option<State>,
}

enum Link {
    /// Not connected.
    Waiting(Box<Blkfront>),
    Up(Box<Up>),
    /// While it is changed.
    Changing,
}

/// A connected disk.
struct Up {
    disk: FrontDisk<Domain>,
    shelf: RefCell<Shelf>,
}

impl GuestDisk {
    /// The first disk that the store has for the domain, if any.
    pub fn find(domain: &Domain, store: &mut Client<XenstoreRing>) -> Option<Self> {
        let devices = blkfront::devices(store, domain.id());
        let number = *devices.unwrap_or_default().first()?;
        match Blkfront::new(store, domain.id(), number, BUFFERS) {
            Ok(front) => Some(Self {
                domain: domain.clone(),
                link: Link::Waiting(Box::new(front)),
                pauses: Pauses::default(),
                reconnect_ns: 0,
                told: None,
            }),
            Err(errno) => {
                log::error!("vbd {number}: {errno:?}");
                None
            }
        }
    }

    fn front(&mut self) -> Option<&mut Blkfront> {
        match &mut self.link {
            Link::Waiting(front) => Some(front),
            Link::Up(up) => Some(up.disk.front()),
            Link::Changing => None,
        }
    }

    /// Takes an event of the store. False: it belongs to somebody else.
    pub fn store_event(&mut self, store: &mut Client<XenstoreRing>, event: &Event) -> bool {
        let mut env = self.domain.clone();
        let Some(front) = self.front() else { return false };
        front.store_event(&mut env, store, event).unwrap_or_else(|errno| {
            log::error!("vbd: {errno:?}");
            true
        })
    }

    /// Connects, and connects again at `retry_ns` intervals after the connection broke.
    pub fn follow_backend(&mut self, store: &mut Client<XenstoreRing>, retry_ns: u64) {
        let Some(front) = self.front() else { return };
        let (connected, fault) = (front.is_connected(), front.fault());
        let lost = fault.is_some() || front.state() == XenbusState::CLOSED;
        let now_ns = self.domain.now_ns();
        if lost && now_ns >= self.reconnect_ns {
            self.reconnect_ns = now_ns + retry_ns;
            if let Err(errno) = self.reconnect(store) {
                log::error!("vbd: {errno:?}");
            }
        } else if connected {
            self.go_up();
        }
    }

    fn go_up(&mut self) {
        self.link = match core::mem::replace(&mut self.link, Link::Changing) {
            Link::Waiting(front) => {
                log::info!("vbd {} is connected", front.device().index);
                let disk = FrontDisk::new(*front, self.domain.clone());
                let shelf = RefCell::new(Shelf::new(disk.pages().to_vec()));
                Link::Up(Box::new(Up { disk, shelf }))
            }
            other => other,
        };
    }

    fn reconnect(&mut self, store: &mut Client<XenstoreRing>) -> Result<(), Errno> {
        let mut env = self.domain.clone();
        let front = self.front().ok_or(Errno::EINVAL)?;
        let closed = front.close(&mut env, store);
        self.link = match core::mem::replace(&mut self.link, Link::Changing) {
            // Whoever reads a file is told by the shelf's end.
            Link::Up(up) => Link::Waiting(Box::new(up.disk.into_front())),
            other => other,
        };
        closed?;
        self.front().ok_or(Errno::EINVAL)?.reopen(&mut env, store)
    }

    /// Takes what was read, and asks for more. Returns whether there is news for a connection.
    pub fn poll(&mut self) -> bool {
        let Link::Up(up) = &mut self.link else { return false };
        let Up { disk, shelf } = &mut **up;
        let news = shelf.get_mut().poll(disk);
        let front = disk.front();
        let (now_ns, waiting) = (self.domain.now_ns(), front.in_flight() > 0);
        if let Some(gap_ns) = self.pauses.observe(now_ns, front.stats().answered, waiting) {
            log::info!("the disk paused for {} us", gap_ns / 1000);
        }
        let state = shelf.get_mut().state();
        if state != State::Opening && self.told != Some(state) {
            self.told = Some(state);
            match state {
                State::Failed(error) => log::error!("files: {error}"),
                _ => log::info!("{} files on the disk", shelf.get_mut().files().len()),
            }
        }
        news
    }

    /// Whether requests are with the backend.
    pub fn is_waiting(&mut self) -> bool {
        self.front().is_some_and(|front| front.in_flight() > 0)
    }

    /// Whether there is no connection.
    pub fn is_down(&mut self) -> bool {
        !self.front().is_some_and(|front| front.is_connected())
    }

    /// The files.
    pub const fn shelf(&self) -> Option<&RefCell<Shelf>> {
        match &self.link {
            Link::Up(up) => Some(&up.shelf),
            Link::Waiting(_) | Link::Changing => None,
        }
    }

    /// What the page shows.
    pub fn status(&mut self, started_ns: u64, name: fn(XenbusState) -> &'static str) -> DiskStatus {
        let (files, trouble) = match self.shelf().map(RefCell::borrow) {
            None => (0, "not connected".to_string()),
            Some(shelf) => match shelf.state() {
                State::Failed(error) => (0, error.to_string()),
                State::Opening => (0, "being opened".to_string()),
                State::Ready => (shelf.files().len() as u64, "".to_string()),
            },
        };
        let pauses = self.pauses;
        let Some(front) = self.front() else { return DiskStatus::default() };
        let stats = front.stats();
        DiskStatus {
            backend_domid: front.device().backend.0,
            backend_state: name(front.backend_state()),
            sectors: front.info().sectors,
            files,
            trouble,
            requests: stats.reads,
            errors: stats.errors + stats.lost,
            read_bytes: stats.read_sectors * 512,
            pauses: pauses.count,
            last_pause_us: pauses.last_ns / 1000,
            last_pause_at_ms: pauses.last_end_ns.saturating_sub(started_ns) / 1_000_000,
            longest_pause_us: pauses.longest_ns / 1000,
        }
    }
}
