//! The event loop, and what the guest knows.

use crate::disk::GuestDisk;
use alloc::string::String;
use core::cell::RefCell;
use demo_guest::config::Config;
use demo_guest::connection::Facts;
use demo_guest::page::{DiskStatus, Status};
use demo_guest::pauses::Pauses;
use demo_guest::server::{RECEIVE_BUFFER, SEND_BUFFER};
use demo_guest::shelf::Shelf;
use demo_guest::stack::Stack;
use frontends::netfront::{self, Netfront, Phy, Stats};
use unikernel::{Domain, XenstoreRing, heap, log, println};
use xenbus::device::{self, DeviceKind};
use xenbus::{Client, DomainId, Store, XenbusState};

/// Pages for frames: what several full TCP windows need in each direction.
const FRAMES: netfront::Config = netfront::Config {
    tx_buffers: 128,
    rx_buffers: 256,
    fragment: 4096,
    grants: netfront::GrantPolicy::Keep,
    split_events: true,
    queues: 1,
    // smoltcp checks the sums of all that it gets, and wants frames.
    takes_blank: false,
    takes_long: false,
    filter: false,
};
/// How often unanswered requests are looked at. Nothing else wakes us for an answer, and a pause
/// shall not look longer than it was.
const LOOK_NS: u64 = 1_000_000;
/// Rounds between the network and the disk before events are looked at.
const ROUNDS: usize = 16;
/// A broken connection to the backend is made again after this time.
const RECONNECT_NS: u64 = 1_000_000_000;

unikernel::main!(run);

fn run(domain: Domain) {
    let mut config = Config::parse(domain.config_text())
        .unwrap_or_else(|error| panic!("configuration: {error}"));
    let affordable = heap::usage().1 / 2 / (SEND_BUFFER + RECEIVE_BUFFER);
    config.connections =
        config.connections.min(u16::try_from(affordable).unwrap_or(u16::MAX)).max(1);
    let store = Client::new(domain.xenstore().expect("a connection to the store"));
    Guest::new(domain, store, &config).run()
}

struct Guest {
    domain: Domain,
    store: Client<XenstoreRing>,
    front: Netfront,
    backend: DomainId,
    disk: Option<GuestDisk>,
    stack: Stack,
    pauses: Pauses,
    started_ns: u64,
    connected: bool,
    connects: u64,
    reconnect_ns: u64,
    address: String,
    /// Whether these were reported: the first answer from the network, the first one to a client.
    told_frame: bool,
    told_answer: bool,
}

impl Guest {
    fn new(domain: Domain, mut store: Client<XenstoreRing>, config: &Config) -> Self {
        let started_ns = domain.now_ns();
        let mut front = Netfront::new(&mut store, domain.id(), 0, FRAMES)
            .unwrap_or_else(|errno| panic!("no network interface: {errno:?}"));
        let backend = device::find_backend(&mut store, domain.id(), DeviceKind::Vif, 0)
            .map_or(DomainId::INVALID, |device| device.backend);
        let disk = GuestDisk::find(&domain, &mut store);
        let seed = domain.tsc() ^ domain.unix_time_ns().unwrap_or(0).rotate_left(32);
        let mac = front.mac();
        let mut env = domain.clone();
        let mut device = Phy { front: &mut front, env: &mut env };
        let stack = Stack::new(config, &mut device, mac, seed, started_ns);
        Self {
            domain,
            store,
            front,
            backend,
            disk,
            stack,
            pauses: Pauses::default(),
            started_ns,
            connected: false,
            connects: 0,
            reconnect_ns: 0,
            address: String::new(),
            told_frame: false,
            told_answer: false,
        }
    }

    fn run(mut self) -> ! {
        loop {
            self.follow_backend();
            let next_ns = self.exchange();
            for port in self.domain.wait(next_ns) {
                self.front.event(port);
            }
        }
    }

    /// Connects, and connects again.
    fn follow_backend(&mut self) {
        let mut env = self.domain.clone();
        while let Some(event) = self.store.next_event() {
            if let Some(disk) = &mut self.disk
                && disk.store_event(&mut self.store, &event)
            {
                continue;
            }
            if let Err(errno) = self.front.store_event(&mut env, &mut self.store, &event) {
                log::error!("vif 0: {errno:?}");
            }
        }
        if let Some(disk) = &mut self.disk {
            disk.follow_backend(&mut self.store, RECONNECT_NS);
        }
        let connected = self.front.is_connected();
        if connected && !self.connected {
            self.connects += 1;
            log::info!("vif 0 is connected");
        }
        self.connected = connected;
        let now_ns = self.domain.now_ns();
        let lost = self.front.fault().is_some() || self.front.state() == XenbusState::CLOSED;
        if lost && now_ns >= self.reconnect_ns {
            self.reconnect_ns = now_ns + RECONNECT_NS;
            self.reconnect();
        }
    }

    fn reconnect(&mut self) {
        let mut env = self.domain.clone();
        if let Some(fault) = self.front.fault() {
            log::error!("vif 0: {fault}");
        }
        let closed = self.front.close(&mut env, &mut self.store);
        let reopened = closed.and_then(|()| self.front.reopen(&mut env, &mut self.store));
        if let Err(errno) = reopened {
            log::error!("vif 0: {errno:?}");
        }
    }

    /// Moves frames and files; returns the time at which to do so again even if nothing happens.
    fn exchange(&mut self) -> Option<u64> {
        let mut next_ns = self.exchange_once();
        for round in 1..=ROUNDS {
            let news = self.disk.as_mut().is_some_and(GuestDisk::poll);
            if !news {
                break;
            }
            // What is left after so many rounds is done when events were looked at.
            next_ns = if round == ROUNDS { Some(0) } else { self.exchange_once() };
        }
        self.tell_address();
        self.tell_first();
        let now_ns = self.domain.now_ns();
        let look_ns = self.look_for_pauses();
        let disk_waits = self.disk.as_mut().is_some_and(GuestDisk::is_waiting);
        let look_disk_ns = disk_waits.then_some(now_ns + LOOK_NS);
        let down = !self.connected || self.disk.as_mut().is_some_and(GuestDisk::is_down);
        let reconnect_ns = down.then_some(now_ns + RECONNECT_NS);
        [next_ns, look_ns, look_disk_ns, reconnect_ns].into_iter().flatten().min()
    }

    fn exchange_once(&mut self) -> Option<u64> {
        let now_ns = self.domain.now_ns();
        let started_ns = self.started_ns;
        let disk_status = self.disk.as_mut().map(|disk| disk.status(started_ns, state_name));
        let facts = Snapshot {
            domain: &self.domain,
            started_ns,
            uptime_ns: now_ns - started_ns,
            mac: self.front.mac(),
            backend_state: self.front.backend_state(),
            backend_domid: self.backend.0,
            stats: self.front.stats(),
            pauses: self.pauses,
            connects: self.connects,
            disk_status,
            shelf: self.disk.as_ref().and_then(GuestDisk::shelf),
        };
        let mut env = self.domain.clone();
        let mut device = Phy { front: &mut self.front, env: &mut env };
        let next_ns = self.stack.poll(&mut device, now_ns, &facts);
        // An error is kept by the frontend, see `follow_backend`.
        let _ = self.front.flush(&mut env);
        next_ns
    }

    fn tell_address(&mut self) {
        let address = self.stack.address();
        if address != self.address {
            log::info!("address {address} ({})", self.stack.addressing());
            self.address = address;
        }
    }

    /// Reports when the network first answered us, and when we first answered a client.
    fn tell_first(&mut self) {
        if !self.told_frame && self.front.stats().rx_packets > 0 {
            self.told_frame = true;
            println!("bench: first_packet_answered {} ns", self.domain.now_ns());
        }
        if !self.told_answer && self.stack.requests() > 0 {
            self.told_answer = true;
            println!("bench: first_http_answer {} ns", self.domain.now_ns());
        }
    }

    fn look_for_pauses(&mut self) -> Option<u64> {
        let (waiting, _) = self.front.in_flight();
        let answered = self.front.stats().tx_packets.wrapping_sub(u64::from(waiting));
        let now_ns = self.domain.now_ns();
        if let Some(gap_ns) = self.pauses.observe(now_ns, answered, waiting != 0) {
            log::info!("the backend paused for {} us", gap_ns / 1000);
        }
        (waiting != 0).then_some(now_ns + LOOK_NS)
    }
}

/// What the page shows, but for what the stack itself knows.
struct Snapshot<'a> {
    domain: &'a Domain,
    started_ns: u64,
    uptime_ns: u64,
    mac: [u8; 6],
    backend_state: XenbusState,
    backend_domid: u16,
    stats: Stats,
    pauses: Pauses,
    connects: u64,
    disk_status: Option<DiskStatus>,
    shelf: Option<&'a RefCell<Shelf>>,
}

impl Facts for Snapshot<'_> {
    fn status(&self) -> Status {
        let (used, bytes) = heap::usage();
        Status {
            name: self.domain.name().into(),
            domid: self.domain.id().0,
            incarnation: self.domain.incarnation(),
            uptime_ms: self.uptime_ns / 1_000_000,
            memory_bytes: bytes as u64,
            memory_used_bytes: used as u64,
            mac: self.mac,
            backend_domid: self.backend_domid,
            backend_state: state_name(self.backend_state),
            rx_frames: self.stats.rx_packets,
            rx_bytes: self.stats.rx_bytes,
            tx_frames: self.stats.tx_packets,
            tx_bytes: self.stats.tx_bytes,
            pauses: self.pauses.count,
            last_pause_us: self.pauses.last_ns / 1000,
            last_pause_at_ms: self.pauses.last_end_ns.saturating_sub(self.started_ns) / 1_000_000,
            longest_pause_us: self.pauses.longest_ns / 1000,
            connects: self.connects,
            disk: self.disk_status.clone(),
            ..Status::default()
        }
    }

    fn shelf(&self) -> Option<&RefCell<Shelf>> {
        self.shelf
    }
}

fn state_name(state: XenbusState) -> &'static str {
    match state {
        XenbusState::INITIALISING => "initialising",
        XenbusState::INIT_WAIT => "init-wait",
        XenbusState::INITIALISED => "initialised",
        XenbusState::CONNECTED => "connected",
        XenbusState::CLOSING => "closing",
        XenbusState::CLOSED => "closed",
        _ => "unknown",
    }
}
