//! Our end of the network interface, used as it is meant to be.

use crate::life::{Failure, Life, Split};
use crate::ring::Ring;
use alloc::format;
use alloc::vec::Vec;
use shmem::Page;
use unikernel::domain_api::{Access, Events, Granter};
use xen_abi::netif::{RSP_OKAY, RX_SLOT, RxRequest, RxResponse, TX_SLOT, TxRequest, TxResponse};
use xen_abi::{EventPort, GrantRef, PAGE_SIZE};
use xenbus::XenbusState;
use xenbus::device::{self, Device, DeviceKind};

/// Pages to send from, and as many to receive into.
const BUFFERS: u16 = 32;
/// Who answers in QEMU's user network.
const GATEWAY: [u8; 4] = [10, 0, 2, 2];
/// Who we say that we are.
const OURS: [u8; 4] = [10, 0, 2, 99];
/// How often the question is asked again: drivers die, and what they had in the card is lost.
const ASK_NS: u64 = 1_000_000_000;
/// A frame that is long enough for Ethernet.
pub const FRAME: usize = FRAME_SIZE as usize;
/// The same, as requests have it.
pub const FRAME_SIZE: u16 = 60;

/// A page and our grant of it.
pub struct Buffer {
    /// The page.
    pub page: Page,
    /// Its grant.
    pub gref: GrantRef,
}

impl Buffer {
    /// A page granted to the backend of `device`.
    pub fn new(life: &mut Life, device: &Device, access: Access) -> Result<Self, Failure> {
        let page = Page::new_zeroed();
        let gref = grant(life, device, &page, access)?;
        Ok(Self { page, gref })
    }
}

/// Grants a page to the backend of `device`.
pub fn grant(
    life: &mut Life,
    device: &Device,
    page: &Page,
    access: Access,
) -> Result<GrantRef, Failure> {
    let granted = life.domain.grant(device.backend, page, access);
    granted.map_err(|errno| format!("granting a page: {errno:?}"))
}

/// The interface.
pub struct Vif {
    device: Device,
    /// Our address.
    pub mac: [u8; 6],
    /// Frames from us.
    pub tx: Ring,
    /// Pages for frames to us.
    pub rx: Ring,
    /// Both rings' grants, transmit first.
    pub grefs: [GrantRef; 2],
    /// The port of both.
    pub port: EventPort,
    /// What we send from.
    pub sources: Vec<Buffer>,
    /// What we receive into.
    pub targets: Vec<Buffer>,
}

impl Vif {
    /// Finds the interface.
    pub fn new(life: &mut Life) -> Result<Self, Failure> {
        let own = life.domain.id();
        let device = device::find_backend(&mut life.store, own, DeviceKind::Vif, 0)
            .map_err(|errno| format!("no network interface: {errno:?}"))?;
        let mut mac = [0; 6];
        for (byte, text) in mac.iter_mut().zip(life.told(&device, "mac")?.split(':')) {
            *byte = u8::from_str_radix(text, 16).unwrap_or(0);
        }
        let mut buffers = |access| -> Result<Vec<Buffer>, Failure> {
            (0..BUFFERS).map(|_| Buffer::new(life, &device, access)).collect()
        };
        let (sources, targets) = (buffers(Access::ReadOnly)?, buffers(Access::ReadWrite)?);
        let (tx, rx) = (Ring::new(TX_SLOT), Ring::new(RX_SLOT));
        let (grefs, port) = ([GrantRef(0); 2], EventPort(0));
        Ok(Self { device, mac, tx, rx, grefs, port, sources, targets })
    }

    /// Tells the backend to look.
    pub fn notify(&self, life: &mut Life) {
        life.domain.notify(self.port);
    }

    /// The page to send from next.
    pub fn source(&self) -> &Buffer {
        &self.sources[self.tx.made as usize % self.sources.len()]
    }

    /// A request to send the first `size` bytes of the next page.
    pub fn request(&self, size: u16, flags: u16) -> TxRequest {
        #[expect(clippy::cast_possible_truncation, reason = "ids may repeat")]
        let id = self.tx.made as u16;
        TxRequest { gref: self.source().gref, offset: 0, flags, id, size }
    }

    /// Puts a frame into the ring; its index.
    pub fn queue(&mut self, frame: &[u8]) -> u32 {
        self.source().page.write(0, frame);
        let size = u16::try_from(frame.len()).unwrap_or(u16::MAX);
        let request = self.request(size, 0);
        self.tx.push(&request)
    }

    /// Shows what is queued, in both rings.
    pub fn flush(&self, life: &mut Life) {
        self.tx.show(self.tx.made);
        self.rx.show(self.rx.made);
        self.notify(life);
    }

    /// Posts the page with the number `id`.
    fn post(&mut self, id: u16) {
        let gref = self.targets[usize::from(id)].gref;
        self.rx.push(&RxRequest { id, pad: 0, gref });
    }

    /// Takes all frames that came, and posts their pages again. True when `wanted` is among them.
    pub fn receive(&mut self, mut wanted: impl FnMut(&[u8]) -> bool) -> bool {
        let mut found = false;
        while let Some(index) = self.rx.next() {
            let response: RxResponse = self.rx.read(index);
            let Some(buffer) = self.targets.get(usize::from(response.id)) else { continue };
            let mut frame = [0; FRAME];
            if usize::from(response.offset) + FRAME <= PAGE_SIZE {
                buffer.page.read(response.offset.into(), &mut frame);
            }
            found |= response.status > 0 && wanted(&frame);
            self.post(response.id);
        }
        found
    }

    /// Waits until every request was answered; how many of the answers say that all is well.
    pub fn await_answers(&mut self, life: &mut Life) -> Result<u32, Failure> {
        let mut good = 0;
        let answered = life.until(|_| {
            self.receive(|_| false);
            while let Some(index) = self.tx.next() {
                good += u32::from(self.tx.read::<TxResponse>(index).status == RSP_OKAY);
            }
            (self.tx.taken == self.tx.made).then_some(good)
        });
        answered
            .ok_or_else(|| format!("{} of {} requests were answered", self.tx.taken, self.tx.made))
    }

    /// Asks who has the gateway's address.
    pub fn question(&self) -> [u8; FRAME] {
        let mut frame = [0; FRAME];
        frame[..6].fill(0xff);
        frame[6..12].copy_from_slice(&self.mac);
        // Address resolution for IPv4 over Ethernet, a request (RFC 826).
        frame[12..22].copy_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        frame[22..28].copy_from_slice(&self.mac);
        frame[28..32].copy_from_slice(&OURS);
        frame[38..42].copy_from_slice(&GATEWAY);
        frame
    }
}

fn is_answer(frame: &[u8]) -> bool {
    frame[12..14] == [8, 6] && frame[20..22] == [0, 2] && frame[28..32] == GATEWAY
}

impl Split for Vif {
    fn device(&self) -> Device {
        self.device
    }

    fn connect(&mut self, life: &mut Life) -> Result<(), Failure> {
        let device = self.device;
        life.await_backend(&device, &[XenbusState::INIT_WAIT])?;
        (self.tx, self.rx) = (Ring::new(TX_SLOT), Ring::new(RX_SLOT));
        self.grefs = [
            grant(life, &device, self.tx.page(), Access::ReadWrite)?,
            grant(life, &device, self.rx.page(), Access::ReadWrite)?,
        ];
        let port = life.domain.alloc_unbound(device.backend);
        self.port = port.map_err(|errno| format!("a port: {errno:?}"))?;
        (0..BUFFERS).for_each(|id| self.post(id));
        self.rx.show(self.rx.made);
        life.tell(&device, "tx-ring-ref", self.grefs[0].0)?;
        life.tell(&device, "rx-ring-ref", self.grefs[1].0)?;
        life.tell(&device, "event-channel", self.port.0)?;
        life.tell(&device, "request-rx-copy", 1)?;
        life.tell(&device, "feature-rx-notify", 1)?;
        life.tell(&device, "feature-sg", 1)?;
        life.tell(&device, "state", XenbusState::CONNECTED.0)?;
        life.await_backend(&device, &[XenbusState::CONNECTED]).map(drop)
    }

    fn work(&mut self, life: &mut Life) -> Result<(), Failure> {
        let question = self.question();
        let mut ask_ns = 0;
        let answered = life.until(|life| {
            if life.domain.now_ns() >= ask_ns {
                self.queue(&question);
                ask_ns = life.domain.now_ns() + ASK_NS;
            }
            let found = self.receive(is_answer);
            self.flush(life);
            found.then_some(())
        });
        answered.ok_or_else(|| {
            format!("nobody answers; {} in flight", self.tx.len() - self.tx.free())
        })?;
        match self.await_answers(life)? {
            0 => Err("the frames were refused".into()),
            _ => Ok(()),
        }
    }
}
