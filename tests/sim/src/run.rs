//! A whole run: what the system of a seed is, and what must be true at its end.

use crate::block::{BlkWork, Book, DEVICE};
use crate::control::{Blueprint, CONTROL, CONTROL_HEAP, Control, Fate, STORE, Tree};
use crate::coroutine;
use crate::disk::{self, Controller, Treatment};
use crate::domain::Start;
use crate::guest::{self, NetWork, Status, Work};
use crate::liar;
use crate::link::{Link, Mac};
use crate::random::Random;
use crate::services::{Card, Outside, net_main, store_main};
use crate::world::{End, Schedule, Sim, World};
use axolotl_abi::control::{CLASS_DRIVER, CLASS_GUEST};
use axolotl_abi::start::{START_INFO_GPA, StartInfo};
use domain_api::{DomainId, EventPort};
use e1000e::model::{Dialect, Model};
use frontends::{blkfront, netfront};
use hv_core::fake::FakeFunction;
use hv_core::platform::Bdf;
use nvme::model::{RamDisk, Setup};
use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use xen_abi::Gfn;
use xenbus::device::{Device, DeviceKind};
use zerocopy::{FromZeros, IntoBytes};

/// The domain of the network card.
pub const NET: DomainId = DomainId(2);
/// The domain of the storage controller.
pub const DISK: DomainId = DomainId(3);
/// The first guest.
pub const GUEST: u16 = 4;
/// Sectors of a guest's disk.
const SECTORS: usize = 192;
const OUTSIDE: Mac = [2, 0xee, 0, 0, 0, 1];
/// Frames of the machine.
const FRAMES: usize = 1900;

/// How a run is to be.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Everything else follows from it.
    pub seed: u64,
    /// How chance treats it.
    pub schedule: Schedule,
    /// Guests.
    pub guests: u16,
    /// Messages of each link in each direction; 0: no network.
    pub messages: u32,
    /// Requests of each guest to its disk; 0: no disk.
    pub requests: u32,
    /// Lies of one further guest.
    pub lies: u64,
    /// What happens to commands of the storage controller.
    pub treatment: Treatment,
    /// The turn at which the power fails.
    pub power_cut: Option<u64>,
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
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// What was wrong.
    pub failure: Option<String>,
    /// Hash of everything that happened.
    pub hash: u64,
    /// Lives that ended.
    pub deaths: u32,
    /// Steps of the drivers' domains.
    pub steps: [u64; 2],
    /// Requests to disks that were acknowledged.
    pub acknowledged: u64,
    /// Turns of the world.
    pub turns: u64,
    /// System time at the end.
    pub ns: u64,
    /// The trace, if it was wanted.
    pub trace: Vec<String>,
}

fn number(random: &mut Random, limit: u64) -> u32 {
    u32::try_from(random.below(limit)).unwrap_or(0)
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
            patience_ns: 120_000_000_000,
        };
        let kinds = random.below(4);
        let most = [0, 1, 2, 5][random.index(4)];
        Self {
            seed,
            schedule,
            guests: 1 + u16::try_from(random.below(2)).unwrap_or(0),
            messages: if kinds == 1 { 0 } else { 2 + number(random, 20) },
            requests: if kinds == 0 { 0 } else { 10 + number(random, 80) },
            lies: if random.one_in(3) { 20 + random.below(200) } else { 0 },
            treatment: Treatment { fault_in: rate(random, 6, 30), faults: 2 },
            power_cut: random.one_in(4).then(|| 500 + random.magnitude(20_000)),
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

/// The first byte of a guest's part of the disk.
fn offset_of(id: DomainId) -> usize {
    usize::from(id.0 - GUEST) * SECTORS * 512 + 64 * 512
}

fn vbd_nodes(tree: &mut Tree, id: DomainId) {
    let device = Device { kind: DeviceKind::Vbd, backend: DISK, frontend: id, index: DEVICE };
    let (front, back) = (device.frontend_path(), device.backend_path());
    tree.directory(&front, id, DISK);
    tree.value(&front, "backend", &back);
    tree.value(&front, "backend-id", DISK.0);
    tree.value(&front, "virtual-device", DEVICE);
    tree.value(&front, "device-type", "disk");
    tree.value(&front, "state", 1);
    tree.directory(&back, DISK, id);
    tree.value(&back, "frontend", &front);
    tree.value(&back, "frontend-id", id.0);
    tree.value(&back, "online", 1);
    tree.value(&back, "removable", 0);
    tree.value(&back, "bootable", 1);
    tree.value(&back, "dev", "xvda");
    tree.value(&back, "device-type", "disk");
    tree.value(&back, "params", format!("range:{}+{}", offset_of(id), SECTORS * 512));
    tree.value(&back, "mode", "w");
    tree.value(&back, "format", "raw");
    tree.value(&back, "state", 1);
}

fn blk_work(random: &mut Random, plan: &Plan, id: DomainId, through: bool) -> BlkWork {
    use blkfront::GrantPolicy::{PerRequest, Persistent};
    let config = blkfront::Config {
        queues: 1 + u16::try_from(random.below(2)).unwrap_or(0),
        ring_page_order: u8::try_from(random.below(2)).unwrap_or(0),
        indirect_segments: [0, 16, 40][random.index(3)],
        grants: if random.one_in(2) { PerRequest } else { Persistent },
        buffers: 16 + u16::try_from(random.below(24)).unwrap_or(0),
    };
    let key = plan.seed << 8 ^ u64::from(id.0);
    BlkWork {
        config,
        requests: plan.requests,
        depth: 1 + random.index(12),
        random: Random::new(plan.seed, 100 + u64::from(id.0)),
        book: Rc::new(RefCell::new(Book::new(key, SECTORS, through))),
    }
}

fn net_work(random: &mut Random, plan: &Plan, id: DomainId) -> NetWork {
    let per_request = random.one_in(2);
    let config = netfront::Config {
        tx_buffers: 20 + u16::try_from(random.below(20)).unwrap_or(0),
        rx_buffers: 2 + u16::try_from(random.below(20)).unwrap_or(0),
        fragment: [4096, 1000, 90][random.index(3)],
        grants: if per_request {
            netfront::GrantPolicy::PerRequest
        } else {
            netfront::GrantPolicy::Keep
        },
        split_events: random.one_in(2),
        queues: 1 + u16::try_from(random.below(3)).unwrap_or(0),
        ..netfront::Config::default()
    };
    let others = (GUEST..GUEST + plan.guests).map(DomainId).filter(|&other| other != id);
    let peers = others.map(mac_of).chain([OUTSIDE]);
    let count = plan.messages;
    let links = peers.map(|peer| Link::new(mac_of(id), peer, count, count)).collect();
    NetWork { config, links, strangers: vec![mac_of(liar_of(plan))] }
}

/// A storage controller as PCI shows it.
fn nvme_function() -> FakeFunction {
    let mut function = FakeFunction::nic(4, 0xd000_0000);
    function.config[..4].copy_from_slice(&0x0010_1b36_u32.to_le_bytes());
    function.config[8..12].copy_from_slice(&0x0108_0200_u32.to_le_bytes());
    function
}

fn disk_setup(random: &mut Random) -> (Setup, RamDisk) {
    let setup = Setup {
        queue_entries: [8, 64, 1024][random.index(3)],
        queue_pairs: 1 + u16::try_from(random.below(4)).unwrap_or(0),
        vectors: 5,
        mdts: [0, 1, 5][random.index(3)],
        volatile_cache: !random.one_in(4),
        discard: random.one_in(2),
        late_dma: random.one_in(2),
        sticky_fatal: random.one_in(2),
        ..Setup::default()
    };
    let shift = if random.one_in(3) { 12 } else { 9 };
    let disk = RamDisk::new(1, shift, (4 * SECTORS as u64 * 512) >> shift);
    (setup, disk)
}

/// Reads a sector of a guest's part of the disk.
fn read_sector(disk: &RamDisk, id: DomainId, sector: usize, durable: bool) -> Vec<u8> {
    let at = offset_of(id) + sector * 512;
    let (block, within) = (at / disk.block_bytes(), at % disk.block_bytes());
    let bytes = if durable { disk.durable(block as u64) } else { disk.read(block as u64) };
    bytes[within..within + 512].to_vec()
}

/// A guest, as the run sees it.
struct Guest {
    id: DomainId,
    status: Rc<Status>,
    book: Option<Rc<RefCell<Book>>>,
}

/// Runs a plan. A panic outside of domains' code, as one of a device's model, is a failure too.
#[must_use]
pub fn run(plan: &Plan) -> Outcome {
    let done = catch_unwind(AssertUnwindSafe(|| coroutine::noting_panics(|| run_whole(plan))));
    done.unwrap_or_else(|payload| Outcome {
        failure: Some(coroutine::panic_text(payload.as_ref())),
        ..Outcome::default()
    })
}

fn run_whole(plan: &Plan) -> Outcome {
    let random = &mut Random::new(plan.seed, 2);
    let (card, storage) = (FakeFunction::nic(3, 0xc000_0000), nvme_function());
    let (card_bdf, storage_bdf) = (card.bdf, storage.bdf);
    let functions = vec![card, storage];
    let mut sim = Sim::boot(plan.seed, plan.schedule.clone(), FRAMES, functions, plan.traced);
    let world = sim.world.clone();
    let ids: Vec<DomainId> = (GUEST..GUEST + plan.guests).map(DomainId).collect();

    let mut tree = Tree::default();
    let mut blueprints = vec![store_blueprint()];
    if plan.messages > 0 {
        tree.home(NET);
        blueprints.push(net_blueprint(&world, random, card_bdf, &ids, plan));
    }
    let (setup, disk) = disk_setup(random);
    let through = !setup.volatile_cache;
    let controller = Controller::plug(&world, storage_bdf, DISK, setup, disk, plan.treatment);
    if plan.requests > 0 {
        tree.home(DISK);
        blueprints.push(disk_blueprint(storage_bdf, &controller, ids.len() + 1));
    }
    let mut guests = Vec::new();
    for &id in &ids {
        tree.home(id);
        let mut work = Work::default();
        if plan.messages > 0 {
            vif_nodes(&mut tree, id);
            work.net = Some(net_work(random, plan, id));
        }
        if plan.requests > 0 {
            vbd_nodes(&mut tree, id);
            work.blk = Some(blk_work(random, plan, id, through));
        }
        let (status, book) = (Rc::default(), work.blk.as_ref().map(|blk| blk.book.clone()));
        blueprints.push(guest_blueprint(&world, id, work, Rc::clone(&status)));
        guests.push(Guest { id, status, book });
    }
    if plan.lies > 0 {
        blueprints.push(liar_blueprint(&mut tree, plan));
    }
    start_control(&world, plan, blueprints, tree);
    let cut = let_run(&mut sim, plan, &guests);
    judge(&mut sim, plan, &guests, &controller, cut)
}

/// Lets everybody work. True: the power failed before they were done.
fn let_run(sim: &mut Sim, plan: &Plan, guests: &[Guest]) -> bool {
    let world = sim.world.clone();
    let all = |what: fn(&Status) -> bool| guests.iter().all(|guest| what(&guest.status));
    let cut = |world: &World| plan.power_cut.is_some_and(|turn| world.turns() >= turn);
    let mut end = sim.run(|world| cut(world) || all(|status| status.has_worked.get()));
    if end == End::Done && !all(|status| status.has_worked.get()) {
        return true;
    }
    if end == End::Done {
        guests.iter().for_each(|guest| guest.status.may_close.set(true));
        end = sim.run(|_| all(|status| status.is_done.get()));
    }
    if end == End::Stuck {
        let waits: Vec<String> =
            guests.iter().map(|guest| guest.status.waits_for.borrow().clone()).collect();
        world.fail(format_args!("nothing goes on: {}{waits:?}", world.describe()));
    }
    false
}

fn store_blueprint() -> Blueprint {
    Blueprint {
        id: STORE,
        name: "store",
        class: CLASS_DRIVER,
        heap_pages: 6,
        preserved_pages: 0,
        device: None,
        mortal: false,
        main: Rc::new(store_main),
    }
}

fn disk_blueprint(bdf: Bdf, controller: &Rc<Controller>, vbds: usize) -> Blueprint {
    let controller = controller.clone();
    let preserved = blkback::preserved::pages_for(vbds, 0);
    Blueprint {
        id: DISK,
        name: "disk",
        class: CLASS_DRIVER,
        heap_pages: 120,
        preserved_pages: u32::try_from(preserved).unwrap_or(0),
        device: Some(bdf),
        mortal: true,
        main: Rc::new(move |domain| disk::main(&domain, &controller)),
    }
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
    let wire = Wire {
        links,
        strangers: guests.iter().copied().chain([liar_of(plan)]).map(mac_of).collect(),
    };
    Card::plug(world, bdf, NET, model.clone(), wire);
    // For one queue of each vif, or for all of them.
    let (least, most) = netback::preserved::pages_for(guests.len() + 1);
    let pages = if random.one_in(2) { least } else { most };
    Blueprint {
        id: NET,
        name: "net",
        class: CLASS_DRIVER,
        heap_pages: 400,
        preserved_pages: u32::try_from(pages).unwrap_or(0),
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
        heap_pages: 300,
        preserved_pages: 0,
        device: None,
        mortal: false,
        main: Rc::new(move |domain| guest::main(&world, domain, work.clone(), &status)),
    }
}

/// Which guest lies.
fn liar_of(plan: &Plan) -> DomainId {
    DomainId(GUEST + plan.guests)
}

fn liar_blueprint(tree: &mut Tree, plan: &Plan) -> Blueprint {
    let id = liar_of(plan);
    tree.home(id);
    let net = (plan.messages > 0).then(|| vif_nodes(tree, id)).map(|()| NET);
    let disk = (plan.requests > 0).then(|| vbd_nodes(tree, id)).map(|()| DISK);
    let (random, lies) = (Random::new(plan.seed, 4), plan.lies);
    Blueprint {
        id,
        name: "liar",
        class: CLASS_GUEST,
        heap_pages: 16,
        preserved_pages: 0,
        device: None,
        mortal: false,
        main: Rc::new(move |mut domain| {
            liar::main(&mut domain, random.clone(), lies, (net, disk));
        }),
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
fn judge(
    sim: &mut Sim,
    plan: &Plan,
    guests: &[Guest],
    controller: &Controller,
    cut: bool,
) -> Outcome {
    let world = sim.world.clone();
    if world.failure().is_none() {
        sim.check_core();
        if cut {
            controller.model().lose_power();
        } else if plan.lies == 0 {
            for id in [NET, DISK] {
                let left = world.view.mapped(id);
                if left != 0 {
                    world.fail(format_args!("{id} has {left} grants mapped"));
                }
            }
        }
        for Guest { id, book, .. } in guests {
            let Some(book) = book else { continue };
            let read = |durable| {
                move |sector| {
                    controller.model().with_disk(0, |disk| read_sector(disk, *id, sector, durable))
                }
            };
            let book = book.borrow();
            let right = match cut {
                true => book.check_durable(read(true)),
                false => book.check_visible(read(false)),
            };
            if let Err(error) = right {
                world.fail(format_args!("disk of {id}: {error}"));
            }
        }
    }
    let books = guests.iter().filter_map(|guest| guest.book.as_ref());
    Outcome {
        failure: world.failure(),
        hash: world.hash(),
        deaths: world.deaths(NET) + world.deaths(DISK),
        steps: [world.steps(NET), world.steps(DISK)],
        acknowledged: books.map(|book| book.borrow().acknowledged).sum(),
        turns: world.turns(),
        ns: world.now_ns(),
        trace: if plan.traced { world.take_lines() } else { Vec::new() },
    }
}
