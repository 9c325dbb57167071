//! Event channels: symmetric, never lost, never somebody else's.

use axolotl_abi::control::{self, Rights};
use hv_core::event::PORT_LIMIT;
use hv_core::fake::{D0, System};
use xen_abi::event::{self, *};
use xen_abi::hypercall::{EVENT_CHANNEL_OP, SCHED_OP};
use xen_abi::sched;
use xen_abi::shared_info::{EVTCHN_MASK, VCPU_PENDING_SEL, VCPU_UPCALL_PENDING};
use xen_abi::{DomainId, Errno, EventPort};

fn shared(system: &System, id: DomainId, offset: usize) -> u64 {
    let mfn = system.core.lock().domain(id).unwrap().shared;
    hv_core::platform::Platform::load64(&system.p, mfn, offset)
}

fn set_shared(system: &mut System, id: DomainId, offset: usize, value: u64) {
    let mfn = system.core.lock().domain(id).unwrap().shared;
    hv_core::platform::Platform::store64(&mut system.p, mfn, offset, value);
}

fn connected() -> (System, [(DomainId, EventPort); 2]) {
    let mut system = System::new();
    let a = system.guest("a");
    let b = system.guest("b");
    let theirs = system.alloc_unbound(a, b).unwrap();
    let mine = system.bind(b, a, theirs).unwrap();
    system.clear_pending(b, mine);
    (system, [(a, theirs), (b, mine)])
}

#[test]
fn an_event_sets_bit_selector_and_flag_in_this_order_of_dependence() {
    let (mut system, [(a, theirs), (b, mine)]) = connected();
    system.run(0, 6);
    assert_eq!(system.send(b, mine), 0);
    assert!(system.is_pending(a, theirs) && !system.is_pending(b, mine));
    // Masked: pending only; unmasking tells.
    system.clear_pending(a, theirs);
    system.run(0, 6);
    set_shared(&mut system, a, EVTCHN_MASK, !0);
    system.send(b, mine);
    assert!(system.is_pending(a, theirs));
    assert_eq!(shared(&system, a, VCPU_UPCALL_PENDING) & 0xff, 0);
    // Control pauses it so that its idle program does not acknowledge before we look.
    assert_eq!(system.control_domain(control::PAUSE, a), 0);
    let op = PortOp { port: theirs };
    assert_eq!(system.control_domain(control::UNPAUSE, a), 0);
    assert_eq!(system.call_with(a, EVENT_CHANNEL_OP, event::UNMASK, op).0, 0);
    assert_eq!(shared(&system, a, VCPU_UPCALL_PENDING) & 0xff, 1);
    assert_eq!(shared(&system, a, VCPU_PENDING_SEL), 1);
    // Pending and not masked now: unmasking again tells nothing new.
    set_shared(&mut system, a, VCPU_UPCALL_PENDING, 0);
    set_shared(&mut system, a, VCPU_PENDING_SEL, 0);
    assert_eq!(system.call_with(a, EVENT_CHANNEL_OP, event::UNMASK, op).0, 0);
    assert_eq!(shared(&system, a, VCPU_UPCALL_PENDING) & 0xff, 0);
}

#[test]
fn block_returns_at_once_with_an_event_and_else_at_the_next() {
    let (mut system, [(a, _), (b, mine)]) = connected();
    system.run(0, 6);
    system.send(b, mine);
    assert_eq!(system.call(a, SCHED_OP, [sched::BLOCK, 0, 0, 0, 0]), 0);
    assert_eq!(system.info(a).state, control::STATE_BLOCKED, "then its idle program blocks");
}

#[test]
fn closing_frees_the_port_and_unbinds_the_peers_for_the_closer() {
    let (mut system, [(a, theirs), (b, mine)]) = connected();
    let other = system.guest("other");
    assert_eq!(system.close(b, mine), 0);
    assert_eq!(system.close(b, mine), Errno::EINVAL.to_result());
    assert_eq!(system.bind(other, a, theirs), Err(Errno::EINVAL.to_result()), "not for it");
    let again = system.bind(b, a, theirs).unwrap();
    assert_eq!(again, mine, "the lowest free one");
    system.check();
    assert_eq!(system.close(a, theirs), 0);
    assert_eq!(system.bind(b, a, theirs), Err(Errno::EINVAL.to_result()));
    system.check();
}

#[test]
fn a_port_to_itself_closes_whole() {
    let mut system = System::new();
    let guest = system.guest("guest");
    let far = system.alloc_unbound(guest, DomainId::SELF).unwrap();
    let near = system.bind(guest, DomainId::SELF, far).unwrap();
    assert_eq!(system.send(guest, near), 0);
    assert!(system.is_pending(guest, far));
    system.check();
    system.restart(guest);
    assert_eq!(system.info(guest).ports, 0);
    system.check();
}

#[test]
fn a_new_port_has_no_event_of_the_last_one() {
    let (mut system, [(a, theirs), (b, mine)]) = connected();
    system.send(b, mine);
    system.close(a, theirs);
    let again = system.alloc_unbound(a, b).unwrap();
    assert_eq!(again, theirs);
    assert!(!system.is_pending(a, again));
}

#[test]
fn virtual_interrupts_are_bound_once_and_only_those_that_exist() {
    let mut system = System::new();
    let guest = system.guest("guest");
    let errno = |errno: Errno| Err(errno.to_result());
    assert!(system.bind_virq(guest, event::VIRQ_TIMER).is_ok());
    assert_eq!(system.bind_virq(guest, event::VIRQ_TIMER), errno(Errno::EEXIST));
    for virq in [NR_VIRQS, NR_VIRQS + 1, u32::MAX] {
        assert_eq!(system.bind_virq(guest, virq), errno(Errno::EINVAL));
    }
    for (virq, expected) in [(event::VIRQ_TIMER, Errno::ENOENT), (5, Errno::EINVAL)] {
        let op = BindVirq { virq, vcpu: 1, port: EventPort(0) };
        let (result, _) = system.call_with(guest, EVENT_CHANNEL_OP, event::BIND_VIRQ, op);
        assert_eq!(result, expected.to_result());
    }
    let op = BindIpi { vcpu: 1, port: EventPort(0) };
    let (result, _) = system.call_with(guest, EVENT_CHANNEL_OP, event::BIND_IPI, op);
    assert_eq!(result, Errno::ENOENT.to_result());
    let op = BindIpi { vcpu: 0, port: EventPort(0) };
    let (_, op) = system.call_with(guest, EVENT_CHANNEL_OP, event::BIND_IPI, op);
    assert_eq!(system.send(guest, op.port), 0);
    assert!(system.is_pending(guest, op.port));
    system.check();
}

#[test]
fn global_interrupts_go_to_who_has_the_right_and_to_nobody_else() {
    let mut system = System::new();
    let guest = system.guest("guest");
    let spy = system.bind_virq(guest, event::VIRQ_CON_RING).unwrap();
    let spy_on_serial = system.bind_virq(guest, event::VIRQ_CONSOLE).unwrap();
    assert!(!system.p.machine().serial_on);
    let port = system.bind_virq(D0, event::VIRQ_CON_RING).unwrap();
    let serial = system.bind_virq(D0, event::VIRQ_CONSOLE).unwrap();
    assert!(system.p.machine().serial_on);
    system.write(guest, hv_core::fake::SCRATCH, b"hello");
    let args = [0, 5, hv_core::fake::SCRATCH, 0, 0];
    assert_eq!(system.call(guest, xen_abi::hypercall::CONSOLE_IO, args), 0);
    assert!(system.is_pending(D0, port) && !system.is_pending(guest, spy));
    system.run(0, 10);
    system.p.machine().interrupts[0].push_back(hv_core::platform::Exit::Serial);
    system.run(0, 4);
    assert!(system.is_pending(D0, serial) && !system.is_pending(guest, spy_on_serial));
    system.close(D0, serial);
    assert!(!system.p.machine().serial_on);
}

#[test]
fn status_tells_of_own_ports_and_of_those_that_the_caller_built() {
    let (mut system, [(a, theirs), (b, mine)]) = connected();
    let mut op = Status {
        dom: DomainId::SELF,
        pad: 0,
        port: theirs,
        status: 9,
        vcpu: 9,
        detail: 9,
        remote_port: EventPort(9),
    };
    let (result, own) = system.call_with(a, EVENT_CHANNEL_OP, event::STATUS, op);
    assert_eq!((result, own.status, own.vcpu), (0, STATUS_INTERDOMAIN, 0));
    assert_eq!((own.detail, own.remote_port), (b.0.into(), mine));
    op.dom = a;
    let (result, built) = system.call_with(D0, EVENT_CHANNEL_OP, event::STATUS, op);
    assert_eq!((result, built.status), (0, STATUS_INTERDOMAIN));
    let (result, _) = system.call_with(b, EVENT_CHANNEL_OP, event::STATUS, op);
    assert_eq!(result, Errno::EPERM.to_result());
    op.port = EventPort(PORT_LIMIT);
    let (result, _) = system.call_with(D0, EVENT_CHANNEL_OP, event::STATUS, op);
    assert_eq!(result, Errno::EINVAL.to_result());
}

#[test]
fn the_builder_makes_ports_in_its_domains_and_nobody_else_does() {
    let mut system = System::new();
    let guest = system.guest("guest");
    let op = AllocUnbound { dom: guest, remote_dom: DomainId(9), port: EventPort(0) };
    let (result, op) = system.call_with(D0, EVENT_CHANNEL_OP, event::ALLOC_UNBOUND, op);
    assert_eq!(result, 0);
    let port = system.core.lock().port(&system.p, guest, op.port);
    assert_eq!((port.status, port.remote), (STATUS_UNBOUND, DomainId(9)));
    let other = system.guest("other");
    let (result, _) = system.call_with(other, EVENT_CHANNEL_OP, event::ALLOC_UNBOUND, op);
    assert_eq!(result, Errno::EPERM.to_result());
    let op = AllocUnbound { dom: D0, ..op };
    let (result, _) = system.call_with(other, EVENT_CHANNEL_OP, event::ALLOC_UNBOUND, op);
    assert_eq!(result, Errno::EPERM.to_result());
    assert_eq!(Rights::all().bits(), 7);
}

#[test]
fn a_binding_whose_answer_cannot_be_written_is_undone() {
    let mut system = System::new();
    let a = system.guest("a");
    let b = system.guest("b");
    let port = system.alloc_unbound(a, b).unwrap();
    // A structure in its code page can be read but not written.
    let op = BindInterdomain { remote_dom: a, pad: 0, remote_port: port, local_port: EventPort(0) };
    let gpa = axolotl_abi::start::IMAGE_GPA;
    system.write(b, gpa, zerocopy::IntoBytes::as_bytes(&op));
    let args = [event::BIND_INTERDOMAIN, gpa, 0, 0, 0];
    assert_eq!(system.call(b, EVENT_CHANNEL_OP, args), Errno::EFAULT.to_result());
    system.check();
    assert!(system.bind(b, a, port).is_ok(), "as if nothing had been");
}
