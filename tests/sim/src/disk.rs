//! The domain of the storage controller, as its binary on a simulated domain; and what the world
//! does with the controller.

use crate::coroutine::{step, unwatched};
use crate::domain::Domain;
use crate::random::Random;
use crate::services::TICK_NS;
use crate::world::{Hardware, World};
use blkback::{Blkback, preserved};
use domain_api::{DmaPage, DomainId, Registers};
use hv_core::platform::Bdf;
use nvme::model::{Fault, Model, RamDisk, Setup, Status};
use nvme::{MOST_VECTORS, Nvme};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use xenbus::{Client, Store};

/// What the world does to the controller.
#[derive(Clone, Copy, Debug)]
pub struct Treatment {
    /// Something goes wrong with one command in so many; 0: never.
    pub fault_in: u64,
    /// Faults of commands, at most.
    pub faults: u32,
}

/// The controller, plugged into the world.
pub struct Controller {
    bdf: Bdf,
    model: Model,
    treatment: Treatment,
    /// Its queues have room for completions that nobody asked for.
    has_room: bool,
    faults: Cell<u32>,
    /// System time that the model has seen.
    seen_ns: Cell<u64>,
    world: std::rc::Weak<World>,
    broken: RefCell<Option<String>>,
}

impl Controller {
    /// A controller of `owner` with one disk.
    pub fn plug(
        world: &Rc<World>,
        bdf: Bdf,
        owner: DomainId,
        setup: Setup,
        disk: RamDisk,
        treatment: Treatment,
    ) -> Rc<Self> {
        let weak = Rc::downgrade(world);
        let memory = move |address: u64| {
            let page = weak.upgrade()?.dma(bdf, owner, address)?;
            Some((page, usize::try_from(address % 4096).ok()?))
        };
        let controller = Rc::new(Self {
            bdf,
            has_room: setup.queue_entries >= 64,
            model: Model::new(setup, vec![disk], memory),
            treatment,
            faults: Cell::new(0),
            seen_ns: Cell::new(0),
            world: Rc::downgrade(world),
            broken: RefCell::default(),
        });
        world.plug(controller.clone());
        controller
    }

    /// The model.
    #[must_use]
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Lets the model know what the machine around it knows.
    fn tell(&self, world: &World) {
        let now_ns = world.now_ns();
        self.model.advance(now_ns - self.seen_ns.replace(now_ns));
        self.model.set_bus_master(world.is_bus_master(self.bdf));
    }

    fn fault(&self, random: &mut Random) -> Option<Fault> {
        let Treatment { fault_in, faults } = self.treatment;
        if fault_in == 0 || self.faults.get() >= faults || !random.one_in(fault_in) {
            return None;
        }
        self.faults.set(self.faults.get() + 1);
        Some(match random.below(if self.has_room { 5 } else { 3 }) {
            0 => Fault::Lost,
            1 => Fault::Failed(Status::INTERNAL),
            2 => Fault::WrongPhase,
            3 => Fault::WrongId(u16::try_from(random.below(0x1_0000)).unwrap_or(0)),
            _ => Fault::Twice,
        })
    }
}

impl Hardware for Controller {
    fn bdf(&self) -> Bdf {
        self.bdf
    }

    fn act(&self, world: &World) -> bool {
        self.tell(world);
        if let Some(broken) = self.broken.take() {
            world.fail(broken);
        }
        let count = self.model.pending_count();
        if count == 0 {
            return false;
        }
        let (place, fault) = world.random(|random| (random.index(count), self.fault(random)));
        world.note(|| format!("controller does command {place} of {count}: {fault:?}"));
        match fault {
            Some(fault) => self.model.run_with(place, fault),
            None => self.model.run(place),
        }
        true
    }

    fn messages(&self) -> Vec<u32> {
        self.model.messages().into_iter().map(u32::from).collect()
    }

    fn deadline_ns(&self) -> Option<u64> {
        None
    }
}

/// The controller's registers.
struct Mmio(Rc<Controller>);

impl Registers for Mmio {
    fn read(&self, offset: u32) -> u32 {
        step();
        unwatched(|| {
            if let Some(world) = self.0.world.upgrade() {
                self.0.tell(&world);
            }
            self.0.model.read(offset)
        })
    }

    fn write(&mut self, offset: u32, value: u32) {
        step();
        unwatched(|| {
            if let Some(world) = self.0.world.upgrade() {
                self.0.tell(&world);
            }
            self.0.model.clone().write(offset, value);
        });
        step();
    }
}

/// The disk domain: a controller and its backend.
pub fn main(domain: &Domain, controller: &Rc<Controller>) {
    let mut device = domain.device();
    let vectors = device.info().msix_vectors.min(MOST_VECTORS);
    for vector in 0..vectors {
        device.bind_interrupt(vector.into()).expect("a vector of the device");
    }
    let (master, registers) = (device.clone(), Mmio(controller.clone()));
    let mut nvme = Nvme::start(registers, &mut device, domain, vectors, || master.turn_on())
        .unwrap_or_else(|error| panic!("{error}"));
    let (tables, bounce) = preserved::split(domain.preserved());
    let bounce = bounce
        .into_iter()
        .map(|page| {
            let bus_address = device.bus_address(&page).expect("preserved pages are our memory");
            DmaPage { page, bus_address }
        })
        .collect();
    let mut blkback = Blkback::new(domain.id(), tables, bounce);
    let mut env = domain.clone();
    let mut store = Client::new(domain.xenstore());
    blkback.start(&mut env, &mut store, nvme.namespaces()).expect("the store answers");
    let mut tick_ns = 0;
    loop {
        while let Some(event) = store.next_event() {
            let taken = blkback.store_event(&mut env, &mut store, nvme.namespaces(), &event);
            taken.expect("the store answers");
        }
        let progress = blkback.poll(&mut env, nvme.namespaces());
        if progress.store_work {
            let settled = blkback.settle(&mut env, &mut store, nvme.namespaces());
            settled.expect("the store answers");
        }
        let now_ns = domain.now_ns();
        if now_ns >= tick_ns {
            nvme.check(now_ns).unwrap_or_else(|hang| panic!("{hang}"));
            tick_ns = now_ns + TICK_NS;
        }
        let busy = progress.more_work || progress.store_work || nvme.arm();
        let ports = if busy { domain.poll() } else { domain.wait(Some(tick_ns)) };
        for port in ports {
            blkback.event(port);
        }
    }
}
