//! The rings, pages and ports of one connection.

use super::{Checksum, Config, Cutting, Env, Error, Fault, GrantPolicy, Mac, Received, Stats};
use alloc::vec;
use alloc::vec::Vec;
use domain_api::{Access, DomainId, Errno, EventPort, GrantRef};
use shmem::{Page, ring::FrontRing};
use xen_abi::PAGE_SIZE;
use xen_abi::netif::{
    EXTRA_GSO, EXTRA_MCAST_ADD, EXTRA_MCAST_DEL, ExtraInfo, GSO_TCPV4, GSO_TCPV6, MAX_TX_SLOTS,
    McastInfo, RSP_NULL, RSP_OKAY, RXF_CSUM_BLANK, RXF_DATA_VALIDATED, RXF_EXTRA_INFO,
    RXF_MORE_DATA, RxRequest, RxResponse, TX_SLOT, TXF_CSUM_BLANK, TXF_EXTRA_INFO, TXF_MORE_DATA,
    TxRequest, TxResponse,
};
use zerocopy::{FromBytes, IntoBytes};

/// A page that the backend may use.
#[derive(Debug)]
pub struct Granted {
    pub gref: GrantRef,
    /// Kept until the grant is revoked: the backend may still write there.
    _page: Page,
}

/// A page for frames.
#[derive(Debug)]
struct Buffer {
    page: Page,
    /// While it is granted.
    gref: Option<GrantRef>,
    /// While a request names it.
    in_use: bool,
}

pub struct Channel {
    backend: DomainId,
    config: Config,
    tx: FrontRing<TxRequest, TxResponse>,
    rx: FrontRing<RxRequest, RxResponse>,
    tx_buffers: Vec<Buffer>,
    rx_buffers: Vec<Buffer>,
    /// Transmit buffers that no request names.
    tx_free: Vec<u16>,
    /// For each slot of the transmit ring, whether an extra info is there.
    extras: Vec<bool>,
    /// For each slot of the receive ring, the buffer posted there.
    posted: Vec<Option<u16>>,
    rings: [Granted; 2],
    tx_port: EventPort,
    rx_port: EventPort,
}

/// What a connection needs, while it is being made.
struct Opening<'a, E> {
    env: &'a mut E,
    backend: DomainId,
    grants: Vec<Granted>,
    ports: Vec<EventPort>,
}

impl<E: Env> Opening<'_, E> {
    fn grant(&mut self, page: &Page, access: Access) -> Result<GrantRef, Errno> {
        let gref = self.env.grant(self.backend, page, access)?;
        self.grants.push(Granted { gref, _page: page.clone() });
        Ok(gref)
    }

    fn port(&mut self) -> Result<EventPort, Errno> {
        let port = self.env.alloc_unbound(self.backend)?;
        self.ports.push(port);
        Ok(port)
    }

    fn buffers(
        &mut self,
        count: u16,
        access: Access,
        policy: GrantPolicy,
    ) -> Result<Vec<Buffer>, Errno> {
        let mut buffers = Vec::new();
        for _ in 0..count {
            let page = Page::new_zeroed();
            let gref = match policy {
                GrantPolicy::Keep => Some(self.grant(&page, access)?),
                GrantPolicy::PerRequest => None,
            };
            buffers.push(Buffer { page, gref, in_use: false });
        }
        Ok(buffers)
    }
}

impl Channel {
    /// Makes rings, buffers and ports, and posts all receive buffers.
    pub fn open<E: Env>(
        env: &mut E,
        backend: DomainId,
        config: Config,
        split: bool,
        held: &mut Vec<Granted>,
    ) -> Result<Self, Errno> {
        let mut opening = Opening { env, backend, grants: Vec::new(), ports: Vec::new() };
        match Self::build(&mut opening, config, split) {
            Ok(mut channel) => match channel.post_all(env) {
                Ok(()) => Ok(channel),
                Err(errno) => {
                    channel.close(env, held);
                    Err(errno)
                }
            },
            Err(errno) => {
                let Opening { env, grants, ports, .. } = opening;
                for port in ports {
                    env.close(port);
                }
                for granted in grants {
                    give_back(env, granted, held);
                }
                Err(errno)
            }
        }
    }

    fn build<E: Env>(
        opening: &mut Opening<'_, E>,
        config: Config,
        split: bool,
    ) -> Result<Self, Errno> {
        let (tx_page, rx_page) = (Page::new_zeroed(), Page::new_zeroed());
        let tx = FrontRing::new(tx_page.clone());
        let rx = FrontRing::new(rx_page.clone());
        let tx_ref = opening.grant(&tx_page, Access::ReadWrite)?;
        let rx_ref = opening.grant(&rx_page, Access::ReadWrite)?;
        let tx_buffers = opening.buffers(config.tx_buffers, Access::ReadOnly, config.grants)?;
        let rx_buffers = opening.buffers(config.rx_buffers, Access::ReadWrite, config.grants)?;
        let tx_port = opening.port()?;
        let rx_port = if split { opening.port()? } else { tx_port };
        let posted = vec![None; rx.len() as usize];
        let extras = vec![false; tx.len() as usize];
        Ok(Self {
            backend: opening.backend,
            config,
            tx,
            rx,
            tx_buffers,
            rx_buffers,
            tx_free: (0..config.tx_buffers).rev().collect(),
            extras,
            posted,
            rings: [
                Granted { gref: tx_ref, _page: tx_page },
                Granted { gref: rx_ref, _page: rx_page },
            ],
            tx_port,
            rx_port,
        })
    }

    /// Keys for the queue's directory.
    pub fn keys(&self) -> Vec<(&'static str, u32)> {
        let mut keys =
            vec![("tx-ring-ref", self.rings[0].gref.0), ("rx-ring-ref", self.rings[1].gref.0)];
        if self.rx_port == self.tx_port {
            keys.push(("event-channel", self.tx_port.0));
        } else {
            keys.push(("event-channel-tx", self.tx_port.0));
            keys.push(("event-channel-rx", self.rx_port.0));
        }
        keys
    }

    /// Closes the ports and takes back what the backend gave back. The rest goes to `held`.
    pub fn close<E: Env>(self, env: &mut E, held: &mut Vec<Granted>) {
        env.close(self.tx_port);
        if self.rx_port != self.tx_port {
            env.close(self.rx_port);
        }
        for granted in self.rings {
            give_back(env, granted, held);
        }
        for buffer in self.tx_buffers.into_iter().chain(self.rx_buffers) {
            if let Some(gref) = buffer.gref {
                give_back(env, Granted { gref, _page: buffer.page }, held);
            }
        }
    }

    pub fn owns(&self, port: EventPort) -> bool {
        port == self.tx_port || port == self.rx_port
    }

    pub fn in_flight(&self) -> (u32, u32) {
        (self.tx.in_flight(), self.rx.in_flight())
    }

    /// Shows new requests of both rings.
    pub fn publish<E: Env>(&mut self, env: &mut E, stats: &mut Stats) {
        if self.tx.publish() {
            stats.notifications += 1;
            env.notify(self.tx_port);
        }
        self.publish_rx(env, stats);
    }

    fn publish_rx<E: Env>(&mut self, env: &mut E, stats: &mut Stats) {
        if self.rx.publish() {
            stats.notifications += 1;
            env.notify(self.rx_port);
        }
    }

    /// Queues a packet.
    pub fn transmit<E: Env>(
        &mut self,
        env: &mut E,
        packet: &[u8],
        checksum: Checksum,
        cutting: Option<Cutting>,
        stats: &mut Stats,
    ) -> Result<(), Error> {
        let parts = packet.chunks(self.fragment(packet.len()));
        self.make_room(env, parts.len(), stats)?;
        let last = parts.len() - 1;
        let granted = self.grant_parts(env, parts.len())?;
        for (index, (part, (id, gref))) in parts.zip(granted).enumerate() {
            let buffer = &mut self.tx_buffers[usize::from(id)];
            buffer.page.write(0, part);
            let mut flags = if index == last { 0 } else { TXF_MORE_DATA };
            if index == 0 && checksum == Checksum::Blank {
                flags |= TXF_CSUM_BLANK;
            }
            if index == 0 && cutting.is_some() {
                flags |= TXF_EXTRA_INFO;
            }
            // The first slot's size is that of the whole packet.
            let size = short(if index == 0 { packet.len() } else { part.len() });
            self.tx.push(&TxRequest { gref, offset: 0, flags, id, size });
            if let Some(cutting) = cutting.filter(|_| index == 0) {
                self.push_extra(extra(cutting).as_bytes());
            }
        }
        stats.tx_packets += 1;
        stats.tx_bytes += packet.len() as u64;
        Ok(())
    }

    /// Bytes of a packet that go into one page; all of it where it would have too many parts.
    fn fragment(&self, len: usize) -> usize {
        let fragment = usize::from(self.config.fragment);
        if len.div_ceil(fragment) > MAX_TX_SLOTS { PAGE_SIZE } else { fragment }
    }

    fn push_extra(&mut self, extra: &[u8]) {
        let mut slot = [0; TX_SLOT];
        slot[..extra.len()].copy_from_slice(extra);
        let request = TxRequest::read_from_bytes(&slot).expect("a slot has the size of a request");
        let index = self.tx.push(&request);
        let slot = (index % self.tx.len()) as usize;
        self.extras[slot] = true;
    }

    /// Queues a message to the backend: a multicast group is to be delivered, or no longer.
    pub fn change_group<E: Env>(
        &mut self,
        env: &mut E,
        address: Mac,
        add: bool,
        stats: &mut Stats,
    ) -> Result<(), Error> {
        self.make_room(env, 1, stats)?;
        let (id, gref) = self.grant_part(env).ok_or(Error::Full)?;
        self.tx.push(&TxRequest { gref, offset: 0, flags: TXF_EXTRA_INFO, id, size: 0 });
        let kind = if add { EXTRA_MCAST_ADD } else { EXTRA_MCAST_DEL };
        self.push_extra(McastInfo { kind, flags: 0, address }.as_bytes());
        Ok(())
    }

    /// Takes buffers for the parts of a frame, all or none.
    fn grant_parts<E: Env>(
        &mut self,
        env: &mut E,
        count: usize,
    ) -> Result<[(u16, GrantRef); MAX_TX_SLOTS], Error> {
        let mut parts = [(0, GrantRef(0)); MAX_TX_SLOTS];
        for (done, part) in parts.iter_mut().take(count).enumerate() {
            match self.grant_part(env) {
                Some(granted) => *part = granted,
                None => {
                    for (id, _) in parts.into_iter().take(done) {
                        self.retire(env, id)?;
                    }
                    return Err(Error::Full);
                }
            }
        }
        Ok(parts)
    }

    fn grant_part<E: Env>(&mut self, env: &mut E) -> Option<(u16, GrantRef)> {
        let id = *self.tx_free.last()?;
        let buffer = &mut self.tx_buffers[usize::from(id)];
        let gref = grant_buffer(env, self.backend, buffer, Access::ReadOnly).ok()?;
        buffer.in_use = true;
        self.tx_free.pop();
        Some((id, gref))
    }

    /// Makes sure that a packet of so many parts finds buffers and slots, and a frame of the
    /// greatest length in any case.
    pub fn make_room<E: Env>(
        &mut self,
        env: &mut E,
        parts: usize,
        stats: &mut Stats,
    ) -> Result<(), Error> {
        let frame = super::MAX_FRAME.div_ceil(usize::from(self.config.fragment));
        let wanted = parts.max(frame);
        if self.has_room(wanted) {
            return Ok(());
        }
        // What was queued must be on its way before anybody waits for it.
        self.publish(env, stats);
        loop {
            self.collect(env, stats)?;
            if self.has_room(wanted) {
                return Ok(());
            }
            if !self.tx.arm() {
                return Err(Error::Full);
            }
        }
    }

    /// Buffers for so many parts, and slots for them and an extra info.
    fn has_room(&self, parts: usize) -> bool {
        self.tx_free.len() >= parts && self.tx.free() as usize > parts
    }

    /// Takes the backend's answers to what was sent.
    pub fn collect<E: Env>(&mut self, env: &mut E, stats: &mut Stats) -> Result<(), Error> {
        loop {
            let slot = (self.tx.next_response() % self.tx.len()) as usize;
            let taken = self.tx.take().map_err(|error| Error::Broken(Fault::Ring(error)))?;
            let Some(TxResponse { id, status }) = taken else { return Ok(()) };
            if core::mem::take(&mut self.extras[slot]) != (status == RSP_NULL) {
                return Err(Error::Broken(Fault::TxStatus(status)));
            }
            if status == RSP_NULL {
                continue;
            }
            if !self.tx_buffers.get(usize::from(id)).is_some_and(|buffer| buffer.in_use) {
                return Err(Error::Broken(Fault::TxId(id)));
            }
            if status != RSP_OKAY {
                stats.tx_errors += 1;
            }
            self.retire(env, id)?;
        }
    }

    /// Frees a transmit buffer.
    fn retire<E: Env>(&mut self, env: &mut E, id: u16) -> Result<(), Error> {
        let buffer = &mut self.tx_buffers[usize::from(id)];
        revoke_buffer(env, buffer, self.config.grants)?;
        buffer.in_use = false;
        self.tx_free.push(id);
        Ok(())
    }

    /// Copies the next packet to `out`.
    pub fn receive<E: Env>(
        &mut self,
        env: &mut E,
        out: &mut [u8],
        stats: &mut Stats,
    ) -> Result<Option<Received>, Error> {
        loop {
            match self.receive_packet(env, out, stats)? {
                Packet::Whole(received) => {
                    stats.rx_packets += 1;
                    stats.rx_bytes += received.len as u64;
                    return Ok(Some(received));
                }
                Packet::Failed => stats.rx_errors += 1,
                Packet::None => {
                    self.publish_rx(env, stats);
                    if !self.rx.arm() {
                        return Ok(None);
                    }
                }
            }
        }
    }

    fn receive_packet<E: Env>(
        &mut self,
        env: &mut E,
        out: &mut [u8],
        stats: &mut Stats,
    ) -> Result<Packet, Error> {
        let mut received: Option<Received> = None;
        let mut failed = false;
        loop {
            let index = self.rx.next_response();
            let Some(response) = self.next_response()? else {
                return match received {
                    None => Ok(Packet::None),
                    Some(_) => Err(Error::Broken(Fault::RxChain)),
                };
            };
            let first = received.is_none();
            let packet = match &mut received {
                Some(packet) => packet,
                none => none.insert(self.judge(&response)?),
            };
            let id = self.take_posted(env, index, response.id)?;
            match self.copy_part(id, &response, &mut out[packet.len..])? {
                Some(bytes) => packet.len += bytes,
                None => failed = true,
            }
            self.post(env, id);
            if response.flags & RXF_EXTRA_INFO != 0 {
                if !first {
                    return Err(Error::Broken(Fault::RxFlags(response.flags)));
                }
                packet.cutting = Some(self.take_extra(env)?);
            }
            if self.time_to_publish() {
                self.publish_rx(env, stats);
            }
            if response.flags & RXF_MORE_DATA == 0 {
                return Ok(if failed { Packet::Failed } else { Packet::Whole(*packet) });
            }
        }
    }

    fn next_response(&mut self) -> Result<Option<RxResponse>, Error> {
        self.rx.take().map_err(|error| Error::Broken(Fault::Ring(error)))
    }

    /// What the first answer says of the packet: only what we said that we take.
    fn judge(&self, response: &RxResponse) -> Result<Received, Error> {
        let blank = response.flags & RXF_CSUM_BLANK != 0;
        let long = response.flags & RXF_EXTRA_INFO != 0;
        if (blank && !self.config.takes_blank) || (long && !self.config.takes_long) {
            return Err(Error::Broken(Fault::RxFlags(response.flags)));
        }
        Ok(Received {
            len: 0,
            queue: 0,
            blank,
            validated: response.flags & RXF_DATA_VALIDATED != 0,
            cutting: None,
        })
    }

    /// The extra info in the next answer, which has taken a posted buffer.
    fn take_extra<E: Env>(&mut self, env: &mut E) -> Result<Cutting, Error> {
        let index = self.rx.next_response();
        let response = self.next_response()?.ok_or(Error::Broken(Fault::RxChain))?;
        let slot = (index % self.rx.len()) as usize;
        let posted = self.posted[slot].ok_or(Error::Broken(Fault::RxChain))?;
        let id = self.take_posted(env, index, posted)?;
        self.post(env, id);
        let extra: ExtraInfo = zerocopy::transmute!(response);
        let ipv6 = match (extra.kind, extra.flags, extra.gso_type) {
            (EXTRA_GSO, 0, GSO_TCPV4) => false,
            (EXTRA_GSO, 0, GSO_TCPV6) => true,
            _ => return Err(Error::Broken(Fault::RxExtra(extra.kind))),
        };
        if extra.gso_size == 0 {
            return Err(Error::Broken(Fault::RxExtra(extra.kind)));
        }
        Ok(Cutting { ipv6, mss: extra.gso_size })
    }

    /// Bytes copied; `None` when the backend reports an error.
    fn copy_part(
        &self,
        id: u16,
        response: &RxResponse,
        out: &mut [u8],
    ) -> Result<Option<usize>, Error> {
        let Ok(len) = u16::try_from(response.status) else { return Ok(None) };
        let (offset, bytes) = (usize::from(response.offset), usize::from(len));
        if offset + bytes > PAGE_SIZE {
            return Err(Error::Broken(Fault::RxExtent { offset: response.offset, len }));
        }
        let out = out.get_mut(..bytes).ok_or(Error::Broken(Fault::RxChain))?;
        self.rx_buffers[usize::from(id)].page.read(offset, out);
        Ok(Some(bytes))
    }

    /// The buffer that was posted in a slot, ours again.
    fn take_posted<E: Env>(&mut self, env: &mut E, index: u32, found: u16) -> Result<u16, Error> {
        let slot = (index % self.rx.len()) as usize;
        let expected = self.posted[slot].take();
        // `take` of the ring returns only answers to requests that were made.
        let expected = expected.ok_or(Error::Broken(Fault::TxId(found)))?;
        if expected != found {
            return Err(Error::Broken(Fault::RxId { expected, found }));
        }
        let buffer = &mut self.rx_buffers[usize::from(expected)];
        revoke_buffer(env, buffer, self.config.grants)?;
        buffer.in_use = false;
        Ok(expected)
    }

    /// Whether another quarter of the buffers was taken and posted again.
    fn time_to_publish(&self) -> bool {
        self.rx.next_response().is_multiple_of(u32::from(self.config.rx_buffers).div_ceil(4))
    }

    fn post_all<E: Env>(&mut self, env: &mut E) -> Result<(), Errno> {
        for id in 0..self.config.rx_buffers {
            self.post(env, id);
        }
        if self.rx.in_flight() == 0 { Err(Errno::ENOSPC) } else { Ok(()) }
    }

    /// Posts a receive buffer. One that cannot be granted stays out of use.
    fn post<E: Env>(&mut self, env: &mut E, id: u16) {
        let buffer = &mut self.rx_buffers[usize::from(id)];
        let Ok(gref) = grant_buffer(env, self.backend, buffer, Access::ReadWrite) else { return };
        buffer.in_use = true;
        let index = self.rx.push(&RxRequest { id, pad: 0, gref });
        let slot = (index % self.rx.len()) as usize;
        self.posted[slot] = Some(id);
    }
}

enum Packet {
    Whole(Received),
    Failed,
    None,
}

fn grant_buffer<E: Env>(
    env: &mut E,
    backend: DomainId,
    buffer: &mut Buffer,
    access: Access,
) -> Result<GrantRef, Errno> {
    if let Some(gref) = buffer.gref {
        return Ok(gref);
    }
    let gref = env.grant(backend, &buffer.page, access)?;
    buffer.gref = Some(gref);
    Ok(gref)
}

fn revoke_buffer<E: Env>(
    env: &mut E,
    buffer: &mut Buffer,
    policy: GrantPolicy,
) -> Result<(), Error> {
    if policy == GrantPolicy::PerRequest
        && let Some(gref) = buffer.gref
    {
        env.revoke(gref).map_err(|_| Error::Broken(Fault::StillGranted(gref)))?;
        buffer.gref = None;
    }
    Ok(())
}

fn give_back<E: Env>(env: &mut E, granted: Granted, held: &mut Vec<Granted>) {
    if env.revoke(granted.gref).is_err() {
        held.push(granted);
    }
}

fn extra(cutting: Cutting) -> ExtraInfo {
    ExtraInfo {
        kind: EXTRA_GSO,
        flags: 0,
        gso_size: cutting.mss,
        gso_type: if cutting.ipv6 { GSO_TCPV6 } else { GSO_TCPV4 },
        pad: 0,
        gso_features: 0,
    }
}

#[expect(clippy::cast_possible_truncation, reason = "a packet has less than 64 KiB")]
fn short(len: usize) -> u16 {
    len as u16
}
