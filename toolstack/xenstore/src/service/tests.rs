use super::*;
use domain_api::fake::{Domain, World};
use proptest::{collection::vec, prelude::*};
use shmem::Page;
use xen_abi::xenstore::{MessageKind, REQ_PROD};
use xenbus::{Client, Nodes, Store, Transport};

const CONTROL: DomainId = DomainId(0);
const STORE: DomainId = DomainId(1);

/// A service in its domain, and all others.
#[derive(Clone)]
struct Rig(std::rc::Rc<std::cell::RefCell<Inner>>);

struct Inner {
    world: World,
    store: Domain,
    service: Service<Domain>,
}

impl Rig {
    /// With the control domain connected.
    fn new() -> (Self, Client<RingTransport>) {
        let world = World::new();
        let store = world.domain(STORE);
        let service = Service::new(Server::default(), store.clone());
        let rig = Self(std::rc::Rc::new(std::cell::RefCell::new(Inner { world, store, service })));
        let (port, client) = rig.domain(CONTROL);
        rig.0.borrow_mut().service.connect(CONTROL, port).unwrap();
        (rig, client)
    }

    /// Starts a domain, with its ring granted and its port waiting.
    fn domain(&self, id: DomainId) -> (EventPort, Client<RingTransport>) {
        let world = self.0.borrow().world.clone();
        let domain = world.domain(id);
        let page = Page::new_zeroed();
        world.set_grant(id, RESERVED_XENSTORE, STORE, &page);
        let port = world.alloc_unbound_in(id, STORE).unwrap();
        let ring = ByteRing::xenstore_client(page);
        (port, Client::new(RingTransport { rig: self.clone(), domain, port, ring }))
    }

    /// Lets the store run until it would sleep.
    fn run(&self) {
        let inner = &mut *self.0.borrow_mut();
        for _ in 0..10_000 {
            for port in inner.store.take_pending() {
                inner.service.event(port);
            }
            if !inner.service.serve() {
                return;
            }
        }
        panic!("the store works for ever");
    }
}

/// A domain's end: real rings, real events. Waiting lets the store run.
struct RingTransport {
    rig: Rig,
    domain: Domain,
    port: EventPort,
    ring: ByteRing,
}

impl Transport for RingTransport {
    fn send(&mut self, bytes: &[u8]) -> usize {
        let sent = self.ring.write(bytes).unwrap();
        if sent > 0 {
            self.domain.notify(self.port);
        }
        sent
    }

    fn receive(&mut self, buffer: &mut [u8]) -> usize {
        let received = self.ring.read(buffer).unwrap();
        if received > 0 {
            self.domain.notify(self.port);
        }
        received
    }

    fn wait(&mut self) -> Result<(), Errno> {
        self.rig.run();
        // Whoever sleeps without an event sleeps for ever.
        if self.domain.take_pending().is_empty() { Err(Errno::EIO) } else { Ok(()) }
    }
}

fn introduced(rig: &Rig, control: &mut Client<RingTransport>, id: u16) -> Client<RingTransport> {
    let id = DomainId(id);
    let (port, client) = rig.domain(id);
    control.introduce(id, Gfn(0), port).unwrap();
    let home = xenbus::device::home(id);
    control.mkdir(&home).unwrap();
    control.set_perms(&home, &[xenbus::Permission::owner(id)]).unwrap();
    client
}

/// Messages longer than the ring, in both directions, and events in between.
#[test]
fn long_messages_pass_through_short_rings() {
    let (rig, mut control) = Rig::new();
    let mut guest = introduced(&rig, &mut control, 5);
    guest.watch("data", "t").unwrap();
    let value = vec![b'v'; 2048];
    guest.write("data/x", &value).unwrap();
    assert_eq!(guest.read("data/x").unwrap(), value);
    rig.run();
    let paths: Vec<String> = std::iter::from_fn(|| guest.next_event()).map(|e| e.path).collect();
    assert_eq!(paths, ["data", "data/x"]);
}

/// §6.2: a domain that does not read loses nothing and holds up nobody.
#[test]
fn a_domain_that_does_not_read_disturbs_nobody() {
    let (rig, mut control) = Rig::new();
    let mut silent = introduced(&rig, &mut control, 5);
    let mut other = introduced(&rig, &mut control, 6);
    let mut request = Vec::new();
    xenbus::wire::encode(&mut request, MessageKind::GET_DOMAIN_PATH, 1, 0, &[b"5\0"]).unwrap();
    let mut stopped = 0;
    for _ in 0..10_000 {
        if silent.transport().send(&request) < request.len() {
            stopped += 1;
        }
        rig.run();
    }
    assert!(stopped > 9_000, "its requests are not taken any more");
    other.write("x", b"1").unwrap();
    assert_eq!(other.read("x").unwrap(), b"1");
    // It goes on where it stopped.
    let mut received = 0;
    loop {
        let count = silent.transport().receive(&mut [0; 1024]);
        rig.run();
        if count == 0 {
            break;
        }
        received += count;
    }
    assert!(received > 1024);
}

#[test]
fn a_domain_with_impossible_counters_is_refused_until_it_is_introduced_again() {
    let (rig, mut control) = Rig::new();
    let mut liar = introduced(&rig, &mut control, 5);
    liar.transport().ring.page().u32(REQ_PROD).store(5000, Relaxed);
    let port = liar.transport().port;
    liar.transport().domain.notify(port);
    rig.run();
    assert_eq!(liar.read("x"), Err(Errno::EIO));
    assert_eq!(control.is_introduced(DomainId(5)), Ok(true));
    rig.0.borrow().world.kill(DomainId(5));
    let (port, mut again) = rig.domain(DomainId(5));
    control.introduce(DomainId(5), Gfn(0), port).unwrap();
    again.write("x", b"1").unwrap();
}

/// architecture §6: what the store wrote for the dead incarnation does not reach the next one, in
/// the same page.
#[test]
fn the_next_incarnation_finds_a_clean_ring() {
    let (rig, mut control) = Rig::new();
    let mut first = introduced(&rig, &mut control, 5);
    first.watch("data", "old").unwrap();
    first.transport().send(b"half a request");
    let page = first.transport().ring.page().clone();
    let world = rig.0.borrow().world.clone();
    world.kill(DomainId(5));
    // The core zeroes the page, the control domain has the next one wait for us; then something
    // happens that the dead one watched.
    page.clear();
    page.u32(CONNECTION).store(RECONNECT, Relaxed);
    control.write("/local/domain/5/data", b"1").unwrap();
    rig.run();
    assert_ne!(page.u32(RSP_PROD).load(Relaxed), 0, "the store wrote for the dead one");
    let mut domain = world.domain(DomainId(5));
    world.set_grant(DomainId(5), RESERVED_XENSTORE, STORE, &page);
    let port = world.alloc_unbound_in(DomainId(5), STORE).unwrap();
    control.introduce(DomainId(5), Gfn(0), port).unwrap();
    assert_eq!(page.u32(CONNECTION).load(Relaxed), CONNECTED);
    assert_eq!(domain.take_pending(), [port], "it waits for this");
    let ring = ByteRing::xenstore_client(page);
    let mut next = Client::new(RingTransport { rig, domain, port, ring });
    assert_eq!(next.read("data").unwrap(), b"1");
    next.watch("data", "new").unwrap();
    assert_eq!(next.next_event().map(|event| event.token).as_deref(), Some("new"));
    assert_eq!(next.next_event(), None);
}

/// A domain may be started before the store hears of it: what it has asked by then is answered.
#[test]
fn requests_wait_in_the_ring_for_the_introduction() {
    let (rig, mut control) = Rig::new();
    for life in 1..=2 {
        let (port, mut guest) = rig.domain(DomainId(5));
        let mut request = Vec::new();
        let kind = MessageKind::GET_DOMAIN_PATH;
        xenbus::wire::encode(&mut request, kind, 7, 0, &[b"5\0"]).unwrap();
        assert_eq!(guest.transport().send(&request), request.len());
        control.introduce(DomainId(5), Gfn(0), port).unwrap();
        rig.run();
        assert!(guest.transport().ring.readable().unwrap() > 16, "life {life} has its answer");
        rig.0.borrow().world.kill(DomainId(5));
    }
}

#[test]
fn introducing_fails_without_a_grant_or_a_port_and_leaves_nothing_mapped() {
    let (rig, mut control) = Rig::new();
    let world = rig.0.borrow().world.clone();
    let mappings = || rig.0.borrow().store.mappings();
    let before = (mappings(), rig.0.borrow().store.open_ports());
    assert_eq!(control.introduce(DomainId(9), Gfn(0), EventPort(1)), Err(Errno::EINVAL));
    let (_, _client) = rig.domain(DomainId(9));
    assert_eq!(control.introduce(DomainId(9), Gfn(0), EventPort(77)), Err(Errno::EINVAL));
    assert_eq!(control.is_introduced(DomainId(9)), Ok(false));
    assert_eq!((mappings(), rig.0.borrow().store.open_ports()), before);
    let port = world.alloc_unbound_in(DomainId(9), STORE).unwrap();
    control.introduce(DomainId(9), Gfn(0), port).unwrap();
    assert!(world.is_mapped(DomainId(9), RESERVED_XENSTORE));
    control.release(DomainId(9)).unwrap();
    assert_eq!((mappings(), rig.0.borrow().store.open_ports()), before);
}

/// Two domains that ask without end are served in turn.
#[test]
fn everybody_gets_a_turn() {
    let (rig, mut control) = Rig::new();
    let mut greedy = introduced(&rig, &mut control, 5);
    let mut modest = introduced(&rig, &mut control, 6);
    let mut request = Vec::new();
    xenbus::wire::encode(&mut request, MessageKind::GET_DOMAIN_PATH, 1, 0, &[b"5\0"]).unwrap();
    let many = request.repeat(1024 / request.len());
    assert_eq!(greedy.transport().send(&many), many.len());
    assert_eq!(modest.transport().send(&request), request.len());
    let inner = &mut *rig.0.borrow_mut();
    for port in inner.store.take_pending() {
        inner.service.event(port);
    }
    assert!(inner.service.serve());
    let readable = |client: &mut Client<RingTransport>| client.transport().ring.readable().unwrap();
    assert!(readable(&mut modest) > 0);
    assert!(readable(&mut greedy) < 3 * readable(&mut modest), "one answer each");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 2 } else { 64 }))]

    /// Whatever a domain writes anywhere into its ring page, the store goes on serving others.
    #[test]
    fn no_ring_content_disturbs_the_store(
        steps in vec((vec(any::<u8>(), 0..64), 0_usize..4088, any::<bool>()), 0..40),
    ) {
        let (rig, mut control) = Rig::new();
        let mut hostile = introduced(&rig, &mut control, 5);
        let mut other = introduced(&rig, &mut control, 6);
        for (bytes, offset, counters) in steps {
            let transport = hostile.transport();
            let offset = if counters { 2048 + offset % 32 } else { offset };
            let len = bytes.len().min(4096 - offset);
            transport.ring.page().write(offset, &bytes[..len]);
            transport.domain.notify(transport.port);
            rig.run();
        }
        other.write("x", b"1").unwrap();
        prop_assert_eq!(other.read("x").unwrap(), b"1");
    }

    /// Random messages that are well framed, of a guest, never bring the server down, and the
    /// control domain's nodes stay as they are.
    #[test]
    fn no_request_disturbs_the_store(
        requests in vec((0_u32..26, 0_u32..4, "[a-c/@TF0-9\0]{0,12}\0?"), 0..60),
    ) {
        let (rig, mut control) = Rig::new();
        control.write("/a/b", b"secret").unwrap();
        let mut hostile = introduced(&rig, &mut control, 5);
        for (kind, tx, payload) in requests {
            let _ = hostile.request(tx, MessageKind(kind), &[payload.as_bytes()]);
            prop_assert!(!hostile.is_lost() || hostile.read("x") == Err(Errno::EIO));
        }
        prop_assert_eq!(control.read("/a/b").unwrap(), b"secret");
        prop_assert_eq!(control.directory("/a").unwrap(), ["b"]);
    }
}
