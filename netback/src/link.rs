//! A connected vif: both rings mapped, both ports bound.

use crate::packet::Assembler;
use crate::pool::{Chunk, Pool};
use crate::preserved::{Preserved, Ring, VifId};
use crate::{Env, VifStats};
use alloc::collections::VecDeque;
use alloc::format;
use alloc::string::String;
use alloc::vec;
use domain_api::{Access, EventPort, GrantRef, MappedGrant};
use shmem::inflight::Identity;
use shmem::ring::{BackRing, Entry};
use xen_abi::netif::{RxRequest, RxResponse, TX_SLOT, TxResponse};

/// Requests from the guest. Kept as bytes: a slot may hold a request or an extra info.
pub type TxRing = BackRing<[u8; TX_SLOT], TxResponse>;
/// Empty buffers from the guest.
pub type RxRing = BackRing<RxRequest, RxResponse>;

/// What the frontend published in its directory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Published {
    /// The transmit ring's page.
    pub tx_ring: GrantRef,
    /// The receive ring's page.
    pub rx_ring: GrantRef,
    /// Port for transmit events, or for all.
    pub tx_port: EventPort,
    /// Port for receive events, when it is another one.
    pub rx_port: Option<EventPort>,
}

/// A frame that waits for a posted buffer.
#[derive(Debug)]
pub struct Waiting {
    /// Where it is.
    pub chunk: Chunk,
    /// Its bytes.
    pub len: u16,
}

/// Data path of one vif.
#[derive(Debug)]
pub struct Link {
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
    /// Frames for the guest that found no posted buffer.
    pub waiting: VecDeque<Waiting>,
    /// There may be requests in the transmit ring.
    pub tx_ready: bool,
    /// There may be new buffers in the receive ring.
    pub rx_ready: bool,
    /// The frontend has to be told once, whatever its event indices say.
    pub greet: bool,
    /// Why this link has to end.
    pub fault: Option<String>,
    /// Counters.
    pub stats: VifStats,
    mappings: [MappedGrant; 2],
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
        published: Published,
    ) -> Result<Self, String> {
        let (tx_map, tx) = open_ring(env, preserved, vif, Ring::Tx, published)?;
        let (rx_map, rx) = match open_ring(env, preserved, vif, Ring::Rx, published) {
            Ok(opened) => opened,
            Err(message) => {
                drop(tx);
                env.unmap(tx_map);
                return Err(message);
            }
        };
        let (tx_port, rx_port) = match bind(env, vif, published) {
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
            tx_ready: true,
            rx_ready: true,
            greet: true,
            fault: None,
            stats: VifStats::default(),
            mappings: [tx_map, rx_map],
        })
    }

    /// Gives everything back.
    pub fn detach<E: Env>(self, env: &mut E, pool: &mut Pool) -> VifStats {
        let Self { tx, rx, tx_port, rx_port, waiting, mappings, stats, .. } = self;
        drop((tx, rx));
        for mapping in mappings {
            env.unmap(mapping);
        }
        env.close(tx_port);
        if rx_port != tx_port {
            env.close(rx_port);
        }
        for frame in waiting {
            pool.give(frame.chunk);
        }
        stats
    }

    /// Ends the link at the next opportunity. The first reason counts.
    pub fn fail(&mut self, reason: impl core::fmt::Display) {
        if self.fault.is_none() {
            self.fault = Some(format!("{reason}"));
        }
        self.tx_ready = false;
        self.rx_ready = false;
    }
}

fn open_ring<E: Env, Req: Entry, Rsp: Entry>(
    env: &mut E,
    preserved: &mut Preserved,
    vif: VifId,
    ring: Ring,
    published: Published,
) -> Result<(MappedGrant, BackRing<Req, Rsp>), String> {
    let (gref, port) = match ring {
        Ring::Tx => (published.tx_ring, published.tx_port),
        Ring::Rx => (published.rx_ring, published.rx_port.unwrap_or(published.tx_port)),
    };
    let Some(table) = preserved.open(vif, ring) else {
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
    published: Published,
) -> Result<(EventPort, EventPort), String> {
    let one = |env: &mut E, port: EventPort| {
        env.bind_interdomain(vif.domain, port)
            .map_err(|errno| format!("binding port {}: {errno}", port.0))
    };
    let tx_port = one(env, published.tx_port)?;
    let Some(port) = published.rx_port else { return Ok((tx_port, tx_port)) };
    match one(env, port) {
        Ok(rx_port) => Ok((tx_port, rx_port)),
        Err(message) => {
            env.close(tx_port);
            Err(message)
        }
    }
}
