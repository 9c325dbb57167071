//! A driver for AHCI host bus adapters, as a safe library.
//!
//! It owns the adapter's registers, its command lists and tables, and serves each ATA disk behind
//! it as a [`Disk`]. It leaves to others: PCI configuration, the routing of the adapter's message
//! to an event, and what requests mean. Packet devices (CD drives), port multipliers and enclosures
//! are left alone.
//!
//! Facts are from the public specifications: Serial ATA AHCI 1.3.1 and ATA Command Set 3. `model`
//! (for tests) is the same facts from the other side.
//!
//! # Ports are disks
//!
//! Port `n` is disk `n` of the slice that [`Ahci::disks`] returns, whatever is on the ports before
//! it: a disk that is missing after a restart must not give its number to another one. A port
//! without a disk has no sectors and refuses all requests; those behind the last disk are left out.
//!
//! # Restarting costs next to nothing
//!
//! [`Ahci::start`] meets an adapter in any state. Its reset (`GHC.HR`) ends what the earlier owner
//! had begun; only then may bus mastering come back. Nothing is waited for longer than it takes.
//!
//! # Interrupts
//!
//! One message for all ports. Its owner calls [`Ahci::interrupt`], which masks the adapter, works
//! until nothing more is complete, and then calls [`Ahci::arm`], which unmasks and looks once
//! more. So a busy disk interrupts once per burst, however long the burst is. Whoever forgets, or
//! an adapter that loses a message, is caught by [`Ahci::check`].
//!
//! # Errors
//!
//! See `recovery`. What the disk says is final, is final; whatever passes is tried again; a disk
//! that does not come back is given up, and the others do not notice. Only an adapter that does not
//! obey ends the driver ([`Hang`]): a restart resets it.
//!
//! # Trust
//!
//! The adapter is below this driver, yet nothing it says is used unchecked: slots are ended by our own
//! table, addresses are never read back, and what a disk says about itself is checked before it
//! becomes a [`Geometry`].

#![cfg_attr(not(any(test, feature = "model")), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod command;
mod disk;
mod engine;
mod identify;
#[cfg(any(test, feature = "model"))]
pub mod model;
mod notice;
mod recovery;
pub mod registers;
mod start;

#[cfg(test)]
mod tests;

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::fmt;
use domain_api::disk::{Busy, Completion, Disk, DiskError, Geometry, Request, Tag};
use domain_api::{Clock, Registers};
use recovery::State;
use registers as reg;

pub use disk::AtaDisk;
pub use engine::TaskFile;
pub use identify::{Identity, Unusable};
pub use notice::Event;
pub use start::StartError;

/// The adapter does not work any more. The remedy is a restart of the driver.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Hang {
    /// All registers read as ones: it left the bus.
    Gone,
    /// A port's engine does not stop.
    Port(u32),
}

impl fmt::Display for Hang {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gone => f.write_str("the adapter does not answer on the bus"),
            Self::Port(port) => write!(f, "port {port} of the adapter does not stop"),
        }
    }
}

impl core::error::Error for Hang {}

/// A running adapter.
#[derive(Debug)]
pub struct Ahci<R, C> {
    registers: R,
    ports: Vec<Port<R, C>>,
    /// How many of them there are up to the last disk.
    served: usize,
    /// Its interrupt is unmasked, and nothing has been raised since.
    armed: bool,
}

impl<R: Registers, C: Clock> Ahci<R, C> {
    /// The ports by number, up to the last one with a disk.
    #[must_use]
    pub fn disks(&mut self) -> &mut [Port<R, C>] {
        &mut self.ports[..self.served]
    }

    /// Handles a message of the adapter: what has ended can be had from the disks afterwards. No
    /// further message comes before [`Self::arm`].
    pub fn interrupt(&mut self) {
        self.registers.write(reg::GHC, reg::GHC_AE);
        self.armed = false;
        for disk in self.ports.iter_mut().filter_map(Port::disk_mut) {
            disk.look = true;
        }
    }

    /// Unmasks the interrupt. Returns whether there is work already, in which case the caller
    /// does it rather than wait.
    pub fn arm(&mut self) -> bool {
        if self.armed {
            // Nothing was raised; what `check` found does not come with a message.
            return self.ports.iter().filter_map(Port::disk).any(AtaDisk::is_told);
        }
        self.armed = true;
        self.registers.write(reg::IS, u32::MAX);
        self.registers.write(reg::GHC, reg::GHC_AE | reg::GHC_IE);
        // What came between the last look and the unmasking may have raised nothing.
        let mut any = false;
        for disk in self.ports.iter_mut().filter_map(Port::disk_mut) {
            any |= disk.has_news();
        }
        any
    }

    /// Looks after the disks now and then, say four times a second: commands that take too long,
    /// devices that become ready, interrupts that were lost. What it found is there for the next
    /// [`Self::arm`] to tell.
    ///
    /// # Errors
    /// The adapter hangs.
    pub fn check(&mut self, now_ns: u64) -> Result<(), Hang> {
        if self.registers.read(reg::GHC) == u32::MAX {
            return Err(Hang::Gone);
        }
        for port in &mut self.ports {
            let Some(disk) = port.disk_mut() else { continue };
            disk.check(now_ns);
            match disk.state {
                State::Stuck => return Err(Hang::Port(port.number)),
                State::Gone => return Err(Hang::Gone),
                State::Running | State::Settling { .. } | State::Dead(_) => {}
            }
        }
        Ok(())
    }

    /// The next thing worth a line in the log, and its port.
    pub fn event(&mut self) -> Option<(u32, Event)> {
        self.ports.iter_mut().find_map(|port| Some((port.number, port.event()?)))
    }
}

/// What is on a port.
#[derive(Debug)]
enum Attached<R, C> {
    Disk(Box<AtaDisk<R, C>>),
    Ignored(Unusable),
    None,
}

/// A port: a disk, or an empty one.
#[derive(Debug)]
pub struct Port<R, C> {
    number: u32,
    disk: Option<Box<AtaDisk<R, C>>>,
    /// Requests to a disk that is not there.
    refused: VecDeque<Tag>,
    event: Option<Event>,
}

/// A disk that is not there.
const NO_DISK: Geometry = Geometry {
    sectors: 0,
    sector_size: 512,
    physical_sector_size: 512,
    read_only: true,
    volatile_cache: false,
    max_discard_sectors: 0,
    max_write_zeroes_sectors: 0,
    max_sectors: 8,
    max_buffers: 1,
    whole_pages: false,
    queue_depth: 1,
};

impl<R, C> Port<R, C> {
    fn new(number: u32, attached: Attached<R, C>) -> Self {
        let (disk, event) = match attached {
            Attached::Disk(disk) => (Some(disk), None),
            Attached::Ignored(why) => (None, Some(Event::Ignored(why))),
            Attached::None => (None, None),
        };
        Self { number, disk, refused: VecDeque::new(), event }
    }

    /// Its number, from 0.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.number
    }

    /// The disk on it.
    #[must_use]
    pub fn disk(&self) -> Option<&AtaDisk<R, C>> {
        self.disk.as_deref()
    }

    fn disk_mut(&mut self) -> Option<&mut AtaDisk<R, C>> {
        self.disk.as_deref_mut()
    }

    fn event(&mut self) -> Option<Event> {
        let of_disk = |disk: &mut Box<AtaDisk<R, C>>| disk.notices.take();
        self.event.take().or_else(|| self.disk.as_mut().and_then(of_disk))
    }
}

impl<R: Registers, C: Clock> Disk for Port<R, C> {
    fn geometry(&self) -> &Geometry {
        self.disk.as_ref().map_or(&NO_DISK, |disk| disk.geometry())
    }

    fn submit(&mut self, request: Request<'_>) -> Result<(), Busy> {
        match &mut self.disk {
            Some(disk) => disk.submit(request),
            None if self.refused.len() >= usize::from(NO_DISK.queue_depth) => Err(Busy),
            None => {
                self.refused.push_back(request.tag);
                Ok(())
            }
        }
    }

    fn kick(&mut self) {
        if let Some(disk) = &mut self.disk {
            disk.kick();
        }
    }

    fn complete(&mut self) -> Option<Completion> {
        match &mut self.disk {
            Some(disk) => disk.complete(),
            None => {
                let tag = self.refused.pop_front()?;
                Some(Completion { tag, result: Err(DiskError::Aborted) })
            }
        }
    }
}
