//! Network frontend.
//!
//! Buffers are pages of our own. Under [`GrantPolicy::Keep`] each is granted to the backend once
//! for the life of the connection, and frames are copied in and out: no grant table work and no
//! hypercall per frame, and what the backend can reach never changes. [`GrantPolicy::PerRequest`]
//! grants a page for one request only, as Linux does.
//!
//! What the backend answers is checked as strictly as by Linux 6.1's netfront, and where Linux
//! is lenient (receive ids), more strictly: the first impossible answer ends the connection with a
//! [`Fault`] that names it. So a backend that, after a restart, answers twice, loses its place or
//! still holds a page, is found out.
//!
//! Life of a device, `state` of our end in brackets:
//!
//! ```text
//!  [1] ──backend 2──▶ rings, keys ──▶ [4] ──backend 5 or 6, or close()──▶ [6] ──reopen()──▶ [1]
//! ```
//!
//! Sources: `xen/include/public/io/netif.h`, xen-abi §6.4, 6.5, 7.3.

mod channel;
#[cfg(feature = "smoltcp")]
mod phy;

#[cfg(feature = "smoltcp")]
pub use phy::{Phy, RxFrame, TxSlot};

use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use channel::Channel;
use core::fmt;
use domain_api::{DomainId, Errno, EventPort, Events, GrantRef, Granter};
use shmem::PeerError;
use xenbus::device::{self, Device, DeviceKind};
use xenbus::{Event, Nodes, Store, XenbusState};

/// What netfront needs of the core.
pub trait Env: Events + Granter {}
impl<T: Events + Granter> Env for T {}

/// Longest frame that is sent: 14 bytes of header, 4 of VLAN tag, 1500 of payload.
pub const MAX_FRAME: usize = domain_api::nic::MAX_FRAME;
/// Longest packet that is sent or received.
pub const MAX_PACKET: usize = domain_api::nic::MAX_PACKET;
/// Most queues.
const MAX_QUEUES: u16 = 8;
const TOKEN: &str = "netfront/";

/// An Ethernet address.
pub type Mac = [u8; 6];

/// How pages are granted to the backend.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GrantPolicy {
    /// Once, for as long as the device is connected.
    Keep,
    /// For one request each; a page that the backend still holds when it answers is a [`Fault`].
    PerRequest,
}

/// Whether the layer-4 checksum of a frame is in it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Checksum {
    /// It is.
    Complete,
    /// The field holds the sum of the pseudo-header only; the backend finishes it.
    Blank,
}

/// How a TCP packet that is longer than a frame is to be cut.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cutting {
    /// It is over IPv6, else over IPv4.
    pub ipv6: bool,
    /// Bytes of payload of all frames but the last.
    pub mss: u16,
}

/// What is known of a received packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Received {
    /// Its bytes.
    pub len: usize,
    /// The queue it came by.
    pub queue: usize,
    /// Its checksum is blank: it was never on a wire.
    pub blank: bool,
    /// Its checksum was found right, or does not matter.
    pub validated: bool,
    /// How it would be cut into frames, if it is longer than one.
    pub cutting: Option<Cutting>,
}

/// Sizes and policies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Config {
    /// Pages for frames to send, 1 to 256.
    pub tx_buffers: u16,
    /// Pages for frames to receive, 1 to 256.
    pub rx_buffers: u16,
    /// Bytes of a frame that go into one page, 1 to 4096; a frame that has more is sent in parts,
    /// of which there are at most 18.
    pub fragment: u16,
    /// How pages are granted.
    pub grants: GrantPolicy,
    /// Whether there are two event channels where the backend can have it so.
    pub split_events: bool,
    /// Queues, 1 to 8, where the backend can have so many. Each has so many buffers.
    pub queues: u16,
    /// Whether packets with a blank checksum are taken.
    pub takes_blank: bool,
    /// Whether packets longer than a frame are taken; they have blank checksums.
    pub takes_long: bool,
    /// Whether only those multicast groups are to come that [`Netfront::change_group`] names.
    pub filter: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            tx_buffers: 64,
            rx_buffers: 128,
            fragment: 4096,
            grants: GrantPolicy::Keep,
            split_events: true,
            queues: 1,
            takes_blank: false,
            takes_long: false,
            filter: false,
        }
    }
}

/// What no correct backend does. The connection is of no use afterwards.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// `rsp_prod` of a ring is impossible.
    Ring(PeerError),
    /// An answer to a request that was never made, or was answered already.
    TxId(u16),
    /// An answer with this status to another kind of slot: an extra info's to a request, or the
    /// other way round.
    TxStatus(i16),
    /// A receive answer with another id than the request in its slot has.
    RxId {
        /// The id of the request.
        expected: u16,
        /// The id in the answer.
        found: u16,
    },
    /// A receive answer whose data leave the page.
    RxExtent {
        /// Where they would start.
        offset: u16,
        /// Their bytes.
        len: u16,
    },
    /// A packet whose parts were not published together, or are longer than a packet can be.
    RxChain,
    /// A kind of answer that we did not ask for.
    RxFlags(u16),
    /// An extra info of this kind that makes no sense.
    RxExtra(u8),
    /// A page that the backend still held when it answered.
    StillGranted(GrantRef),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ring(error) => write!(f, "{error}"),
            Self::TxId(id) => write!(f, "transmit answer for inactive request {id}"),
            Self::TxStatus(status) => write!(f, "transmit answer with status {status}"),
            Self::RxId { expected, found } => {
                write!(f, "receive answer {found} in the place of {expected}")
            }
            Self::RxExtent { offset, len } => {
                write!(f, "receive answer of {len} bytes at offset {offset}")
            }
            Self::RxChain => write!(f, "received packet is cut"),
            Self::RxFlags(flags) => write!(f, "receive answer with flags {flags:#x}"),
            Self::RxExtra(kind) => write!(f, "received extra info of kind {kind}"),
            Self::StillGranted(gref) => write!(f, "grant {} still in use", gref.0),
        }
    }
}

/// Why a frame was not sent or received.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Error {
    /// There is no connection, or not any more.
    NotConnected,
    /// All buffers are in use; an event follows when there is one again.
    Full,
    /// The frame is too long, or shorter than a header.
    BadLength,
    /// The backend broke the protocol.
    Broken(Fault),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotConnected => write!(f, "not connected"),
            Self::Full => write!(f, "all transmit buffers are in use"),
            Self::BadLength => write!(f, "no length of a frame"),
            Self::Broken(fault) => write!(f, "{fault}"),
        }
    }
}

impl core::error::Error for Error {}

/// Counters.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Stats {
    /// Frames handed to the backend.
    pub tx_packets: u64,
    /// Their bytes.
    pub tx_bytes: u64,
    /// Slots that the backend answered with an error.
    pub tx_errors: u64,
    /// Frames received.
    pub rx_packets: u64,
    /// Their bytes.
    pub rx_bytes: u64,
    /// Receive answers that carried an error.
    pub rx_errors: u64,
    /// Events that we sent.
    pub notifications: u64,
}

/// A network interface.
pub struct Netfront {
    device: Device,
    mac: Mac,
    config: Config,
    state: XenbusState,
    backend_state: XenbusState,
    /// One for each queue, while connected.
    channels: Vec<Channel>,
    /// The channel to be looked at first for received packets.
    turn: usize,
    /// Of earlier connections: pages that the backend still held when they ended.
    held: Vec<channel::Granted>,
    received: Vec<u8>,
    #[cfg(feature = "smoltcp")]
    received_len: usize,
    fault: Option<Fault>,
    stats: Stats,
}

impl Netfront {
    /// Finds interface `index` of the domain `own` in the store, and watches its backend.
    /// The connection is made by [`Self::store_event`] or [`Self::refresh`], when the backend
    /// is ready.
    ///
    /// # Errors
    /// `ENOENT` when there is no such interface, `EINVAL` when its keys make no sense or `config`
    /// is out of bounds, and the store's.
    pub fn new<S: Store>(
        store: &mut S,
        own: DomainId,
        index: u32,
        config: Config,
    ) -> Result<Self, Errno> {
        let sizes = [config.tx_buffers, config.rx_buffers];
        if sizes.iter().any(|&size| size == 0 || size > 256)
            || usize::from(config.fragment) * xen_abi::netif::MAX_TX_SLOTS < MAX_FRAME
            || usize::from(config.fragment) > xen_abi::PAGE_SIZE
            || usize::from(config.tx_buffers) < MAX_FRAME.div_ceil(usize::from(config.fragment))
            || !(1..=MAX_QUEUES).contains(&config.queues)
        {
            return Err(Errno::EINVAL);
        }
        let device = device::find_backend(store, own, DeviceKind::Vif, index)?;
        let directory = device.frontend_path();
        let mac = store.read_string(&format!("{directory}/mac"))?;
        let mac = parse_mac(&mac).ok_or(Errno::EINVAL)?;
        let state = device::state(store, &directory)?;
        let mut front = Self {
            device,
            mac,
            config,
            state,
            backend_state: XenbusState::UNKNOWN,
            channels: Vec::new(),
            turn: 0,
            held: Vec::new(),
            received: vec![0; MAX_PACKET],
            #[cfg(feature = "smoltcp")]
            received_len: 0,
            fault: None,
            stats: Stats::default(),
        };
        // A state left by an earlier life of this domain, which nobody reset.
        if state != XenbusState::INITIALISING {
            front.switch(store, XenbusState::INITIALISING)?;
        }
        store.watch(&front.backend_node("state"), &front.token())?;
        Ok(front)
    }

    /// Our Ethernet address.
    #[must_use]
    pub const fn mac(&self) -> Mac {
        self.mac
    }

    /// Whether frames can be sent and received.
    #[must_use]
    pub const fn is_connected(&self) -> bool {
        !self.channels.is_empty() && self.fault.is_none()
    }

    /// `state` of our end.
    #[must_use]
    pub const fn state(&self) -> XenbusState {
        self.state
    }

    /// `state` of the backend's end, as last seen.
    #[must_use]
    pub const fn backend_state(&self) -> XenbusState {
        self.backend_state
    }

    /// What the backend did wrong, if it did.
    #[must_use]
    pub const fn fault(&self) -> Option<Fault> {
        self.fault
    }

    /// The counters.
    #[must_use]
    pub const fn stats(&self) -> Stats {
        self.stats
    }

    /// Requests that the backend has not answered: sent frames' parts, posted buffers.
    #[must_use]
    pub fn in_flight(&self) -> (u32, u32) {
        let all = self.channels.iter().map(Channel::in_flight);
        all.fold((0, 0), |(tx, rx), (more_tx, more_rx)| (tx + more_tx, rx + more_rx))
    }

    /// Takes an event of the store. False: it belongs to somebody else.
    ///
    /// # Errors
    /// See [`Self::refresh`].
    pub fn store_event<E: Env, S: Store>(
        &mut self,
        env: &mut E,
        store: &mut S,
        event: &Event,
    ) -> Result<bool, Errno> {
        if event.token != self.token() {
            return Ok(false);
        }
        self.refresh(env, store)?;
        Ok(true)
    }

    /// Looks at the backend's state and acts on it.
    ///
    /// # Errors
    /// The store's; `ENOSPC` when there are no ports or grants for a connection.
    pub fn refresh<E: Env, S: Store>(&mut self, env: &mut E, store: &mut S) -> Result<(), Errno> {
        self.backend_state = device::state(store, &self.device.backend_path())?;
        let initialising = self.state == XenbusState::INITIALISING;
        match self.backend_state {
            XenbusState::INIT_WAIT if initialising => self.connect(env, store),
            XenbusState::CLOSING | XenbusState::CLOSED
                if !initialising && self.state != XenbusState::CLOSED =>
            {
                self.disconnect(env);
                self.switch(store, XenbusState::CLOSED)
            }
            _ => Ok(()),
        }
    }

    /// Ends the connection in good order.
    ///
    /// # Errors
    /// The store's.
    pub fn close<E: Env, S: Store>(&mut self, env: &mut E, store: &mut S) -> Result<(), Errno> {
        if self.state == XenbusState::CLOSED {
            return Ok(());
        }
        self.switch(store, XenbusState::CLOSING)?;
        self.disconnect(env);
        self.refresh(env, store)
    }

    /// Asks for a new connection after the last one was closed.
    ///
    /// # Errors
    /// The store's.
    pub fn reopen<E: Env, S: Store>(&mut self, env: &mut E, store: &mut S) -> Result<(), Errno> {
        self.disconnect(env);
        self.fault = None;
        self.switch(store, XenbusState::INITIALISING)?;
        self.refresh(env, store)
    }

    /// Takes an event channel's event. False: the port is not ours. Then receive until there is
    /// nothing left.
    pub fn event(&mut self, port: EventPort) -> bool {
        self.channels.iter().any(|channel| channel.owns(port))
    }

    /// Queues a frame; [`Self::flush`] tells the backend.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn transmit<E: Env>(
        &mut self,
        env: &mut E,
        frame: &[u8],
        checksum: Checksum,
    ) -> Result<(), Error> {
        if !(14..=MAX_FRAME).contains(&frame.len()) {
            return Err(Error::BadLength);
        }
        self.transmit_packet(env, 0, frame, checksum, None)
    }

    /// How many queues there are while connected.
    #[must_use]
    pub fn queues(&self) -> usize {
        self.channels.len()
    }

    /// Queues a packet of up to [`MAX_PACKET`] bytes in one of the queues; longer than a frame only
    /// with the wish that it be cut, which is for a backend that offers that.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn transmit_packet<E: Env>(
        &mut self,
        env: &mut E,
        queue: usize,
        packet: &[u8],
        checksum: Checksum,
        cutting: Option<Cutting>,
    ) -> Result<(), Error> {
        let most = if cutting.is_some() { MAX_PACKET } else { MAX_FRAME };
        let parts = packet.len().div_ceil(xen_abi::PAGE_SIZE);
        if !(14..=most).contains(&packet.len()) || parts > usize::from(self.config.tx_buffers) {
            return Err(Error::BadLength);
        }
        let channel = live(&mut self.channels, self.fault, queue)?;
        let done = channel.transmit(env, packet, checksum, cutting, &mut self.stats);
        self.check(done)
    }

    /// Names a multicast group that is to be delivered, or no longer.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn change_group<E: Env>(
        &mut self,
        env: &mut E,
        group: Mac,
        add: bool,
    ) -> Result<(), Error> {
        let channel = live(&mut self.channels, self.fault, 0)?;
        let done = channel.change_group(env, group, add, &mut self.stats);
        self.check(done)
    }

    /// Whether a frame can be queued now. If not, an event follows when it can.
    pub fn can_transmit<E: Env>(&mut self, env: &mut E) -> bool {
        let Ok(channel) = live(&mut self.channels, self.fault, 0) else { return false };
        let done = channel.make_room(env, 1, &mut self.stats);
        self.check(done).is_ok()
    }

    /// Hands the next received frame to `work`. `None` when there is none; then an event follows
    /// when there is one.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn receive<E: Env, R>(
        &mut self,
        env: &mut E,
        work: impl FnOnce(&[u8]) -> R,
    ) -> Result<Option<R>, Error> {
        self.receive_packet(env, |packet, _| work(packet))
    }

    /// As [`Self::receive`], with what is known of the packet.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn receive_packet<E: Env, R>(
        &mut self,
        env: &mut E,
        work: impl FnOnce(&[u8], Received) -> R,
    ) -> Result<Option<R>, Error> {
        let received = self.receive_frame(env)?;
        Ok(received.map(|it| work(&self.received[..it.len], it)))
    }

    /// Shows the backend what was queued and posted, and takes its answers. To be called after
    /// each burst of frames, before the domain sleeps.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn flush<E: Env>(&mut self, env: &mut E) -> Result<(), Error> {
        live(&mut self.channels, self.fault, 0)?;
        let mut done = Ok(());
        for channel in &mut self.channels {
            channel.publish(env, &mut self.stats);
            done = done.and(channel.collect(env, &mut self.stats));
        }
        self.check(done)
    }

    fn receive_frame<E: Env>(&mut self, env: &mut E) -> Result<Option<Received>, Error> {
        let count = self.channels.len().max(1);
        for step in 0..count {
            let queue = (self.turn + step) % count;
            let channel = live(&mut self.channels, self.fault, queue)?;
            let done = channel.receive(env, &mut self.received, &mut self.stats);
            if let Some(received) = self.check(done)? {
                self.turn = queue;
                return Ok(Some(Received { queue, ..received }));
            }
        }
        Ok(None)
    }

    /// Keeps the first fault.
    fn check<R>(&mut self, done: Result<R, Error>) -> Result<R, Error> {
        if let Err(Error::Broken(fault)) = done
            && self.fault.is_none()
        {
            log::error!("{}: {fault}", self.device.frontend_path());
            self.fault = Some(fault);
        }
        done
    }

    fn connect<E: Env, S: Store>(&mut self, env: &mut E, store: &mut S) -> Result<(), Errno> {
        self.release_held(env);
        let backend = self.device.backend_path();
        if !device::has_feature(store, &backend, "feature-rx-copy")? {
            return Err(Errno::ENODEV);
        }
        let split = self.config.split_events
            && device::has_feature(store, &backend, "feature-split-event-channels")?;
        let most = device::read_or(store, &backend, "multi-queue-max-queues", 1_u16).unwrap_or(1);
        let count = self.config.queues.min(most.max(1));
        let opened = self.open_channels(env, count, split);
        let directory = self.device.frontend_path();
        let written = opened.and_then(|()| {
            let (channels, config) = (&self.channels, self.config);
            store.transaction(|nodes| write_keys(nodes, &directory, channels, config))
        });
        if let Err(errno) = written {
            self.disconnect(env);
            return Err(errno);
        }
        for channel in &mut self.channels {
            channel.publish(env, &mut self.stats);
        }
        self.fault = None;
        self.switch(store, XenbusState::CONNECTED)
    }

    fn open_channels<E: Env>(&mut self, env: &mut E, count: u16, split: bool) -> Result<(), Errno> {
        for _ in 0..count {
            let backend = self.device.backend;
            let channel = Channel::open(env, backend, self.config, split, &mut self.held)?;
            self.channels.push(channel);
        }
        Ok(())
    }

    fn disconnect<E: Env>(&mut self, env: &mut E) {
        for channel in self.channels.drain(..) {
            channel.close(env, &mut self.held);
        }
        self.release_held(env);
    }

    fn release_held<E: Env>(&mut self, env: &mut E) {
        self.held.retain(|granted| env.revoke(granted.gref) == Err(Errno::EBUSY));
    }

    fn switch<S: Store>(&mut self, store: &mut S, state: XenbusState) -> Result<(), Errno> {
        self.state = state;
        device::switch_state(store, &self.device.frontend_path(), state)
    }

    fn backend_node(&self, key: &str) -> String {
        format!("{}/{key}", self.device.backend_path())
    }

    fn token(&self) -> String {
        format!("{TOKEN}{}", self.device.index)
    }
}

fn live(
    channels: &mut [Channel],
    fault: Option<Fault>,
    queue: usize,
) -> Result<&mut Channel, Error> {
    match (channels.get_mut(queue), fault) {
        (_, Some(fault)) => Err(Error::Broken(fault)),
        (Some(channel), None) => Ok(channel),
        (None, None) => Err(Error::NotConnected),
    }
}

fn write_keys(
    nodes: &mut dyn Nodes,
    directory: &str,
    channels: &[Channel],
    config: Config,
) -> Result<(), Errno> {
    for (number, channel) in channels.iter().enumerate() {
        // One queue has its keys where they were before there could be several.
        let queue = if channels.len() == 1 {
            directory.into()
        } else {
            format!("{directory}/queue-{number}")
        };
        for old in ["event-channel", "event-channel-tx", "event-channel-rx"] {
            if nodes.read_optional(&format!("{queue}/{old}"))?.is_some() {
                nodes.rm(&format!("{queue}/{old}"))?;
            }
        }
        for (key, value) in channel.keys() {
            device::write(nodes, &queue, key, value)?;
        }
    }
    let flags = [
        ("request-rx-copy", true),
        ("feature-rx-notify", true),
        ("feature-sg", true),
        ("feature-no-csum-offload", !config.takes_blank),
        ("feature-ipv6-csum-offload", config.takes_blank),
        ("feature-gso-tcpv4", config.takes_long),
        ("feature-gso-tcpv6", config.takes_long),
        ("request-multicast-control", config.filter),
    ];
    for (key, is_set) in flags {
        device::write(nodes, directory, key, u32::from(is_set))?;
    }
    device::write(nodes, directory, "multi-queue-num-queues", channels.len())
}

fn parse_mac(text: &str) -> Option<Mac> {
    let mut mac = [0; 6];
    let mut bytes = text.split(':');
    for byte in &mut mac {
        *byte = u8::from_str_radix(bytes.next()?, 16).ok()?;
    }
    bytes.next().is_none().then_some(mac)
}
