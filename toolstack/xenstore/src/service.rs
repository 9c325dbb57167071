//! The store domain, without its machine: rings and event channels around a [`Server`].
//!
//! Each connected domain has granted its ring page by the reserved entry 1 of its grant table,
//! and left a port for the store to bind to (`xen/include/public/io/xs_wire.h`,
//! `docs/misc/xenstore-ring.txt`). Nothing that a ring contains is trusted: a domain whose counters
//! are impossible is not served any more, until it is introduced again, and nobody else notices.
//!
//! Requests are taken from all domains in turn, one each, and only as far as the domain takes
//! its replies. Whenever bytes moved in either direction, the domain is notified once: it may be
//! waiting for room as well as for an answer.

use crate::server::{Host, Server};
use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use domain_api::{Access, Events, Grants, MappedGrant};
use shmem::bytes::ByteRing;
use shmem::{Page, PeerError};
use xen_abi::grant::RESERVED_XENSTORE;
use xen_abi::xenstore::{
    CONNECTED, CONNECTION, RECONNECT, REQ_CONS, REQ_PROD, RING_SIZE, RSP_CONS, RSP_PROD,
};
use xen_abi::{DomainId, Errno, EventPort, Gfn};

/// The store, connected to other domains.
#[derive(Debug)]
pub struct Service<A: Grants + Events> {
    server: Server,
    rings: Rings<A>,
}

#[derive(Debug)]
struct Rings<A> {
    api: A,
    by_domain: BTreeMap<DomainId, Ring>,
}

#[derive(Debug)]
struct Ring {
    /// Ours.
    port: EventPort,
    mapping: MappedGrant,
    bytes: ByteRing,
    /// The domain may have written or read since we looked.
    ready: bool,
    /// Its counters made no sense.
    broken: bool,
}

impl<A: Grants + Events> Service<A> {
    /// A store that serves nobody yet.
    pub const fn new(server: Server, api: A) -> Self {
        Self { server, rings: Rings { api, by_domain: BTreeMap::new() } }
    }

    /// Connects the domain that will introduce all others.
    ///
    /// # Errors
    /// `EINVAL` when its ring cannot be mapped, or its port cannot be bound.
    pub fn connect(&mut self, domid: DomainId, port: EventPort) -> Result<(), Errno> {
        self.server.disconnect(domid);
        self.rings.connect(domid, port)?;
        self.server.connect(domid);
        Ok(())
    }

    /// Notes that an event came in on one of our ports.
    pub fn event(&mut self, port: EventPort) {
        for ring in self.rings.by_domain.values_mut() {
            ring.ready |= ring.port == port;
        }
    }

    /// Gives every domain its turn: sends what there is for it, and answers at most one request.
    /// Returns whether it did anything; if not, there is nothing to do until the next event. If
    /// so, look for events ([`Self::event`]) before the next round, too.
    pub fn serve(&mut self) -> bool {
        let domains: Vec<DomainId> = self.rings.by_domain.keys().copied().collect();
        let mut worked = false;
        for domid in domains {
            worked |= self.serve_domain(domid);
        }
        worked
    }

    /// The parts that a runtime may want to look at.
    pub const fn server(&self) -> &Server {
        &self.server
    }

    fn serve_domain(&mut self, domid: DomainId) -> bool {
        match self.exchange(domid) {
            Ok(0) => false,
            Ok(_) => {
                self.rings.notify(domid);
                true
            }
            Err(error) => {
                log::warn!("{domid} is not served any more: {error}");
                self.server.refuse(domid);
                if let Some(ring) = self.rings.by_domain.get_mut(&domid) {
                    ring.broken = true;
                }
                true
            }
        }
    }

    /// One turn of a domain. Returns how many bytes moved.
    fn exchange(&mut self, domid: DomainId) -> Result<usize, PeerError> {
        let sent = self.send(domid)?;
        let received = self.receive(domid)?;
        if received == 0 {
            return Ok(sent);
        }
        Ok(sent + received + self.send(domid)?)
    }

    /// Moves output of the server into the ring, as much as fits.
    fn send(&mut self, domid: DomainId) -> Result<usize, PeerError> {
        let mut buffer = [0; RING_SIZE];
        let mut sent = 0;
        while self.server.has_output(domid) {
            let Some(ring) = self.rings.live(domid) else { break };
            let room = ring.bytes.writable()?.min(buffer.len());
            let filled = self.server.output(domid, &mut buffer[..room]);
            if filled == 0 {
                break;
            }
            sent += ring.bytes.write(&buffer[..filled])?;
        }
        Ok(sent)
    }

    /// Moves bytes from the ring into the server, up to the end of one request.
    fn receive(&mut self, domid: DomainId) -> Result<usize, PeerError> {
        let mut buffer = [0; RING_SIZE];
        let mut received = 0;
        while let wanted @ 1.. = self.server.wanted(domid).min(buffer.len()) {
            let Some(ring) = self.rings.live(domid).filter(|ring| ring.ready) else { break };
            let count = ring.bytes.read(&mut buffer[..wanted])?;
            received += count;
            if count == 0 {
                ring.ready = false;
                break;
            }
            // Everything is taken: no more was read than is wanted.
            if self.server.input(domid, &buffer[..count], &mut self.rings).is_err() {
                log::warn!("{domid} is not served any more: it sent too long a message");
                break;
            }
            if self.server.has_output(domid) {
                break;
            }
        }
        Ok(received)
    }
}

impl<A: Grants + Events> Rings<A> {
    fn live(&mut self, domid: DomainId) -> Option<&mut Ring> {
        self.by_domain.get_mut(&domid).filter(|ring| !ring.broken)
    }

    fn notify(&mut self, domid: DomainId) {
        if let Some(ring) = self.by_domain.get(&domid) {
            self.api.notify(ring.port);
        }
    }

    fn connect(&mut self, domid: DomainId, port: EventPort) -> Result<(), Errno> {
        self.disconnect(domid);
        let mapping = self
            .api
            .map(domid, RESERVED_XENSTORE, Access::ReadWrite)
            .inspect_err(|status| log::warn!("{domid}: ring page: {status:?}"))
            .map_err(|_| Errno::EINVAL)?;
        let port = match self.api.bind_interdomain(domid, port) {
            Ok(port) => port,
            Err(errno) => {
                log::warn!("{domid}: event channel: {errno}");
                self.api.unmap(mapping);
                return Err(Errno::EINVAL);
            }
        };
        reconnect(&mapping.page);
        let bytes = ByteRing::xenstore_server(mapping.page.clone());
        self.by_domain.insert(domid, Ring { port, mapping, bytes, ready: true, broken: false });
        self.api.notify(port);
        Ok(())
    }

    fn disconnect(&mut self, domid: DomainId) {
        let Some(Ring { port, mapping, bytes, .. }) = self.by_domain.remove(&domid) else { return };
        self.api.close(port);
        drop(bytes);
        self.api.unmap(mapping);
    }
}

/// Empties the ring of a domain that waits for it (`XENSTORE_RECONNECT` of `xs_wire.h`): we may
/// have written to it for an earlier incarnation after it was zeroed.
fn reconnect(page: &Page) {
    if page.u32(CONNECTION).load(Acquire) != RECONNECT {
        return;
    }
    for counter in [REQ_CONS, REQ_PROD, RSP_CONS, RSP_PROD] {
        page.u32(counter).store(0, Relaxed);
    }
    page.u32(CONNECTION).store(CONNECTED, Release);
}

impl<A: Grants + Events> Host for Rings<A> {
    fn introduce(&mut self, domid: DomainId, _: Gfn, port: EventPort) -> Result<(), Errno> {
        self.connect(domid, port)
    }

    fn release(&mut self, domid: DomainId) {
        self.disconnect(domid);
    }
}

#[cfg(test)]
mod tests;
