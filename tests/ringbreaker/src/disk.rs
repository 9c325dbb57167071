//! What no correct guest does to its disk.

use crate::life::{After, Attack, Failure, Life, Split};
use crate::memory;
use crate::net::{DECIDED, erase, scrawl, start_over, wander};
use crate::ring::Ring;
use crate::vbd::Vbd;
use crate::vif::{Buffer, grant};
use core::sync::atomic::Ordering::Relaxed;
use unikernel::domain_api::{Access, Events, Granter};
use xen_abi::blkif::{
    DISCARD, DISCARD_SECURE, DiscardRequest, FLUSH_DISKCACHE, INDIRECT, IndirectRequest, READ,
    RSP_OKAY, Request, SLOT, Segment, WRITE, WRITE_BARRIER,
};
use xen_abi::ring::{REQ_EVENT, RSP_PROD};
use xen_abi::{GrantRef, PAGE_SIZE};
use xenbus::XenbusState;
use zerocopy::FromZeros;

/// All of them.
pub const ATTACKS: &[Attack<Vbd>] = &[
    Attack { name: "grants that are none", after: After::Serves, run: bad_grants },
    Attack { name: "grants taken back in flight", after: After::Serves, run: revoked },
    Attack { name: "grant entries overwritten in flight", after: After::Any, run: overwritten },
    Attack { name: "reads into read-only pages", after: After::Serves, run: read_only },
    Attack { name: "counter far ahead", after: After::Closes, run: ahead },
    Attack { name: "counter backwards", after: After::Closes, run: backwards },
    Attack { name: "random requests", after: After::Any, run: random_requests },
    Attack { name: "requests that change while they are read", after: After::Any, run: rewritten },
    Attack {
        name: "segments that change while they are read",
        after: After::Any,
        run: segments_rewritten,
    },
    Attack { name: "sectors out of range", after: After::Serves, run: bad_sectors },
    Attack { name: "segments out of range", after: After::Serves, run: bad_segments },
    Attack { name: "indirect segments out of range", after: After::Serves, run: bad_indirect },
    Attack { name: "operations that there are not", after: After::Serves, run: bad_operations },
    Attack { name: "discards out of range", after: After::Serves, run: bad_discards },
    Attack { name: "the same request all over", after: After::Serves, run: repeated },
    Attack { name: "a storm of events", after: After::Serves, run: storm },
    Attack { name: "an end in the middle", after: After::Any, run: close_in_the_middle },
    Attack { name: "other rings in the store", after: After::Any, run: other_rings },
    Attack { name: "garbage in the store", after: After::Any, run: garbage },
    Attack { name: "a directory that is gone", after: After::Leaves, run: no_directory },
    Attack { name: "states in any order", after: After::Any, run: states },
    Attack { name: "a connection with bad rings", after: After::Any, run: bad_connection },
    Attack { name: "the backend's own counters", after: After::Any, run: backend_counters },
    Attack { name: "data pages that are rings", after: After::Any, run: ring_as_data },
];

/// Fills the ring with good requests, and does not wait.
pub fn fill(life: &mut Life, vbd: &mut Vbd) {
    while vbd.ring.free() > 0 {
        let operation = if life.random.below(2) == 0 { READ } else { WRITE };
        let sector = u64::from(life.random.below(2000)) * 8;
        let request = vbd.request(operation, sector);
        vbd.ring.push(&request);
    }
    vbd.flush(life);
}

fn ahead(life: &mut Life, vbd: &mut Vbd) -> Result<(), Failure> {
    let far = vbd.ring.len() + 1 + life.random.below(1 << 30);
    vbd.ring.show(vbd.ring.taken.wrapping_add(far));
    vbd.notify(life);
    Ok(())
}

fn backwards(life: &mut Life, vbd: &mut Vbd) -> Result<(), Failure> {
    let back = 1 + life.random.below(1 << 30);
    vbd.ring.show(vbd.ring.made.wrapping_sub(back));
    vbd.notify(life);
    Ok(())
}

fn random_request(life: &mut Life) -> Request {
    let mut slot = [0; SLOT];
    life.random.fill(&mut slot);
    let mut request: Request = zerocopy::transmute!(slot);
    request.operation = life.random.byte(8);
    if life.random.below(2) == 0 {
        request.nr_segments = life.random.byte(13);
        request.sector %= 4000;
        for segment in &mut request.segments {
            segment.gref = GrantRef(life.random.below(128));
            segment.first_sect &= 7;
            segment.last_sect &= 7;
        }
    }
    request
}

fn random_requests(life: &mut Life, vbd: &mut Vbd) -> Result<(), Failure> {
    while vbd.ring.free() > 0 {
        let request = random_request(life);
        vbd.ring.push(&request);
    }
    vbd.flush(life);
    Ok(())
}

fn rewritten(life: &mut Life, vbd: &mut Vbd) -> Result<(), Failure> {
    let first = vbd.ring.made;
    fill(life, vbd);
    for _ in 0..500 {
        let index = first.wrapping_add(life.random.below(vbd.ring.len()));
        let request = random_request(life);
        vbd.ring.write(index, &request);
    }
    vbd.notify(life);
    Ok(())
}

/// An indirect request for `count` segments, whose list is in `list`.
fn indirect(vbd: &Vbd, list: &Buffer, operation: u8, count: u16, sector: u64) -> IndirectRequest {
    let mut request = IndirectRequest::new_zeroed();
    request.operation = INDIRECT;
    request.indirect_op = operation;
    request.nr_segments = count;
    request.id = u64::from(vbd.ring.made);
    request.sector = sector;
    request.grefs[0] = list.gref;
    request
}

/// Writes a list of good segments.
fn write_list(vbd: &Vbd, list: &Buffer) {
    for (at, buffer) in vbd.buffers.iter().enumerate() {
        let segment = Segment { gref: buffer.gref, first_sect: 0, last_sect: 7, pad: 0 };
        list.page.write(at * size_of::<Segment>(), zerocopy::IntoBytes::as_bytes(&segment));
    }
}

fn segments_rewritten(life: &mut Life, vbd: &mut Vbd) -> Result<(), Failure> {
    let list = Buffer::new(life, &vbd.device(), Access::ReadOnly)?;
    write_list(vbd, &list);
    for _ in 0..16 {
        let request = indirect(vbd, &list, READ, 32, 0);
        vbd.ring.push(&request);
    }
    vbd.flush(life);
    for _ in 0..2000 {
        let word = life.random.below(64) as usize * 4;
        list.page.u32(word).store(life.random.word(), Relaxed);
    }
    Ok(())
}

/// Pushes requests made by `make`, waits for the answers, and sees that all of them say no.
fn refused(
    life: &mut Life,
    vbd: &mut Vbd,
    count: u32,
    mut make: impl FnMut(&mut Life, &Vbd, u32) -> Request,
) -> Result<(), Failure> {
    for turn in 0..count {
        let request = make(life, vbd, turn);
        vbd.ring.push(&request);
        vbd.flush(life);
        let answers = vbd.await_answers(life)?;
        if let Some(good) = answers.iter().find(|answer| answer.status == RSP_OKAY) {
            return Err(alloc::format!("bad request {turn} was answered by {good:?}"));
        }
    }
    Ok(())
}

fn bad_grants(life: &mut Life, vbd: &mut Vbd) -> Result<(), Failure> {
    refused(life, vbd, 24, |life, vbd, turn| {
        let mut request = vbd.request(if turn % 2 == 0 { READ } else { WRITE }, 0);
        request.segments[0].gref = match turn % 3 {
            0 => GrantRef(life.random.word() | 1 << 20),
            1 => GrantRef(5000 + life.random.below(1000)),
            // That of our ring to the store: it is granted to somebody else.
            _ => GrantRef(1),
        };
        // Some good ones before it.
        request.nr_segments = 3;
        request.segments[2] = request.segments[0];
        request.segments[0].gref = vbd.buffers[0].gref;
        request.segments[1] = request.segments[0];
        request
    })
}

fn revoked(life: &mut Life, vbd: &mut Vbd) -> Result<(), Failure> {
    let device = vbd.device();
    for _ in 0..32 {
        let buffer = Buffer::new(life, &device, Access::ReadWrite)?;
        let mut request = vbd.request(READ, 0);
        request.segments[0].gref = buffer.gref;
        vbd.ring.push(&request);
        vbd.flush(life);
        // `EBUSY` is the core's good right. A page that is granted is kept by the runtime.
        let _ = life.domain.revoke(buffer.gref);
    }
    vbd.await_answers(life).map(drop)
}

fn overwritten(life: &mut Life, vbd: &mut Vbd) -> Result<(), Failure> {
    fill(life, vbd);
    let used = vbd.buffers.iter().map(|buffer| buffer.gref);
    for gref in used.chain([vbd.gref]) {
        let (flags, domid, frame) = (life.random.short(), life.random.short(), life.random.word());
        memory::overwrite_grant(gref, flags, domid, frame);
    }
    life.pause();
    let device = vbd.device();
    for at in 0..vbd.buffers.len() {
        let fresh = Buffer::new(life, &device, Access::ReadWrite)?;
        vbd.buffers[at] = fresh;
    }
    Ok(())
}

fn read_only(life: &mut Life, vbd: &mut Vbd) -> Result<(), Failure> {
    let page = Buffer::new(life, &vbd.device(), Access::ReadOnly)?;
    refused(life, vbd, 8, |_, vbd, _| {
        let mut request = vbd.request(READ, 0);
        request.segments[0].gref = page.gref;
        request
    })
}

fn bad_sectors(life: &mut Life, vbd: &mut Vbd) -> Result<(), Failure> {
    let end = vbd.sectors;
    let sectors = [end, end - 1, end - 7, u64::MAX, u64::MAX - 7, 1 << 63, 1 << 55, u64::MAX / 512];
    refused(life, vbd, 16, |_, vbd, turn| {
        let operation = if turn % 2 == 0 { READ } else { WRITE };
        vbd.request(operation, sectors[turn as usize / 2])
    })
}

fn bad_segments(life: &mut Life, vbd: &mut Vbd) -> Result<(), Failure> {
    let cases: [(u8, u8, u8); 9] = [
        (0, 0, 7),
        (12, 0, 7),
        (255, 0, 7),
        (1, 7, 0),
        (1, 0, 8),
        (1, 8, 8),
        (1, 255, 255),
        (1, 0, 255),
        (11, 1, 0),
    ];
    refused(life, vbd, 9, |_, vbd, turn| {
        let (count, first_sect, last_sect) = cases[turn as usize];
        let mut request = vbd.request(READ, 0);
        request.nr_segments = count;
        let gref = request.segments[0].gref;
        request.segments = [Segment { gref, first_sect, last_sect, pad: 0 }; 11];
        request
    })
}

fn bad_indirect(life: &mut Life, vbd: &mut Vbd) -> Result<(), Failure> {
    let list = Buffer::new(life, &vbd.device(), Access::ReadOnly)?;
    write_list(vbd, &list);
    let end = vbd.sectors;
    refused(life, vbd, 10, |life, vbd, turn| {
        let mut request = indirect(vbd, &list, READ, 32, 0);
        match turn {
            0 => request.nr_segments = 0,
            1 => request.nr_segments = 257,
            2 => request.nr_segments = u16::MAX,
            // Behind the list there is nothing that was ever granted.
            3 => request.nr_segments = 256,
            4 => request.indirect_op = INDIRECT,
            5 => request.indirect_op = DISCARD,
            6 => request.grefs = [GrantRef(life.random.word() | 1 << 20); 8],
            7 => request.grefs = [GrantRef(1); 8],
            8 => request.sector = end - 8,
            _ => request.sector = u64::MAX - 8,
        }
        zerocopy::transmute!(request)
    })
}

fn bad_operations(life: &mut Life, vbd: &mut Vbd) -> Result<(), Failure> {
    refused(life, vbd, 8, |life, vbd, turn| {
        let operation = [4, 7, 8, 77, 128, 255, WRITE_BARRIER, 9][turn as usize];
        let mut request = vbd.request(operation, life.random.next());
        request.nr_segments = life.random.byte(255);
        request
    })?;
    // A flush of nonsense is a flush.
    let mut request = random_request(life);
    request.operation = FLUSH_DISKCACHE;
    vbd.ring.push(&request);
    vbd.flush(life);
    vbd.await_answers(life).map(drop)
}

fn bad_discards(life: &mut Life, vbd: &mut Vbd) -> Result<(), Failure> {
    let end = vbd.sectors;
    refused(life, vbd, 6, |_, vbd, turn| {
        let (flag, sector, nr_sectors) = [
            (0, end, 8),
            (0, end - 8, 16),
            (0, 8, u64::MAX - 7),
            (0, u64::MAX, u64::MAX),
            (0, 0, 0),
            (DISCARD_SECURE, 0, 8),
        ][turn as usize];
        let id = u64::from(vbd.ring.made);
        zerocopy::transmute!(DiscardRequest {
            operation: DISCARD,
            flag,
            handle: 0,
            pad: 0,
            id,
            sector,
            nr_sectors,
            rest: [0; 10],
        })
    })
}

fn repeated(life: &mut Life, vbd: &mut Vbd) -> Result<(), Failure> {
    let mut request = vbd.request(WRITE, 64);
    // One page eleven times, and one id for all.
    request.nr_segments = 11;
    request.segments = [request.segments[0]; 11];
    for _ in 0..20 {
        while vbd.ring.free() > 0 {
            vbd.ring.push(&request);
        }
        vbd.flush(life);
        vbd.await_answers(life)?;
    }
    Ok(())
}

fn storm(life: &mut Life, vbd: &mut Vbd) -> Result<(), Failure> {
    for _ in 0..20_000 {
        vbd.notify(life);
    }
    Ok(())
}

fn close_in_the_middle(life: &mut Life, vbd: &mut Vbd) -> Result<(), Failure> {
    fill(life, vbd);
    if life.random.below(2) == 0 {
        life.domain.close(vbd.port);
    }
    let state = [XenbusState::CLOSING, XenbusState::CLOSED, XenbusState::INITIALISING];
    let state = state[life.random.below(3) as usize];
    life.tell(&vbd.device(), "state", state.0)
}

fn other_rings(life: &mut Life, vbd: &mut Vbd) -> Result<(), Failure> {
    let device = vbd.device();
    let ring = Ring::new(SLOT);
    let gref = grant(life, &device, ring.page(), Access::ReadWrite)?;
    life.tell(&device, "ring-ref", gref.0)?;
    life.tell(&device, "ring-page-order", 3)?;
    life.tell(&device, "multi-queue-num-queues", 4)?;
    life.tell(&device, "event-channel", 4000)?;
    // The same state once more.
    life.tell(&device, "state", XenbusState::CONNECTED.0)?;
    life.pause();
    // A backend that dies and comes back must find what is in use.
    life.tell(&device, "multi-queue-num-queues", 1)?;
    life.tell(&device, "ring-page-order", 0)?;
    life.tell(&device, "ring-ref", vbd.gref.0)?;
    life.tell(&device, "event-channel", vbd.port.0)
}

fn garbage(life: &mut Life, vbd: &mut Vbd) -> Result<(), Failure> {
    scrawl(life, &vbd.device())
}

fn no_directory(life: &mut Life, vbd: &mut Vbd) -> Result<(), Failure> {
    erase(life, &vbd.device())
}

fn states(life: &mut Life, vbd: &mut Vbd) -> Result<(), Failure> {
    wander(life, &vbd.device())
}

/// Ends the connection, and comes back with rings that cannot be.
fn bad_connection(life: &mut Life, vbd: &mut Vbd) -> Result<(), Failure> {
    let device = vbd.device();
    let read_only = Buffer::new(life, &device, Access::ReadOnly)?.gref.0;
    let full = Ring::new(SLOT);
    full.show(life.random.word() | 1 << 20);
    full.poke(RSP_PROD, life.random.word());
    let full = grant(life, &device, full.page(), Access::ReadWrite)?.0;
    let (gref, port) = (vbd.gref.0, vbd.port.0);
    for (key, value) in [
        ("ring-ref", read_only),
        ("ring-ref", life.random.word()),
        ("ring-ref", 1),
        ("ring-ref", full),
        ("event-channel", life.random.word()),
        ("event-channel", life.domain.start_info().xenstore_port.0),
        ("multi-queue-num-queues", 0),
        ("multi-queue-num-queues", 4),
        ("multi-queue-num-queues", 65535),
        ("ring-page-order", 31),
        ("ring-page-order", 4),
        ("protocol", 64),
    ] {
        start_over(life, &device)?;
        life.tell(&device, "ring-ref", gref)?;
        life.tell(&device, "event-channel", port)?;
        life.tell(&device, "multi-queue-num-queues", 1)?;
        life.tell(&device, "ring-page-order", 0)?;
        life.tell(&device, "protocol", xen_abi::blkif::PROTOCOL)?;
        life.tell(&device, key, value)?;
        life.tell(&device, "state", XenbusState::INITIALISED.0)?;
        life.await_backend(&device, &DECIDED)?;
    }
    life.tell(&device, "ring-page-order", 0)
}

fn backend_counters(life: &mut Life, vbd: &mut Vbd) -> Result<(), Failure> {
    fill(life, vbd);
    for _ in 0..2000 {
        vbd.ring.poke(RSP_PROD, life.random.word());
        vbd.ring.poke(REQ_EVENT, life.random.word());
    }
    let mut page = [0; PAGE_SIZE];
    life.random.fill(&mut page);
    vbd.ring.page().write(0, &page);
    vbd.notify(life);
    Ok(())
}

/// Reads from the disk into the ring itself, and into the list that names the pages.
fn ring_as_data(life: &mut Life, vbd: &mut Vbd) -> Result<(), Failure> {
    let list = Buffer::new(life, &vbd.device(), Access::ReadWrite)?;
    write_list(vbd, &list);
    let itself = Segment { gref: list.gref, first_sect: 0, last_sect: 7, pad: 0 };
    list.page.write(0, zerocopy::IntoBytes::as_bytes(&itself));
    for turn in 0..12 {
        let sector = u64::from(life.random.below(500)) * 8;
        if turn % 3 == 0 {
            let mut request = vbd.request(READ, sector);
            request.segments[0].gref = vbd.gref;
            vbd.ring.push(&request);
        } else {
            let request = indirect(vbd, &list, READ, 32, sector);
            vbd.ring.push(&request);
        }
    }
    vbd.flush(life);
    Ok(())
}
