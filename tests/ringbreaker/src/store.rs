//! What no correct guest does to the store.

use crate::life::{Failure, Life};
use alloc::format;
use xen_abi::DomainId;
use xen_abi::xenstore::MessageKind;
use xenbus::device::home;
use xenbus::{Errno, Nodes, Store};

/// One thing.
pub struct Attack {
    /// What.
    pub name: &'static str,
    /// Does it.
    pub run: fn(&mut Life) -> Result<(), Failure>,
}

/// All of them.
pub const ATTACKS: &[Attack] = &[
    Attack { name: "nodes of others", run: foreign },
    Attack { name: "as many nodes as can be", run: nodes },
    Attack { name: "as many watches as can be", run: watches },
    Attack { name: "transactions left open", run: transactions },
    Attack { name: "requests that there are not", run: requests },
];

/// What belongs to others cannot be changed.
fn foreign(life: &mut Life) -> Result<(), Failure> {
    let own = life.domain.id().0;
    for domid in (0..own + 3).filter(|domid| *domid != own) {
        let home = home(DomainId(domid));
        for path in ["name", "memory/target", "backend/x", "device/vif/0/state", "control/shutdown"]
        {
            let path = format!("{home}/{path}");
            for done in [life.store.write(&path, b"0"), life.store.rm(&path)] {
                if done.is_ok() {
                    return Err(format!("{path} could be changed"));
                }
            }
        }
    }
    let introduced = life.store.introduce(life.domain.id(), xen_abi::Gfn(1), xen_abi::EventPort(1));
    if introduced.is_ok() || life.store.release(DomainId(own.wrapping_sub(1))).is_ok() {
        return Err("a privileged request was served".into());
    }
    Ok(())
}

/// What is left of it stays for the next life: the domain's home outlives it.
fn nodes(life: &mut Life) -> Result<(), Failure> {
    let home = home(life.domain.id());
    let value = [b'x'; 1500];
    let full = (0..3000).find(|n| life.store.write(&format!("{home}/data/{n}"), &value).is_err());
    match full {
        Some(_) => Ok(()),
        None => Err("there is no end to the nodes of a guest".into()),
    }
}

fn watches(life: &mut Life) -> Result<(), Failure> {
    let full = (0..3000).find_map(|n| {
        let errno = life.store.watch("/local/domain", &format!("{n}")).err()?;
        Some(errno)
    });
    // Those of others bring events too.
    match full {
        Some(Errno::E2BIG) => Ok(()),
        other => Err(format!("watches ended with {other:?}")),
    }
}

fn transactions(life: &mut Life) -> Result<(), Failure> {
    let home = home(life.domain.id());
    for n in 0..100_u32 {
        let Ok(id) = life.store.request(0, MessageKind::TRANSACTION_START, &[b"\0"]) else {
            return Ok(());
        };
        let id =
            core::str::from_utf8(&id).ok().and_then(|id| id.trim_end_matches('\0').parse().ok());
        let path = format!("{home}/data/in-{n}\0");
        let _ = life.store.request(id.unwrap_or(n), MessageKind::WRITE, &[path.as_bytes(), b"x"]);
    }
    Err("there is no end to the transactions of a guest".into())
}

fn requests(life: &mut Life) -> Result<(), Failure> {
    for _ in 0..300 {
        let mut payload = [0; 200];
        life.random.fill(&mut payload);
        let bytes = life.random.below(200) as usize;
        let kind = MessageKind(life.random.below(40));
        // These two would by right undo what the life needs, and the last is no request.
        if matches!(
            kind,
            MessageKind::RESET_WATCHES | MessageKind::CONTROL | MessageKind::WATCH_EVENT
        ) {
            continue;
        }
        let _ = life.store.request(life.random.below(4), kind, &[&payload[..bytes]]);
        if life.store.is_lost() {
            return Err(format!("the store went away at a request of kind {}", kind.0));
        }
    }
    Ok(())
}
