//! Packets to guests: into posted buffers, else into private memory until there are enough.
//!
//! A packet takes one posted buffer for each 4096 bytes, and one more for the extra info if the
//! guest is to know how it would be cut. It gets all of them or none; what it does not get is left
//! in the ring, and an event tells of more. So what is in the ring is always whole packets.
//!
//! A packet that waits is kept in private memory, of which each vif has so much, whatever its
//! queues. When that is used up, newer packets are dropped, except that a packet which has waited
//! for [`STALE_NS`] makes room: it may be one for which the guest never posts enough.

use crate::Env;
use crate::frame;
use crate::link::{Link, Queue};
use crate::parts::{self, Cursor};
use crate::plane::Station;
use crate::pool::{Pool, ROOM};
use crate::segment::{Cut, Cutting};
use alloc::vec::Vec;
use domain_api::nic::{Buffer, Checksum};
use domain_api::{Direction, DomainId, GrantCopy, GrantStatus};
use xen_abi::PAGE_SIZE;
use xen_abi::netif::{
    EXTRA_GSO, ExtraInfo, GSO_TCPV4, GSO_TCPV6, RSP_ERROR, RXF_CSUM_BLANK, RXF_DATA_VALIDATED,
    RXF_EXTRA_INFO, RXF_MORE_DATA, RxResponse,
};

/// A packet that has waited for so long is dropped when others come.
pub const STALE_NS: u64 = 1_000_000_000;
/// Bytes of a packet that tell its flow: with a VLAN tag, IPv6 and ports.
const FLOW_HEAD: usize = 64;

/// Frames that are made here and delivered at once, in one go.
const BENCH: usize = 64;
/// Token of a buffer of theirs.
const BENCH_TOKEN: u16 = 1;

/// A packet that waits; its bytes are in the queue's memory.
#[derive(Clone, Copy, Debug)]
pub struct Waiting {
    len: usize,
    buffers: usize,
    checksum: Checksum,
    cutting: Option<Cutting>,
    since_ns: u64,
}

/// A packet for a guest, which takes it as it is.
#[derive(Clone, Copy, Debug)]
pub struct Offer<'a> {
    /// Its parts.
    pub parts: &'a [Buffer],
    /// Its bytes.
    pub len: usize,
    /// What is known of its checksum.
    pub checksum: Checksum,
    /// How it would be cut, if it is longer than a frame.
    pub cutting: Option<Cutting>,
}

/// A queue: the place of its vif, and its number there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct At {
    place: usize,
    queue: usize,
}

/// A posted buffer that was taken.
struct Slot {
    at: At,
    id: u16,
    content: Content,
}

enum Content {
    /// Part of a packet, brought by so many copies.
    Data { len: usize, flags: u16, copies: usize },
    /// How it would be cut.
    Extra(Cutting),
}

/// Copies towards guests, and what they are for.
#[derive(Default)]
struct Work {
    copies: Vec<GrantCopy>,
    slots: Vec<Slot>,
}

/// What is under way to guests.
pub struct Deliveries {
    work: Work,
    /// Memory of packets that no longer wait, until they were copied.
    spent: Vec<Buffer>,
    /// Memory for packets that wait; enough for every vif, so that none can use up another's.
    pool: Pool,
    /// Buffers of it that one vif may have.
    most_kept: usize,
    /// Memory for frames that are made here, until they were copied; whoever's they are.
    bench: Pool,
    now_ns: u64,
}

impl Deliveries {
    /// Without anything to do. Packets of each of at most `vifs` can wait in `most_kept` buffers.
    pub fn new(vifs: usize, most_kept: usize) -> Self {
        Self {
            work: Work::default(),
            spent: Vec::new(),
            pool: Pool::new(vifs * most_kept),
            most_kept,
            bench: Pool::new(BENCH),
            now_ns: 0,
        }
    }

    /// Tells what time it is.
    pub fn set_time(&mut self, now_ns: u64) {
        self.now_ns = now_ns;
    }

    /// The memory for packets that wait.
    pub fn pool(&mut self) -> &mut Pool {
        &mut self.pool
    }

    /// Delivers a packet to the vif in `place`, or keeps it, or drops it.
    pub fn offer(&mut self, place: usize, station: &mut Station, offer: &Offer<'_>) {
        let domain = station.domain;
        let Some(link) = station.link.as_mut().filter(|link| link.fault.is_none()) else { return };
        let at = At { place, queue: queue_of(link, offer.parts) };
        let free = link.queues[at.queue].waiting.is_empty();
        if free && has_room(link, at.queue, offer) {
            self.work.post(at, domain, &mut link.queues[at.queue], offer);
        } else {
            self.keep(link, at.queue, offer);
        }
    }

    /// Delivers the frames that a long packet makes to a vif that takes no such packets.
    pub fn offer_cut(
        &mut self,
        place: usize,
        station: &mut Station,
        packet: &[Buffer],
        mut cut: Cut,
    ) {
        let domain = station.domain;
        let Some(link) = station.link.as_mut().filter(|link| link.fault.is_none()) else { return };
        let at = At { place, queue: queue_of(link, packet) };
        while let Some(len) = cut.next_len() {
            if !self.offer_next(at, domain, link, packet, &mut cut, len) {
                // Its receiver has to ask for the rest again anyway.
                link.stats.rx_dropped += 1;
                return;
            }
        }
    }

    /// Makes the next frame, of `len` bytes, where it can be delivered from, or where it can wait.
    fn offer_next(
        &mut self,
        at: At,
        domain: DomainId,
        link: &mut Link,
        packet: &[Buffer],
        cut: &mut Cut,
        len: usize,
    ) -> bool {
        let nothing = Offer { parts: &[], len, checksum: Checksum::Good, cutting: None };
        let free = link.queues[at.queue].waiting.is_empty();
        if free
            && self.bench.available() > 0
            && has_room(link, at.queue, &nothing)
            && let Some(mut buffer) = self.bench.take()
        {
            buffer.token = BENCH_TOKEN;
            cut.next(packet, &mut buffer);
            let parts = core::slice::from_ref(&buffer);
            self.work.post(at, domain, &mut link.queues[at.queue], &Offer { parts, ..nothing });
            self.spent.push(buffer);
            return true;
        }
        if link.fault.is_some() || !self.room(link, at.queue, 1) {
            return false;
        }
        let Some(mut buffer) = self.pool.take() else { return false };
        cut.next(packet, &mut buffer);
        let (checksum, since_ns) = (Checksum::Good, self.now_ns);
        let queue = &mut link.queues[at.queue];
        queue.waiting.push_back(Waiting { len, buffers: 1, checksum, cutting: None, since_ns });
        queue.kept.push_back(buffer);
        // It may be for want of memory that it waits.
        queue.rx_ready = true;
        true
    }

    /// Whether a vif may keep so many buffers more. Packets that have waited for too long go.
    fn room(&mut self, link: &mut Link, number: usize, buffers: usize) -> bool {
        while link.kept() + buffers > self.most_kept.min(link.kept() + self.pool.available()) {
            let queue = &mut link.queues[number];
            let stale = |it: &Waiting| self.now_ns.saturating_sub(it.since_ns) >= STALE_NS;
            let Some(old) = queue.waiting.front().copied().filter(stale) else { return false };
            queue.waiting.pop_front();
            queue.kept.drain(..old.buffers).for_each(|buffer| self.pool.give(buffer));
            // What is behind it may need fewer.
            queue.rx_ready = true;
            link.stats.rx_dropped += 1;
        }
        true
    }

    /// Copies a packet into private memory, if there is room.
    fn keep(&mut self, link: &mut Link, number: usize, offer: &Offer<'_>) {
        let buffers = offer.len.div_ceil(usize::from(ROOM));
        if link.fault.is_some() || !self.room(link, number, buffers) {
            link.stats.rx_dropped += 1;
            return;
        }
        let kept = &mut link.queues[number].kept;
        let mut done = 0;
        while done < offer.len {
            let Some(mut buffer) = self.pool.take() else { break };
            let len = usize::from(ROOM).min(offer.len - done);
            parts::copy(offer.parts, done, len, &buffer, 0);
            parts::fill(core::slice::from_mut(&mut buffer), len);
            kept.push_back(buffer);
            done += len;
        }
        let &Offer { len, checksum, cutting, .. } = offer;
        let since_ns = self.now_ns;
        let waiting = Waiting { len, buffers, checksum, cutting, since_ns };
        link.queues[number].waiting.push_back(waiting);
    }

    /// Starts to deliver what waited, where new buffers may have been posted.
    pub fn resume(&mut self, stations: &mut [Option<Station>]) {
        for (place, station) in stations.iter_mut().enumerate() {
            let Some(Station { domain, link: Some(link), .. }) = station else { continue };
            for number in 0..link.queues.len() {
                if core::mem::take(&mut link.queues[number].rx_ready) {
                    self.resume_queue(At { place, queue: number }, *domain, link);
                }
            }
        }
    }

    fn resume_queue(&mut self, at: At, domain: DomainId, link: &mut Link) {
        while let Some(&Waiting { len, buffers, checksum, cutting, .. }) =
            link.queues[at.queue].waiting.front()
        {
            let nothing = Offer { parts: &[], len, checksum, cutting };
            if !has_room(link, at.queue, &nothing) {
                return;
            }
            let queue = &mut link.queues[at.queue];
            queue.waiting.pop_front();
            let start = self.spent.len();
            self.spent.extend(queue.kept.drain(..buffers));
            let offer = Offer { parts: &self.spent[start..], ..nothing };
            self.work.post(at, domain, queue, &offer);
        }
    }

    /// Copies what was started, and tells the guests.
    pub fn finish<E: Env>(&mut self, env: &mut E, stations: &mut [Option<Station>]) {
        if self.work.slots.is_empty() {
            return;
        }
        env.copy(&mut self.work.copies);
        self.work.respond(stations);
        let mut last = None;
        for slot in self.work.slots.drain(..) {
            if last.replace(slot.at) == Some(slot.at) {
                continue;
            }
            // The second publish of the same queue has nothing to publish.
            if let Some(link) = link_at(stations, slot.at.place)
                && link.fault.is_none()
                && link.queues[slot.at.queue].rx.publish()
            {
                env.notify(link.queues[slot.at.queue].rx_port);
            }
        }
        self.work.copies.clear();
        for mut buffer in self.spent.drain(..) {
            match core::mem::take(&mut buffer.token) {
                BENCH_TOKEN => self.bench.give(buffer),
                _ => self.pool.give(buffer),
            }
        }
    }
}

impl Work {
    /// Takes the posted buffers that a packet needs, of which [`has_room`] was found to hold.
    fn post(&mut self, at: At, domain: DomainId, queue: &mut Queue, offer: &Offer<'_>) {
        let mut cursor = Cursor::new(offer.parts, 0);
        let mut left = offer.len;
        let mut flags = match offer.checksum {
            Checksum::Unknown => 0,
            Checksum::Good => RXF_DATA_VALIDATED,
            Checksum::Blank => RXF_CSUM_BLANK | RXF_DATA_VALIDATED,
        };
        let mut extra = offer.cutting;
        if extra.is_some() {
            flags |= RXF_EXTRA_INFO;
        }
        while left > 0
            && let Ok(Some(request)) = queue.rx.take()
        {
            let len = left.min(PAGE_SIZE);
            left -= len;
            let more = if left > 0 { RXF_MORE_DATA } else { 0 };
            let first = self.copies.len();
            let mut done = 0;
            while let Some(piece) = cursor.next(len - done) {
                self.copies.push(GrantCopy {
                    local: piece.page.clone(),
                    local_offset: piece.offset,
                    remote: domain,
                    gref: request.gref,
                    remote_offset: short(done),
                    len: piece.len,
                    direction: Direction::ToRemote,
                    status: GrantStatus::OKAY,
                });
                done += usize::from(piece.len);
            }
            let copies = self.copies.len() - first;
            let content = Content::Data { len, flags: flags | more, copies };
            self.slots.push(Slot { at, id: request.id, content });
            flags = 0;
            if let Some(cutting) = extra.take()
                && let Ok(Some(request)) = queue.rx.take()
            {
                self.slots.push(Slot { at, id: request.id, content: Content::Extra(cutting) });
            }
        }
    }

    /// Writes the responses, in ring order, and counts.
    fn respond(&self, stations: &mut [Option<Station>]) {
        let mut copies = self.copies.iter();
        let (mut bytes, mut failed) = (0, false);
        for slot in &self.slots {
            let Some(link) = link_at(stations, slot.at.place) else { return };
            let ring = &mut link.queues[slot.at.queue].rx;
            let (len, flags, count) = match slot.content {
                Content::Data { len, flags, copies } => (len, flags, copies),
                Content::Extra(cutting) => {
                    link.stats.rx_long += 1;
                    ring.respond(&extra_response(cutting));
                    continue;
                }
            };
            let mut good = true;
            for copy in copies.by_ref().take(count) {
                good &= copy.status == GrantStatus::OKAY;
            }
            let status = if good { short(len).cast_signed() } else { RSP_ERROR };
            ring.respond(&RxResponse { id: slot.id, offset: 0, flags, status });
            failed |= !good;
            bytes += len as u64;
            if flags & RXF_MORE_DATA == 0 {
                count_packet(link, bytes, failed);
                (bytes, failed) = (0, false);
            }
        }
    }
}

fn count_packet(link: &mut Link, bytes: u64, failed: bool) {
    if failed {
        link.stats.rx_errors += 1;
    } else {
        link.stats.rx_packets += 1;
        link.stats.rx_bytes += bytes;
    }
}

/// Whether a queue has all the buffers that a packet needs. If not, an event tells of more.
fn has_room(link: &mut Link, number: usize, offer: &Offer<'_>) -> bool {
    let slots = offer.len.div_ceil(PAGE_SIZE) + usize::from(offer.cutting.is_some());
    let ring = &mut link.queues[number].rx;
    loop {
        match ring.available() {
            Ok(posted) if posted as usize >= slots => return true,
            Ok(_) if ring.arm_for_more() => {}
            Ok(_) => return false,
            Err(error) => {
                link.fail(format_args!("rx ring: {error}"));
                return false;
            }
        }
    }
}

/// The queue for a packet: the same for all of a flow.
fn queue_of(link: &Link, packet: &[Buffer]) -> usize {
    if link.queues.len() == 1 {
        return 0;
    }
    let mut head = [0; FLOW_HEAD];
    parts::read(packet, 0, &mut head);
    frame::flow(&head) as usize % link.queues.len()
}

fn link_at(stations: &mut [Option<Station>], place: usize) -> Option<&mut Link> {
    stations.get_mut(place)?.as_mut()?.link.as_mut()
}

/// An extra info in a slot for a response.
fn extra_response(cutting: Cutting) -> RxResponse {
    let gso_type = if cutting.ipv6 { GSO_TCPV6 } else { GSO_TCPV4 };
    zerocopy::transmute!(ExtraInfo {
        kind: EXTRA_GSO,
        flags: 0,
        gso_size: cutting.mss,
        gso_type,
        pad: 0,
        gso_features: 0,
    })
}

#[expect(clippy::cast_possible_truncation, reason = "at most the size of a page")]
const fn short(len: usize) -> u16 {
    len as u16
}
