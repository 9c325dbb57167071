//! Backend half of Xen's split network driver: serves any number of vifs above one card.
//!
//! [`Netback`] finds its vifs in xenstore, connects to their frontends, and moves frames between
//! them and a [`Nic`] through a learning switch ([`switch`]). It trusts no
//! frontend: every slot is copied once and then checked, addresses are checked against the vif's
//! own (anti-spoof), and a frontend that breaks the protocol is disconnected with a message in
//! its `error` node while all others go on.
//!
//! It can be killed at any instant and go on in its next incarnation without the frontends
//! noticing. For this it publishes responses strictly in ring order, whole packets at a time,
//! and keeps its private copies of requests in preserved pages ([`preserved`]). What the next
//! incarnation does with each vif follows from the states that are in the store
//! ([`xenbus::takeover()`]); a vif that works is attached to without a write to the store.
//!
//! The event loop, the card and the core's interfaces are left to the domain that uses this
//! crate: everything is passed in, as traits of `domain-api` and `xenbus`.
//!
//! What is offered to frontends: copying receive, split event channels, several queues, packets in
//! up to 18 parts, checksums of TCP and UDP left to us over IPv4 and IPv6, TCP packets longer than a
//! frame over both (GSO), multicast filters. What of it a frontend uses follows from what it
//! published, also when it published that to an earlier incarnation that offered less. What it
//! takes in turn it gets: packets with a blank checksum and long packets of its neighbours as they
//! are. For those who do not take them, guests or cards, they are finished and cut here. Not
//! offered: hashes and the control ring that tells of them, XDP headroom.
//!
//! Multicast groups that a guest named are not kept over a restart: after one it gets all groups.

#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

mod deliver;
pub mod frame;
pub mod groups;
mod link;
pub mod packet;
mod parts;
mod plane;
mod pool;
pub mod preserved;
pub mod segment;
pub mod switch;
mod vif;

use crate::plane::Plane;
use crate::preserved::{Preserved, VifId};
use crate::switch::Mac;
use crate::vif::Vif;
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use domain_api::nic::Nic;
use domain_api::{Clock, DomainId, Errno, EventPort, Events, Grants};
use shmem::Page;
use xenbus::device::{self, DeviceKind};
use xenbus::{Event, Store};

/// What netback needs of the core.
pub trait Env: Events + Grants + Clock {}
impl<T: Events + Grants + Clock> Env for T {}

const BACKEND_ROOT: &str = "backend/vif";
const BACKEND_TOKEN: &str = "netback";
const FRONTEND_TOKEN: &str = "netback-front/";

/// Counters of one vif. "tx" is from the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct VifStats {
    /// Packets taken from the guest.
    pub tx_packets: u64,
    /// Their bytes.
    pub tx_bytes: u64,
    /// Those of them that were longer than a frame.
    pub tx_long: u64,
    /// Packets from the guest for the outside, dropped because the link is down.
    pub tx_dropped: u64,
    /// Packets from the guest that were refused: malformed, bad grants.
    pub tx_errors: u64,
    /// Packets from the guest with a source address that is not its own.
    pub tx_spoofed: u64,
    /// Packets given to the guest.
    pub rx_packets: u64,
    /// Their bytes.
    pub rx_bytes: u64,
    /// Packets longer than a frame, given or lost.
    pub rx_long: u64,
    /// Packets dropped because the guest had posted too few buffers for too long.
    pub rx_dropped: u64,
    /// Packets lost because a buffer that the guest had posted could not be written.
    pub rx_errors: u64,
}

/// What a round of [`Netback::poll`] left to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use = "work may be left that no event will tell of"]
pub struct Progress {
    /// There is more to do: poll again before sleeping.
    pub more_work: bool,
    /// A vif has to be closed: call [`Netback::settle`].
    pub store_work: bool,
    /// Guests' frames wait until the card has a transmit buffer again.
    pub stalled: bool,
}

impl Progress {
    /// Nothing.
    pub const IDLE: Self = Self { more_work: false, store_work: false, stalled: false };
}

/// A vif, for those who ask.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VifInfo {
    /// Which.
    pub id: VifId,
    /// Its address; `None` before it was first advertised.
    pub mac: Option<Mac>,
    /// Whether its rings are attached.
    pub connected: bool,
    /// How many queues it has while they are.
    pub queues: usize,
    /// Counters since this incarnation connected to it.
    pub stats: VifStats,
}

/// The backend of all vifs of a driver domain.
pub struct Netback {
    own: DomainId,
    preserved: Preserved,
    plane: Plane,
    vifs: BTreeMap<VifId, Vif>,
    /// The vif's place and the number of the queue.
    ports: BTreeMap<EventPort, (usize, usize)>,
    /// Vifs in the store when we last looked.
    listed: usize,
    /// Connections so far.
    links: u64,
}

impl Netback {
    /// A backend in the domain `own`, with the preserved pages as the last incarnation left
    /// them; [`preserved::pages_for`] says how many.
    #[must_use]
    pub fn new(own: DomainId, preserved: Vec<Page>) -> Self {
        let preserved = Preserved::new(preserved);
        Self {
            own,
            plane: Plane::new(preserved.capacity()),
            preserved,
            vifs: BTreeMap::new(),
            ports: BTreeMap::new(),
            listed: 0,
            links: 0,
        }
    }

    /// Finds the vifs, takes over those that were connected, and watches them all.
    ///
    /// # Errors
    /// The store's, when it cannot be used at all. What is wrong with a single vif is that vif's
    /// own matter, told in its `error` node.
    pub fn start<E: Env, S: Store>(&mut self, env: &mut E, store: &mut S) -> Result<(), Errno> {
        self.rescan(env, store)?;
        store.watch(BACKEND_ROOT, BACKEND_TOKEN)
    }

    /// Takes an event of the store. False: it belongs to somebody else.
    ///
    /// # Errors
    /// As for [`Self::start`].
    pub fn store_event<E: Env, S: Store>(
        &mut self,
        env: &mut E,
        store: &mut S,
        event: &Event,
    ) -> Result<bool, Errno> {
        if let Some(vif) = event.token.strip_prefix(FRONTEND_TOKEN) {
            if let Some(id) = parse_vif(vif.split('/')) {
                self.refresh(env, store, id)?;
                self.refresh_groups(store, id)?;
            }
            return Ok(true);
        }
        if event.token != BACKEND_TOKEN {
            return Ok(false);
        }
        let below = event.path.strip_prefix(BACKEND_ROOT).unwrap_or_default();
        let mut names = below.split('/').filter(|name| !name.is_empty());
        match parse_vif(names.by_ref()) {
            Some(id) if vif::matters(names.next()) => self.refresh(env, store, id)?,
            Some(_) => {}
            None => self.rescan(env, store)?,
        }
        Ok(true)
    }

    /// Takes an event channel's event. False: the port is not one of a vif's.
    pub fn event(&mut self, port: EventPort) -> bool {
        let Some(&(place, number)) = self.ports.get(&port) else { return false };
        if let Some(Some(station)) = self.plane.stations.get_mut(place)
            && let Some(queue) = station.link.as_mut().and_then(|it| it.queues.get_mut(number))
        {
            queue.tx_ready |= port == queue.tx_port;
            queue.rx_ready |= port == queue.rx_port;
        }
        true
    }

    /// Moves frames, at most one batch from the card and one from each vif, and has the card
    /// start what was queued.
    ///
    /// Call it after events of vifs, after interrupts of the card (received frames, freed
    /// transmit buffers, link changes), after [`Self::start`] and [`Self::store_event`], and
    /// again while it has more work.
    pub fn poll<E: Env, N: Nic>(&mut self, env: &mut E, nic: &mut N) -> Progress {
        self.plane.poll(env, nic)
    }

    /// Closes the vifs whose frontends broke the protocol.
    ///
    /// # Errors
    /// As for [`Self::start`].
    pub fn settle<E: Env, S: Store>(&mut self, env: &mut E, store: &mut S) -> Result<(), Errno> {
        let faulty: Vec<VifId> = self
            .vifs
            .iter()
            .filter(|(_, vif)| self.fault(vif).is_some())
            .map(|(&id, _)| id)
            .collect();
        for id in faulty {
            let message = self.vifs.get(&id).and_then(|vif| self.fault(vif)).unwrap_or_default();
            self.give_up(env, store, id, &message)?;
        }
        Ok(())
    }

    /// The vifs.
    pub fn vifs(&self) -> impl Iterator<Item = VifInfo> + '_ {
        self.vifs.iter().map(|(&id, vif)| {
            let link = self.plane.stations[vif.place].as_ref().and_then(|it| it.link.as_ref());
            VifInfo {
                id,
                mac: vif.mac,
                connected: link.is_some(),
                queues: link.map_or(0, |link| link.queues.len()),
                stats: link.map(|link| link.stats).unwrap_or_default(),
            }
        })
    }

    fn fault(&self, vif: &Vif) -> Option<String> {
        self.plane.stations[vif.place].as_ref()?.link.as_ref()?.fault.clone()
    }

    /// Compares the store's list of vifs with ours.
    fn rescan<E: Env, S: Store>(&mut self, env: &mut E, store: &mut S) -> Result<(), Errno> {
        let listed = device::served(store, self.own, DeviceKind::Vif)?;
        let ids: Vec<VifId> = listed
            .iter()
            .map(|device| VifId { domain: device.frontend, handle: device.index })
            .collect();
        let gone: Vec<VifId> = self.vifs.keys().copied().filter(|id| !ids.contains(id)).collect();
        for id in gone {
            self.remove(env, store, id);
        }
        self.preserved.retain(|id| ids.contains(&id));
        self.listed = ids.len();
        for id in ids {
            self.refresh(env, store, id)?;
        }
        Ok(())
    }
}

/// The vif that the first two names stand for.
fn parse_vif<'a>(mut names: impl Iterator<Item = &'a str>) -> Option<VifId> {
    let domain = xenbus::wire::parse_domid(names.next()?)?;
    let handle = xenbus::wire::parse_decimal(names.next()?)?;
    Some(VifId { domain, handle })
}

fn frontend_token(id: VifId) -> String {
    format!("{FRONTEND_TOKEN}{}/{}", id.domain.0, id.handle)
}
