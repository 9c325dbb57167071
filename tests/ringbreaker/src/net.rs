//! What no correct guest does to its network interface.

use crate::life::{After, Attack, Failure, Life, Split};
use crate::memory;
use crate::ring::Ring;
use crate::vif::{Buffer, FRAME_SIZE, Vif, grant};
use alloc::format;
use unikernel::domain_api::{Access, Events, Granter};
use xen_abi::netif::{
    EXTRA_FLAG_MORE, EXTRA_GSO, ExtraInfo, RX_SLOT, RxRequest, TX_SLOT, TXF_CSUM_BLANK,
    TXF_DATA_VALIDATED, TXF_EXTRA_INFO, TXF_MORE_DATA, TxRequest,
};
use xen_abi::ring::{REQ_EVENT, RSP_PROD};
use xen_abi::{GrantRef, PAGE_SIZE};
use xenbus::device::Device;
use xenbus::{Nodes, XenbusState};

/// All of them.
pub const ATTACKS: &[Attack<Vif>] = &[
    Attack { name: "transmit counter far ahead", after: After::Closes, run: ahead },
    Attack { name: "transmit counter backwards", after: After::Closes, run: backwards },
    Attack { name: "receive counter anywhere", after: After::Any, run: receive_counter },
    Attack { name: "random requests", after: After::Any, run: random_requests },
    Attack { name: "requests that change while they are read", after: After::Any, run: rewritten },
    Attack { name: "grants that are none", after: After::Serves, run: bad_grants },
    Attack { name: "grants taken back in flight", after: After::Serves, run: revoked },
    Attack { name: "grant entries overwritten in flight", after: After::Any, run: overwritten },
    Attack { name: "offsets and sizes out of range", after: After::Any, run: bad_sizes },
    Attack { name: "an endless packet", after: After::Any, run: endless_packet },
    Attack { name: "wrong extra infos", after: After::Any, run: bad_extras },
    Attack { name: "endless extra infos", after: After::Any, run: endless_extras },
    Attack { name: "pages to receive into that are none", after: After::Any, run: bad_targets },
    Attack { name: "frames of somebody else", after: After::Serves, run: spoofed },
    Attack { name: "frames that are none", after: After::Any, run: odd_frames },
    Attack { name: "a storm of events", after: After::Serves, run: storm },
    Attack { name: "an end in the middle", after: After::Any, run: close_in_the_middle },
    Attack { name: "other rings in the store", after: After::Any, run: other_rings },
    Attack { name: "garbage in the store", after: After::Any, run: garbage },
    Attack { name: "a directory that is gone", after: After::Leaves, run: no_directory },
    Attack { name: "states in any order", after: After::Any, run: states },
    Attack { name: "a connection with bad rings", after: After::Any, run: bad_connection },
    Attack { name: "the backend's own counters", after: After::Any, run: backend_counters },
];

/// Fills both rings with good requests, and does not wait.
pub fn fill(life: &mut Life, vif: &mut Vif) {
    let question = vif.question();
    while vif.tx.free() > 0 {
        vif.queue(&question);
    }
    vif.flush(life);
}

fn ahead(life: &mut Life, vif: &mut Vif) -> Result<(), Failure> {
    let far = vif.tx.len() + 1 + life.random.below(1 << 30);
    vif.tx.show(vif.tx.taken.wrapping_add(far));
    vif.notify(life);
    Ok(())
}

fn backwards(life: &mut Life, vif: &mut Vif) -> Result<(), Failure> {
    let back = 1 + life.random.below(1 << 30);
    vif.tx.show(vif.tx.made.wrapping_sub(back));
    vif.notify(life);
    Ok(())
}

fn receive_counter(life: &mut Life, vif: &mut Vif) -> Result<(), Failure> {
    vif.rx.show(life.random.word());
    // Something to be received, so that the backend must look.
    let question = vif.question();
    vif.queue(&question);
    vif.tx.show(vif.tx.made);
    vif.notify(life);
    Ok(())
}

fn random_request(life: &mut Life) -> [u8; TX_SLOT] {
    let mut slot = [0; TX_SLOT];
    life.random.fill(&mut slot);
    slot
}

fn random_requests(life: &mut Life, vif: &mut Vif) -> Result<(), Failure> {
    for _ in 0..vif.tx.free() {
        let slot = random_request(life);
        vif.tx.push(&slot);
    }
    vif.flush(life);
    Ok(())
}

fn rewritten(life: &mut Life, vif: &mut Vif) -> Result<(), Failure> {
    let first = vif.tx.made;
    fill(life, vif);
    for _ in 0..2000 {
        let index = first.wrapping_add(life.random.below(vif.tx.len()));
        let slot = random_request(life);
        vif.tx.write(index, &slot);
        let source = life.random.below(32) as usize;
        let word = life.random.below(15) as usize * 4;
        vif.sources[source]
            .page
            .u32(word)
            .store(life.random.word(), core::sync::atomic::Ordering::Relaxed);
    }
    vif.notify(life);
    Ok(())
}

fn bad_grants(life: &mut Life, vif: &mut Vif) -> Result<(), Failure> {
    for _ in 0..64 {
        let gref = match life.random.below(4) {
            0 => GrantRef(life.random.word()),
            1 => GrantRef(life.random.below(4096) + 256),
            // That of our console, and that of our ring to the store: they are granted to somebody else.
            _ => GrantRef(life.random.below(2)),
        };
        let request = TxRequest { gref, ..vif.request(FRAME_SIZE, 0) };
        vif.tx.push(&request);
    }
    vif.flush(life);
    vif.await_answers(life).map(drop)
}

fn revoked(life: &mut Life, vif: &mut Vif) -> Result<(), Failure> {
    let (device, question) = (vif.device(), vif.question());
    for _ in 0..32 {
        let buffer = Buffer::new(life, &device, Access::ReadOnly)?;
        buffer.page.write(0, &question);
        let request = TxRequest { gref: buffer.gref, ..vif.request(FRAME_SIZE, 0) };
        vif.tx.push(&request);
        vif.flush(life);
        // `EBUSY` is the core's good right.
        let _ = life.domain.revoke(buffer.gref);
    }
    vif.await_answers(life).map(drop)
}

fn overwritten(life: &mut Life, vif: &mut Vif) -> Result<(), Failure> {
    fill(life, vif);
    let used = vif.sources.iter().chain(&vif.targets).map(|buffer| buffer.gref);
    for gref in used.chain(vif.grefs) {
        let (flags, domid, frame) = (life.random.short(), life.random.short(), life.random.word());
        memory::overwrite_grant(gref, flags, domid, frame);
    }
    vif.notify(life);
    life.pause();
    restore(life, vif)
}

/// New pages in place of all that were in use.
fn restore(life: &mut Life, vif: &mut Vif) -> Result<(), Failure> {
    let device = vif.device();
    for buffer in &mut vif.sources {
        *buffer = Buffer::new(life, &device, Access::ReadOnly)?;
    }
    for buffer in &mut vif.targets {
        *buffer = Buffer::new(life, &device, Access::ReadWrite)?;
    }
    Ok(())
}

fn bad_sizes(life: &mut Life, vif: &mut Vif) -> Result<(), Failure> {
    for (offset, size) in [
        (0, 0),
        (0, 1),
        (0, 13),
        (4095, 1),
        (4095, 60),
        (4096, 60),
        (65535, 65535),
        (1, 4096),
        (0, 4097),
        (0, 1515),
        (0, 65535),
        (2600, 1514),
    ] {
        let flags = life.random.short() & (TXF_CSUM_BLANK | TXF_DATA_VALIDATED);
        let request = TxRequest { offset, ..vif.request(size, flags) };
        vif.tx.push(&request);
    }
    vif.flush(life);
    Ok(())
}

fn endless_packet(life: &mut Life, vif: &mut Vif) -> Result<(), Failure> {
    let first = vif.request(65535, TXF_MORE_DATA);
    vif.tx.push(&first);
    while vif.tx.free() > 0 {
        let request = vif.request(100, TXF_MORE_DATA);
        vif.tx.push(&request);
    }
    vif.flush(life);
    Ok(())
}

fn bad_extras(life: &mut Life, vif: &mut Vif) -> Result<(), Failure> {
    for turn in 0..40_u8 {
        let request = vif.request(1400, TXF_EXTRA_INFO | TXF_CSUM_BLANK);
        vif.tx.push(&request);
        let kind = if turn % 2 == 0 { EXTRA_GSO } else { turn };
        let gso_size = [0, 1, 65535, life.random.short()][usize::from(turn % 4)];
        let gso_type = [0, 1, 2, 255][usize::from(turn / 4 % 4)];
        let (flags, pad, gso_features) = (0, 0, life.random.short());
        vif.tx
            .push(&ExtraWord(ExtraInfo { kind, flags, gso_size, gso_type, pad, gso_features }, 0));
    }
    vif.flush(life);
    Ok(())
}

/// An extra info as it lies in a slot for requests.
#[derive(zerocopy::IntoBytes, zerocopy::Immutable)]
#[repr(C, packed)]
struct ExtraWord(ExtraInfo, u32);

fn endless_extras(life: &mut Life, vif: &mut Vif) -> Result<(), Failure> {
    let request = vif.request(1400, TXF_EXTRA_INFO);
    vif.tx.push(&request);
    while vif.tx.free() > 0 {
        let info = ExtraInfo {
            kind: EXTRA_GSO,
            flags: EXTRA_FLAG_MORE,
            gso_size: 1,
            gso_type: 1,
            pad: 0,
            gso_features: 0,
        };
        vif.tx.push(&ExtraWord(info, 0));
    }
    vif.flush(life);
    Ok(())
}

fn bad_targets(life: &mut Life, vif: &mut Vif) -> Result<(), Failure> {
    while vif.rx.free() > 0 {
        let gref = match life.random.below(3) {
            // Only for reading.
            0 => vif.sources[0].gref,
            1 => GrantRef(life.random.word()),
            // The ring itself.
            _ => vif.grefs[1],
        };
        vif.rx.push(&RxRequest { id: life.random.short(), pad: 0, gref });
    }
    for _ in 0..100 {
        let question = vif.question();
        vif.queue(&question);
    }
    vif.flush(life);
    Ok(())
}

fn spoofed(life: &mut Life, vif: &mut Vif) -> Result<(), Failure> {
    let own = vif.mac;
    for neighbour in 1..4 {
        let mut frame = vif.question();
        // The addresses of the system file count up. An unasked answer in somebody's name.
        frame[11] = neighbour;
        frame[21] = 2;
        frame[27] = neighbour;
        frame[28..32].copy_from_slice(&[10, 0, 2, 2]);
        vif.queue(&frame);
    }
    vif.flush(life);
    vif.await_answers(life)?;
    vif.mac = own;
    Ok(())
}

fn odd_frames(life: &mut Life, vif: &mut Vif) -> Result<(), Failure> {
    for _ in 0..100 {
        let mut frame = [0; 1514];
        life.random.fill(&mut frame);
        // To nobody, so that the neighbours' counters stay as they are.
        frame[..6].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
        frame[6..12].copy_from_slice(&vif.mac);
        let kinds = [[8, 0], [0x86, 0xdd], [0x81, 0], [0, 5], [0xff, 0xff]];
        frame[12..14].copy_from_slice(&kinds[life.random.below(5) as usize]);
        vif.source().page.write(0, &frame);
        let size = life.random.short() % 1515;
        let request =
            vif.request(size, life.random.short() & (TXF_CSUM_BLANK | TXF_DATA_VALIDATED));
        vif.tx.push(&request);
    }
    vif.flush(life);
    Ok(())
}

fn storm(life: &mut Life, vif: &mut Vif) -> Result<(), Failure> {
    for _ in 0..20_000 {
        vif.notify(life);
    }
    Ok(())
}

fn close_in_the_middle(life: &mut Life, vif: &mut Vif) -> Result<(), Failure> {
    fill(life, vif);
    if life.random.below(2) == 0 {
        life.domain.close(vif.port);
    }
    let state = [XenbusState::CLOSING, XenbusState::CLOSED, XenbusState::INITIALISING];
    let state = state[life.random.below(3) as usize];
    life.tell(&vif.device(), "state", state.0)
}

fn other_rings(life: &mut Life, vif: &mut Vif) -> Result<(), Failure> {
    let device = vif.device();
    let (tx, rx) = (Ring::new(TX_SLOT), Ring::new(RX_SLOT));
    let tx_gref = grant(life, &device, tx.page(), Access::ReadWrite)?;
    let rx_gref = grant(life, &device, rx.page(), Access::ReadWrite)?;
    life.tell(&device, "tx-ring-ref", tx_gref.0)?;
    life.tell(&device, "rx-ring-ref", rx_gref.0)?;
    life.tell(&device, "event-channel", 4000)?;
    // The same state once more.
    life.tell(&device, "state", XenbusState::CONNECTED.0)?;
    life.pause();
    // A backend that dies and comes back must find what is in use.
    life.tell(&device, "tx-ring-ref", vif.grefs[0].0)?;
    life.tell(&device, "rx-ring-ref", vif.grefs[1].0)?;
    life.tell(&device, "event-channel", vif.port.0)
}

/// Writes nonsense into the directory of a device's frontend.
pub fn scrawl(life: &mut Life, device: &Device) -> Result<(), Failure> {
    let long = "x".repeat(2000);
    let values = ["", "-1", "4294967296", "0x4", "4 ", "\u{fc}", "99999999999999999999", &long];
    for _ in 0..40 {
        let key =
            ["state", "backend-id", "feature-sg", "mac", "protocol", "ring-ref", "event-channel"];
        let key = key[life.random.below(7) as usize];
        let value = values[life.random.below(8) as usize];
        life.tell(device, key, value)?;
    }
    for below in 0..50 {
        life.tell(device, &format!("queue-{below}/deeper/{below}"), below)?;
    }
    let backend = device.backend_path();
    life.tell(device, "backend", &backend)?;
    life.tell(device, "state", "nonsense")
}

fn garbage(life: &mut Life, vif: &mut Vif) -> Result<(), Failure> {
    scrawl(life, &vif.device())
}

/// Removes the frontend's directory.
pub fn erase(life: &mut Life, device: &Device) -> Result<(), Failure> {
    let path = device.frontend_path();
    // It cannot be made again: it was in a directory of the toolstack.
    life.store.rm(&path).map_err(|errno| format!("removing {path}: {errno:?}"))
}

fn no_directory(life: &mut Life, vif: &mut Vif) -> Result<(), Failure> {
    erase(life, &vif.device())
}

/// Many states, one after the other.
pub fn wander(life: &mut Life, device: &Device) -> Result<(), Failure> {
    for _ in 0..60 {
        let state = life.random.below(10);
        life.tell(device, "state", state)?;
    }
    Ok(())
}

fn states(life: &mut Life, vif: &mut Vif) -> Result<(), Failure> {
    wander(life, &vif.device())
}

/// Ends the connection, and comes back with rings that cannot be.
fn bad_connection(life: &mut Life, vif: &mut Vif) -> Result<(), Failure> {
    let device = vif.device();
    let good = [vif.grefs[0].0, vif.grefs[1].0, vif.port.0];
    let read_only = vif.sources[0].gref.0;
    let full = Ring::new(TX_SLOT);
    full.show(life.random.word() | 1 << 20);
    full.poke(RSP_PROD, life.random.word());
    let full = grant(life, &device, full.page(), Access::ReadWrite)?.0;
    for [tx, rx, port] in [
        [good[0], good[0], good[2]],
        [read_only, good[1], good[2]],
        [good[0], read_only, good[2]],
        [life.random.word(), good[1], good[2]],
        [good[0], 1, good[2]],
        [good[0], good[1], life.random.word()],
        [good[0], good[1], life.domain.start_info().xenstore_port.0],
        [full, good[1], good[2]],
        [good[0], full, good[2]],
    ] {
        start_over(life, &device)?;
        life.tell(&device, "tx-ring-ref", tx)?;
        life.tell(&device, "rx-ring-ref", rx)?;
        life.tell(&device, "event-channel", port)?;
        life.tell(&device, "state", XenbusState::CONNECTED.0)?;
        life.await_backend(&device, &DECIDED)?;
    }
    // Queues that have no directories, or cannot be so many.
    for queues in ["0", "2", "4", "5", "65535", "4294967296", "x"] {
        start_over(life, &device)?;
        life.tell(&device, "multi-queue-num-queues", queues)?;
        life.tell(&device, "state", XenbusState::CONNECTED.0)?;
        life.await_backend(&device, &DECIDED)?;
    }
    life.tell(&device, "multi-queue-num-queues", 1)
}

/// States of a backend that has looked at what a frontend published.
pub const DECIDED: [XenbusState; 3] =
    [XenbusState::CONNECTED, XenbusState::CLOSING, XenbusState::CLOSED];

/// Ends the connection, and comes back to where rings are published.
pub fn start_over(life: &mut Life, device: &Device) -> Result<(), Failure> {
    life.tell(device, "state", XenbusState::CLOSING.0)?;
    life.tell(device, "state", XenbusState::CLOSED.0)?;
    life.await_backend(device, &[XenbusState::CLOSED])?;
    life.tell(device, "state", XenbusState::INITIALISING.0)?;
    life.await_backend(device, &[XenbusState::INIT_WAIT]).map(drop)
}

fn backend_counters(life: &mut Life, vif: &mut Vif) -> Result<(), Failure> {
    fill(life, vif);
    for _ in 0..2000 {
        vif.tx.poke(RSP_PROD, life.random.word());
        vif.rx.poke(RSP_PROD, life.random.word());
        vif.tx.poke(REQ_EVENT, life.random.word());
        vif.rx.poke(REQ_EVENT, life.random.word());
    }
    let mut page = [0; PAGE_SIZE];
    life.random.fill(&mut page);
    vif.rx.page().write(0, &page);
    vif.notify(life);
    Ok(())
}
