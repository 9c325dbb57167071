//! A connected vbd: its rings mapped, its ports bound.

use crate::preserved::{MAX_QUEUES, MAX_RING_ORDER, Preserved, VbdId};
use crate::queue::{Queue, Ring};
use crate::tags::Pool;
use crate::{Env, VbdStats};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use domain_api::{Access, Errno, EventPort, GrantRef, MappedDmaGrant, MappedGrant, Page};
use shmem::PeerError;
use shmem::inflight::{Identity, InflightTable};
use shmem::ring::{BackRing, Entry};
use xenbus::{Nodes, device};

/// How requests are laid out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Protocol {
    /// By 64-bit guests.
    Wide,
    /// By 32-bit guests.
    Narrow,
}

/// What the frontend published of one queue.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PublishedQueue {
    /// The ring's pages.
    pub ring: Vec<GrantRef>,
    /// The event channel.
    pub port: EventPort,
}

/// What the frontend published in its directory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Published {
    /// How requests are laid out.
    pub protocol: Protocol,
    /// Whether its grants stay valid after a response.
    pub persistent: bool,
    /// Its queues.
    pub queues: Vec<PublishedQueue>,
}

/// Data path of one vbd.
#[derive(Debug)]
pub struct Link {
    /// Its queues.
    pub queues: Vec<Queue>,
    /// Whether pages stay mapped.
    pub persistent: bool,
    /// The queue that is served first in the next round.
    pub first: usize,
    /// Requests that a disk has, of all queues.
    pub outstanding: u32,
    /// Why this link has to end.
    pub fault: Option<String>,
    /// Its rings are gone; it waits for the disk.
    pub closed: bool,
    /// Counters.
    pub stats: VbdStats,
}

impl Link {
    /// Attaches to the rings at the first unanswered request (`xen-abi.md` §10.4).
    ///
    /// # Errors
    /// What the frontend did wrong, in words; nothing is left mapped or bound.
    pub fn attach<E: Env>(
        env: &mut E,
        pages: (&mut Preserved, &mut Pool),
        vbd: VbdId,
        published: &Published,
    ) -> Result<Self, String> {
        let (preserved, pool) = pages;
        let mut queues: Vec<Queue> = Vec::with_capacity(published.queues.len());
        for (number, queue) in (0_u16..).zip(&published.queues) {
            let table = preserved.open(vbd, number, queue.ring.len(), pool);
            match open_queue(env, table, vbd, published.protocol, queue) {
                Ok(queue) => queues.push(queue),
                Err(message) => {
                    queues.iter_mut().for_each(|queue| queue.detach(env));
                    return Err(format!("queue {number}: {message}"));
                }
            }
        }
        let replayed = queues.iter().filter_map(|it| it.ring.as_ref()).map(Ring::replayed);
        let stats = VbdStats { replayed: replayed.map(u64::from).sum(), ..VbdStats::default() };
        Ok(Self {
            queues,
            persistent: published.persistent,
            first: 0,
            outstanding: 0,
            fault: None,
            closed: false,
            stats,
        })
    }

    /// Lets go of the rings and the event channels. What the disk still has stays mapped.
    pub fn close<E: Env>(&mut self, env: &mut E) {
        self.closed = true;
        self.queues.iter_mut().for_each(|queue| queue.detach(env));
    }

    /// Gives back what is mapped, once the disk has nothing any more.
    pub fn clear<E: Env>(&mut self, env: &mut E) -> usize {
        let mut unmap: Vec<MappedDmaGrant> = Vec::new();
        self.queues.iter_mut().for_each(|queue| queue.mappings.clear(&mut unmap));
        let count = unmap.len();
        env.unmap_from_devices(&mut unmap);
        count
    }

    /// Ends the link at the next opportunity. The first reason counts.
    pub fn fail(&mut self, reason: impl core::fmt::Display) {
        if self.fault.is_none() {
            self.fault = Some(format!("{reason}"));
        }
    }

    /// Whether requests are to be taken.
    pub fn is_served(&self) -> bool {
        !self.closed && self.fault.is_none()
    }
}

fn open_queue<E: Env>(
    env: &mut E,
    table: Option<InflightTable>,
    vbd: VbdId,
    protocol: Protocol,
    published: &PublishedQueue,
) -> Result<Queue, String> {
    let Some(table) = table else {
        return Err(String::from("this driver domain has no preserved pages left for it"));
    };
    let maps = map_ring(env, vbd, &published.ring)?;
    let pages = maps.iter().map(|map| map.page.clone()).collect();
    // The frontend gets from one connection to the next only through a state in which the table
    // is made to forget, so the incarnation needs no number of its own.
    let identity = Identity {
        frontend: vbd.domain,
        incarnation: 0,
        ring: published.ring[0],
        port: published.port,
    };
    let attached = match protocol {
        Protocol::Wide => attach(pages, table, identity).map(Ring::Wide),
        Protocol::Narrow => attach(pages, table, identity).map(Ring::Narrow),
    };
    let ring = match attached {
        Ok(ring) => ring,
        Err(error) => {
            unmap_all(env, maps);
            return Err(error.to_string());
        }
    };
    match env.bind_interdomain(vbd.domain, published.port) {
        Ok(port) => Ok(Queue::new(ring, maps, port)),
        Err(errno) => {
            drop(ring);
            unmap_all(env, maps);
            Err(format!("binding port {}: {errno}", published.port.0))
        }
    }
}

fn attach<Req: Entry, Rsp: Entry>(
    pages: Vec<Page>,
    table: InflightTable,
    identity: Identity,
) -> Result<BackRing<Req, Rsp>, PeerError> {
    BackRing::attach(pages, table, identity)
}

fn map_ring<E: Env>(
    env: &mut E,
    vbd: VbdId,
    grefs: &[GrantRef],
) -> Result<Vec<MappedGrant>, String> {
    let mut maps = Vec::with_capacity(grefs.len());
    for gref in grefs {
        match env.map(vbd.domain, *gref, Access::ReadWrite) {
            Ok(map) => maps.push(map),
            Err(status) => {
                unmap_all(env, maps);
                return Err(format!("mapping ring page {}: {status:?}", gref.0));
            }
        }
    }
    Ok(maps)
}

fn unmap_all<E: Env>(env: &mut E, maps: Vec<MappedGrant>) {
    for map in maps {
        env.unmap(map);
    }
}

/// Reads what the frontend published.
///
/// # Errors
/// What is wrong with it, in words.
pub fn read_published<S: Nodes>(store: &mut S, frontend: &str) -> Result<Published, String> {
    let protocol = match store.read_optional(&format!("{frontend}/protocol")) {
        Ok(None) => Protocol::Wide,
        Ok(Some(text)) if text == xen_abi::blkif::PROTOCOL => Protocol::Wide,
        Ok(Some(text)) if text == "x86_32-abi" => Protocol::Narrow,
        Ok(Some(text)) => return Err(format!("the frontend's `protocol` is unknown: {text:.40}")),
        Err(errno) => return Err(of_key("protocol")(errno)),
    };
    let persistent = device::has_feature(store, frontend, "feature-persistent")
        .map_err(of_key("feature-persistent"))?;
    let count: u16 = device::read_or(store, frontend, "multi-queue-num-queues", 1)
        .map_err(of_key("multi-queue-num-queues"))?;
    if count == 0 || count > MAX_QUEUES {
        return Err(format!("the frontend has {count} queues, 1 to {MAX_QUEUES} are possible"));
    }
    let order: Option<u32> = match device::read(store, frontend, "ring-page-order") {
        Ok(order) => Some(order),
        Err(Errno::ENOENT) => None,
        Err(errno) => return Err(of_key("ring-page-order")(errno)),
    };
    if order.is_some_and(|order| order > MAX_RING_ORDER) {
        return Err(format!("the frontend's rings are larger than order {MAX_RING_ORDER}"));
    }
    let mut queues = Vec::with_capacity(usize::from(count));
    for number in 0..count {
        let directory =
            if count == 1 { frontend.to_string() } else { format!("{frontend}/queue-{number}") };
        queues.push(read_queue(store, &directory, order)?);
    }
    Ok(Published { protocol, persistent, queues })
}

fn read_queue<S: Nodes>(
    store: &mut S,
    directory: &str,
    order: Option<u32>,
) -> Result<PublishedQueue, String> {
    let mut ring = Vec::new();
    for page in 0..1_u32 << order.unwrap_or(0) {
        let key = format!("ring-ref{page}");
        match device::read_grant(store, directory, &key) {
            Ok(gref) => ring.push(gref),
            // A ring of one page goes by the plain name, whatever else the frontend writes.
            Err(_) if order.unwrap_or(0) == 0 => {
                let plain = device::read_grant(store, directory, "ring-ref");
                ring.push(plain.map_err(of_key("ring-ref"))?);
            }
            Err(errno) => return Err(of_key(&key)(errno)),
        }
    }
    let port =
        device::read_port(store, directory, "event-channel").map_err(of_key("event-channel"))?;
    Ok(PublishedQueue { ring, port })
}

fn of_key(name: &str) -> impl Fn(Errno) -> String + '_ {
    move |errno| format!("the frontend's key `{name}`: {errno}")
}
