//! The store domain, and the domain of the network card: as their binaries, on simulated domains.

use crate::coroutine::{step, unwatched};
use crate::domain::Domain;
use crate::world::{Hardware, World};
use domain_api::{DomainId, EventPort, Registers};
use e1000e::model::{Defect, Model};
use e1000e::{E1000e, PciId, VECTOR_OTHER, VECTOR_QUEUES};
use hv_core::platform::Bdf;
use netback::Netback;
use std::cell::RefCell;
use std::rc::Rc;
use xenbus::{Client, Store};
use xenstore::{Server, Service};

/// How often a driver domain looks after its device, as in the real one.
pub const TICK_NS: u64 = 250_000_000;

/// The store domain: xenstore.
pub fn store_main(domain: Domain) {
    let port = domain.start().store_port;
    let mut service = Service::new(Server::default(), domain.clone());
    service.connect(crate::control::CONTROL, port).expect("the control domain granted its ring");
    loop {
        for port in domain.poll() {
            service.event(port);
        }
        if !service.serve() {
            for port in domain.wait(None) {
                service.event(port);
            }
        }
    }
}

/// Registers of a device's model. Each access is a step, before and after.
pub struct Mmio<R> {
    model: R,
}

impl<R: Registers> Mmio<R> {
    /// The registers of `model`.
    pub const fn new(model: R) -> Self {
        Self { model }
    }
}

impl<R: Registers> Registers for Mmio<R> {
    fn read(&self, offset: u32) -> u32 {
        step();
        unwatched(|| self.model.read(offset))
    }

    fn write(&mut self, offset: u32, value: u32) {
        step();
        unwatched(|| self.model.write(offset, value));
        step();
    }
}

/// The network domain: a card and its backend.
pub fn net_main(domain: &Domain, model: &Model) {
    let mut device = domain.device();
    let other = device.bind_interrupt(VECTOR_OTHER).expect("MSI-X vector of the link");
    let _queues = device.bind_interrupt(VECTOR_QUEUES).expect("MSI-X vector of the rings");
    let id = PciId {
        vendor: device.info().vendor,
        device: device.info().device,
        subsystem: Model::ID.subsystem,
    };
    let master = device.clone();
    let turn_on = || {
        master.turn_on()?;
        unwatched(|| model.set_bus_master(true));
        Ok(())
    };
    unwatched(|| model.set_bus_master(false));
    let registers = Mmio::new(model.clone());
    let mut nic = E1000e::start(id, registers, &mut device, domain, turn_on)
        .unwrap_or_else(|error| panic!("{error}"));

    let mut env = domain.clone();
    let mut store = Client::new(domain.xenstore());
    let mut netback = Netback::new(domain.id(), domain.preserved());
    netback.start(&mut env, &mut store).expect("the store answers");
    let mut tick_ns = 0;
    loop {
        while let Some(event) = store.next_event() {
            netback.store_event(&mut env, &mut store, &event).expect("the store answers");
        }
        let progress = netback.poll(&mut env, &mut nic);
        if progress.store_work {
            netback.settle(&mut env, &mut store).expect("the store answers");
        }
        let now_ns = domain.now_ns();
        if now_ns >= tick_ns {
            nic.check(now_ns).unwrap_or_else(|hang| panic!("{hang}"));
            tick_ns = now_ns + TICK_NS;
        }
        let busy = progress.more_work || progress.store_work || nic.arm();
        let ports = if busy { domain.poll() } else { domain.wait(Some(tick_ns)) };
        for port in ports {
            if !netback.event(port) {
                interrupt(&mut nic, port, other);
            }
        }
    }
}

fn interrupt(nic: &mut E1000e<Mmio<Model>>, port: EventPort, other: EventPort) {
    if port == other {
        nic.service_other();
    }
}

/// Somebody on the wire.
pub trait Outside {
    /// A frame arrived from the card.
    fn take(&mut self, world: &World, frame: &[u8]);
    /// The next frame to send now.
    fn next(&mut self, now_ns: u64) -> Option<Vec<u8>>;
    /// When there is one, if nothing comes before.
    fn deadline_ns(&self) -> Option<u64>;
}

/// The card, its wire and who is there.
pub struct Card<O> {
    bdf: Bdf,
    owner: DomainId,
    model: Model,
    /// The other end of the wire.
    pub outside: RefCell<O>,
}

impl<O: Outside + 'static> Card<O> {
    /// A card of `owner`, plugged into the world.
    pub fn plug(
        world: &Rc<World>,
        bdf: Bdf,
        owner: DomainId,
        model: Model,
        outside: O,
    ) -> Rc<Self> {
        let weak = Rc::downgrade(world);
        model.set_bus(Rc::new(move |frame| weak.upgrade()?.dma(bdf, owner, frame << 12)));
        let card = Rc::new(Self { bdf, owner, model, outside: RefCell::new(outside) });
        world.plug(card.clone());
        card
    }
}

impl<O: Outside> Hardware for Card<O> {
    fn bdf(&self) -> Bdf {
        self.bdf
    }

    fn act(&self, world: &World) -> bool {
        let mut any = false;
        if world.is_bus_master(self.bdf) && world.random(|random| random.one_in(2)) {
            self.model.transmit(1);
        } else {
            self.model.set_bus_master(world.is_bus_master(self.bdf));
        }
        let mut outside = self.outside.borrow_mut();
        for frame in self.model.sent() {
            outside.take(world, &frame);
            any = true;
        }
        if let Some(frame) = outside.next(world.now_ns()) {
            let seen = self.model.deliver(&frame, Defect::None);
            world.note(|| format!("a frame of {} bytes for {}: {seen}", frame.len(), self.owner));
            any = true;
        }
        for violation in self.model.violations() {
            world.fail(format_args!("the network card: {violation}"));
        }
        any
    }

    fn messages(&self) -> Vec<u32> {
        self.model.messages()
    }

    fn deadline_ns(&self) -> Option<u64> {
        self.outside.borrow().deadline_ns()
    }
}
