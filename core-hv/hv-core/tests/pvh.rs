//! Domains with kernels of their own, on the fake machine (`xen-abi.md` §2–§5, §9.4).

use axolotl_abi::CONTROL_OP;
use axolotl_abi::control::{
    self, DEATH_SHUTDOWN, ExitCounts, KIND_PVH, POPULATE_MISSING, Populate, SetHvmParam, SetStart,
};
use axolotl_abi::image::{ACCESS_EXECUTE, ACCESS_READ, ACCESS_WRITE};
use hv_core::domain::Stage;
use hv_core::fake::{Config, D0, Fake, FakeVcpu, System, poison_stack};
use hv_core::platform::{
    CpuId, Event, Exit, GuestExit, GuestMsr, NoGuests, Platform, PortAccess, Start,
};
use hv_core::vcpu::{VcpuId, Wait};
use proptest::prelude::*;
use std::cell::RefCell;
use std::collections::{BTreeSet, VecDeque};
use std::rc::Rc;
use xen_abi::event::{BindIpi, BindVirq, PortOp, VIRQ_TIMER};
use xen_abi::hvm::{self, HvmParam, params};
use xen_abi::hypercall::{
    EVENT_CHANNEL_OP, GRANT_TABLE_OP, HVM_OP, MEMORY_OP, SCHED_OP, VCPU_OP, XEN_VERSION,
};
use xen_abi::memory::{
    ADD_TO_PHYSMAP, AddToPhysmap, DECREASE_RESERVATION, POPULATE_PHYSMAP, Reservation,
    SPACE_SHARED_INFO,
};
use xen_abi::shared_info::time::TSC_TIMESTAMP;
use xen_abi::shared_info::{VCPU_PENDING_SEL, VCPU_TIME, VCPU_UPCALL_PENDING};
use xen_abi::vcpu::{self, RegisterVcpuInfo, SetSingleshotTimer};
use xen_abi::{DomainId, Errno, EventPort, Gfn, event};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

const PAGES: u32 = 48;
/// Where argument structures are.
const SCRATCH: u64 = 0x2_0000;
const VECTOR: u8 = 0xf3;
const INTERRUPTS_ON: u64 = 0x200;

/// What a vCPU does at its next runs, and what its registers were after each.
type Steps = Rc<RefCell<VecDeque<Box<dyn FnOnce(&mut FakeVcpu) -> Exit>>>>;

/// A system with one PVH domain, whose vCPUs do what a test says, and halt otherwise.
struct Guest {
    system: System,
    id: DomainId,
    steps: Vec<Steps>,
}

impl Guest {
    fn new(vcpus: u32) -> Self {
        Self::on(vcpus, Config::default())
    }

    fn on(vcpus: u32, config: Config) -> Self {
        let mut system = System::with(config);
        let mut plan = System::plan("guest");
        (plan.kind, plan.vcpus, plan.max_pages) = (KIND_PVH, vcpus, 240);
        let (result, plan) = system.control(control::CREATE, plan);
        assert_eq!(result, 0, "CREATE");
        let id = plan.domid;
        let all = ACCESS_READ | ACCESS_WRITE | ACCESS_EXECUTE;
        system.populate(id, Gfn(0), PAGES, all, 0);
        let mut guest = Self { system, id, steps: Vec::new() };
        let frames: Vec<_> = {
            let core = guest.system.core.lock();
            core.domain(id).unwrap().vcpus.iter().map(|vcpu| vcpu.frame).collect()
        };
        for frame in frames {
            let steps = Steps::default();
            let own = steps.clone();
            let program = move |_: &mut Fake, vcpu: &mut FakeVcpu, _| {
                let next = own.borrow_mut().pop_front();
                let Some(step) = next else {
                    vcpu.registers.rflags |= INTERRUPTS_ON;
                    return Exit::Guest(GuestExit::Halt);
                };
                step(vcpu)
            };
            guest.system.p.machine().guest_programs.insert(frame, Box::new(program));
            guest.steps.push(steps);
        }
        let op = SetStart { domid: id, pad: [0; 3], entry: 0x1000, stack: 0, argument: 0x3000 };
        assert_eq!(guest.system.control(control::SET_START, op).0, 0, "SET_START");
        assert_eq!(guest.system.control_domain(control::UNPAUSE, id), 0, "UNPAUSE");
        guest
    }

    /// Lets a vCPU, in 64-bit mode with interrupts on, do one thing; runs until it is done.
    fn act(&mut self, vcpu: usize, act: impl FnOnce(&mut FakeVcpu) -> Exit + 'static) {
        let step = move |vcpu: &mut FakeVcpu| {
            vcpu.guest.mode.code_bits = 64;
            vcpu.registers.rflags |= INTERRUPTS_ON;
            act(vcpu)
        };
        self.steps[vcpu].borrow_mut().push_back(Box::new(step));
        for _ in 0..100 {
            if self.steps[vcpu].borrow().is_empty() {
                return;
            }
            let v = VcpuId { domain: self.id, index: u8::try_from(vcpu).unwrap() };
            self.system.wake_vcpu(v);
            self.system.step(0);
        }
        panic!("vCPU {vcpu} never ran");
    }

    fn exit(&mut self, vcpu: usize, exit: GuestExit) {
        self.act(vcpu, move |_| Exit::Guest(exit));
    }

    /// A hypercall; its result. The vCPU halts afterwards.
    fn call(&mut self, vcpu: usize, number: u64, args: [u64; 5]) -> i64 {
        let result = Rc::new(RefCell::new(0));
        let told = result.clone();
        for _ in 0..200 {
            let seen = Rc::new(RefCell::new((0, 0)));
            let before = seen.clone();
            self.act(vcpu, move |vcpu| {
                let r = &mut vcpu.registers;
                (r.rax, before.borrow_mut().0) = (number, r.rip);
                [r.rdi, r.rsi, r.rdx, r.r10, r.r8] = args;
                Exit::Guest(GuestExit::Hypercall)
            });
            let (after, told) = (seen.clone(), told.clone());
            self.act(vcpu, move |vcpu| {
                after.borrow_mut().1 = vcpu.registers.rip;
                *told.borrow_mut() = vcpu.registers.rax.cast_signed();
                Exit::Interrupted
            });
            let (before, after) = *seen.borrow();
            if before != after {
                assert_eq!(after, before + 3, "behind the instruction");
                return *result.borrow();
            }
        }
        panic!("hypercall {number} is continued without end");
    }

    fn call_with<T: FromBytes + IntoBytes + Immutable>(
        &mut self,
        vcpu: usize,
        number: u64,
        args: [u64; 2],
        argument: T,
    ) -> (i64, T) {
        self.system.write(self.id, SCRATCH, argument.as_bytes());
        let result = match number {
            VCPU_OP => self.call(vcpu, number, [args[0], args[1], SCRATCH, 0, 0]),
            _ => self.call(vcpu, number, [args[0], SCRATCH, 1, 0, 0]),
        };
        (result, self.system.get(self.id, SCRATCH))
    }

    fn wrmsr(&mut self, vcpu: usize, msr: u32, value: u64) {
        self.act(vcpu, move |vcpu| {
            vcpu.registers.rcx = msr.into();
            (vcpu.registers.rax, vcpu.registers.rdx) = (value & 0xffff_ffff, value >> 32);
            Exit::Guest(GuestExit::WriteMsr)
        });
    }

    fn rdmsr(&mut self, vcpu: usize, msr: u32) -> u64 {
        self.act(vcpu, move |vcpu| {
            vcpu.registers.rcx = msr.into();
            Exit::Guest(GuestExit::ReadMsr)
        });
        let value = Rc::new(RefCell::new(0));
        let told = value.clone();
        self.act(vcpu, move |vcpu| {
            let r = &vcpu.registers;
            *told.borrow_mut() = r.rax | r.rdx << 32;
            Exit::Interrupted
        });
        *value.borrow()
    }

    /// What a vCPU was told since the last question.
    fn told(&self, vcpu: usize) -> Vec<Event> {
        let frame = {
            let core = self.system.core.lock();
            core.domain(self.id).unwrap().vcpus[vcpu].frame
        };
        let mut machine = self.system.p.machine();
        let (own, rest) = machine.told.drain(..).partition(|(of, _)| *of == frame);
        machine.told = rest;
        let own: Vec<_> = own;
        own.into_iter().map(|(_, event)| event).collect()
    }

    fn wait_of(&self, vcpu: usize) -> Wait {
        self.system.core.lock().domain(self.id).unwrap().vcpus[vcpu].wait
    }

    fn started(&self, vcpu: usize) -> Option<Start> {
        let core = self.system.core.lock();
        core.domain(self.id).unwrap().vcpus[vcpu].state.as_ref().unwrap().guest.started
    }

    fn set_callback(&mut self) {
        let value = params::CALLBACK_VECTOR << 56 | u64::from(VECTOR);
        let op = HvmParam { domid: DomainId::SELF, pad: 0, index: 0, value };
        assert_eq!(self.call_with(0, HVM_OP, [hvm::SET_PARAM, 0], op).0, 0);
    }

    fn register_info(&mut self, vcpu: u64, gfn: u64, offset: u32) -> i64 {
        let op = RegisterVcpuInfo { mfn: gfn, offset, rsvd: 0 };
        self.call_with(0, VCPU_OP, [vcpu::REGISTER_VCPU_INFO, vcpu], op).0
    }

    fn start_other(&mut self) {
        self.wrmsr(0, 0x1b, 0xfee0_0c00);
        self.wrmsr(0, 0x830, 0x2_0000_c500);
        self.wrmsr(0, 0x830, 0x2_0000_8500);
        self.wrmsr(0, 0x830, 0x2_0000_0699);
    }

    fn is_live(&self) -> bool {
        self.system.is_live(self.id)
    }
}

#[test]
fn a_machine_without_virtualization_says_so() {
    let mut system = System::new();
    system.p.machine().guests = Err(NoGuests::Disabled);
    let mut plan = System::plan("guest");
    plan.kind = KIND_PVH;
    let (_, free) = system.core.lock().frames().counts();
    assert_eq!(system.control(control::CREATE, plan).0, Errno::ENODEV.to_result());
    assert_eq!(system.core.lock().frames().counts().1, free);
}

#[test]
fn only_guests_have_several_vcpus_and_at_most_eight() {
    let mut system = System::new();
    for (kind, vcpus, rights) in [(0, 2, 0), (KIND_PVH, 9, 0), (KIND_PVH, 1, 1), (2, 1, 0)] {
        let mut plan = System::plan("guest");
        (plan.kind, plan.vcpus, plan.rights) = (kind, vcpus, rights);
        let result = system.control(control::CREATE, plan).0;
        assert_eq!(result, Errno::EINVAL.to_result(), "{kind} {vcpus}");
    }
}

#[test]
fn the_first_vcpu_begins_where_its_builder_says_and_the_others_wait() {
    let guest = Guest::new(3);
    let start = Start::Pvh { entry: 0x1000, start_info: 0x3000 };
    assert_eq!(guest.started(0), Some(start));
    assert_eq!(guest.started(1), Some(Start::Reset));
    assert_eq!((guest.wait_of(1), guest.wait_of(2)), (Wait::Start, Wait::Start));
    guest.system.check();
}

/// §5.1, as Linux does it.
#[test]
fn a_vcpu_is_started_by_init_and_a_start_up_interrupt() {
    let mut guest = Guest::new(2);
    guest.start_other();
    assert_eq!(guest.started(1), Some(Start::Page(0x99)));
    assert_eq!(guest.wait_of(1), Wait::Nothing);
    // A second one comes too late to matter.
    guest.wrmsr(0, 0x830, 0x2_0000_0642);
    assert_eq!(guest.started(1), Some(Start::Page(0x99)));
    guest.system.check();
}

#[test]
fn the_identity_of_a_vcpu_is_the_same_everywhere() {
    let mut guest = Guest::new(2);
    guest.start_other();
    for vcpu in [0, 1] {
        let seen = Rc::new(RefCell::new([0; 4]));
        for leaf in [1, 0x4000_0004] {
            guest.act(vcpu, move |vcpu| {
                vcpu.registers.rax = leaf;
                Exit::Guest(GuestExit::Cpuid)
            });
            let told = seen.clone();
            guest.act(vcpu, move |vcpu| {
                let r = &vcpu.registers;
                *told.borrow_mut() = [r.rax, r.rbx, r.rcx, r.rdx];
                Exit::Interrupted
            });
            let [_, ebx, ecx, _] = *seen.borrow();
            match leaf {
                1 => assert_eq!(ebx >> 24, 2 * vcpu as u64),
                _ => assert_eq!((ebx, ecx), (vcpu as u64, guest.id.0.into())),
            }
        }
        guest.wrmsr(vcpu, 0x1b, 0xfee0_0c00);
        assert_eq!(guest.rdmsr(vcpu, 0x802), 2 * vcpu as u64);
    }
}

/// §9.4: by the vector, directly, and only when the guest can take it.
#[test]
fn an_event_comes_by_the_callback_vector() {
    let mut guest = Guest::new(1);
    guest.set_callback();
    let op = BindIpi { vcpu: 0, port: EventPort(0) };
    let (result, op) = guest.call_with(0, EVENT_CHANNEL_OP, [event::BIND_IPI, 0], op);
    assert_eq!(result, 0);
    guest.told(0);
    let port = PortOp { port: op.port };
    assert_eq!(guest.call_with(0, EVENT_CHANNEL_OP, [event::SEND, 0], port).0, 0);
    assert!(guest.told(0).contains(&Event::Interrupt(VECTOR)));
    // Not before it has interrupts on; then it is left as soon as it has.
    guest.act(0, |vcpu| {
        vcpu.registers.rflags &= !INTERRUPTS_ON;
        Exit::Interrupted
    });
    guest.told(0);
    let window = Rc::new(RefCell::new(false));
    let told = window.clone();
    guest.steps[0].borrow_mut().push_back(Box::new(move |vcpu| {
        *told.borrow_mut() = vcpu.guest.window;
        Exit::Interrupted
    }));
    guest.system.step(0);
    assert!(*window.borrow());
    assert_eq!(guest.told(0), []);
}

/// The second part of an area at the end of all addresses is at their start.
#[test]
fn times_of_states_may_be_asked_for_at_any_address() {
    let mut guest = Guest::new(1);
    for address in [u64::MAX, u64::MAX - 47, 0xffff_fff0, 0x2_0ff8, 0x2_1000] {
        let result = guest.call_with(0, VCPU_OP, [vcpu::REGISTER_RUNSTATE, 0], address).0;
        assert_eq!(result, 0, "{address:#x}: without paging every address is one");
        guest.system.check();
    }
}

/// §4.3: its own counter begins at 0, and the parameters of system time speak of that.
#[test]
fn a_life_begins_with_the_counter_at_0() {
    let mut guest = Guest::new(2);
    let (tsc, started) = {
        let core = guest.system.core.lock();
        let domain = core.domain(guest.id).unwrap();
        (guest.system.p.clock().tsc_at_zero, domain.started_ns)
    };
    assert_ne!(started, 0);
    // A tick of the fake machine is a ns.
    let begin = tsc.wrapping_sub(started + tsc);
    let timestamp = |guest: &Guest, vcpu: usize| -> u64 {
        let core = guest.system.core.lock();
        let shared = core.domain(guest.id).unwrap().shared;
        guest.system.p.load64(shared, vcpu * 64 + VCPU_TIME + TSC_TIMESTAMP)
    };
    assert_eq!([0, 1].map(|vcpu| timestamp(&guest, vcpu)), [begin; 2]);
    guest.system.advance(5_000);
    let now = guest.system.p.tsc();
    guest.wrmsr(0, 0x10, 77);
    assert_eq!([0, 1].map(|vcpu| timestamp(&guest, vcpu)), [(tsc + 77).wrapping_sub(now), begin]);
}

/// §4.2: nothing that was noted in the old place is lost, and the page cannot become another's.
#[test]
fn vcpu_info_moves_once_and_its_page_is_kept() {
    let mut guest = Guest::new(2);
    assert_eq!(guest.register_info(0, 5, 4090), Errno::ENXIO.to_result());
    assert_eq!(guest.register_info(0, 5, 12), Errno::EINVAL.to_result());
    assert_eq!(guest.register_info(0, 0x500, 64), Errno::EINVAL.to_result());
    assert_eq!(guest.register_info(2, 5, 64), Errno::ENOENT.to_result());
    assert_eq!(guest.register_info(1, 5, 128), 0);
    assert_eq!(guest.register_info(0, 5, 64), 0);
    assert_eq!(guest.register_info(0, 6, 64), Errno::EBUSY.to_result());
    let info: [u64; 8] = guest.system.get(guest.id, 5 * 4096 + 128);
    assert_eq!(info[VCPU_UPCALL_PENDING], 1);
    assert_eq!(info[VCPU_PENDING_SEL / 8], u64::MAX);
    assert_ne!(info[VCPU_TIME / 8 + 3] & 0xffff_ffff, 0, "a clock");
    guest.system.check();
    // The guest gives the page away; the core goes on to write to the frame, which is nobody's.
    let orphans = guest.system.core.lock().frames().orphans();
    guest.system.write(guest.id, SCRATCH + 64, &5_u64.to_le_bytes());
    let mut op = Reservation::new_zeroed();
    (op.extent_start, op.nr_extents, op.domid) = (SCRATCH + 64, 1, DomainId::SELF);
    assert_eq!(guest.call_with(0, MEMORY_OP, [DECREASE_RESERVATION, 0], op).0, 1);
    assert_eq!(guest.system.core.lock().frames().orphans(), orphans + 1);
    guest.system.check();
    guest.system.destroy(guest.id);
    assert_eq!(guest.system.core.lock().frames().orphans(), orphans);
    guest.system.check();
}

/// §3.4: a guest may give memory back and get it again, and no more than it had.
#[test]
fn memory_goes_back_and_forth() {
    let mut guest = Guest::new(1);
    let pages = guest.system.info(guest.id).pages;
    let list: Vec<u64> = (20..30).collect();
    let reservation = |count| {
        let mut op = Reservation::new_zeroed();
        (op.extent_start, op.nr_extents, op.domid) = (SCRATCH + 256, count, DomainId::SELF);
        op
    };
    guest.system.write(guest.id, SCRATCH + 256, list.as_bytes());
    let decrease = [DECREASE_RESERVATION, 0];
    assert_eq!(guest.call_with(0, MEMORY_OP, decrease, reservation(10)).0, 10);
    assert_eq!(guest.system.info(guest.id).pages, pages - 10);
    // XSA-277: what is gone is not given back again.
    assert_eq!(guest.call_with(0, MEMORY_OP, decrease, reservation(10)).0, 0);
    assert!(guest.system.page(guest.id, Gfn(25)).is_none());
    assert_eq!(guest.call_with(0, MEMORY_OP, [POPULATE_PHYSMAP, 0], reservation(10)).0, 10);
    assert_eq!(guest.system.info(guest.id).pages, pages);
    assert_eq!(guest.system.get::<[u8; 16]>(guest.id, 25 * 4096), [0; 16]);
    guest.system.check();
}

/// A handler's own hypercalls would end what is half done, or go on with it.
#[test]
fn no_event_comes_between_two_parts_of_a_hypercall() {
    let mut guest = Guest::new(1);
    guest.set_callback();
    let op = BindIpi { vcpu: 0, port: EventPort(0) };
    let (_, op) = guest.call_with(0, EVENT_CHANNEL_OP, [event::BIND_IPI, 0], op);
    guest.system.write(guest.id, SCRATCH + 8, PortOp { port: op.port }.as_bytes());
    let gfns: Vec<u64> = (0x100..0x100 + 70).collect();
    guest.system.write(guest.id, SCRATCH + 256, gfns.as_bytes());
    let mut list = Reservation::new_zeroed();
    (list.extent_start, list.nr_extents, list.domid) = (SCRATCH + 256, 70, DomainId::SELF);
    guest.system.write(guest.id, SCRATCH + 32, list.as_bytes());
    let start = |vcpu: &mut FakeVcpu, number, command, argument| {
        let r = &mut vcpu.registers;
        (r.rax, r.rdi, r.rsi) = (number, command, argument);
        Exit::Guest(GuestExit::Hypercall)
    };
    // An event waits for interrupts to come on when a long hypercall begins.
    guest.act(0, move |vcpu| {
        vcpu.registers.rflags &= !INTERRUPTS_ON;
        start(vcpu, EVENT_CHANNEL_OP, event::SEND, SCRATCH + 8)
    });
    guest.told(0);
    guest.act(0, move |vcpu| start(vcpu, MEMORY_OP, POPULATE_PHYSMAP, SCRATCH + 32));
    assert!(guest.system.page(guest.id, Gfn(0x100)).is_some());
    assert!(guest.system.page(guest.id, Gfn(0x100 + 69)).is_none(), "in parts");
    guest.act(0, |_| Exit::Interrupted);
    assert_eq!(guest.told(0), []);
    guest.act(0, move |vcpu| start(vcpu, MEMORY_OP, POPULATE_PHYSMAP, SCRATCH + 32));
    guest.act(0, |vcpu| {
        assert_eq!(vcpu.registers.rax, 70, "all of them");
        Exit::Interrupted
    });
    assert_eq!(guest.told(0), [Event::Interrupt(VECTOR)]);
}

#[test]
fn shared_info_takes_the_place_of_memory() {
    let mut guest = Guest::new(1);
    let pages = guest.system.info(guest.id).pages;
    let mut op = AddToPhysmap::new_zeroed();
    (op.domid, op.space, op.gpfn) = (DomainId::SELF, SPACE_SHARED_INFO, 0x10);
    assert_eq!(guest.call_with(0, MEMORY_OP, [ADD_TO_PHYSMAP, 0], op).0, 0);
    assert_eq!(guest.system.info(guest.id).pages, pages - 1);
    // It moves, and leaves nothing behind.
    op.gpfn = 0x100;
    assert_eq!(guest.call_with(0, MEMORY_OP, [ADD_TO_PHYSMAP, 0], op).0, 0);
    assert!(guest.system.page(guest.id, Gfn(0x10)).is_none());
    let shared: [u64; 8] = guest.system.get(guest.id, 0x100 << 12);
    assert_ne!(shared[VCPU_TIME / 8 + 3] & 0xffff_ffff, 0, "a clock before anybody asks");
    // What the next incarnation misses is put back.
    guest.system.control_domain(control::CRASH, guest.id);
    assert_eq!(guest.system.control_domain(control::RESTART, guest.id), 0);
    let access = ACCESS_READ | ACCESS_WRITE | ACCESS_EXECUTE;
    let mut op = Populate::new_zeroed();
    (op.domid, op.access, op.flags, op.count) = (guest.id, access, POPULATE_MISSING, PAGES);
    let (result, op) = guest.system.control(control::POPULATE, op);
    assert_eq!((result, op.done), (0, PAGES.into()));
    assert!(guest.system.page(guest.id, Gfn(0x10)).is_some());
    guest.system.check();
}

#[test]
fn timers_are_each_vcpu_s_own() {
    let mut guest = Guest::new(2);
    guest.start_other();
    let mut ports = Vec::new();
    for vcpu in [0, 1] {
        let op = BindVirq { virq: VIRQ_TIMER, vcpu, port: EventPort(0) };
        let (result, op) = guest.call_with(0, EVENT_CHANNEL_OP, [event::BIND_VIRQ, 0], op);
        assert_eq!(result, 0);
        ports.push(op.port);
    }
    let now = guest.system.p.now_ns();
    let op = SetSingleshotTimer { timeout_abs_ns: now + 5_000, flags: 0, pad: 0 };
    let own = [vcpu::SET_SINGLESHOT_TIMER, 1];
    assert_eq!(guest.call_with(0, VCPU_OP, own, op).0, Errno::EINVAL.to_result());
    assert_eq!(guest.call_with(1, VCPU_OP, own, op).0, 0);
    guest.system.advance(10_000);
    guest.system.step(0);
    assert!(guest.system.is_pending(guest.id, ports[1]));
    assert!(!guest.system.is_pending(guest.id, ports[0]));
    // One that is past: at once, unless that is not wanted.
    let past = SetSingleshotTimer { timeout_abs_ns: 1, flags: 1, pad: 0 };
    let own = [vcpu::SET_SINGLESHOT_TIMER, 0];
    assert_eq!(guest.call_with(0, VCPU_OP, own, past).0, Errno::ETIME.to_result());
    assert!(!guest.system.is_pending(guest.id, ports[0]));
    let past = SetSingleshotTimer { flags: 0, ..past };
    assert_eq!(guest.call_with(0, VCPU_OP, own, past).0, 0);
    assert!(guest.system.is_pending(guest.id, ports[0]));
    guest.system.check();
}

/// §0, 5.
#[test]
fn when_all_vcpus_halt_without_interrupts_the_domain_is_off() {
    let mut guest = Guest::new(2);
    guest.start_other();
    for (vcpu, lives) in [(1, true), (0, false)] {
        guest.act(vcpu, |vcpu| {
            vcpu.registers.rflags &= !INTERRUPTS_ON;
            Exit::Guest(GuestExit::Halt)
        });
        assert_eq!(guest.is_live(), lives);
    }
    let death = guest.system.death(guest.id);
    assert_eq!((death.cause, death.detail), (DEATH_SHUTDOWN, 0));
    guest.system.check();
}

#[test]
fn an_interrupt_between_vcpus_wakes_and_is_told_once() {
    let mut guest = Guest::new(2);
    guest.start_other();
    for vcpu in [0, 1] {
        guest.wrmsr(vcpu, 0x1b, 0xfee0_0c00);
        guest.wrmsr(vcpu, 0x80f, 0x1ff);
    }
    guest.exit(1, GuestExit::Halt);
    assert_eq!(guest.wait_of(1), Wait::Event);
    guest.told(1);
    guest.wrmsr(0, 0x830, 0x2_0000_00f6);
    assert_eq!(guest.wait_of(1), Wait::Nothing);
    for _ in 0..4 {
        guest.exit(1, GuestExit::Halt);
    }
    assert_eq!(guest.told(1), [Event::Interrupt(0xf6)]);
    guest.wrmsr(0, 0x830, 0x2_0000_0400);
    guest.exit(1, GuestExit::Halt);
    assert_eq!(guest.told(1), [Event::Nmi]);
}

#[test]
fn what_is_not_listed_faults_and_is_counted() {
    let mut guest = Guest::new(1);
    guest.wrmsr(0, 0xc001_1020, 5);
    guest.exit(0, GuestExit::Nothing);
    assert_eq!(guest.told(0), [Event::Exception(13, Some(0))]);
    guest.exit(0, GuestExit::SetXcr);
    guest.exit(0, GuestExit::Nothing);
    assert_eq!(guest.told(0), [Event::Exception(6, None)]);
    let result = guest.call(0, 40, [7, 0, 0, 0, 0]);
    assert_eq!(result, Errno::ENOSYS.to_result());
    assert_eq!(guest.call(0, CONTROL_OP, [0; 5]), Errno::ENOSYS.to_result(), "no rights at all");
    assert_eq!(guest.call(0, GRANT_TABLE_OP, [0, SCRATCH, 1, 0, 0]), Errno::ENOSYS.to_result());
    let mut op = ExitCounts::new_zeroed();
    op.domid = guest.id;
    let (result, op) = guest.system.control(control::GET_EXITS, op);
    assert_eq!((result, op.unlisted), (0, 4));
    assert_eq!(op.last_unlisted >> 32, 5);
}

/// AMD64 APM volume 4, XSETBV.
#[test]
fn xcr0_is_written_by_the_rules() {
    let mut guest = Guest::new(1);
    let attempts =
        [(0, 0, 7, true), (0, 0, 3, true), (0, 0, 5, false), (0, 1, 3, false), (3, 0, 3, false)];
    for (cpl, register, value, is_taken) in attempts {
        guest.act(0, move |vcpu| {
            (vcpu.guest.mode.cr4, vcpu.guest.mode.cpl) = (1 << 18, cpl);
            (vcpu.registers.rcx, vcpu.registers.rax, vcpu.registers.rdx) = (register, value, 0);
            Exit::Guest(GuestExit::SetXcr)
        });
        let xcr0 = Rc::new(RefCell::new(0));
        let found = xcr0.clone();
        guest.act(0, move |vcpu| {
            *found.borrow_mut() = vcpu.guest.msrs[GuestMsr::Xcr0 as usize];
            vcpu.guest.mode.cpl = 0;
            Exit::Interrupted
        });
        let fault = Event::Exception(13, Some(0));
        assert_eq!(guest.told(0).contains(&fault), !is_taken, "{cpl} {register} {value}");
        assert_eq!(*xcr0.borrow(), if is_taken { value } else { 3 });
    }
}

#[test]
fn ports_answer_as_the_specification_says() {
    let mut guest = Guest::new(1);
    for (port, bytes, expected) in
        [(0x42, 1, 0x1122_3300), (0x60, 1, 0x1122_33ff), (0xcfc, 4, 0xffff_ffff)]
    {
        let access = PortAccess {
            port,
            bytes,
            write: false,
            string: false,
            repeat: false,
            address_bytes: 8,
            next_rip: 0x5000,
        };
        guest.act(0, move |vcpu| {
            vcpu.registers.rax = 0x1122_3344;
            Exit::Guest(GuestExit::Port(access))
        });
        let seen = Rc::new(RefCell::new((0, 0)));
        let told = seen.clone();
        guest.act(0, move |vcpu| {
            *told.borrow_mut() = (vcpu.registers.rax, vcpu.registers.rip);
            Exit::Interrupted
        });
        assert_eq!(*seen.borrow(), (expected, 0x5000));
    }
}

/// REP OUTSB to the debug console, more than one exit takes.
#[test]
fn strings_go_to_the_debug_console_whole() {
    let mut guest = Guest::new(1);
    let text: Vec<u8> = (0..150).map(|n| b'a' + n % 26).collect();
    guest.system.write(guest.id, 0x9f80, &text);
    let access = PortAccess {
        port: 0xe9,
        bytes: 1,
        write: true,
        string: true,
        repeat: true,
        address_bytes: 8,
        next_rip: 0x5000,
    };
    guest.act(0, |vcpu| {
        (vcpu.registers.rsi, vcpu.registers.rcx, vcpu.registers.rip) = (0x9f80, 150, 0x4000);
        Exit::Interrupted
    });
    let last = Rc::new(RefCell::new((0, 0, 0)));
    while last.borrow().0 != 0x5000 {
        guest.act(0, move |_| Exit::Guest(GuestExit::Port(access)));
        let told = last.clone();
        guest.act(0, move |vcpu| {
            *told.borrow_mut() = (vcpu.registers.rip, vcpu.registers.rcx, vcpu.registers.rsi);
            Exit::Interrupted
        });
    }
    assert_eq!(*last.borrow(), (0x5000, 0, 0x9f80 + 150));
    let mut tail = [0; 150];
    let core = guest.system.core.lock();
    assert_eq!(core.console_tail(&guest.system.p, guest.id, &mut tail), 150);
    assert_eq!(tail[..], text[..]);
}

#[test]
fn hypercalls_are_the_kernel_s_alone() {
    let mut guest = Guest::new(1);
    guest.act(0, |vcpu| {
        vcpu.guest.mode.cpl = 3;
        vcpu.registers.rax = XEN_VERSION;
        vcpu.registers.rdi = 0;
        Exit::Guest(GuestExit::Hypercall)
    });
    let seen = Rc::new(RefCell::new(0));
    let told = seen.clone();
    guest.act(0, move |vcpu| {
        *told.borrow_mut() = vcpu.registers.rax.cast_signed();
        Exit::Interrupted
    });
    assert_eq!(*seen.borrow(), Errno::EPERM.to_result());
}

#[test]
fn parameters_are_the_builder_s_and_then_readable() {
    let mut guest = Guest::new(1);
    let set = |index, value| HvmParam { domid: DomainId::SELF, pad: 0, index, value };
    let get = [hvm::GET_PARAM, 0];
    assert_eq!(guest.call_with(0, HVM_OP, get, set(params::STORE_PFN, 9)).1.value, 0);
    assert_eq!(guest.call_with(0, HVM_OP, get, set(4, 0)).0, Errno::EINVAL.to_result());
    assert_eq!(guest.call_with(0, HVM_OP, get, set(10, 0)).0, Errno::EPERM.to_result());
    let put = [hvm::SET_PARAM, 0];
    let result = guest.call_with(0, HVM_OP, put, set(params::STORE_PFN, 1)).0;
    assert_eq!(result, Errno::EPERM.to_result());
    // Not while it runs.
    let op = SetHvmParam { domid: guest.id, pad: 0, index: params::STORE_PFN, value: 7 };
    assert_eq!(guest.system.control(control::SET_HVM_PARAM, op).0, Errno::EBUSY.to_result());
    guest.system.control_domain(control::CRASH, guest.id);
    assert_eq!(guest.system.control_domain(control::RESTART, guest.id), 0);
    assert_eq!(guest.system.control(control::SET_HVM_PARAM, op).0, 0);
}

/// While one vCPU takes memory away, no other runs with what it had cached.
#[test]
fn an_address_space_is_narrowed_by_one_vcpu_alone() {
    let mut guest = Guest::on(2, Config { cpus: 2, ..Config::default() });
    guest.start_other();
    // The second vCPU computes on the second processor.
    for _ in 0..64 {
        guest.steps[1].borrow_mut().push_back(Box::new(|vcpu| {
            vcpu.guest.mode.code_bits = 64;
            vcpu.registers.rflags |= INTERRUPTS_ON;
            Exit::Interrupted
        }));
    }
    guest.system.run(1, 4);
    let on_cpu = |guest: &Guest| guest.system.core.lock().domain(guest.id).unwrap().vcpus[1].on_cpu;
    assert_eq!(on_cpu(&guest), Some(1));
    guest.system.write(guest.id, SCRATCH + 256, &30_u64.to_le_bytes());
    let mut op = Reservation::new_zeroed();
    (op.extent_start, op.nr_extents, op.domid) = (SCRATCH + 256, 1, DomainId::SELF);
    guest.system.write(guest.id, SCRATCH, op.as_bytes());
    let ask = |vcpu: &mut FakeVcpu| {
        vcpu.guest.mode.code_bits = 64;
        vcpu.registers.rax = MEMORY_OP;
        (vcpu.registers.rdi, vcpu.registers.rsi) = (DECREASE_RESERVATION, SCRATCH);
        Exit::Guest(GuestExit::Hypercall)
    };
    guest.act(0, ask);
    assert!(guest.system.page(guest.id, Gfn(30)).is_some(), "not while the other one runs");
    // It was kicked, and is not run again until that is done.
    assert!(guest.system.p.machine().kicks.contains(&CpuId(1)));
    guest.system.run(1, 3);
    assert_eq!(on_cpu(&guest), None);
    guest.steps[0].borrow_mut().push_back(Box::new(ask));
    while !guest.steps[0].borrow().is_empty() {
        guest.system.step(0);
    }
    assert!(guest.system.page(guest.id, Gfn(30)).is_none());
    guest.system.run(1, 3);
    assert_eq!(on_cpu(&guest), Some(1));
    guest.system.check();
}

/// A processor that the machine layer leaves out runs no guest; neither it nor the others idle while
/// there is something for them.
#[test]
fn guests_stay_on_their_processors() {
    let mut guest = Guest::on(1, Config { cpus: 2, guest_cpus: 0b10, ..Config::default() });
    let (system, id) = (&mut guest.system, guest.id);
    let other = system.guest("other");
    (0..8).for_each(|_| [0, 1].iter().for_each(|&cpu| system.step(cpu)));
    // On the second processor is who could run on the first one as well.
    system.spin(other);
    system.run(1, 3);
    assert_eq!(system.core.lock().domain(other).unwrap().vcpu().on_cpu, Some(1));
    system.run(0, 8);
    let cpus = Rc::new(RefCell::new(BTreeSet::new()));
    let seen = cpus.clone();
    let frame = system.core.lock().domain(id).unwrap().vcpu().frame;
    let compute = move |p: &mut Fake, _: &mut FakeVcpu, _| {
        seen.borrow_mut().insert(p.cpu().0);
        p.spin(1_000_000)
    };
    system.p.machine().guest_programs.insert(frame, Box::new(compute));
    system.wake_vcpu(VcpuId::first(id));
    system.run(0, 4);
    let used = |system: &System| {
        let core = system.core.lock();
        [id, other].map(|id| core.domain(id).unwrap().vcpu().cpu_ns)
    };
    let (before, start) = (used(system), system.p.machine().now_ns);
    system.p.machine().kicks.clear();
    for _ in 0..200 {
        system.step(1);
        // The first one waits until somebody ends that.
        if system.p.machine().kicks.contains(&CpuId(0)) {
            system.step(0);
        }
    }
    system.check();
    let took = system.p.machine().now_ns - start;
    let now = used(system);
    let is_busy = now.iter().zip(before).all(|(now, before)| now - before > took * 8 / 10);
    assert!(is_busy, "{before:?}, {now:?} in {took}");
    assert_eq!(*cpus.borrow(), [1].into());
}

#[test]
fn a_domain_ends_when_the_last_of_its_vcpus_is_off_its_processor() {
    let mut guest = Guest::on(2, Config { cpus: 2, ..Config::default() });
    guest.start_other();
    for _ in 0..64 {
        guest.steps[1].borrow_mut().push_back(Box::new(|_| Exit::Interrupted));
    }
    guest.system.run(1, 4);
    guest.system.write(guest.id, SCRATCH, &3_u32.to_le_bytes());
    guest.act(0, |vcpu| {
        vcpu.registers.rax = SCHED_OP;
        (vcpu.registers.rdi, vcpu.registers.rsi) = (2, SCRATCH);
        Exit::Guest(GuestExit::Hypercall)
    });
    assert!(guest.is_live(), "a processor still runs the other vCPU");
    guest.system.run(1, 2);
    assert!(!guest.is_live());
    let death = guest.system.death(guest.id);
    assert_eq!((death.cause, death.detail), (DEATH_SHUTDOWN, 3));
    guest.system.destroy(guest.id);
    guest.system.check();
    let core = guest.system.core.lock();
    assert!(core.domain(guest.id).is_none() && core.domain(D0).unwrap().stage == Stage::Live);
}

/// Numbers that mean something somewhere, and any others.
fn number() -> impl Strategy<Value = u64> {
    prop_oneof![
        0_u64..64,
        Just(SCRATCH),
        SCRATCH..SCRATCH + 4096,
        (0_u64..64).prop_map(|page| page << 12),
        Just(u64::MAX),
        u64::MAX - 64..u64::MAX,
        Just(0x8000_0000_0000),
        Just(0xfee0_0030),
        any::<u64>(),
    ]
}

fn msr() -> impl Strategy<Value = u64> {
    prop_oneof![
        Just(0x1b_u64),
        Just(0xc000_0080),
        Just(0x277),
        Just(0x4000_0000),
        0x800_u64..0x840,
        0x200_u64..0x300,
        any::<u32>().prop_map(u64::from),
    ]
}

/// Everything that a processor may report, with anything in it.
fn exit() -> impl Strategy<Value = GuestExit> {
    let port = (any::<u16>(), 0_u8..3, any::<[bool; 3]>(), 1_u32..4, number());
    let port = port.prop_map(|(port, bytes, [write, string, repeat], address, next_rip)| {
        let (bytes, address_bytes) = (1 << bytes, 1 << address);
        GuestExit::Port(PortAccess { port, bytes, write, string, repeat, address_bytes, next_rip })
    });
    prop_oneof![
        8 => Just(GuestExit::Hypercall),
        2 => Just(GuestExit::Cpuid),
        2 => Just(GuestExit::ReadMsr),
        4 => Just(GuestExit::WriteMsr),
        1 => Just(GuestExit::Halt),
        2 => port,
        1 => (number(), any::<bool>()).prop_map(|(gpa, write)| {
            GuestExit::Memory { gpa, write, implicit: false }
        }),
        1 => Just(GuestExit::Window),
        1 => Just(GuestExit::NmiDone),
        1 => Just(GuestExit::SetXcr),
        1 => Just(GuestExit::Nothing),
        1 => Just(GuestExit::Exception { vector: 1, error: None }),
    ]
}

/// One step: which vCPU, in which mode, with which registers, and why it stops.
#[derive(Clone, Debug)]
struct Attack {
    vcpu: usize,
    bits: u8,
    paging: [u64; 3],
    registers: [u64; 6],
    flags: u64,
    msr: u64,
    exit: GuestExit,
    memory: [u64; 4],
}

fn attack() -> impl Strategy<Value = Attack> {
    let bits = prop_oneof![6 => Just(64_u8), 1 => Just(32), 1 => Just(16)];
    let paging = prop_oneof![
        6 => Just([0; 3]),
        // PG and WP; PAE; LMA.
        1 => number().prop_map(|cr3| [1 << 31 | 1 << 16 | 1, cr3, 1 << 10]),
        1 => number().prop_map(|cr3| [1 << 31 | 1, cr3, 0]),
    ];
    let number = [number(), number(), number(), number(), number(), number()];
    let memory = [0_u64..64, 0..u64::MAX, 0..4096, 0..64];
    (0_usize..2, bits, paging, number, any::<bool>(), msr(), exit(), memory).prop_map(
        |(vcpu, bits, paging, registers, on, msr, exit, memory)| {
            let flags = if on { INTERRUPTS_ON } else { 0 };
            Attack { vcpu, bits, paging, registers, flags, msr, exit, memory }
        },
    )
}

/// Lets a guest's vCPU stop for a reason, with `byte` everywhere on the core's stack.
fn hit(guest: &mut Guest, attack: Attack, byte: u8) {
    let words = attack.memory;
    if guest.system.page(guest.id, Gfn::containing(SCRATCH)).is_some() {
        guest.system.write(guest.id, SCRATCH, words.as_bytes());
    }
    let steps = guest.steps[attack.vcpu].clone();
    steps.borrow_mut().push_back(Box::new(move |vcpu| {
        let mode = &mut vcpu.guest.mode;
        mode.code_bits = attack.bits;
        [mode.cr0, mode.cr3, mode.efer] = attack.paging;
        mode.cr4 = 1 << 5;
        let r = &mut vcpu.registers;
        [r.rax, r.rdi, r.rsi, r.rdx, r.r10, r.rbx] = attack.registers;
        r.rax = if r.rax > 64 { r.rax } else { r.rax % 48 };
        r.rcx = attack.msr;
        r.rflags = attack.flags;
        Exit::Guest(attack.exit)
    }));
    for vcpu in [0, 1] {
        guest.system.wake_vcpu(VcpuId { domain: guest.id, index: vcpu });
    }
    poison_stack(byte);
    guest.system.run(0, 4);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: if cfg!(miri) { 2 } else { 192 }, ..ProptestConfig::default() })]

    /// Whatever a guest's vCPUs do, nobody else is hurt, and nothing is lost.
    #[test]
    fn hostile_guests_hurt_nobody(attacks in proptest::collection::vec(attack(), 1..60)) {
        let mut guest = Guest::new(2);
        guest.start_other();
        let other = guest.system.guest("other");
        for attack in attacks {
            if !guest.is_live() {
                break;
            }
            hit(&mut guest, attack, 0);
        }
        guest.system.check();
        let result = guest.system.alloc_unbound(other, D0);
        prop_assert!(result.is_ok(), "others go on");
        guest.system.destroy(guest.id);
        guest.system.destroy(other);
        guest.system.check();
        prop_assert!(guest.system.is_live(D0));
    }

    /// As for unikernels' calls, in `hostile`: nothing that a guest sees depends on what was on the
    /// core's stack when it stopped.
    #[test]
    fn nothing_of_the_stack_reaches_a_guest(
        attacks in proptest::collection::vec(attack(), 1..20),
    ) {
        let seen = [0x5a, 0xc3].map(|byte| {
            let mut guest = Guest::new(2);
            guest.start_other();
            for attack in &attacks {
                if guest.is_live() {
                    hit(&mut guest, attack.clone(), byte);
                }
            }
            guest.system.visible()
        });
        prop_assert!(seen[0] == seen[1], "the same with anything on the stack");
    }
}
