//! The data path: frames between rings and card.
//!
//! From a guest, a frame is copied once, from the guest's pages into a buffer lent by the card;
//! if it turns out to be for a neighbour, the same buffer is the source of the copy to it, and
//! goes back unused. From the card, a frame is copied once, from the card's buffer into what the
//! guest posted. Only a frame that has to wait is copied into private memory ([`crate::pool`]).
//! What is looked at (addresses, checksums) is always the private copy.
//!
//! All copies of a batch are one [`domain_api::Grants::copy`]. A batch is bounded, each vif has one
//! per round, and the first to be served changes with each round. When the card has no buffer
//! left, requests stay in the rings, and the next round starts with the vif that found none, or
//! behind the one that got the last.
//!
//! Responses are written in ring order after the copies, and published once per batch, so that
//! `rsp_prod` only ever moves over whole packets.

use crate::frame::{self, HEADER};
use crate::link::{Link, Waiting};
use crate::packet::{Answer, Packet};
use crate::pool::{Chunk, Pool};
use crate::switch::{Addresses, Mac, Port, Switch, Verdict};
use crate::{Env, Progress};
use alloc::vec::Vec;
use domain_api::nic::{Buffer, MAX_FRAME, Nic, Offload, Received};
use domain_api::{Direction, DomainId, GrantCopy, GrantStatus};
use shmem::Page;
use xen_abi::PAGE_SIZE;
use xen_abi::netif::{RSP_ERROR, RSP_NULL, RSP_OKAY, RxResponse, TxResponse};

/// Frames taken from the card in one round.
const NIC_BATCH: usize = 64;
/// Packets taken from one vif in one round.
const TX_BATCH: usize = 32;
/// Slots taken from one vif in one round; more than a whole packet can have.
const TX_SLOTS: usize = 128;
/// Frames that may wait for one vif.
pub const MOST_WAITING: usize = 32;

/// What the data path knows of a vif.
#[derive(Debug)]
pub struct Station {
    /// The frontend's domain.
    pub domain: DomainId,
    /// The address that its frames must carry.
    pub mac: Mac,
    /// Whether they must.
    pub addresses: Addresses,
    /// The rings, while it is connected.
    pub link: Option<Link>,
}

/// The data path of all vifs.
pub struct Plane {
    /// Vifs, each in a place of its own; `None` is a free place.
    pub stations: Vec<Option<Station>>,
    /// Who is where.
    pub switch: Switch,
    /// Memory for frames that wait; enough for every vif, so that none can use up another's.
    pub pool: Pool,
    /// Memory for packets of one batch while the link is down.
    staging: Pool,
    /// Which vif is served first in the next round.
    first: usize,
    to_guests: Deliveries,
    from_guest: Vec<GrantCopy>,
    nic_frames: Vec<Buffer>,
    batch: Vec<Taken>,
    /// The parts of one packet for the card.
    parts: Vec<Buffer>,
}

/// Copies towards guests, and what each is for.
#[derive(Default)]
struct Deliveries {
    copies: Vec<GrantCopy>,
    posted: Vec<Posted>,
}

/// A posted buffer that was taken for a frame.
struct Posted {
    station: usize,
    id: u16,
    len: u16,
}

/// A frame in private memory.
#[derive(Clone, Copy)]
struct Frame<'a> {
    page: &'a Page,
    offset: u16,
    len: u16,
}

/// Where a packet from a guest is put together.
enum Staging {
    Nic(Buffer),
    Own(Chunk),
}

/// A packet from a guest on its way.
struct Taken {
    packet: Packet,
    staging: Option<Staging>,
    /// Its copies in `from_guest`.
    copies: core::ops::Range<usize>,
    /// Whether the card gets it.
    outside: bool,
    status: i16,
}

impl Staging {
    fn at(&self) -> (&Page, u16) {
        match self {
            Self::Nic(buffer) => (&buffer.page, buffer.offset),
            Self::Own(chunk) => (&chunk.page, chunk.offset),
        }
    }
}

impl Plane {
    pub fn new(pool: Pool) -> Self {
        let mut switch = Switch::new();
        switch.attach(Port::Nic, Addresses::Learned);
        Self {
            stations: Vec::new(),
            switch,
            pool,
            staging: Pool::new(TX_BATCH),
            first: 0,
            to_guests: Deliveries::default(),
            from_guest: Vec::new(),
            nic_frames: Vec::new(),
            batch: Vec::new(),
            parts: Vec::new(),
        }
    }

    /// One round. See [`crate::Netback::poll`].
    pub fn poll<E: Env, N: Nic>(&mut self, env: &mut E, nic: &mut N) -> Progress {
        let now_ns = env.now_ns();
        self.serve_waiting(env);
        let mut progress =
            Progress { more_work: self.serve_nic(env, nic, now_ns), ..Progress::IDLE };
        self.serve_vifs(env, nic, now_ns, &mut progress);
        nic.flush();
        for link in self.stations.iter_mut().flatten().filter_map(|it| it.link.as_mut()) {
            progress.store_work |= link.fault.is_some();
            if core::mem::take(&mut link.greet) && link.fault.is_none() {
                env.notify(link.tx_port);
                if link.rx_port != link.tx_port {
                    env.notify(link.rx_port);
                }
            }
        }
        progress
    }

    /// Takes frames from the card. True when it may have more.
    fn serve_nic<E: Env, N: Nic>(&mut self, env: &mut E, nic: &mut N, now_ns: u64) -> bool {
        let mut frames = core::mem::take(&mut self.nic_frames);
        while frames.len() < NIC_BATCH
            && let Some(Received { buffer, .. }) = nic.receive()
        {
            let frame = Frame { page: &buffer.page, offset: buffer.offset, len: buffer.len };
            if let Some((destination, source)) = frame.addresses() {
                let verdict = self.switch.forward(now_ns, Port::Nic, source, destination);
                self.deliver(Port::Nic, verdict, frame);
            }
            frames.push(buffer);
        }
        let more = frames.len() == NIC_BATCH;
        self.finish_deliveries(env);
        for buffer in frames.drain(..) {
            nic.recycle(buffer);
        }
        self.nic_frames = frames;
        more
    }

    /// One batch from each vif, beginning with the one whose turn it is.
    fn serve_vifs<E: Env, N: Nic>(
        &mut self,
        env: &mut E,
        nic: &mut N,
        now_ns: u64,
        progress: &mut Progress,
    ) {
        let count = self.stations.len();
        let begin = self.first;
        self.first = if count == 0 { 0 } else { (begin + 1) % count };
        for place in (0..count).map(|step| (begin + step) % count) {
            let ready = |it: &Station| it.link.as_ref().is_some_and(|link| link.tx_ready);
            if !self.stations[place].as_ref().is_some_and(ready) {
                continue;
            }
            match self.serve_vif(env, nic, now_ns, place) {
                Turn::Done => {}
                Turn::More => progress.more_work = true,
                Turn::Stalled { served } => {
                    progress.stalled = true;
                    self.first = if served { (place + 1) % count } else { place };
                    return;
                }
            }
        }
    }

    fn serve_vif<E: Env, N: Nic>(
        &mut self,
        env: &mut E,
        nic: &mut N,
        now_ns: u64,
        place: usize,
    ) -> Turn {
        let mut batch = core::mem::take(&mut self.batch);
        let turn = self.take_batch(nic, place, &mut batch);
        let mut copies = core::mem::take(&mut self.from_guest);
        if !copies.is_empty() {
            env.copy(&mut copies);
        }
        for taken in &mut batch {
            self.route(place, taken, &copies, now_ns, nic.link_up());
        }
        copies.clear();
        self.from_guest = copies;
        self.finish_deliveries(env);
        self.answer(env, nic, place, &mut batch);
        self.batch = batch;
        turn
    }

    /// Takes packets out of a ring, and lists the copies that bring them here.
    fn take_batch<N: Nic>(&mut self, nic: &mut N, place: usize, batch: &mut Vec<Taken>) -> Turn {
        let Self { stations, staging: pool, from_guest, parts, .. } = self;
        let Some(Station { domain, link: Some(link), .. }) = &mut stations[place] else {
            return Turn::Done;
        };
        let mut spare = None;
        let mut slots = 0;
        let turn = loop {
            if batch.len() == TX_BATCH || slots >= TX_SLOTS {
                break Turn::More;
            }
            if spare.is_none() && !has_requests(link) {
                break Turn::Done;
            }
            if spare.is_none() {
                spare = stage(nic, pool, parts);
            }
            // Requests stay in the ring until there is room for what they bring.
            if spare.is_none() {
                break Turn::Stalled { served: !batch.is_empty() };
            }
            let Some(packet) = next_packet(link, &mut slots) else {
                if has_requests(link) { continue } else { break Turn::Done }
            };
            let staging = if packet.refused.is_none() { spare.take() } else { None };
            let start = from_guest.len();
            if let Some(staging) = &staging {
                list_copies(from_guest, *domain, &packet, staging);
            }
            let copies = start..from_guest.len();
            batch.push(Taken { packet, staging, copies, outside: false, status: RSP_ERROR });
        };
        if let Some(staging) = spare {
            unstage(nic, pool, staging);
        }
        turn
    }

    /// Decides where a packet goes, now that it is here, and delivers it to neighbours.
    fn route(
        &mut self,
        place: usize,
        taken: &mut Taken,
        copies: &[GrantCopy],
        now_ns: u64,
        link_up: bool,
    ) {
        let Some(station) = &mut self.stations[place] else { return };
        let (mac, addresses) = (station.mac, station.addresses);
        let Some(stats) = station.link.as_mut().map(|link| &mut link.stats) else { return };
        let Some(staging) = &taken.staging else {
            stats.tx_errors += 1;
            return;
        };
        let (page, offset) = staging.at();
        let frame = Frame { page, offset, len: taken.packet.len };
        let copied = &copies[taken.copies.clone()];
        if copied.iter().any(|copy| copy.status != GrantStatus::OKAY)
            || (taken.packet.csum_blank && !frame.finish_checksum())
        {
            stats.tx_errors += 1;
            return;
        }
        let Some((destination, source)) = frame.addresses() else { return };
        if addresses == Addresses::Exact && source != mac {
            stats.tx_spoofed += 1;
            return;
        }
        stats.tx_packets += 1;
        stats.tx_bytes += u64::from(frame.len);
        taken.status = RSP_OKAY;
        let from = Port::Vif(place);
        let verdict = self.switch.forward(now_ns, from, source, destination);
        let outside = self.deliver(from, verdict, frame);
        taken.outside = outside && link_up;
        if outside
            && !link_up
            && let Some(link) = self.link(place)
        {
            link.stats.tx_dropped += 1;
        }
    }

    /// Sends what is for outside, then answers the whole batch.
    fn answer<E: Env, N: Nic>(
        &mut self,
        env: &mut E,
        nic: &mut N,
        place: usize,
        batch: &mut Vec<Taken>,
    ) {
        let Self { stations, staging: pool, parts, .. } = self;
        let Some(Station { link: Some(link), .. }) = &mut stations[place] else { return };
        for taken in batch.drain(..) {
            match taken.staging {
                Some(Staging::Nic(mut buffer)) if taken.outside => {
                    buffer.len = taken.packet.len;
                    parts.push(buffer);
                    nic.transmit(parts.drain(..), Offload::Nothing);
                }
                Some(staging) => unstage(nic, pool, staging),
                None => {}
            }
            for answer in &taken.packet.answers {
                link.tx.respond(&match *answer {
                    Answer::Data(id) => TxResponse { id, status: taken.status },
                    Answer::Extra => TxResponse { id: 0, status: RSP_NULL },
                });
            }
        }
        if link.fault.is_none() && link.tx.publish() {
            env.notify(link.tx_port);
        }
    }

    /// Starts the copies of a frame to all vifs that get it. True when the card gets it too.
    fn deliver(&mut self, from: Port, verdict: Verdict, frame: Frame<'_>) -> bool {
        let Self { stations, switch, pool, to_guests, .. } = self;
        let mut outside = false;
        for port in switch.flood(from, verdict) {
            match port {
                Port::Nic => outside = true,
                Port::Vif(place) => {
                    if let Some(station) = &mut stations[place] {
                        to_guests.offer(place, station, pool, frame);
                    }
                }
            }
        }
        outside
    }

    /// Copies what was started, and tells the guests.
    fn finish_deliveries<E: Env>(&mut self, env: &mut E) {
        let Self { stations, to_guests: Deliveries { copies, posted }, .. } = self;
        if posted.is_empty() {
            return;
        }
        env.copy(copies);
        for (copy, posted) in copies.iter().zip(posted.iter()) {
            let Some(Station { link: Some(link), .. }) = &mut stations[posted.station] else {
                continue;
            };
            let status = if copy.status == GrantStatus::OKAY {
                link.stats.rx_packets += 1;
                link.stats.rx_bytes += u64::from(posted.len);
                posted.len.cast_signed()
            } else {
                link.stats.rx_errors += 1;
                RSP_ERROR
            };
            link.rx.respond(&RxResponse { id: posted.id, offset: 0, flags: 0, status });
        }
        for posted in posted.iter() {
            // The second publish of the same link has nothing to publish.
            if let Some(Station { link: Some(link), .. }) = &mut stations[posted.station]
                && link.fault.is_none()
                && link.rx.publish()
            {
                env.notify(link.rx_port);
            }
        }
        copies.clear();
        posted.clear();
    }

    /// Delivers frames that waited for posted buffers.
    fn serve_waiting<E: Env>(&mut self, env: &mut E) {
        let Self { stations, to_guests, .. } = self;
        let mut served = Vec::new();
        for (place, station) in stations.iter_mut().enumerate() {
            let Some(station) = station else { continue };
            let domain = station.domain;
            let Some(link) = &mut station.link else { continue };
            if !core::mem::take(&mut link.rx_ready) {
                continue;
            }
            while let Some(waiting) = link.waiting.pop_front() {
                let Waiting { chunk, len } = &waiting;
                let frame = Frame { page: &chunk.page, offset: chunk.offset, len: *len };
                if !to_guests.post(place, domain, link, frame) {
                    link.waiting.push_front(waiting);
                    break;
                }
                served.push(waiting);
            }
        }
        self.finish_deliveries(env);
        for Waiting { chunk, .. } in served {
            self.pool.give(chunk);
        }
    }

    fn link(&mut self, place: usize) -> Option<&mut Link> {
        self.stations.get_mut(place)?.as_mut()?.link.as_mut()
    }
}

/// How a vif's turn ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Turn {
    /// Its ring is empty, and an event will tell of the next request.
    Done,
    /// It has more.
    More,
    /// The card has no buffer.
    Stalled {
        /// For all that, some packets found one.
        served: bool,
    },
}

impl Deliveries {
    /// A frame for a vif: into a posted buffer, else into the queue, else dropped.
    fn offer(&mut self, place: usize, station: &mut Station, pool: &mut Pool, frame: Frame<'_>) {
        let domain = station.domain;
        let Some(link) = &mut station.link else { return };
        if link.fault.is_some() {
            return;
        }
        if link.waiting.is_empty() && self.post(place, domain, link, frame) {
            return;
        }
        let room = link.waiting.len() < MOST_WAITING && link.fault.is_none();
        let Some(chunk) = room.then(|| pool.take()).flatten() else {
            link.stats.rx_dropped += 1;
            return;
        };
        let mut bytes = [0; MAX_FRAME];
        let bytes = &mut bytes[..usize::from(frame.len)];
        frame.page.read(usize::from(frame.offset), bytes);
        chunk.page.write(usize::from(chunk.offset), bytes);
        link.waiting.push_back(Waiting { chunk, len: frame.len });
    }

    /// Takes a posted buffer for a frame. False when there is none; then an event will tell of
    /// the next one.
    fn post(&mut self, place: usize, domain: DomainId, link: &mut Link, frame: Frame<'_>) -> bool {
        let request = loop {
            match link.rx.take() {
                Ok(Some(request)) => break request,
                Ok(None) if link.rx.arm() => {}
                Ok(None) => return false,
                Err(error) => {
                    link.fail(format_args!("rx ring: {error}"));
                    return false;
                }
            }
        };
        self.copies.push(GrantCopy {
            local: frame.page.clone(),
            local_offset: frame.offset,
            remote: domain,
            gref: request.gref,
            remote_offset: 0,
            len: frame.len,
            direction: Direction::ToRemote,
            status: GrantStatus::OKAY,
        });
        self.posted.push(Posted { station: place, id: request.id, len: frame.len });
        true
    }
}

impl Frame<'_> {
    /// Destination and source. `None` for what is no frame.
    fn addresses(&self) -> Option<(Mac, Mac)> {
        let len = usize::from(self.len);
        if !(HEADER..=MAX_FRAME).contains(&len) || usize::from(self.offset) + len > PAGE_SIZE {
            return None;
        }
        let mut header = [0; HEADER];
        self.page.read(usize::from(self.offset), &mut header);
        Some(frame::addresses(&header))
    }

    /// Finishes the checksum in place. False when there is none that we know.
    fn finish_checksum(&self) -> bool {
        let mut bytes = [0; MAX_FRAME];
        let Some(bytes) = bytes.get_mut(..usize::from(self.len)) else { return false };
        self.page.read(usize::from(self.offset), bytes);
        let Some(sum) = frame::finish_checksum(bytes) else { return false };
        self.page.write(usize::from(self.offset) + sum.offset, &sum.value);
        true
    }
}

/// Whether the ring has requests. If not, an event will tell of the next one.
fn has_requests(link: &mut Link) -> bool {
    while link.fault.is_none() {
        match link.tx.available() {
            Ok(0) if link.tx.arm() => {}
            Ok(0) => {
                link.tx_ready = false;
                return false;
            }
            Ok(_) => return true,
            Err(error) => {
                link.fail(format_args!("tx ring: {error}"));
            }
        }
    }
    false
}

/// Takes slots until they make a packet. `None`: the ring is empty for now, or lied.
fn next_packet(link: &mut Link, slots: &mut usize) -> Option<Packet> {
    loop {
        let slot = match link.tx.take() {
            Ok(slot) => slot?,
            Err(error) => {
                link.fail(format_args!("tx ring: {error}"));
                return None;
            }
        };
        *slots += 1;
        match link.assembler.push(&slot) {
            Ok(None) => {}
            Ok(packet) => return packet,
            Err(lie) => {
                link.fail(format_args!("tx ring: {lie}"));
                return None;
            }
        }
    }
}

/// A place for the next packet. While the link is down the card keeps its buffers for itself.
fn stage<N: Nic>(nic: &mut N, pool: &mut Pool, parts: &mut Vec<Buffer>) -> Option<Staging> {
    if !nic.link_up() {
        return pool.take().map(Staging::Own);
    }
    if !nic.tx_buffers(MAX_FRAME, parts) {
        return None;
    }
    let buffer = parts.pop()?;
    let end = usize::from(buffer.offset) + MAX_FRAME;
    assert!(end <= PAGE_SIZE, "a card's transmit buffer has room for a frame");
    Some(Staging::Nic(buffer))
}

fn unstage<N: Nic>(nic: &mut N, pool: &mut Pool, staging: Staging) {
    match staging {
        Staging::Nic(buffer) => nic.cancel(buffer),
        Staging::Own(chunk) => pool.give(chunk),
    }
}

fn list_copies(list: &mut Vec<GrantCopy>, remote: DomainId, packet: &Packet, staging: &Staging) {
    let (page, mut local_offset) = staging.at();
    for part in packet.fragments.iter().filter(|part| part.len > 0) {
        list.push(GrantCopy {
            local: page.clone(),
            local_offset,
            remote,
            gref: part.gref,
            remote_offset: part.offset,
            len: part.len,
            direction: Direction::FromRemote,
            status: GrantStatus::OKAY,
        });
        local_offset += part.len;
    }
}
