//! Clients and the server on one wire in memory.

use super::*;
use crate::connection::tests::Fixed;
use crate::generator;
use smoltcp::phy::{Checksum, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;

const SERVER: Ipv4Address = Ipv4Address::new(10, 0, 2, 15);
const QUEUE: usize = 64;

type Queue = Rc<RefCell<VecDeque<Vec<u8>>>>;

/// One end of a wire that drops what does not fit, and every `lose`th frame.
struct End {
    incoming: Queue,
    outgoing: Queue,
    lose: usize,
    sent: usize,
}

struct Incoming(Vec<u8>);
struct Outgoing<'a>(&'a mut End);

impl RxToken for Incoming {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Outgoing<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        self.0.sent += 1;
        if self.0.lose == 0 || !self.0.sent.is_multiple_of(self.0.lose) {
            self.0.outgoing.borrow_mut().push_back(frame);
        }
        result
    }
}

impl Device for End {
    type RxToken<'a> = Incoming;
    type TxToken<'a> = Outgoing<'a>;

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1514;
        capabilities.checksum.tcp = Checksum::Both;
        capabilities
    }

    fn receive(&mut self, _: Instant) -> Option<(Incoming, Outgoing<'_>)> {
        let frame = self.incoming.borrow_mut().pop_front()?;
        Some((Incoming(frame), Outgoing(self)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Outgoing<'_>> {
        let room = self.outgoing.borrow().len() < QUEUE;
        room.then_some(Outgoing(self))
    }
}

fn wire(lose: usize) -> (End, End) {
    let (a, b) = (Queue::default(), Queue::default());
    let near = End { incoming: a.clone(), outgoing: b.clone(), lose, sent: 0 };
    (near, End { incoming: b, outgoing: a, lose, sent: 0 })
}

/// What one client sends and gets.
struct Client {
    handle: SocketHandle,
    request: Vec<u8>,
    sent: usize,
    answer: Vec<u8>,
    /// Closes its own half when all is sent.
    half_close: bool,
    open: bool,
}

struct World {
    near: End,
    far: End,
    stack: Stack,
    interface: Interface,
    sockets: SocketSet<'static>,
    clients: Vec<Client>,
    now_ns: u64,
}

impl World {
    fn new(lose: usize, connections: u16) -> Self {
        let (mut near, mut far) = wire(lose);
        let config = Config {
            addressing: Addressing::Static { address: Ipv4Cidr::new(SERVER, 24), gateway: None },
            connections,
            ..Config::default()
        };
        let stack = Stack::new(&config, &mut near, [2, 0, 0, 0, 0, 1], 7, 0);
        let settings = iface::Config::new(EthernetAddress([2, 0, 0, 0, 0, 2]).into());
        let mut interface = Interface::new(settings, &mut far, instant(0));
        interface.update_ip_addrs(|addresses| {
            let own = IpCidr::Ipv4(Ipv4Cidr::new(Ipv4Address::new(10, 0, 2, 2), 24));
            addresses.push(own).expect("room");
        });
        let sockets = SocketSet::new(Vec::new());
        Self { near, far, stack, interface, sockets, clients: Vec::new(), now_ns: 0 }
    }

    fn client(&mut self, request: Vec<u8>, half_close: bool) {
        // The last segments of earlier connections, delayed by 10 ms, arrive first.
        (0..40).for_each(|_| self.turn());
        let buffer = || tcp::SocketBuffer::new(vec![0; 65536]);
        let mut socket = tcp::Socket::new(buffer(), buffer());
        let local = 50_000 + u16::try_from(self.clients.len()).expect("few");
        socket.connect(self.interface.context(), (SERVER, 80), local).expect("connect");
        let handle = self.sockets.add(socket);
        let answer = Vec::new();
        self.clients.push(Client { handle, request, sent: 0, answer, half_close, open: true });
    }

    /// Lets time go on until all clients are closed.
    fn run(&mut self, limit_ns: u64) {
        let end = self.now_ns + limit_ns;
        while self.clients.iter().any(|client| client.open) {
            assert!(self.now_ns < end, "a client waits: {:?}", self.states());
            self.turn();
        }
    }

    fn turn(&mut self) {
        self.now_ns += 500_000;
        self.stack.poll(&mut self.near, self.now_ns, &Fixed);
        self.interface.poll(instant(self.now_ns), &mut self.far, &mut self.sockets);
        for client in &mut self.clients {
            client.turn(self.sockets.get_mut(client.handle));
        }
    }

    fn states(&self) -> Vec<(tcp::State, usize)> {
        let state =
            |c: &Client| (self.sockets.get::<tcp::Socket>(c.handle).state(), c.answer.len());
        self.clients.iter().map(state).collect()
    }
}

impl Client {
    fn turn(&mut self, socket: &mut tcp::Socket<'_>) {
        if socket.can_send() && self.sent < self.request.len() {
            self.sent += socket.send_slice(&self.request[self.sent..]).expect("open");
            if self.sent == self.request.len() && self.half_close {
                socket.close();
            }
        }
        while socket.can_recv() {
            let answer = &mut self.answer;
            let all = |bytes: &mut [u8]| (bytes.len(), answer.extend_from_slice(bytes));
            socket.recv(all).expect("data");
        }
        if !socket.may_recv()
            && socket.state() != tcp::State::SynSent
            && socket.state() != tcp::State::SynReceived
        {
            socket.close();
        }
        self.open = !matches!(socket.state(), tcp::State::Closed | tcp::State::TimeWait);
    }

    fn body(&self) -> &[u8] {
        let end = self.answer.windows(4).position(|w| w == b"\r\n\r\n").expect("a head") + 4;
        &self.answer[end..]
    }
}

fn get(path: &str) -> Vec<u8> {
    format!("GET {path} HTTP/1.1\r\nHost: demo\r\nConnection: close\r\n\r\n").into_bytes()
}

#[test]
fn eight_downloads_and_an_upload_at_once_arrive_whole() {
    let mut world = World::new(0, 12);
    for i in 0..8 {
        world.client(get(&format!("/bytes/{}", 300_000 + i * 1000)), i % 2 == 0);
    }
    let mut upload = vec![0; 400_000];
    generator::fill(3, &mut upload);
    let head = format!(
        "POST /echo HTTP/1.1\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        upload.len()
    );
    world.client([head.as_bytes(), &upload].concat(), false);
    world.run(30_000_000_000);
    for (i, client) in world.clients[..8].iter().enumerate() {
        assert_eq!(client.body().len(), 300_000 + i * 1000);
        assert_eq!(generator::first_difference(0, client.body()), None);
    }
    assert_eq!(generator::first_difference(3, world.clients[8].body()), None);
    assert_eq!(world.clients[8].body().len(), upload.len());
    assert_eq!(world.stack.requests(), 9);
}

#[test]
fn a_lossy_wire_only_costs_time() {
    let mut world = World::new(37, 4);
    world.client(get("/bytes/200000"), false);
    world.run(120_000_000_000);
    assert_eq!(world.clients[0].body().len(), 200_000);
    assert_eq!(generator::first_difference(0, world.clients[0].body()), None);
}

#[test]
fn connections_are_given_back() {
    let mut world = World::new(0, 2);
    for round in 0..12 {
        world.client(get("/healthz"), round % 3 == 0);
        world.run(20_000_000_000);
        assert_eq!(world.clients.last().expect("one").body(), b"ok\n");
    }
    assert_eq!(world.stack.requests(), 12);
}

#[test]
fn a_client_that_goes_silent_is_cut() {
    let mut world = World::new(0, 1);
    world.client(b"GET / HTT".to_vec(), false);
    world.run(90_000_000_000); // Ends when the server has cut it.
    world.client(get("/healthz"), false);
    world.run(20_000_000_000);
    assert_eq!(world.clients[1].body(), b"ok\n");
}

#[test]
fn a_client_that_hangs_up_in_the_middle_does_not_keep_its_place() {
    let mut world = World::new(0, 1);
    world.client(b"POST /echo HTTP/1.1\r\nContent-Length: 1000\r\n\r\nonly this".to_vec(), true);
    world.run(20_000_000_000);
    world.client(get("/healthz"), false);
    world.run(20_000_000_000);
    assert_eq!(world.clients[1].body(), b"ok\n");
}

#[test]
fn a_repeated_syn_does_not_open_a_second_connection() {
    // Whichever of the two would answer first, when the wire is whole again.
    for outage_ns in (1..40).map(|n| n * 100_000_000) {
        let mut world = World::new(0, 2);
        world.client(b"GET / HTT".to_vec(), false);
        (0..40).for_each(|_| world.turn());
        // The answer to the second client's SYN is lost...
        world.near.lose = 1;
        world.client(get("/healthz"), false);
        (0..40).for_each(|_| world.turn());
        // ... and when it repeats the SYN, the first socket listens again.
        world.sockets.get_mut::<tcp::Socket>(world.clients[0].handle).abort();
        while world.now_ns < 1_000_000_000 + outage_ns {
            world.turn();
        }
        world.near.lose = 0;
        world.run(60_000_000_000);
        let answer = &world.clients[1].answer;
        assert!(answer.ends_with(b"ok\n"), "{outage_ns}: {answer:?}");
    }
}

#[test]
fn a_client_is_welcome_however_long_nobody_came() {
    let mut world = World::new(0, 2);
    world.now_ns += 600_000_000_000;
    world.client(get("/healthz"), false);
    world.run(20_000_000_000);
    assert_eq!(world.clients[0].body(), b"ok\n");
    // The guest sleeps until the first frame of the next client, whose request takes a while.
    world.client(b"GET / HTT".to_vec(), false);
    world.interface.poll(instant(world.now_ns), &mut world.far, &mut world.sockets);
    world.now_ns += 600_000_000_000;
    (0..40).for_each(|_| world.turn());
    assert!(world.clients[1].open, "{:?}", world.states());
}
