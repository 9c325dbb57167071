//! A connected vif: the rings of all its queues mapped, all ports bound.

use crate::deliver::Waiting;
use crate::groups::Groups;
use crate::packet::Assembler;
use crate::pool::Pool;
use crate::preserved::{Preserved, Ring, VifId};
use crate::{Env, VifStats};
use alloc::collections::VecDeque;
use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use domain_api::nic::Buffer;
use domain_api::{Access, EventPort, GrantRef, MappedGrant};
use shmem::inflight::Identity;
use shmem::ring::{BackRing, Entry};
use xen_abi::netif::{RxRequest, RxResponse, TX_SLOT, TxResponse};

/// Requests from the guest. Kept as bytes: a slot may hold a request or an extra info.
pub type TxRing = BackRing<[u8; TX_SLOT], TxResponse>;
/// Empty buffers from the guest.
pub type RxRing = BackRing<RxRequest, RxResponse>;

/// What the frontend says that it takes besides finished frames.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Takes {
    /// Packets over IPv4 with a blank checksum.
    pub blank_v4: bool,
    /// The same over IPv6.
    pub blank_v6: bool,
    /// TCP packets over IPv4 that are longer than a frame.
    pub long_v4: bool,
    /// The same over IPv6.
    pub long_v6: bool,
}

impl Takes {
    /// Whether blank checksums are for it to finish.
    #[must_use]
    pub const fn blank(self, ipv6: bool) -> bool {
        if ipv6 { self.blank_v6 } else { self.blank_v4 }
    }

    /// Whether it takes long packets.
    #[must_use]
    pub const fn long(self, ipv6: bool) -> bool {
        if ipv6 { self.long_v6 } else { self.long_v4 }
    }
}

/// What the frontend published of one queue.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PublishedQueue {
    /// The transmit ring's page.
    pub tx_ring: GrantRef,
    /// The receive ring's page.
    pub rx_ring: GrantRef,
    /// Port for transmit events, or for all.
    pub tx_port: EventPort,
    /// Port for receive events, when it is another one.
    pub rx_port: Option<EventPort>,
}

/// What the frontend published in its directory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Published {
    /// One or more.
    pub queues: Vec<PublishedQueue>,
    /// What it takes.
    pub takes: Takes,
}

/// A pair of rings.
#[derive(Debug)]
pub struct Queue {
    /// From the guest.
    pub tx: TxRing,
    /// To the guest.
    pub rx: RxRing,
    /// Our end of the port for transmit events.
    pub tx_port: EventPort,
    /// Our end of the port for receive events; the same when they are not split.
    pub rx_port: EventPort,
    /// The packet being read.
    pub assembler: Assembler,
    /// Packets for the guest that found too few posted buffers, oldest first.
    pub waiting: VecDeque<Waiting>,
    /// Where they are, one after the other.
    pub kept: VecDeque<Buffer>,
    /// There may be requests in the transmit ring, or there is a packet in the assembler.
    pub tx_ready: bool,
    /// There may be new buffers in the receive ring.
    pub rx_ready: bool,
    /// The frontend has to be told once, whatever its event indices say.
    pub greet: bool,
    mappings: [MappedGrant; 2],
}

/// Data path of one vif.
#[derive(Debug)]
pub struct Link {
    /// One or more.
    pub queues: Vec<Queue>,
    /// What the guest takes.
    pub takes: Takes,
    /// Which multicast groups it hears.
    pub groups: Groups,
    /// Distinguishes it from other links in its place.
    pub serial: u64,
    /// The queue whose turn it is.
    pub turn: usize,
    /// Why this link has to end.
    pub fault: Option<String>,
    /// Counters.
    pub stats: VifStats,
}

impl Link {
    /// Attaches to the rings at the first unanswered request (xen-abi §10.4).
    ///
    /// # Errors
    /// What the frontend did wrong, in words; nothing is left mapped or bound.
    pub fn attach<E: Env>(
        env: &mut E,
        preserved: &mut Preserved,
        vif: VifId,
        published: &Published,
        groups: Groups,
        serial: u64,
    ) -> Result<Self, String> {
        let mut queues = Vec::with_capacity(published.queues.len());
        for (number, &keys) in (0..).zip(&published.queues) {
            match Queue::attach(env, preserved, vif, number, keys) {
                Ok(queue) => queues.push(queue),
                Err(message) => {
                    for queue in queues {
                        queue.detach(env);
                    }
                    return Err(message);
                }
            }
        }
        Ok(Self {
            queues,
            takes: published.takes,
            groups,
            serial,
            turn: 0,
            fault: None,
            stats: VifStats::default(),
        })
    }

    /// Gives everything back.
    pub fn detach<E: Env>(self, env: &mut E, pool: &mut Pool) -> VifStats {
        for mut queue in self.queues {
            queue.kept.drain(..).for_each(|buffer| pool.give(buffer));
            queue.detach(env);
        }
        self.stats
    }

    /// Ends the link at the next opportunity. The first reason counts.
    pub fn fail(&mut self, reason: impl core::fmt::Display) {
        if self.fault.is_none() {
            self.fault = Some(format!("{reason}"));
        }
        for queue in &mut self.queues {
            queue.tx_ready = false;
            queue.rx_ready = false;
        }
    }

    /// Requests taken up from an earlier incarnation.
    #[must_use]
    pub fn replayed(&self) -> u32 {
        self.queues.iter().map(|queue| queue.tx.replayed() + queue.rx.replayed()).sum()
    }

    /// The next queue with requests, from the one on whose turn it is.
    #[must_use]
    pub fn ready(&self) -> Option<usize> {
        let count = self.queues.len();
        let mut turns = (0..count).map(|step| (self.turn + step) % count);
        turns.find(|&number| self.queues[number].tx_ready)
    }

    /// Buffers in which packets wait.
    #[must_use]
    pub fn kept(&self) -> usize {
        self.queues.iter().map(|queue| queue.kept.len()).sum()
    }
}

impl Queue {
    fn attach<E: Env>(
        env: &mut E,
        preserved: &mut Preserved,
        vif: VifId,
        number: u16,
        keys: PublishedQueue,
    ) -> Result<Self, String> {
        let (tx_map, tx) = open_ring(env, preserved, vif, number, Ring::Tx, keys)?;
        let (rx_map, rx) = match open_ring(env, preserved, vif, number, Ring::Rx, keys) {
            Ok(opened) => opened,
            Err(message) => {
                drop(tx);
                env.unmap(tx_map);
                return Err(message);
            }
        };
        let (tx_port, rx_port) = match bind(env, vif, keys) {
            Ok(ports) => ports,
            Err(message) => {
                drop((tx, rx));
                env.unmap(tx_map);
                env.unmap(rx_map);
                return Err(message);
            }
        };
        Ok(Self {
            tx,
            rx,
            tx_port,
            rx_port,
            assembler: Assembler::new(),
            waiting: VecDeque::new(),
            kept: VecDeque::new(),
            tx_ready: true,
            rx_ready: true,
            greet: true,
            mappings: [tx_map, rx_map],
        })
    }

    fn detach<E: Env>(self, env: &mut E) {
        let Self { tx, rx, tx_port, rx_port, mappings, .. } = self;
        drop((tx, rx));
        for mapping in mappings {
            env.unmap(mapping);
        }
        env.close(tx_port);
        if rx_port != tx_port {
            env.close(rx_port);
        }
    }
}

fn open_ring<E: Env, Req: Entry, Rsp: Entry>(
    env: &mut E,
    preserved: &mut Preserved,
    vif: VifId,
    number: u16,
    ring: Ring,
    keys: PublishedQueue,
) -> Result<(MappedGrant, BackRing<Req, Rsp>), String> {
    let (gref, port) = match ring {
        Ring::Tx => (keys.tx_ring, keys.tx_port),
        Ring::Rx => (keys.rx_ring, keys.rx_port.unwrap_or(keys.tx_port)),
    };
    let Some(table) = preserved.open(vif, ring, number) else {
        return Err(String::from("this driver domain has no preserved pages left for it"));
    };
    let mapping = env
        .map(vif.domain, gref, Access::ReadWrite)
        .map_err(|status| format!("mapping {ring:?} ring {}: {status:?}", gref.0))?;
    // The frontend gets from one connection to the next only through a state in which the table
    // is made to forget, so the incarnation needs no number here.
    let identity = Identity { frontend: vif.domain, incarnation: 0, ring: gref, port };
    match BackRing::attach(vec![mapping.page.clone()], table, identity) {
        Ok(opened) => Ok((mapping, opened)),
        Err(error) => {
            env.unmap(mapping);
            Err(format!("{ring:?} ring: {error}"))
        }
    }
}

fn bind<E: Env>(
    env: &mut E,
    vif: VifId,
    keys: PublishedQueue,
) -> Result<(EventPort, EventPort), String> {
    let one = |env: &mut E, port: EventPort| {
        env.bind_interdomain(vif.domain, port)
            .map_err(|errno| format!("binding port {}: {errno}", port.0))
    };
    let tx_port = one(env, keys.tx_port)?;
    let Some(port) = keys.rx_port else { return Ok((tx_port, tx_port)) };
    match one(env, port) {
        Ok(rx_port) => Ok((tx_port, rx_port)),
        Err(message) => {
            env.close(tx_port);
            Err(message)
        }
    }
}
