//! A whole run: what the system of a seed is, and what must be true at its end.

use crate::control::{Blueprint, CONTROL, CONTROL_HEAP, Control, Fate, STORE, Tree};
use crate::domain::Start;
use crate::guest::{self, NetWork, Status, Work};
use crate::link::{Link, Mac};
use crate::random::Random;
use crate::services::{Card, Outside, net_main, store_main};
use crate::world::{End, Schedule, Sim, World};
use axolotl_abi::control::{CLASS_DRIVER, CLASS_GUEST};
use axolotl_abi::start::{START_INFO_GPA, StartInfo};
use domain_api::{DomainId, EventPort};
use e1000e::model::{Dialect, Model};
use frontends::netfront::{Config, GrantPolicy};
use hv_core::fake::FakeFunction;
use hv_core::platform::Bdf;
use std::cell::Cell;
use std::rc::Rc;
use xen_abi::Gfn;
use xenbus::device::{Device, DeviceKind};
use zerocopy::{FromZeros, IntoBytes};

/// The domain of the network card.
pub const NET: DomainId = DomainId(2);
/// The first guest.
pub const GUEST: u16 = 4;
const OUTSIDE: Mac = [2, 0xee, 0, 0, 0, 1];
/// Frames of the machine.
const FRAMES: usize = 1400;

/// How a run is to be.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Everything else follows from it.
    pub seed: u64,
    /// How chance treats it.
    pub schedule: Schedule,
    /// Guests.
    pub guests: u16,
    /// Messages of each link in each direction.
    pub messages: u32,
    /// When the drivers die.
    pub deaths: Deaths,
    /// Whether there is a trace in words.
    pub traced: bool,
}

/// When the drivers die.
#[derive(Clone, Debug)]
pub enum Deaths {
    /// Never.
    None,
    /// So many times at most, at random steps up to a limit.
    Random {
        /// Deaths of each driver domain.
        most: u32,
        /// Steps of a life, at most.
        steps: u64,
    },
    /// One domain, after these numbers of steps of its lives.
    At(DomainId, Vec<u64>),
}

/// How a run was.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// What was wrong.
    pub failure: Option<String>,
    /// Hash of everything that happened.
    pub hash: u64,
    /// Lives that ended.
    pub deaths: u32,
    /// Steps of the network domain.
    pub net_steps: u64,
    /// Turns of the world.
    pub turns: u64,
    /// System time at the end.
    pub ns: u64,
    /// The trace, if it was wanted.
    pub trace: Vec<String>,
}

impl Plan {
    /// What a seed stands for.
    #[must_use]
    pub fn of_seed(seed: u64) -> Self {
        let random = &mut Random::new(seed, 0);
        let rate = |random: &mut Random, often: u64, times: u64| {
            if random.one_in(often) { times } else { 0 }
        };
        let schedule = Schedule {
            cpus: 1 + random.index(5),
            quantum: [4, 30, 300, 3000][random.index(4)],
            hardware_in: [2, 5, 20][random.index(3)],
            lost_interrupt_in: rate(random, 4, 20),
            spurious_in: rate(random, 3, 100),
            most_turns: 3_000_000,
            patience_ns: 30_000_000_000,
        };
        let most = [0, 1, 2, 5][random.index(4)];
        Self {
            seed,
            schedule,
            guests: 1 + u16::try_from(random.below(2)).unwrap_or(0),
            messages: 4 + u32::try_from(random.below(20)).unwrap_or(0),
            deaths: Deaths::Random { most, steps: 4000 },
            traced: false,
        }
    }

    fn fate(&self) -> Fate {
        match self.deaths.clone() {
            Deaths::None => Rc::new(|_, _| {}),
            Deaths::Random { most, steps } => Rc::new(move |world, id| {
                if id.0 < GUEST && world.deaths(id) < most {
                    let life = world.random(|random| random.magnitude(steps) + random.below(600));
                    world.light_fuse(id, life);
                }
            }),
            Deaths::At(whose, lives) => Rc::new(move |world, id| {
                let life = usize::try_from(world.deaths(id)).unwrap_or(usize::MAX);
                if let Some(&steps) = lives.get(life).filter(|_| id == whose) {
                    world.light_fuse(id, steps);
                }
            }),
        }
    }
}

/// Everybody outside.
struct Wire {
    links: Vec<Link>,
    strangers: Vec<Mac>,
}

impl Outside for Wire {
    fn take(&mut self, world: &World, frame: &[u8]) {
        for link in &mut self.links {
            match link.take(frame) {
                Ok(true) => return,
                Ok(false) => {}
                Err(error) => return world.fail(format_args!("outside: {error}")),
            }
        }
        let source = frame.get(6..12).unwrap_or_default();
        if !self.strangers.iter().any(|mac| mac == source) {
            world.fail(format_args!("outside: a frame from nowhere: {source:x?}"));
        }
    }

    fn next(&mut self, now_ns: u64) -> Option<Vec<u8>> {
        self.links.iter_mut().find_map(|link| link.next(now_ns))
    }

    fn deadline_ns(&self) -> Option<u64> {
        self.links.iter().filter_map(Link::deadline_ns).min()
    }
}

fn mac_of(id: DomainId) -> Mac {
    let [high, low] = id.0.to_be_bytes();
    [0x02, 0x16, 0x3e, 0, high, low]
}

fn vif_nodes(tree: &mut Tree, id: DomainId) {
    let device = Device { kind: DeviceKind::Vif, backend: NET, frontend: id, index: 0 };
    let (front, back) = (device.frontend_path(), device.backend_path());
    let mac = mac_of(id).map(|byte| format!("{byte:02x}")).join(":");
    tree.directory(&front, id, NET);
    tree.value(&front, "backend", &back);
    tree.value(&front, "backend-id", NET.0);
    tree.value(&front, "handle", 0);
    tree.value(&front, "mac", &mac);
    tree.value(&front, "state", 1);
    tree.directory(&back, NET, id);
    tree.value(&back, "frontend", &front);
    tree.value(&back, "frontend-id", id.0);
    tree.value(&back, "online", 1);
    tree.value(&back, "handle", 0);
    tree.value(&back, "mac", &mac);
    tree.value(&back, "state", 1);
}

fn net_work(random: &mut Random, plan: &Plan, id: DomainId) -> NetWork {
    let per_request = random.one_in(2);
    let config = Config {
        tx_buffers: 20 + u16::try_from(random.below(20)).unwrap_or(0),
        rx_buffers: 2 + u16::try_from(random.below(20)).unwrap_or(0),
        fragment: [4096, 1000, 90][random.index(3)],
        grants: if per_request { GrantPolicy::PerRequest } else { GrantPolicy::Keep },
        split_events: random.one_in(2),
    };
    let others = (GUEST..GUEST + plan.guests).map(DomainId).filter(|&other| other != id);
    let peers = others.map(mac_of).chain([OUTSIDE]);
    let count = plan.messages;
    let links = peers.map(|peer| Link::new(mac_of(id), peer, count, count)).collect();
    NetWork { config, links, strangers: Vec::new() }
}

/// Runs a plan.
#[must_use]
pub fn run(plan: &Plan) -> Outcome {
    let random = &mut Random::new(plan.seed, 2);
    let card = FakeFunction::nic(3, 0xc000_0000);
    let bdf = card.bdf;
    let mut sim = Sim::boot(plan.seed, plan.schedule.clone(), FRAMES, vec![card], plan.traced);
    let world = sim.world.clone();
    let guests: Vec<DomainId> = (GUEST..GUEST + plan.guests).map(DomainId).collect();

    let mut tree = Tree::default();
    tree.home(NET);
    let mut blueprints = vec![
        Blueprint {
            id: STORE,
            name: "store",
            class: CLASS_DRIVER,
            heap_pages: 6,
            preserved_pages: 0,
            device: None,
            mortal: false,
            main: Rc::new(store_main),
        },
        net_blueprint(&world, random, bdf, &guests, plan),
    ];
    let statuses: Vec<Rc<Status>> = guests.iter().map(|_| Rc::default()).collect();
    for (&id, status) in guests.iter().zip(&statuses) {
        tree.home(id);
        vif_nodes(&mut tree, id);
        let work = Work { net: Some(net_work(random, plan, id)) };
        blueprints.push(guest_blueprint(&world, id, work, status.clone()));
    }
    start_control(&world, plan, blueprints, tree);

    let all = |what: fn(&Status) -> bool| statuses.iter().all(|status| what(status));
    let mut end = sim.run(|_| all(|status| status.has_worked.get()));
    if end == End::Done {
        statuses.iter().for_each(|status| status.may_close.set(true));
        end = sim.run(|_| all(|status| status.is_done.get()));
    }
    if end == End::Stuck {
        let waits: Vec<String> =
            statuses.iter().map(|status| status.waits_for.borrow().clone()).collect();
        world.fail(format_args!("nothing goes on: {waits:?}"));
    }
    judge(&mut sim, plan)
}

fn net_blueprint(
    world: &Rc<World>,
    random: &mut Random,
    bdf: Bdf,
    guests: &[DomainId],
    plan: &Plan,
) -> Blueprint {
    let dialect = if random.one_in(2) { Dialect::Datasheet } else { Dialect::Lazy };
    let model = Model::new(dialect);
    let count = plan.messages;
    let links = guests.iter().map(|&id| Link::new(OUTSIDE, mac_of(id), count, count)).collect();
    let wire = Wire { links, strangers: guests.iter().copied().map(mac_of).collect() };
    Card::plug(world, bdf, NET, model.clone(), wire);
    Blueprint {
        id: NET,
        name: "net",
        class: CLASS_DRIVER,
        heap_pages: 260,
        preserved_pages: 1 + 2 * u32::try_from(guests.len() + 1).unwrap_or(1),
        device: Some(bdf),
        mortal: true,
        main: Rc::new(move |domain| net_main(&domain, &model)),
    }
}

fn guest_blueprint(world: &Rc<World>, id: DomainId, work: Work, status: Rc<Status>) -> Blueprint {
    let world = world.clone();
    Blueprint {
        id,
        name: ["guest0", "guest1", "guest2"][usize::from(id.0 - GUEST) % 3],
        class: CLASS_GUEST,
        heap_pages: 90,
        preserved_pages: 0,
        device: None,
        mortal: false,
        main: Rc::new(move |domain| guest::main(&world, domain, work.clone(), &status)),
    }
}

fn start_control(world: &Rc<World>, plan: &Plan, blueprints: Vec<Blueprint>, tree: Tree) {
    let mut info = StartInfo::new_zeroed();
    let page = world.view.memory(CONTROL, Gfn::containing(START_INFO_GPA));
    page.expect("the core wrote it").read(0, info.as_mut_bytes());
    let start = Start {
        id: CONTROL,
        incarnation: 1,
        store_port: EventPort(info.xenstore_port.0),
        heap_pages: CONTROL_HEAP,
        preserved_pages: 0,
    };
    let random = Random::new(plan.seed, 3);
    let once = Cell::new(Some((blueprints, tree)));
    let (fate, within) = (plan.fate(), world.clone());
    let main = move |domain| {
        let (blueprints, tree) = once.take().expect("the control domain starts once");
        Control::run(&within, domain, random.clone(), blueprints, &tree.0, fate.clone());
    };
    world.install(start, "control", false, Rc::new(main));
}

/// What must be true at the end, whatever happened.
fn judge(sim: &mut Sim, plan: &Plan) -> Outcome {
    let world = sim.world.clone();
    if world.failure().is_none() {
        // The last answers on their way.
        sim.check_core();
        if world.view.mapped(NET) != 0 {
            world.fail(format_args!("{} grants are left mapped", world.view.mapped(NET)));
        }
    }
    Outcome {
        failure: world.failure(),
        hash: world.hash(),
        deaths: world.deaths(NET),
        net_steps: world.steps(NET),
        turns: sim.turns(),
        ns: world.now_ns(),
        trace: if plan.traced { world.take_lines() } else { Vec::new() },
    }
}
