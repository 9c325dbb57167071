//! An honest guest: the real frontends, with work whose every result it can judge.

use crate::block::{BlkHalf, BlkWork};
use crate::domain::{Domain, XenstoreRing};
use crate::link::{Link, Mac};
use crate::world::World;
use frontends::netfront::{Checksum, Config, Error, Netfront};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use xenbus::{Client, Event, Store, XenbusState};

/// How often a guest whose work is done asks whether the others' is.
const LINGER_NS: u64 = 10_000_000;

/// What a guest shows of itself.
#[derive(Default)]
pub struct Status {
    /// All work is done.
    pub has_worked: Cell<bool>,
    /// All others' work is done, too: nobody needs its answers any more.
    pub may_close: Cell<bool>,
    /// What it is waiting for, when it is.
    pub waits_for: RefCell<String>,
    /// All work is done and all connections are closed.
    pub is_done: Cell<bool>,
    /// Store events that its frontends saw since they were connected.
    pub store_events: Cell<u32>,
}

/// The work of a guest on the network.
#[derive(Clone)]
pub struct NetWork {
    /// How the frontend is to work.
    pub config: Config,
    /// Streams, each with somebody.
    pub links: Vec<Link>,
    /// Others who may send it frames.
    pub strangers: Vec<Mac>,
}

/// The network half of a guest.
pub struct NetHalf {
    front: Netfront,
    work: NetWork,
    waiting: Option<Vec<u8>>,
    /// The queue for the next frame.
    turn: usize,
}

impl NetHalf {
    /// Finds its interface.
    fn new(domain: &Domain, client: &mut Client<XenstoreRing>, work: NetWork) -> Self {
        let front = Netfront::new(client, domain.id(), 0, work.config);
        Self { front: front.expect("its nodes are there"), work, waiting: None, turn: 0 }
    }

    fn is_done(&self) -> bool {
        self.work.links.iter().all(Link::is_done) && self.waiting.is_none()
    }

    /// Takes what came and sends what there is. An error ends the run.
    fn go_on(&mut self, world: &World, domain: &mut Domain) -> Result<(), String> {
        if !self.front.is_connected() {
            return self.front.fault().map_or(Ok(()), |fault| Err(fault.to_string()));
        }
        let text = |error: Error| error.to_string();
        while let Some(frame) = self.front.receive(domain, <[u8]>::to_vec).map_err(text)? {
            self.judge(world, &frame)?;
        }
        loop {
            let frame = match self.waiting.take() {
                Some(frame) => frame,
                None => {
                    let now_ns = domain.now_ns();
                    match self.work.links.iter_mut().find_map(|link| link.next(now_ns)) {
                        Some(frame) => frame,
                        None => break,
                    }
                }
            };
            // Any queue will do: whoever gets a frame knows its number.
            self.turn = (self.turn + 1) % self.front.queues();
            let complete = Checksum::Complete;
            match self.front.transmit_packet(domain, self.turn, &frame, complete, None) {
                Ok(()) => {}
                Err(Error::Full) => {
                    self.waiting = Some(frame);
                    break;
                }
                Err(error) => return Err(text(error)),
            }
        }
        self.front.flush(domain).map_err(text)
    }

    fn judge(&mut self, world: &World, frame: &[u8]) -> Result<(), String> {
        for link in &mut self.work.links {
            if link.take(frame)? {
                return Ok(());
            }
        }
        let source = frame.get(6..12).unwrap_or_default();
        let for_others = frame[..6] != self.front.mac() && frame[0] & 1 == 0;
        if for_others || !self.work.strangers.iter().any(|mac| mac == source) {
            world.note(|| format!("{frame:x?}"));
            // A switch that does not know an address yet sends to everybody.
            if !for_others {
                return Err(format!("a frame from nowhere: {source:x?}"));
            }
        }
        Ok(())
    }

    /// Where it is, for messages.
    fn describe(&self) -> String {
        let Self { front, work, waiting, .. } = self;
        let (state, backend, flight) = (front.state(), front.backend_state(), front.in_flight());
        let waits = waiting.is_some();
        format!("{state:?} {backend:?} in flight {flight:?} waits {waits} {:?}", work.links)
    }

    fn deadline_ns(&self) -> Option<u64> {
        // A frame that has to wait for room is woken by an event; retries would only spin.
        if self.waiting.is_some() {
            return None;
        }
        self.work.links.iter().filter_map(Link::deadline_ns).min()
    }
}

/// What a guest is to do.
#[derive(Clone, Default)]
pub struct Work {
    /// On the network.
    pub net: Option<NetWork>,
    /// On its disk.
    pub blk: Option<BlkWork>,
}

/// The devices of a guest.
struct Halves {
    net: Option<NetHalf>,
    blk: Option<BlkHalf>,
}

impl Halves {
    fn is_connected(&self) -> bool {
        self.net.as_ref().is_none_or(|net| net.front.is_connected())
            && self.blk.as_ref().is_none_or(|blk| blk.front.is_connected())
    }

    fn have_worked(&self) -> bool {
        self.net.as_ref().is_none_or(NetHalf::is_done)
            && self.blk.as_ref().is_none_or(BlkHalf::is_done)
    }

    fn are_closed(&self) -> bool {
        let closed = XenbusState::CLOSED;
        self.net
            .as_ref()
            .is_none_or(|net| net.front.state() == closed && net.front.backend_state() == closed)
            && self.blk.as_ref().is_none_or(|blk| {
                blk.front.state() == closed && blk.front.backend_state() == closed
            })
    }

    fn go_on(&mut self, world: &World, domain: &mut Domain) -> Result<(), String> {
        if let Some(net) = &mut self.net {
            net.go_on(world, domain)?;
        }
        if let Some(blk) = &mut self.blk {
            blk.go_on(world, domain)?;
        }
        Ok(())
    }

    fn store_event(
        &mut self,
        domain: &mut Domain,
        client: &mut Client<XenstoreRing>,
        event: &Event,
    ) {
        if let Some(net) = &mut self.net {
            net.front.store_event(domain, client, event).expect("the store answers");
        }
        if let Some(blk) = &mut self.blk {
            blk.front.store_event(domain, client, event).expect("the store answers");
        }
    }

    fn close(&mut self, domain: &mut Domain, client: &mut Client<XenstoreRing>) {
        if let Some(net) = &mut self.net {
            net.front.close(domain, client).expect("the store answers");
        }
        if let Some(blk) = &mut self.blk {
            blk.front.close(domain, client).expect("the store answers");
        }
    }

    fn describe(&self) -> String {
        let net = self.net.as_ref().map(NetHalf::describe);
        let blk = self.blk.as_ref().map(BlkHalf::describe);
        format!("{net:?} {blk:?}")
    }
}

/// A guest's code.
pub fn main(world: &Rc<World>, mut domain: Domain, work: Work, status: &Status) {
    let mut client = Client::new(domain.xenstore());
    let mut halves = Halves {
        net: work.net.map(|net| NetHalf::new(&domain, &mut client, net)),
        blk: work.blk.map(|blk| BlkHalf::new(&domain, &mut client, blk)),
    };
    let mut closing = false;
    loop {
        while let Some(event) = client.next_event() {
            if !closing && halves.is_connected() {
                status.store_events.set(status.store_events.get() + 1);
            }
            halves.store_event(&mut domain, &mut client, &event);
        }
        if !closing && let Err(error) = halves.go_on(world, &mut domain) {
            world.fail(format_args!("{}: {error}", domain.id()));
            return;
        }
        let worked = halves.have_worked();
        status.has_worked.set(worked);
        if !closing && worked && status.may_close.get() {
            closing = true;
            halves.close(&mut domain, &mut client);
            // Events may have come with the answers.
            continue;
        }
        status.is_done.set(closing && halves.are_closed());
        let links = halves.net.as_ref().filter(|_| !closing);
        let mut deadline = links.and_then(NetHalf::deadline_ns);
        if !closing && worked {
            deadline = Some(domain.now_ns() + LINGER_NS);
        }
        *status.waits_for.borrow_mut() = halves.describe();
        for port in domain.wait(deadline) {
            if let Some(net) = &mut halves.net {
                net.front.event(port);
            }
        }
    }
}
