//! What must be true of the core between any two steps, for tests.
//!
//! Written against the layouts that the modules document, not with their code.

use crate::domain::{Domain, Stage};
use crate::event::{PORT_LIMIT, Port};
use crate::frame::Mfn;
use crate::p2m::{Kind, Walk};
use crate::platform::Platform;
use crate::state::Core;
use std::collections::{BTreeMap, BTreeSet};
use std::vec::Vec;
use xen_abi::event::{STATUS_CLOSED, STATUS_INTERDOMAIN};
use xen_abi::{DomainId, EventPort, Gfn};

/// A foreign grant that a domain has mapped.
pub(crate) struct Mapping {
    granter: DomainId,
    gref: u32,
    write: bool,
    pub(crate) gfn: Gfn,
    pub(crate) mfn: Mfn,
    life: u64,
}

/// # Panics
/// Something is not as it must be.
pub fn check<P: Platform>(p: &P, core: &Core<P>) {
    check_counts(core);
    let mut owners = BTreeMap::new();
    let mut uses = BTreeMap::<_, (u32, u32, u64)>::new();
    for domain in core.domains.iter().flatten() {
        let maps = mappings(p, domain);
        assert_eq!(maps.len(), domain.grants.mapped as usize, "mapped grants are counted");
        check_pages(p, core, domain, &maps, &mut owners);
        check_ports(p, core, domain);
        for map in maps {
            let used = uses.entry((map.granter.0, map.life, map.gref)).or_default();
            *used = (used.0 + 1, used.1 + u32::from(map.write), map.mfn.0);
        }
        for (index, vcpu) in (0..).zip(&domain.vcpus) {
            let scheduled = vcpu.queued || vcpu.on_cpu.is_some();
            assert!(!domain.is_runnable(index) || scheduled, "who can run is queued or runs");
        }
        if domain.stage != Stage::Live {
            assert_eq!(domain.deadline(), u64::MAX, "only the living have deadlines");
        }
    }
    check_active(p, core, &uses);
}

/// The part that needs no walk of a table: whose all frames and pins are.
///
/// # Panics
/// Something is not as it must be.
pub fn check_counts<P: Platform>(core: &Core<P>) {
    let (total, free) = core.frames().counts();
    let charged: u64 = core.domains.iter().flatten().map(|d| u64::from(d.account.pages)).sum();
    assert_eq!(free + charged + core.frames().orphans(), total, "no frame is lost or made");
    for domain in core.domains.iter().flatten() {
        assert!(domain.account.pages <= domain.account.max, "no account is overdrawn");
    }
    let mapped = core.domains.iter().flatten().map(|domain| u64::from(domain.grants.mapped));
    let infos = core
        .domains
        .iter()
        .flatten()
        .flat_map(|domain| domain.vcpus.iter().filter(|vcpu| vcpu.info.0 != domain.shared));
    let expected = mapped.sum::<u64>() + u64::try_from(infos.count()).expect("few");
    assert_eq!(core.frames().total_pins(), expected, "every pin is a mapping's or vcpu_info's");
}

/// Each page of a domain is its own alone, one of the core's for it, or a grant that is mapped.
fn check_pages<P: Platform>(
    p: &P,
    core: &Core<P>,
    domain: &Domain<P>,
    maps: &[Mapping],
    owners: &mut BTreeMap<Mfn, DomainId>,
) {
    let id = domain.id;
    assert!(domain.p2m.is_cache_true(p), "{id}: what is remembered is what the tables say");
    let mut granted = BTreeSet::new();
    let mut gfn = Gfn(0);
    loop {
        let (at, page) = match domain.p2m.walk(p, gfn) {
            Walk::End => break,
            Walk::Skipped(next) => {
                gfn = next;
                continue;
            }
            Walk::Page(at, page) => (at, page),
        };
        gfn = Gfn(at.0 + 1);
        let lax = domain.pvh.is_some();
        assert!(lax || !(page.write && page.execute), "{id} {at:?}: writable or executable");
        match page.kind {
            Kind::Ram => {
                assert!(core.frames().is_owned_by(page.mfn, id), "{id} {at:?}: its own memory");
                assert_eq!(owners.insert(page.mfn, id), None, "{id} {at:?}: its own alone");
            }
            Kind::Grant => {
                let map = maps.iter().find(|map| map.gfn == at && map.mfn == page.mfn);
                let map = map.expect("a foreign page is a mapped grant");
                assert_eq!(map.write, page.write, "{id} {at:?}: as it was granted");
                check_granter(core, map);
                granted.insert(at);
            }
            Kind::Special => assert!(
                page.mfn == domain.shared
                    || (0..32).any(|n| domain.grants.shared.frame(n) == Some(page.mfn)),
                "{id} {at:?}: one of its shared pages"
            ),
            Kind::Device | Kind::Bundle => {
                assert!(!core.frames().manages(page.mfn), "{id} {at:?}: no memory");
            }
        }
    }
    assert_eq!(granted.len(), maps.len(), "{id}: every mapping is a page");
}

/// A grant shows memory of its granter's present life; what is left of an earlier one is nobody's.
fn check_granter<P: Platform>(core: &Core<P>, map: &Mapping) {
    let granter = core.domain(map.granter);
    if granter.is_some_and(|granter| granter.life == map.life) {
        assert!(core.frames().is_owned_by(map.mfn, map.granter), "a grant shows its memory");
    } else if !granter.is_some_and(|d| matches!(d.stage, Stage::Restarting(_) | Stage::Dying(_))) {
        for domain in core.domains.iter().flatten() {
            assert!(!core.frames().is_owned_by(map.mfn, domain.id), "of an earlier life");
        }
    }
}

fn check_ports<P: Platform>(p: &P, core: &Core<P>, domain: &Domain<P>) {
    let mut used = 0;
    for number in 1..PORT_LIMIT {
        let port = core.port(p, domain.id, EventPort(number));
        if port.status == STATUS_CLOSED {
            continue;
        }
        used += 1;
        if port.status == STATUS_INTERDOMAIN {
            let peer = core.port(p, port.remote, EventPort(port.detail));
            let expected =
                Port { vcpu: peer.vcpu, ..Port::new(STATUS_INTERDOMAIN, domain.id, number) };
            assert_eq!(peer, expected, "{} {number}: its peer names it", domain.id);
        }
    }
    assert_eq!(used, domain.ports.used, "{}: ports are counted", domain.id);
    if !domain.is_alive() {
        assert_eq!(used, 0, "{}: the dead have no ports", domain.id);
    }
}

/// How grants are in use is noted at their granters, exactly.
fn check_active<P: Platform>(
    p: &P,
    core: &Core<P>,
    uses: &BTreeMap<(u16, u64, u32), (u32, u32, u64)>,
) {
    for domain in core.domains.iter().flatten() {
        let entries = u32::try_from(domain.grants.active.len() * 256).expect("small");
        for gref in 0..entries {
            let Some((mfn, at)) = domain.grants.active.entry(gref, 16) else { continue };
            let (place, counts) = (p.load64(mfn, at), p.load64(mfn, at + 8));
            let (pins, writers) = (counts & 0xffff_ffff, counts >> 32);
            let used = uses.get(&(domain.id.0, domain.life, gref)).copied().unwrap_or_default();
            assert_eq!((pins, writers), (used.0.into(), used.1.into()), "{} {gref}", domain.id);
            if pins > 0 {
                assert_eq!(place & ((1 << 40) - 1), used.2, "{} {gref}: its frame", domain.id);
            }
        }
    }
}

/// All that a domain has mapped.
pub(crate) fn mappings<P: Platform>(p: &P, domain: &Domain<P>) -> Vec<Mapping> {
    let handles = u32::try_from(domain.grants.maps.len() * 128).expect("small");
    let mut found = Vec::new();
    for handle in 0..handles {
        let (mfn, at) = domain.grants.maps.entry(handle, 32).expect("within the table");
        let [word, gfn, frame, life] = [0, 8, 16, 24].map(|offset| p.load64(mfn, at + offset));
        if word >> 16 & 1 != 0 {
            found.push(Mapping {
                granter: DomainId(u16::try_from(word & 0xffff).expect("16 bits")),
                gref: u32::try_from(word >> 32).expect("32 bits"),
                write: word >> 17 & 1 != 0,
                gfn: Gfn(gfn),
                mfn: Mfn(frame),
                life,
            });
        }
    }
    found
}
