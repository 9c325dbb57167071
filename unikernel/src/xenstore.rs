//! The domain's end of its xenstore ring, as the transport of a `xenbus::Client`.

use crate::domain::{Domain, page_at};
use axolotl_abi::start::XENSTORE_RING_GPA;
use core::sync::atomic::Ordering::Acquire;
use domain_api::Events;
use shmem::PeerError;
use shmem::bytes::ByteRing;
use xen_abi::xenstore::{CONNECTED, CONNECTION};
use xen_abi::{Errno, EventPort};

/// The xenstore ring and its port.
///
/// While a client waits for a reply, only this port's events are taken. Watch events that come
/// with the reply are kept by the client: look at it before [`Domain::wait`], not only when
/// [`Self::port`] has an event.
#[derive(Debug)]
pub struct XenstoreRing {
    domain: Domain,
    ring: ByteRing,
    port: EventPort,
    lost: bool,
}

impl XenstoreRing {
    /// Waits until the store has taken notice of this incarnation.
    pub(crate) fn open(domain: &Domain) -> Result<Self, Errno> {
        let port = domain.start_info().xenstore_port;
        if port == EventPort(0) {
            return Err(Errno::ENODEV);
        }
        let page = page_at(XENSTORE_RING_GPA);
        // Until then the store may still be at work for our last incarnation.
        while page.u32(CONNECTION).load(Acquire) != CONNECTED {
            domain.wait_for(port, None);
        }
        let ring = ByteRing::xenstore_client(page);
        Ok(Self { domain: domain.clone(), ring, port, lost: false })
    }

    /// The port that has an event when something came, or when there is room again.
    #[must_use]
    pub fn port(&self) -> EventPort {
        self.port
    }

    /// Tells the store about bytes moved. An impossible counter ends the connection.
    fn moved(&mut self, result: Result<usize, PeerError>) -> usize {
        match result {
            Ok(0) => 0,
            Ok(count) => {
                self.domain.notify(self.port);
                count
            }
            Err(error) => {
                log::error!("xenstore: {error}");
                self.lost = true;
                0
            }
        }
    }
}

impl xenbus::Transport for XenstoreRing {
    fn send(&mut self, bytes: &[u8]) -> usize {
        let result = self.ring.write(bytes);
        self.moved(result)
    }

    fn receive(&mut self, buffer: &mut [u8]) -> usize {
        let result = self.ring.read(buffer);
        self.moved(result)
    }

    fn wait(&mut self) -> Result<(), Errno> {
        if self.lost {
            return Err(Errno::EIO);
        }
        self.domain.wait_for(self.port, None);
        Ok(())
    }
}
