//! The data path: packets between rings and card.
//!
//! From a guest, a packet is copied once, from the guest's pages into buffers lent by the card;
//! if it turns out to be for a neighbour, the same buffers are the source of the copy to it, and
//! go back unused. From the card, a frame is copied once, from the card's buffer into what the
//! guest posted. Only a packet that has to wait is copied into private memory ([`crate::deliver`]).
//! What is looked at (addresses, headers) is always the private copy.
//!
//! What a sender left undone, a checksum or the cutting of a long packet into frames, is left
//! undone as far as it goes: the card may do it, and a neighbour may take the packet as it is.
//! What nobody does is done here ([`crate::segment`], [`crate::frame`]).
//!
//! All copies of a batch are one [`domain_api::Grants::copy`]. A batch is bounded, each vif has one
//! per round, for one of its queues, and the first to be served changes with each round. When the
//! card has no buffer left, requests wait, and the next round starts with the vif that found none,
//! or behind the one that got the last.
//!
//! Responses are written in ring order after the copies, and published once per batch, so that
//! `rsp_prod` only ever moves over whole packets. When the card runs out of buffers while a packet
//! is being cut, the rest of its batch waits unanswered.

use crate::deliver::{Deliveries, Offer};
use crate::frame::{self, HEAD, HEADER, Layers};
use crate::link::{Link, Queue};
use crate::packet::{Answer, GroupChange, Packet};
use crate::parts::{self, Cursor};
use crate::pool::Pool;
use crate::segment::{self, Cut, Cutting};
use crate::switch::{Addresses, Mac, Port, Switch, Verdict, is_group};
use crate::{Env, Progress};
use alloc::vec::Vec;
use core::ops::Range;
use domain_api::nic::{Buffer, Checksum, Headers, MAX_FRAME, Nic, Offload, Offloads, Received};
use domain_api::{Direction, DomainId, GrantCopy, GrantStatus};
use shmem::Page;
use xen_abi::PAGE_SIZE;
use xen_abi::netif::{RSP_ERROR, RSP_NULL, RSP_OKAY, TxResponse};

/// Frames taken from the card in one round.
const NIC_BATCH: usize = 64;
/// Packets taken from one vif in one round.
const TX_BATCH: usize = 32;
/// Slots taken from one vif in one round; more than a whole packet can have.
const TX_SLOTS: usize = 128;
/// Bytes behind which no further packet is taken in the same round.
const TX_BYTES: usize = 128 << 10;
/// Buffers of 2 KiB in which packets for one vif may wait: 64 frames, or two long packets. With
/// many vifs it is less, down to the last number: a net domain's memory has to do for all.
const MOST_KEPT: [usize; 3] = [64, 512, 8];

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
    /// What is under way to guests.
    pub deliveries: Deliveries,
    /// Memory for frames of one batch while the link is down.
    staging: Pool,
    /// Memory for one long packet that the card cannot have as it is.
    large: Vec<Page>,
    /// Which vif is served first in the next round.
    first: usize,
    from_guest: Vec<GrantCopy>,
    nic_frames: Vec<Received>,
    batch: Batch,
    cutter: Cutter,
}

/// Where a packet from a guest is put together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Origin {
    /// Nowhere: it is none, or refused.
    Nowhere,
    /// In buffers of the card.
    Nic,
    /// In memory for one frame.
    Frame,
    /// In the memory for a long packet.
    Large,
}

/// A packet from a guest on its way.
struct Taken {
    origin: Origin,
    parts: Vec<Buffer>,
    len: usize,
    /// Its copies in `from_guest`.
    copies: Range<usize>,
    /// Its answers, in the batch.
    answers: Range<usize>,
    checksum: Checksum,
    cutting: Option<Cutting>,
    /// Known if anything is left undone.
    layers: Option<Layers>,
    /// Whether the card gets it.
    outside: bool,
    status: i16,
}

/// Packets that were taken from a queue together.
#[derive(Default)]
struct Batch {
    /// Whose.
    place: usize,
    queue: usize,
    serial: u64,
    /// The packets; the first `done` of `count` are answered. What is behind is kept for its
    /// memory.
    packets: Vec<Taken>,
    count: usize,
    done: usize,
    answers: Vec<Answer>,
}

/// What is needed to cut packets for the card.
#[derive(Default)]
struct Cutter {
    /// The packet that is being cut.
    cut: Option<Cut>,
    /// The parts of one frame.
    frame: Vec<Buffer>,
}

/// How a vif's turn ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Turn {
    /// Its rings are empty, and events will tell of the next request.
    Done,
    /// It has more.
    More,
    /// The card has too few buffers.
    Stalled {
        /// For all that, some packets found theirs.
        served: bool,
    },
}

/// What became of the wish for room for a packet.
enum Room {
    Found(Origin),
    /// The card has none.
    Stalled,
    /// There is some when the batch is done.
    NextBatch,
}

impl Plane {
    /// Without vifs, of which there will be at most `vifs`.
    pub fn new(vifs: usize) -> Self {
        let mut switch = Switch::new();
        switch.attach(Port::Nic, Addresses::Learned);
        let [most, all, least] = MOST_KEPT;
        let most_kept = (all / vifs.max(1)).clamp(least, most);
        Self {
            stations: Vec::new(),
            switch,
            deliveries: Deliveries::new(vifs, most_kept),
            staging: Pool::new(TX_BATCH),
            large: Vec::new(),
            first: 0,
            from_guest: Vec::new(),
            nic_frames: Vec::new(),
            batch: Batch::default(),
            cutter: Cutter::default(),
        }
    }

    /// One round. See [`crate::Netback::poll`].
    pub fn poll<E: Env, N: Nic>(&mut self, env: &mut E, nic: &mut N) -> Progress {
        let now_ns = env.now_ns();
        self.deliveries.set_time(now_ns);
        self.resume_deliveries(env);
        let mut progress =
            Progress { more_work: self.serve_nic(env, nic, now_ns), ..Progress::IDLE };
        self.serve_vifs(env, nic, now_ns, &mut progress);
        // Frames that were cut for guests wait only since now.
        self.resume_deliveries(env);
        nic.flush();
        for link in self.stations.iter_mut().flatten().filter_map(|it| it.link.as_mut()) {
            progress.store_work |= link.fault.is_some();
            greet(env, link);
        }
        progress
    }

    fn resume_deliveries<E: Env>(&mut self, env: &mut E) {
        self.deliveries.resume(&mut self.stations);
        self.deliveries.finish(env, &mut self.stations);
    }

    /// Takes frames from the card. True when it may have more.
    fn serve_nic<E: Env, N: Nic>(&mut self, env: &mut E, nic: &mut N, now_ns: u64) -> bool {
        let mut frames = core::mem::take(&mut self.nic_frames);
        while frames.len() < NIC_BATCH
            && let Some(received) = nic.receive()
        {
            self.deliver_received(&received, now_ns);
            frames.push(received);
        }
        let more = frames.len() == NIC_BATCH;
        self.deliveries.finish(env, &mut self.stations);
        for received in frames.drain(..) {
            nic.recycle(received.buffer);
        }
        self.nic_frames = frames;
        more
    }

    fn deliver_received(&mut self, received: &Received, now_ns: u64) {
        let parts = core::slice::from_ref(&received.buffer);
        let len = usize::from(received.buffer.len);
        if len > MAX_FRAME {
            return;
        }
        let Some((destination, source)) = addresses(parts, len) else { return };
        let verdict = self.switch.forward(now_ns, Port::Nic, source, destination);
        let layers = match received.checksum {
            Checksum::Blank => layers(parts, len),
            _ => None,
        };
        let mut packet =
            Outgoing { parts, len, checksum: received.checksum, cutting: None, layers };
        let offloads = Offloads::default();
        self.settle_checksum(Port::Nic, verdict, destination, &mut packet, offloads);
        self.deliver(Port::Nic, verdict, destination, &packet);
    }

    /// One batch from each vif, beginning with the one whose turn it is.
    fn serve_vifs<E: Env, N: Nic>(
        &mut self,
        env: &mut E,
        nic: &mut N,
        now_ns: u64,
        progress: &mut Progress,
    ) {
        // A batch that the card had no room for comes first.
        if !self.answer(env, nic) {
            progress.stalled = true;
            return;
        }
        let count = self.stations.len();
        let begin = self.first;
        self.first = if count == 0 { 0 } else { (begin + 1) % count };
        for place in (0..count).map(|step| (begin + step) % count) {
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
        let Some(number) = self.link(place).and_then(|link| link.ready()) else {
            return Turn::Done;
        };
        let turn = self.take_batch(nic, place, number);
        let mut copies = core::mem::take(&mut self.from_guest);
        if !copies.is_empty() {
            env.copy(&mut copies);
        }
        let mut packets = core::mem::take(&mut self.batch.packets);
        let card = nic.link_up().then(|| nic.offloads());
        for taken in &mut packets[..self.batch.count] {
            self.route(place, taken, &copies, now_ns, card);
        }
        self.batch.packets = packets;
        copies.clear();
        self.from_guest = copies;
        self.deliveries.finish(env, &mut self.stations);
        if !self.answer(env, nic) {
            return Turn::Stalled { served: true };
        }
        let more = self.link(place).is_some_and(|link| link.ready().is_some());
        if turn == Turn::Done && more { Turn::More } else { turn }
    }

    /// Takes packets out of a queue, and lists the copies that bring them here.
    fn take_batch<N: Nic>(&mut self, nic: &mut N, place: usize, number: usize) -> Turn {
        let Self { stations, staging, large, batch, from_guest, .. } = self;
        let Some(Station { domain, link: Some(link), .. }) = &mut stations[place] else {
            return Turn::Done;
        };
        link.turn = (number + 1) % link.queues.len();
        batch.start(place, number, link.serial);
        let (mut slots, mut bytes) = (0, 0);
        loop {
            if batch.count == TX_BATCH || slots >= TX_SLOTS || bytes >= TX_BYTES {
                return Turn::More;
            }
            let Some(packet) = next_packet(link, number, &mut slots) else { return Turn::Done };
            let taken = batch.next();
            match stage(nic, staging, large, &packet, taken) {
                Room::Found(origin) => taken.origin = origin,
                Room::Stalled => return Turn::Stalled { served: batch.count > 0 },
                Room::NextBatch => return Turn::More,
            }
            let queue = &mut link.queues[number];
            list_copies(from_guest, *domain, queue, taken);
            bytes += taken.len;
            if let Some(change) = packet.message.filter(|_| packet.refused.is_none()) {
                taken.status = change_group(link, change);
            }
            batch.push(&mut link.queues[number]);
        }
    }

    /// Decides where a packet goes, now that it is here, and delivers it to neighbours. `card` is
    /// what the card does, if its link is up.
    fn route(
        &mut self,
        place: usize,
        taken: &mut Taken,
        copies: &[GrantCopy],
        now_ns: u64,
        card: Option<Offloads>,
    ) {
        let Some(Station { mac, addresses: known, link: Some(link), .. }) =
            &mut self.stations[place]
        else {
            return;
        };
        if taken.origin == Origin::Nowhere {
            link.stats.tx_errors += u64::from(taken.status != RSP_OKAY);
            return;
        }
        let copied = &copies[taken.copies.clone()];
        let good = copied.iter().all(|copy| copy.status == GrantStatus::OKAY);
        let Some((destination, source)) = addresses(&taken.parts, taken.len) else { return };
        if !good || !taken.look(destination) {
            link.stats.tx_errors += 1;
            return;
        }
        if *known == Addresses::Exact && source != *mac {
            link.stats.tx_spoofed += 1;
            return;
        }
        link.stats.tx_packets += 1;
        link.stats.tx_bytes += taken.len as u64;
        link.stats.tx_long += u64::from(taken.is_long());
        taken.status = RSP_OKAY;
        let from = Port::Vif(place);
        let verdict = self.switch.forward(now_ns, from, source, destination);
        let mut packet = taken.outgoing();
        if taken.origin == Origin::Nic {
            let card = card.unwrap_or(ALL_OFFLOADS);
            self.settle_checksum(from, verdict, destination, &mut packet, card);
        } else {
            self.settle_checksum(from, verdict, destination, &mut packet, ALL_OFFLOADS);
        }
        let outside = self.deliver(from, verdict, destination, &packet);
        taken.checksum = packet.checksum;
        taken.outside = outside && card.is_some();
        if outside
            && card.is_none()
            && let Some(link) = self.link(place)
        {
            link.stats.tx_dropped += 1;
        }
    }

    /// Finishes a blank checksum, unless all who get the packet do that themselves.
    fn settle_checksum(
        &self,
        from: Port,
        verdict: Verdict,
        destination: Mac,
        packet: &mut Outgoing<'_>,
        card: Offloads,
    ) {
        if packet.checksum != Checksum::Blank || packet.cutting.is_some() {
            return;
        }
        let Some(layers) = packet.layers else {
            packet.checksum = Checksum::Unknown;
            return;
        };
        let ipv6 = layers.headers.ipv6;
        let plain = !layers.extended && layers.end == packet.len;
        let takes = |port| match port {
            Port::Nic => plain && if ipv6 { card.checksum_v6 } else { card.checksum_v4 },
            Port::Vif(place) => self
                .stations
                .get(place)
                .and_then(|station| station.as_ref()?.link.as_ref())
                .is_none_or(|link| link.takes.blank(ipv6) || !link.groups.hears(destination)),
        };
        if !self.switch.flood(from, verdict).all(takes) {
            let sum = parts::sum(packet.parts, layers.l4(), layers.end - layers.l4());
            parts::write(packet.parts, layers.checksum(), &layers.finished(sum));
            packet.checksum = Checksum::Good;
        }
    }

    /// Starts the copies of a packet to all vifs that get it. True when the card gets it too.
    fn deliver(
        &mut self,
        from: Port,
        verdict: Verdict,
        destination: Mac,
        packet: &Outgoing<'_>,
    ) -> bool {
        let Self { stations, switch, deliveries, .. } = self;
        let mut outside = false;
        for port in switch.flood(from, verdict) {
            let place = match port {
                Port::Nic => {
                    outside = true;
                    continue;
                }
                Port::Vif(place) => place,
            };
            let Some(station) = &mut stations[place] else { continue };
            let Some(link) = &station.link else { continue };
            if !link.groups.hears(destination) {
                continue;
            }
            match (packet.cutting, &packet.layers) {
                (Some(cutting), Some(layers)) if !link.takes.long(cutting.ipv6) => {
                    let cut = Cut::new(packet.parts, layers, cutting);
                    deliveries.offer_cut(place, station, packet.parts, cut);
                }
                _ => deliveries.offer(place, station, &packet.offer()),
            }
        }
        outside
    }

    /// Sends what is for outside of the batch, and answers it. False when the card has too few
    /// buffers; the rest is then left for the next time.
    fn answer<E: Env, N: Nic>(&mut self, env: &mut E, nic: &mut N) -> bool {
        let Self { stations, staging, batch, cutter, .. } = self;
        let Batch { place, queue, serial, packets, count, done, answers } = batch;
        let mut link = stations
            .get_mut(*place)
            .and_then(|station| station.as_mut()?.link.as_mut())
            .filter(|link| link.serial == *serial);
        // A card without a link would keep the batch, and all others, waiting.
        let card = nic.link_up().then(|| nic.offloads());
        while *done < *count {
            let taken = &mut packets[*done];
            match (&mut link, card) {
                (Some(_), Some(card)) if taken.outside && !cutter.send(nic, taken, card) => break,
                (Some(link), None) if taken.outside => link.stats.tx_dropped += 1,
                _ => {}
            }
            cutter.cut = None;
            taken.unstage(nic, staging);
            if let Some(link) = &mut link {
                respond(&mut link.queues[*queue], &answers[taken.answers.clone()], taken.status);
            }
            *done += 1;
        }
        if let Some(link) = link
            && link.fault.is_none()
            && link.queues[*queue].tx.publish()
        {
            env.notify(link.queues[*queue].tx_port);
        }
        done == count
    }

    fn link(&mut self, place: usize) -> Option<&mut Link> {
        self.stations.get_mut(place)?.as_mut()?.link.as_mut()
    }
}

/// What a card does that need not be asked, for nothing goes to it.
const ALL_OFFLOADS: Offloads =
    Offloads { checksum_v4: true, checksum_v6: true, segment_v4: true, segment_v6: true };

/// A packet on its way to those who get it.
struct Outgoing<'a> {
    parts: &'a [Buffer],
    len: usize,
    checksum: Checksum,
    /// How it is to be cut, if it is longer than a frame.
    cutting: Option<Cutting>,
    layers: Option<Layers>,
}

impl Outgoing<'_> {
    fn offer(&self) -> Offer<'_> {
        let Self { parts, len, checksum, cutting, .. } = *self;
        Offer { parts, len, checksum, cutting }
    }
}

impl Batch {
    fn start(&mut self, place: usize, queue: usize, serial: u64) {
        (self.place, self.queue, self.serial) = (place, queue, serial);
        (self.count, self.done) = (0, 0);
        self.answers.clear();
    }

    /// The place for the next packet, empty.
    fn next(&mut self) -> &mut Taken {
        if self.count == self.packets.len() {
            self.packets.push(Taken {
                origin: Origin::Nowhere,
                parts: Vec::new(),
                len: 0,
                copies: 0..0,
                answers: 0..0,
                checksum: Checksum::Unknown,
                cutting: None,
                layers: None,
                outside: false,
                status: RSP_ERROR,
            });
        }
        let answers = self.answers.len();
        let taken = &mut self.packets[self.count];
        (taken.origin, taken.len, taken.status) = (Origin::Nowhere, 0, RSP_ERROR);
        (taken.copies, taken.answers) = (0..0, answers..answers);
        (taken.checksum, taken.cutting, taken.layers) = (Checksum::Unknown, None, None);
        taken.outside = false;
        taken
    }

    /// Counts the packet in that place, which is the one in the assembler.
    fn push(&mut self, queue: &mut Queue) {
        self.answers.extend(queue.assembler.answers());
        queue.assembler.clear();
        self.packets[self.count].answers.end = self.answers.len();
        self.count += 1;
    }
}

impl Taken {
    /// Looks for what was left undone. False when it makes no sense.
    fn look(&mut self, destination: Mac) -> bool {
        if self.checksum != Checksum::Blank && self.cutting.is_none() {
            return true;
        }
        let Some(layers) = layers(&self.parts, self.len) else { return false };
        self.layers = Some(layers);
        let Some(cutting) = self.cutting else { return true };
        // TCP has one receiver.
        if is_group(destination) || !segment::fits(&layers, self.len, cutting) {
            return false;
        }
        // Who has it cut cannot have finished its checksum; Linux, too, does not insist on the flag.
        if self.checksum != Checksum::Blank {
            self.blank_checksum(&layers);
        }
        true
    }

    fn blank_checksum(&mut self, layers: &Layers) {
        let mut head = [0; HEAD];
        parts::read(&self.parts, 0, &mut head[..usize::from(layers.headers.l4)]);
        let sum = frame::pseudo_header(&head, &layers.headers, self.len - layers.l4());
        parts::write(&self.parts, layers.checksum(), &sum.folded().to_be_bytes());
        self.checksum = Checksum::Blank;
    }

    /// How it is to be cut, if that makes more than one frame.
    fn long(&self) -> Option<Cutting> {
        let payload = self.layers?.payload();
        self.cutting.filter(|cutting| payload > usize::from(cutting.mss))
    }

    fn is_long(&self) -> bool {
        self.long().is_some()
    }

    fn outgoing(&self) -> Outgoing<'_> {
        Outgoing {
            parts: &self.parts,
            len: self.len,
            checksum: self.checksum,
            cutting: self.long(),
            layers: self.layers,
        }
    }

    /// Gives back what it lies in.
    fn unstage<N: Nic>(&mut self, nic: &mut N, staging: &mut Pool) {
        for part in self.parts.drain(..) {
            match self.origin {
                Origin::Nic => nic.cancel(part),
                Origin::Frame => staging.give(part),
                // Its pages have other handles.
                Origin::Large | Origin::Nowhere => {}
            }
        }
    }
}

impl Cutter {
    /// Sends a packet. False when the card has too few buffers for all of its frames; then it is
    /// to be called again.
    fn send<N: Nic>(&mut self, nic: &mut N, taken: &mut Taken, card: Offloads) -> bool {
        if taken.origin == Origin::Nic
            && let Some(offload) = offload(taken, card)
        {
            nic.transmit(taken.parts.drain(..), offload);
            return true;
        }
        // A frame that was put elsewhere found the link down, and shares the fate of those.
        let (Some(layers), Some(cutting)) = (&taken.layers, taken.cutting) else { return true };
        let cut = self.cut.get_or_insert_with(|| Cut::new(&taken.parts, layers, cutting));
        while let Some(len) = cut.next_len() {
            if !nic.tx_buffers(len, &mut self.frame) {
                return false;
            }
            cut.next(&taken.parts, &mut self.frame[0]);
            nic.transmit(self.frame.drain(..), Offload::Nothing);
        }
        true
    }
}

/// What the card has to do for a packet in its buffers; `None` when it cannot.
fn offload(taken: &Taken, card: Offloads) -> Option<Offload> {
    let Some(layers) = taken.layers else { return Some(Offload::Nothing) };
    let headers = layers.headers;
    let Some(Cutting { mss, ipv6 }) = taken.long() else {
        let blank = taken.checksum == Checksum::Blank;
        return Some(if blank { Offload::Checksum(headers) } else { Offload::Nothing });
    };
    let segments = if ipv6 { card.segment_v6 } else { card.segment_v4 };
    (segments && !layers.extended).then_some(Offload::Segment { headers, mss })
}

/// Finds room for a packet, and notes what it is.
fn stage<N: Nic>(
    nic: &mut N,
    staging: &mut Pool,
    large: &mut Vec<Page>,
    packet: &Packet,
    taken: &mut Taken,
) -> Room {
    if packet.refused.is_some() || packet.message.is_some() {
        return Room::Found(Origin::Nowhere);
    }
    let len = usize::from(packet.len);
    taken.len = len;
    taken.cutting = packet.cutting;
    taken.checksum = if packet.csum_blank { Checksum::Blank } else { Checksum::Unknown };
    let card = nic.offloads();
    let whole =
        packet.cutting.is_none_or(|it| if it.ipv6 { card.segment_v6 } else { card.segment_v4 });
    if whole && nic.link_up() {
        if !nic.tx_buffers(len, &mut taken.parts) {
            return Room::Stalled;
        }
        parts::fill(&mut taken.parts, len);
        return Room::Found(Origin::Nic);
    }
    if packet.cutting.is_some() {
        return stage_large(large, taken);
    }
    // While the link is down the card keeps its buffers for itself.
    let Some(frame) = staging.take() else { return Room::NextBatch };
    taken.parts.push(frame);
    parts::fill(&mut taken.parts, len);
    Room::Found(Origin::Frame)
}

/// The memory for a long packet, unless another one is in it.
fn stage_large(large: &mut Vec<Page>, taken: &mut Taken) -> Room {
    let pages = taken.len.div_ceil(PAGE_SIZE);
    while large.len() < pages {
        large.push(Page::new_zeroed());
    }
    if large.first().is_some_and(|page| page.handles() > 1) {
        return Room::NextBatch;
    }
    let buffer = |page: &Page| Buffer { page: page.clone(), offset: 0, len: 4096, token: 0 };
    taken.parts.extend(large[..pages].iter().map(buffer));
    parts::fill(&mut taken.parts, taken.len);
    Room::Found(Origin::Large)
}

/// Lists the copies that bring the packet in the assembler into its parts.
fn list_copies(list: &mut Vec<GrantCopy>, remote: DomainId, queue: &Queue, taken: &mut Taken) {
    let first = list.len();
    if taken.origin != Origin::Nowhere {
        let mut cursor = Cursor::new(&taken.parts, 0);
        for part in queue.assembler.fragments() {
            let mut done = 0;
            while let Some(piece) = cursor.next(usize::from(part.len - done)) {
                list.push(GrantCopy {
                    local: piece.page.clone(),
                    local_offset: piece.offset,
                    remote,
                    gref: part.gref,
                    remote_offset: part.offset + done,
                    len: piece.len,
                    direction: Direction::FromRemote,
                    status: GrantStatus::OKAY,
                });
                done += piece.len;
            }
        }
    }
    taken.copies = first..list.len();
}

/// Whether the ring has requests. If not, an event will tell of the next one.
fn has_requests(link: &mut Link, number: usize) -> bool {
    while link.fault.is_none() {
        let queue = &mut link.queues[number];
        match queue.tx.available() {
            Ok(0) if queue.tx.arm() => {}
            Ok(0) => {
                queue.tx_ready = false;
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

/// Takes slots until they make a packet, which stays in the assembler. `None`: the ring is empty,
/// or lied.
fn next_packet(link: &mut Link, number: usize, slots: &mut usize) -> Option<Packet> {
    loop {
        let queue = &mut link.queues[number];
        if let Some(packet) = queue.assembler.whole() {
            return Some(packet);
        }
        match queue.tx.take() {
            Ok(Some(slot)) => {
                *slots += 1;
                if let Err(lie) = queue.assembler.push(&slot) {
                    link.fail(format_args!("tx ring: {lie}"));
                    return None;
                }
            }
            Ok(None) if has_requests(link, number) => {}
            Ok(None) => return None,
            Err(error) => {
                link.fail(format_args!("tx ring: {error}"));
                return None;
            }
        }
    }
}

fn respond(queue: &mut Queue, answers: &[Answer], status: i16) {
    for answer in answers {
        queue.tx.respond(&match *answer {
            Answer::Data(id) => TxResponse { id, status },
            Answer::Extra => TxResponse { id: 0, status: RSP_NULL },
        });
    }
}

fn change_group(link: &mut Link, change: GroupChange) -> i16 {
    let known = if change.add {
        link.groups.add(change.group)
    } else {
        link.groups.remove(change.group);
        true
    };
    if known { RSP_OKAY } else { RSP_ERROR }
}

/// Tells a frontend once, whatever its event indices say (R9 in xen-abi §10.2).
fn greet<E: Env>(env: &mut E, link: &mut Link) {
    let live = link.fault.is_none();
    for queue in &mut link.queues {
        if core::mem::take(&mut queue.greet) && live {
            env.notify(queue.tx_port);
            if queue.rx_port != queue.tx_port {
                env.notify(queue.rx_port);
            }
        }
    }
}

/// Destination and source of a packet. `None` for what is none.
fn addresses(packet: &[Buffer], len: usize) -> Option<(Mac, Mac)> {
    if len < HEADER {
        return None;
    }
    let mut header = [0; HEADER];
    parts::read(packet, 0, &mut header);
    Some(frame::addresses(&header))
}

/// The layers of a packet.
fn layers(packet: &[Buffer], len: usize) -> Option<Layers> {
    let mut head = [0; HEAD];
    let head = &mut head[..len.min(HEAD)];
    parts::read(packet, 0, head);
    let found = Layers::of(head, len)?;
    // What is to be done by others has to be found by them: in the first part.
    let Headers { end, .. } = found.headers;
    packet.first().is_some_and(|part| end <= part.len).then_some(found)
}
