//! The machine, the core, and whose turn it is.
//!
//! Domains' code runs as programs of the fake machine's processors: the real core decides which
//! domain a processor runs, delivers events, blocks and wakes. What it leaves to chance, the seed
//! decides: which processor goes on, for how many steps, when a device moves, when an interrupt
//! arrives, and at which step a driver domain dies.

use crate::coroutine::{Coroutine, Resume, Turn, Yielded, install_panic_hook, step, unwatched};
use crate::domain::{Domain, Heap, Start};
use crate::random::Random;
use axolotl_abi::start::{STACK_TOP_GPA, START_INFO_GPA};
use domain_api::DomainId;
use hv_core::fake::{Config, FakeFunction, Program, System, View, issue};
use hv_core::platform::{Bdf, Exit, HYPERCALL_BYTES, Platform as _, Registers};
use shmem::Page;
use shmem::sim::Hooks;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fmt::Display;
use std::rc::Rc;

/// First instruction of every domain. The fake machine's hypercalls never come back to it.
pub const ENTRY: u64 = axolotl_abi::start::IMAGE_GPA + 0xff0;
/// What a step takes.
const STEP_NS: u64 = 20;
/// Sweeps over all processors that show that nothing is left to do.
const SWEEPS: usize = 4;
/// Lines of a trace that are kept.
const TRACE_MOST: usize = 400_000;

thread_local! {
    static HEAP: RefCell<Option<Rc<Heap>>> = const { RefCell::new(None) };
}

/// A device, as the world moves it.
pub trait Hardware {
    /// Which function it is.
    fn bdf(&self) -> Bdf;
    /// Does one thing on its own account. False: there is nothing to do.
    fn act(&self, world: &World) -> bool;
    /// Vectors that it signalled since the last call.
    fn messages(&self) -> Vec<u32>;
    /// When it does something next without being asked.
    fn deadline_ns(&self) -> Option<u64>;
}

/// How chance is to treat a run.
#[derive(Clone, Debug)]
pub struct Schedule {
    /// Processors.
    pub cpus: usize,
    /// Steps of a turn, at most.
    pub quantum: u64,
    /// Devices move once in so many turns.
    pub hardware_in: u64,
    /// An interrupt is lost once in so many; 0: never.
    pub lost_interrupt_in: u64,
    /// A spurious event happens once in so many turns; 0: never.
    pub spurious_in: u64,
    /// Turns after which the run counts as stuck.
    pub most_turns: u64,
    /// System time after which it does.
    pub patience_ns: u64,
}

/// Code of a domain.
pub type Main = Rc<dyn Fn(Domain)>;

/// One domain of the simulation, over all its lives.
pub struct Slot {
    id: DomainId,
    name: String,
    main: Main,
    mortal: bool,
    coroutine: RefCell<Option<Coroutine>>,
    waiting: Cell<Option<Waiting>>,
    heap: RefCell<Option<Rc<Heap>>>,
    start: Cell<Start>,
    /// Which life its coroutine is.
    life: Cell<u32>,
    fuse: Cell<u64>,
    steps: Cell<u64>,
    deaths: Cell<u32>,
}

/// A hypercall that is under way.
#[derive(Clone, Copy)]
struct Waiting {
    after: u64,
    number: u64,
    args: [u64; 5],
}

/// What happened, as a number and, if wanted, as text.
#[derive(Default)]
struct Trace {
    hash: u64,
    lines: Option<Vec<String>>,
}

/// What everything in a simulation can reach.
pub struct World {
    /// The machine and the core.
    pub view: View,
    /// How chance treats this run.
    pub schedule: Schedule,
    random: RefCell<Random>,
    slots: RefCell<BTreeMap<DomainId, Rc<Slot>>>,
    trace: RefCell<Trace>,
    failure: RefCell<Option<String>>,
    ran: Cell<bool>,
    hardware: RefCell<Vec<Rc<dyn Hardware>>>,
    turns: Cell<u64>,
}

fn access() {
    step();
}

fn allocate() -> Page {
    let heap = HEAP.with_borrow(Clone::clone);
    heap.expect("a domain that runs has a heap").allocate()
}

impl World {
    /// A number for chance to decide by.
    pub fn random<R>(&self, work: impl FnOnce(&mut Random) -> R) -> R {
        work(&mut self.random.borrow_mut())
    }

    /// System time.
    #[must_use]
    pub fn now_ns(&self) -> u64 {
        self.view.p.machine().now_ns
    }

    /// Notes something that is not as it must be; the run ends.
    pub fn fail(&self, what: impl Display) {
        self.note(|| format!("FAILURE {what}"));
        self.failure.borrow_mut().get_or_insert_with(|| what.to_string());
    }

    /// What was wrong first.
    #[must_use]
    pub fn failure(&self) -> Option<String> {
        self.failure.borrow().clone()
    }

    /// Adds a line to the trace, if there is one.
    pub fn note(&self, line: impl FnOnce() -> String) {
        if let Some(lines) = &mut self.trace.borrow_mut().lines
            && lines.len() < TRACE_MOST
        {
            let at = self.view.p.machine().now_ns;
            lines.push(format!("{at:>12} {}", line()));
        }
    }

    /// Adds a number to the trace's hash.
    pub fn mix(&self, value: u64) {
        let trace = &mut *self.trace.borrow_mut();
        trace.hash = (trace.hash.rotate_left(5) ^ value).wrapping_mul(0x517c_c1b7_2722_0a95);
    }

    /// The hash of all that happened.
    #[must_use]
    pub fn hash(&self) -> u64 {
        self.trace.borrow().hash
    }

    /// The lines of the trace.
    #[must_use]
    pub fn take_lines(&self) -> Vec<String> {
        self.trace.borrow_mut().lines.take().unwrap_or_default()
    }

    /// Makes a domain's code known, and its processor run it. `mortal`: it may end; the control
    /// domain starts it again.
    pub fn install(self: &Rc<Self>, start: Start, name: &str, mortal: bool, main: Main) {
        let slot = Rc::new(Slot {
            id: start.id,
            name: name.into(),
            main,
            mortal,
            coroutine: RefCell::default(),
            waiting: Cell::new(None),
            heap: RefCell::default(),
            start: Cell::new(start),
            life: Cell::new(0),
            fuse: Cell::new(u64::MAX),
            steps: Cell::new(0),
            deaths: Cell::new(0),
        });
        self.slots.borrow_mut().insert(start.id, slot.clone());
        self.view.program(start.id, program(self.clone(), slot));
    }

    /// Says what a domain's next life is told.
    ///
    /// # Panics
    /// There is no such domain.
    pub fn set_start(&self, start: Start) {
        self.slot(start.id).start.set(start);
    }

    fn slot(&self, id: DomainId) -> Rc<Slot> {
        self.slots.borrow().get(&id).expect("the domain was installed").clone()
    }

    /// Ends a domain's life after so many steps from now.
    pub fn light_fuse(&self, id: DomainId, steps: u64) {
        self.slot(id).fuse.set(steps.max(1));
    }

    /// Turns that were taken.
    #[must_use]
    pub fn turns(&self) -> u64 {
        self.turns.get()
    }

    /// Steps that a domain has made in all its lives.
    #[must_use]
    pub fn steps(&self, id: DomainId) -> u64 {
        self.slots.borrow().get(&id).map_or(0, |slot| slot.steps.get())
    }

    /// How often a domain died.
    #[must_use]
    pub fn deaths(&self, id: DomainId) -> u32 {
        self.slots.borrow().get(&id).map_or(0, |slot| slot.deaths.get())
    }

    /// What everybody waits for, for messages.
    #[must_use]
    pub fn describe(&self) -> String {
        let slots = self.slots.borrow();
        let lines =
            slots.values().map(|slot| format!("{}: {}; ", slot.name, self.view.describe(slot.id)));
        lines.collect()
    }

    /// Has a device moved by the world.
    pub fn plug(&self, hardware: Rc<dyn Hardware>) {
        self.hardware.borrow_mut().push(hardware);
    }

    /// Whether a function may reach memory by itself.
    #[must_use]
    pub fn is_bus_master(&self, bdf: Bdf) -> bool {
        let machine = self.view.p.machine();
        let function = machine.functions.iter().find(|function| function.bdf == bdf);
        function.is_some_and(FakeFunction::is_bus_master)
    }

    /// The memory that a device of `owner` finds at a bus address: the owner's own, or a grant
    /// that it has mapped for its devices. `None`: it may not reach that, or not now.
    #[must_use]
    pub fn dma(&self, bdf: Bdf, owner: DomainId, address: u64) -> Option<Page> {
        let mfn = hv_core::frame::Mfn(address >> 12);
        if !self.is_bus_master(bdf) {
            return None;
        }
        if !self.view.owns(owner, mfn) && !self.view.maps_for_devices(owner, mfn) {
            self.fail(format_args!("a device of {owner} reaches for {address:#x}"));
            return None;
        }
        Some(self.view.p.frame(mfn))
    }
}

/// Whether a vCPU is at the first instruction of a life.
fn is_fresh(registers: &Registers) -> bool {
    registers.rip == ENTRY && registers.rdi == START_INFO_GPA && registers.rsp == STACK_TOP_GPA - 8
}

fn program(world: Rc<World>, slot: Rc<Slot>) -> Program {
    Box::new(move |p, registers, _space| {
        world.ran.set(true);
        if let Some(vector) = p.machine().interrupts[usize::from(p.cpu().0)].pop_front() {
            return vector;
        }
        if slot.life.get() != slot.start.get().incarnation {
            // The control domain has made its first calls before it was ours.
            let is_control = slot.id == DomainId(0);
            assert!(is_control || is_fresh(registers), "a life begins at the entry");
            slot.begin(&world);
        }
        slot.run(&world, registers)
    })
}

impl Slot {
    /// Begins a life.
    fn begin(&self, world: &World) {
        let start = self.start.get();
        let heap = Rc::new(Heap::new(&world.view, &start));
        *self.heap.borrow_mut() = Some(heap);
        self.waiting.set(None);
        self.life.set(start.incarnation);
        let (main, view) = (self.main.clone(), world.view.clone());
        let body = Box::new(move || main(Domain::new(&view, start)));
        *self.coroutine.borrow_mut() = Some(Coroutine::new(body));
        world.note(|| format!("{} begins life {}", self.name, start.incarnation));
    }

    fn run(&self, world: &World, registers: &mut Registers) -> Exit {
        let why = match self.waiting.take() {
            None => Resume::Go,
            Some(waiting) if registers.rip == waiting.after => Resume::Answer(registers.rax),
            Some(waiting) => {
                debug_assert_eq!(registers.rip.wrapping_add(HYPERCALL_BYTES), waiting.after);
                return self.issue(world, registers, waiting.number, waiting.args);
            }
        };
        let quantum = world.random(|random| random.magnitude(world.schedule.quantum));
        let yielded = self.resume(world, why, quantum);
        match yielded {
            Yielded::Preempted => Exit::Interrupted,
            Yielded::Hypercall { number, args } => self.issue(world, registers, number, args),
            Yielded::Fuse => self.die(world, "by its fuse"),
            Yielded::Ended(message) => {
                let message = message.unwrap_or_else(|| "it returned".into());
                if !self.mortal || !message.contains("the controller") {
                    world.fail(format_args!("{} ended: {message}", self.name));
                }
                self.die(world, &message)
            }
        }
    }

    fn resume(&self, world: &World, why: Resume, quantum: u64) -> Yielded {
        let mut coroutine = self.coroutine.borrow_mut().take().expect("its life has begun");
        HEAP.set(self.heap.borrow().clone());
        let fuse = self.fuse.get();
        let before = shmem::sim::install(Some(Hooks { access, allocate }));
        let (yielded, used) = coroutine.resume(why, Turn { quantum, fuse });
        shmem::sim::install(before);
        HEAP.take();
        self.steps.set(self.steps.get() + used);
        if fuse != u64::MAX {
            self.fuse.set(fuse.saturating_sub(used).max(1));
        }
        world.view.p.machine().now_ns += used * STEP_NS;
        world.mix(u64::from(self.id.0) << 32 | used);
        *self.coroutine.borrow_mut() = Some(coroutine);
        yielded
    }

    fn issue(&self, world: &World, registers: &mut Registers, number: u64, args: [u64; 5]) -> Exit {
        world.mix(number << 8 ^ args[0]);
        world.note(|| format!("{} calls {number} {:?}", self.name, &args[..3]));
        let exit = issue(registers, number, args);
        self.waiting.set(Some(Waiting { after: registers.rip, number, args }));
        exit
    }

    fn die(&self, world: &World, how: &str) -> Exit {
        let life = self.start.get().incarnation;
        world.note(|| format!("{} dies in life {life}: {how}", self.name));
        self.fuse.set(u64::MAX);
        self.deaths.set(self.deaths.get() + 1);
        // What its stack still does has no effect.
        let coroutine = self.coroutine.borrow_mut().take();
        unwatched(|| drop(coroutine));
        self.waiting.set(None);
        Exit::Fault { vector: 6, error: 0, address: 0 }
    }
}

/// A world with its machine.
pub struct Sim {
    /// The machine and the core, to be moved on.
    system: System,
    /// What runs there.
    pub world: Rc<World>,
}

/// Why a run ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// What was waited for is so.
    Done,
    /// Something is wrong.
    Failed,
    /// Nothing is left to do, or too much was done.
    Stuck,
}

impl Sim {
    /// Boots the core on a machine with these functions.
    #[must_use]
    pub fn boot(
        seed: u64,
        schedule: Schedule,
        frames: usize,
        functions: Vec<FakeFunction>,
        traced: bool,
    ) -> Self {
        install_panic_hook();
        let config =
            Config { frames, cpus: schedule.cpus, guest_cpus: !0, functions, control_pages: 130 };
        let system = System::with(config);
        let trace = Trace { hash: seed, lines: traced.then(Vec::new) };
        let world = World {
            view: system.view(),
            schedule,
            random: RefCell::new(Random::new(seed, 1)),
            slots: RefCell::default(),
            trace: RefCell::new(trace),
            failure: RefCell::default(),
            ran: Cell::new(false),
            hardware: RefCell::default(),
            turns: Cell::new(0),
        };
        Self { system, world: Rc::new(world) }
    }

    /// Lets everybody go on until `done`.
    pub fn run(&mut self, done: impl Fn(&World) -> bool) -> End {
        let world = self.world.clone();
        let cpus = world.schedule.cpus;
        let mut idle = vec![false; cpus];
        for turn in 0.. {
            if world.failure.borrow().is_some() {
                return End::Failed;
            }
            if done(&world) {
                return End::Done;
            }
            if turn > world.schedule.most_turns || world.now_ns() > world.schedule.patience_ns {
                return End::Stuck;
            }
            world.turns.set(world.turns.get() + 1);
            if world.random(|random| random.one_in(world.schedule.hardware_in)) {
                self.move_hardware();
            }
            self.spurious();
            let busy: Vec<usize> = (0..cpus).filter(|&cpu| !idle[cpu]).collect();
            if busy.is_empty() {
                if !self.sweep(&mut idle) && !self.move_hardware() && !self.skip_time() {
                    return End::Stuck;
                }
                continue;
            }
            let cpu = busy[world.random(|random| random.index(busy.len()))];
            idle[cpu] = !self.step(cpu);
            for kicked in self.system.p.machine().kicks.drain(..) {
                idle[usize::from(kicked.0)] = false;
            }
        }
        End::Stuck
    }

    /// A step of a processor. True when a domain ran.
    fn step(&mut self, cpu: usize) -> bool {
        self.world.ran.set(false);
        self.world.mix(cpu as u64);
        self.system.step(cpu);
        self.collect_messages();
        self.world.ran.get()
    }

    /// Gives each processor a few steps. True when a domain ran on any.
    fn sweep(&mut self, idle: &mut [bool]) -> bool {
        let mut any = false;
        for _ in 0..SWEEPS {
            for (cpu, idle) in idle.iter_mut().enumerate() {
                let ran = self.step(cpu);
                *idle &= !ran;
                any |= ran;
            }
            if any {
                break;
            }
        }
        self.system.p.machine().kicks.clear();
        any
    }

    fn move_hardware(&self) -> bool {
        let hardware = self.world.hardware.borrow().clone();
        if hardware.is_empty() {
            return false;
        }
        let first = self.world.random(|random| random.index(hardware.len()));
        let moved =
            (0..hardware.len()).any(|n| hardware[(first + n) % hardware.len()].act(&self.world));
        self.collect_messages();
        moved
    }

    /// Routes the messages of devices as the core has programmed them.
    fn collect_messages(&self) {
        for hardware in &*self.world.hardware.borrow() {
            for entry in hardware.messages() {
                self.signal(hardware.bdf(), entry);
            }
        }
    }

    fn signal(&self, bdf: Bdf, entry: u32) {
        let world = &self.world;
        let lost = world.schedule.lost_interrupt_in;
        if lost != 0 && world.random(|random| random.one_in(lost)) {
            world.note(|| format!("message {entry} of {bdf:?} is lost"));
            return;
        }
        let mut machine = world.view.p.machine();
        let Some(function) = machine.functions.iter().find(|function| function.bdf == bdf) else {
            return;
        };
        if !function.can_interrupt() {
            return;
        }
        let table = function.msix_table();
        let word = |offset| {
            let at = table + u64::from(entry) * 16 + offset;
            machine.registers.get(&at).copied().unwrap_or(0)
        };
        let (address, data, control) = (word(0), word(8), word(12));
        if control & 1 != 0 || address == 0 {
            return;
        }
        let cpu = usize::try_from(address >> 12 & 0xff).unwrap_or(0) % world.schedule.cpus;
        let vector = u8::try_from(data & 0xff).unwrap_or(0);
        machine.interrupts[cpu].push_back(Exit::Device { vector });
        machine.kicks.push(hv_core::platform::CpuId(u8::try_from(cpu).unwrap_or(0)));
    }

    fn spurious(&self) {
        let world = &self.world;
        let rate = world.schedule.spurious_in;
        if rate == 0 || !world.random(|random| random.one_in(rate)) {
            return;
        }
        let ids: Vec<DomainId> = world.slots.borrow().keys().copied().collect();
        let (id, port) =
            world.random(|random| (ids[random.index(ids.len())], 1 + random.below(24)));
        let port = domain_api::EventPort(u32::try_from(port).unwrap_or(1));
        if world.view.is_open(id, port) {
            world.note(|| format!("a spurious event at {port:?} of {id}"));
            world.view.raise(id, port);
        }
    }

    /// Moves the clock to the next thing that is due. False: nothing is.
    fn skip_time(&mut self) -> bool {
        let timers = self.system.p.machine().timers.iter().copied().flatten().min();
        let devices = self.world.hardware.borrow();
        let devices = devices.iter().filter_map(|it| it.deadline_ns()).min();
        let Some(next) = timers.into_iter().chain(devices).min() else { return false };
        let mut machine = self.system.p.machine();
        machine.now_ns = machine.now_ns.max(next);
        true
    }

    /// Checks what must be true of the core.
    ///
    /// # Panics
    /// It is not.
    pub fn check_core(&self) {
        self.system.check_whole();
    }
}

impl Drop for Sim {
    fn drop(&mut self) {
        // Programs know the world, which knows the machine, which has the programs.
        self.system.p.machine().programs.clear();
        for slot in std::mem::take(&mut *self.world.slots.borrow_mut()).into_values() {
            slot.coroutine.take();
        }
        self.world.hardware.take();
    }
}
