//! Measures the core from inside, with two domains of this image.
//!
//! `extra = "role=pong"` serves; `extra = "role=ping"` measures and prints lines `bench: name
//! value unit`, at last `bench: done`. The server is the next domain behind the measuring one,
//! unless `peer=N` says otherwise on both sides. `rounds=N` sets how often each thing is done
//! (1000). The server leaves a grant and a port for its peer in its node `data/pingpong`.

#![no_std]
#![no_main]
#![forbid(unsafe_code)]

extern crate alloc;

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use domain_api::{
    Access, Direction, DomainId, Errno, EventPort, Events, GrantCopy, GrantRef, GrantStatus,
    Granter, Grants, MapRequest, Page,
};
use unikernel::{Domain, XenstoreRing, println};
use xenbus::{Client, Nodes, Permission};

unikernel::main!(run);

/// Bytes of a full Ethernet frame's payload.
const PACKET: u16 = 1500;
/// Operations in one batch.
const BATCH: usize = 32;
/// How long to wait for the peer to appear.
const PATIENCE_NS: u64 = 30_000_000_000;

fn run(domain: Domain) {
    let value = |key| domain.config_value(key);
    let rounds = value("rounds").and_then(|n| n.parse().ok()).unwrap_or(1000);
    let named = value("peer").and_then(|n| n.parse().ok());
    let own = domain.id().0;
    let result = match value("role") {
        Some("pong") => pong(domain, DomainId(named.unwrap_or(own - 1))),
        Some("ping") => ping(domain, DomainId(named.unwrap_or(own + 1)), rounds),
        _ => {
            println!("bench: failed: extra needs role=ping or role=pong");
            return;
        }
    };
    if let Err(error) = result {
        println!("bench: failed: {error}");
    }
}

fn store(domain: &Domain) -> Result<Client<XenstoreRing>, Errno> {
    domain.xenstore().map(Client::new)
}

fn node(domid: DomainId) -> String {
    format!("/local/domain/{}/data/pingpong", domid.0)
}

/// Serves: answers each event with one.
fn pong(mut domain: Domain, peer: DomainId) -> Result<(), Errno> {
    let page = Page::new_zeroed();
    let gref = domain.grant(peer, &page, Access::ReadWrite)?;
    let port = domain.alloc_unbound(peer)?;
    let mut store = store(&domain)?;
    let path = node(domain.id());
    store.write(&path, b"")?;
    store.set_perms(&path, &[Permission::owner(domain.id()), Permission::reader(peer)])?;
    store.write(&path, format!("{} {}", gref.0, port.0).as_bytes())?;
    loop {
        domain.wait_for(port, None);
        domain.notify(port);
    }
}

/// Reads what the peer left, once it is there.
fn find(domain: &Domain, peer: DomainId) -> Result<(GrantRef, EventPort), Errno> {
    let mut store = store(domain)?;
    let end = domain.now_ns() + PATIENCE_NS;
    loop {
        let text = store.read_string(&node(peer)).unwrap_or_default();
        let mut numbers = text.split(' ').map(str::parse);
        if let (Some(Ok(gref)), Some(Ok(port))) = (numbers.next(), numbers.next()) {
            return Ok((GrantRef(gref), EventPort(port)));
        }
        if domain.now_ns() > end {
            return Err(Errno::ENOENT);
        }
        drop(domain.wait(Some(domain.now_ns() + 1_000_000)));
    }
}

fn ping(mut domain: Domain, peer: DomainId, rounds: u64) -> Result<(), Errno> {
    let (gref, port) = find(&domain, peer)?;
    let local = domain.bind_interdomain(peer, port)?;
    // Binding made it pending.
    domain.wait_for(local, None);
    measure(&domain, "null_hypercall", rounds, 1, || unikernel::hypercall::version().map(drop))?;
    let mut events = domain.clone();
    measure(&domain, "event_round_trip", rounds, 1, || {
        events.notify(local);
        events.wait_for(local, None);
        Ok(())
    })?;
    copies(&domain, peer, gref, rounds)?;
    mappings(&domain, peer, gref, rounds)?;
    println!("bench: done");
    Ok(())
}

fn copies(domain: &Domain, peer: DomainId, gref: GrantRef, rounds: u64) -> Result<(), Errno> {
    let copy = GrantCopy {
        local: Page::new_zeroed(),
        local_offset: 0,
        remote: peer,
        gref,
        remote_offset: 0,
        len: PACKET,
        direction: Direction::FromRemote,
        status: GrantStatus::OKAY,
    };
    let mut batch: Vec<GrantCopy> = (0..BATCH).map(|_| copy.clone()).collect();
    let mut grants = domain.clone();
    let mut run = |count: usize| {
        let part = &mut batch[..count];
        grants.copy(part);
        part.iter().all(|c| c.status == GrantStatus::OKAY).then_some(()).ok_or(Errno::EIO)
    };
    measure(domain, "grant_copy_1500", rounds, 1, || run(1))?;
    measure(domain, "grant_copy_1500_batched", rounds, BATCH as u64, || run(BATCH))
}

fn mappings(domain: &Domain, peer: DomainId, gref: GrantRef, rounds: u64) -> Result<(), Errno> {
    let request = MapRequest { granter: peer, gref, access: Access::ReadWrite };
    let requests = [request; BATCH];
    let mut grants = domain.clone();
    let mut run = |count: usize| {
        let mapped: Result<Vec<_>, _> = grants.map_all(&requests[..count]).into_iter().collect();
        grants.unmap_all(mapped.map_err(|_| Errno::EIO)?);
        Ok(())
    };
    measure(domain, "grant_map_unmap", rounds, 1, || run(1))?;
    measure(domain, "grant_map_unmap_batched", rounds, BATCH as u64, || run(BATCH))
}

/// Does `work`, which is `size` operations, at least `rounds` times and prints the mean of one
/// operation, in system time and in ticks of the time-stamp counter.
fn measure(
    domain: &Domain,
    name: &str,
    rounds: u64,
    size: u64,
    mut work: impl FnMut() -> Result<(), Errno>,
) -> Result<(), Errno> {
    let rounds = rounds.div_ceil(size).max(1);
    for _ in 0..rounds.div_ceil(10) {
        work()?;
    }
    let (start_ns, start_tsc) = (domain.now_ns(), domain.tsc());
    for _ in 0..rounds {
        work()?;
    }
    let (ns, ticks) = (domain.now_ns() - start_ns, domain.tsc() - start_tsc);
    let operations = rounds * size;
    println!("bench: {name} {} ns", ns / operations);
    println!("bench: {name}_tsc {} ticks", ticks / operations);
    Ok(())
}
