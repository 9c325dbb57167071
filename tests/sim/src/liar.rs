//! A guest that lies: to both backends, through rings, grants, events and the store. Nobody else
//! may notice.

use crate::block::DEVICE;
use crate::domain::Domain;
use crate::random::Random;
use domain_api::{Access, DomainId, EventPort, Events, GrantRef, Granter, Page};
use std::sync::atomic::Ordering::Relaxed;
use xen_abi::ring::{REQ_PROD, RSP_PROD, SLOTS};
use xenbus::device::{Device, DeviceKind};
use xenbus::{Client, Nodes, Transport};

/// Pages that it shares.
const PAGES: usize = 6;

struct Liar<'a, T: Transport> {
    domain: &'a mut Domain,
    random: Random,
    client: Client<T>,
    pages: Vec<Page>,
    devices: Vec<Device>,
    grants: Vec<GrantRef>,
    ports: Vec<EventPort>,
}

/// Lies so many times to the backends `net` and `disk`, then waits for good.
pub fn main(
    domain: &mut Domain,
    random: Random,
    rounds: u64,
    backends: (Option<DomainId>, Option<DomainId>),
) {
    let client = Client::new(domain.xenstore());
    let frontend = domain.id();
    let device = |kind, index| move |backend| Device { kind, backend, frontend, index };
    let devices: Vec<Device> = [
        backends.0.map(device(DeviceKind::Vif, 0)),
        backends.1.map(device(DeviceKind::Vbd, DEVICE)),
    ]
    .into_iter()
    .flatten()
    .collect();
    let pages = (0..PAGES).map(|_| Page::new_zeroed()).collect();
    let (grants, ports) = (Vec::new(), Vec::new());
    let mut liar = Liar { domain, random, client, pages, devices, grants, ports };
    for _ in 0..rounds {
        liar.lie();
    }
    loop {
        liar.sleep(None);
    }
}

impl<T: Transport> Liar<'_, T> {
    fn lie(&mut self) {
        match self.random.below(12) {
            0..2 => self.publish(),
            2..5 => self.fill_ring(),
            5 => self.scribble(),
            6..9 => self.notify(),
            9 => self.revoke(),
            10 => self.switch(),
            _ => {
                let until = self.domain.now_ns() + self.random.magnitude(1_000_000);
                self.sleep(Some(until));
            }
        }
    }

    /// Events are nothing to it, but those that stay pending would wake it again.
    fn sleep(&self, until_ns: Option<u64>) {
        self.domain.wait(until_ns).for_each(drop);
    }

    fn device(&mut self) -> Device {
        let index = self.random.index(self.devices.len());
        self.devices[index]
    }

    fn grant(&mut self, to: DomainId) -> GrantRef {
        let page = self.pages[self.random.index(PAGES)].clone();
        let access = if self.random.one_in(8) { Access::ReadOnly } else { Access::ReadWrite };
        match self.domain.grant(to, &page, access) {
            Ok(gref) => {
                self.grants.push(gref);
                gref
            }
            Err(_) => GrantRef(9),
        }
    }

    fn port(&mut self, to: DomainId) -> EventPort {
        match self.domain.alloc_unbound(to) {
            Ok(port) => {
                self.ports.push(port);
                port
            }
            Err(_) => EventPort(1),
        }
    }

    /// Mostly what it should be, sometimes anything.
    fn bent(&mut self, value: u32) -> String {
        match self.random.below(12) {
            0 => self.random.number().to_string(),
            1 => "-1".into(),
            2 => String::new(),
            _ => value.to_string(),
        }
    }

    /// Writes the keys of a connection, and the state that says so.
    fn publish(&mut self) {
        let device = self.device();
        let path = device.frontend_path();
        let (rings, state): (&[&str], u8) = match device.kind {
            DeviceKind::Vif => (&["tx-ring-ref", "rx-ring-ref"], 4),
            DeviceKind::Vbd => (&["ring-ref"], 3),
        };
        for key in rings {
            let gref = self.grant(device.backend).0;
            let value = self.bent(gref);
            let _ = self.client.write(&format!("{path}/{key}"), value.as_bytes());
        }
        let port = self.port(device.backend).0;
        let value = self.bent(port);
        let _ = self.client.write(&format!("{path}/event-channel"), value.as_bytes());
        let _ = self.client.write(&format!("{path}/request-rx-copy"), b"1");
        let _ = self.client.write(&format!("{path}/protocol"), b"x86_64-abi");
        if self.random.one_in(2) {
            let _ = self.client.write(&format!("{path}/feature-persistent"), b"1");
        }
        let _ = self.client.write(&format!("{path}/state"), state.to_string().as_bytes());
    }

    /// Writes requests that may look good into a page, and says that there are some.
    fn fill_ring(&mut self) {
        let index = self.random.index(PAGES);
        let page = self.pages[index].clone();
        let at = self.random.below(32);
        for _ in 0..1 + self.random.below(4) {
            let slot = SLOTS + usize::try_from(at).unwrap_or(0) % 24 * 112;
            let mut bytes = [0; 112];
            for word in bytes.chunks_exact_mut(4) {
                let value = match self.random.below(4) {
                    0 => u32::try_from(self.random.number() >> 32).unwrap_or(0),
                    1 => self.grants.last().map_or(8, |gref| gref.0),
                    2 => u32::try_from(self.random.below(600)).unwrap_or(0),
                    _ => u32::try_from(self.random.below(7)).unwrap_or(0),
                };
                word.copy_from_slice(&value.to_le_bytes());
            }
            bytes[0] = u8::try_from(self.random.below(8)).unwrap_or(0);
            bytes[1] = u8::try_from(self.random.below(13)).unwrap_or(0);
            page.write(slot, &bytes);
        }
        let step = match self.random.below(8) {
            0 => u32::try_from(self.random.number() >> 32).unwrap_or(0),
            step => u32::try_from(step).unwrap_or(0) % 4,
        };
        page.u32(REQ_PROD).fetch_add(step, Relaxed);
        if self.random.one_in(10) {
            page.u32(RSP_PROD).fetch_add(1, Relaxed);
        }
    }

    fn scribble(&mut self) {
        let index = self.random.index(PAGES);
        let offset = 4 * self.random.index(1024);
        let value = u32::try_from(self.random.number() >> 32).unwrap_or(0);
        self.pages[index].u32(offset).store(value, Relaxed);
    }

    fn notify(&mut self) {
        if !self.ports.is_empty() {
            let port = self.ports[self.random.index(self.ports.len())];
            self.domain.notify(port);
        }
    }

    fn revoke(&mut self) {
        if !self.grants.is_empty() {
            let gref = self.grants.swap_remove(self.random.index(self.grants.len()));
            if self.domain.revoke(gref).is_err() {
                self.grants.push(gref);
            }
        }
    }

    fn switch(&mut self) {
        let device = self.device();
        let state = self.random.below(8);
        let path = format!("{}/state", device.frontend_path());
        let _ = self.client.write(&path, state.to_string().as_bytes());
    }
}
