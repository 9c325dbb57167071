//! Our end of the disk, used as it is meant to be.

use crate::life::{Failure, Life, Split};
use crate::ring::Ring;
use crate::vif::{Buffer, grant};
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;
use unikernel::domain_api::{Access, Events};
use xen_abi::blkif::{READ, RSP_OKAY, Request, Response, SLOT, Segment, WRITE, device_number};
use xen_abi::{EventPort, GrantRef, PAGE_SIZE};
use xenbus::XenbusState;
use xenbus::device::{self, Device, DeviceKind};
use zerocopy::FromZeros;

/// Pages for data.
const BUFFERS: u32 = 32;
/// Sectors of a page.
const PAGE_SECTORS: u64 = 8;
/// Only the first so many sectors are used for work; the attacks have all of them.
const WORK_SECTORS: u32 = 4096;

/// The disk.
pub struct Vbd {
    device: Device,
    /// Its size.
    pub sectors: u64,
    /// Requests and responses.
    pub ring: Ring,
    /// The ring's grant.
    pub gref: GrantRef,
    /// Its port.
    pub port: EventPort,
    /// Data.
    pub buffers: Vec<Buffer>,
}

impl Vbd {
    /// Finds the disk.
    pub fn new(life: &mut Life) -> Result<Self, Failure> {
        let (own, number) = (life.domain.id(), device_number("xvda").unwrap_or(0));
        let device = device::find_backend(&mut life.store, own, DeviceKind::Vbd, number)
            .map_err(|errno| format!("no disk: {errno:?}"))?;
        let buffers = (0..BUFFERS).map(|_| Buffer::new(life, &device, Access::ReadWrite));
        let buffers = buffers.collect::<Result<Vec<_>, _>>()?;
        let (gref, port) = (GrantRef(0), EventPort(0));
        Ok(Self { device, sectors: 0, ring: Ring::new(SLOT), gref, port, buffers })
    }

    /// Tells the backend to look.
    pub fn notify(&self, life: &mut Life) {
        life.domain.notify(self.port);
    }

    /// The page for the next request.
    pub fn buffer(&self) -> &Buffer {
        &self.buffers[self.ring.made as usize % self.buffers.len()]
    }

    /// A request for the whole of the next page.
    pub fn request(&self, operation: u8, sector: u64) -> Request {
        let mut request = Request::new_zeroed();
        request.operation = operation;
        request.nr_segments = 1;
        request.id = u64::from(self.ring.made);
        request.sector = sector;
        request.segments[0] =
            Segment { gref: self.buffer().gref, first_sect: 0, last_sect: 7, pad: 0 };
        request
    }

    /// Shows what is queued.
    pub fn flush(&self, life: &mut Life) {
        self.ring.show(self.ring.made);
        self.notify(life);
    }

    /// Waits until every request was answered; the answers.
    pub fn await_answers(&mut self, life: &mut Life) -> Result<Vec<Response>, Failure> {
        let mut answers = Vec::new();
        let done = life.until(|_| {
            while let Some(index) = self.ring.next() {
                answers.push(self.ring.read::<Response>(index));
            }
            (self.ring.taken == self.ring.made).then_some(())
        });
        match done {
            Some(()) => Ok(answers),
            None => {
                Err(format!("{} of {} requests were answered", self.ring.taken, self.ring.made))
            }
        }
    }

    /// One request that must succeed.
    fn transfer(&mut self, life: &mut Life, operation: u8, sector: u64) -> Result<(), Failure> {
        let request = self.request(operation, sector);
        self.ring.push(&request);
        self.flush(life);
        let answers = self.await_answers(life)?;
        match answers.last() {
            Some(answer) if answer.id == request.id && answer.status == RSP_OKAY => Ok(()),
            answer => Err(format!("operation {operation} at {sector} was answered by {answer:?}")),
        }
    }
}

impl Split for Vbd {
    fn device(&self) -> Device {
        self.device
    }

    fn connect(&mut self, life: &mut Life) -> Result<(), Failure> {
        let device = self.device;
        life.await_backend(&device, &[XenbusState::INIT_WAIT])?;
        self.ring = Ring::new(SLOT);
        self.gref = grant(life, &device, self.ring.page(), Access::ReadWrite)?;
        let port = life.domain.alloc_unbound(device.backend);
        self.port = port.map_err(|errno| format!("a port: {errno:?}"))?;
        life.tell(&device, "ring-ref", self.gref.0)?;
        life.tell(&device, "event-channel", self.port.0)?;
        life.tell(&device, "protocol", xen_abi::blkif::PROTOCOL)?;
        let persistent = life.random.below(2);
        life.tell(&device, "feature-persistent", persistent)?;
        life.tell(&device, "state", XenbusState::INITIALISED.0)?;
        life.await_backend(&device, &[XenbusState::CONNECTED])?;
        let sectors = device::read(&mut life.store, &device.backend_path(), "sectors");
        self.sectors = sectors.map_err(|errno| format!("the disk's size: {errno:?}"))?;
        life.tell(&device, "state", XenbusState::CONNECTED.0)
    }

    fn work(&mut self, life: &mut Life) -> Result<(), Failure> {
        for _ in 0..4 {
            let sector = u64::from(life.random.below(WORK_SECTORS)) / PAGE_SECTORS * PAGE_SECTORS;
            let mut written = vec![0; PAGE_SIZE];
            life.random.fill(&mut written);
            self.buffer().page.write(0, &written);
            self.transfer(life, WRITE, sector)?;
            let page = self.buffer().page.clone();
            self.transfer(life, READ, sector)?;
            let mut read = vec![0; PAGE_SIZE];
            page.read(0, &mut read);
            if read != written {
                return Err(format!("sector {sector} holds something else than was written"));
            }
        }
        Ok(())
    }
}
