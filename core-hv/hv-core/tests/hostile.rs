//! Whatever a domain asks for, and whatever a bundle says: an answer, in bounded time, and a core
//! that is in order.

use axolotl_abi::control::{self, ASSIGN_DMA_TRUSTED, AssignDevice, Create, Rights};
use axolotl_abi::start::{GRANT_TABLE_GPA, HEAP_GPA, IMAGE_GPA, MMIO_GPA, SHARED_INFO_GPA};
use axolotl_abi::{CONTROL_OP, DEVICE_OP};
use hv_core::fake::{Config, D0, DATA, FakeFunction, SCRATCH, System, bundle, image, poison_stack};
use proptest::collection::vec;
use proptest::prelude::*;
use xen_abi::hypercall::*;
use xen_abi::{DomainId, GrantRef};

/// Numbers that mean something more often than chance would have it.
fn number() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => 0_u64..12,
        2 => prop::sample::select(vec![
            SCRATCH, SCRATCH + 8, SCRATCH + 4090, HEAP_GPA + 7 * 4096, IMAGE_GPA, SHARED_INFO_GPA,
            GRANT_TABLE_GPA, MMIO_GPA, 0x4000_0000, (1 << 47) - 4096, 1 << 47, 0, 0x7ff0, 0x7ff2,
            DATA.0, 0x4_0000, 512, 1023, 1024, 4096, u64::MAX, 1 << 31, 1 << 32, u64::from(u32::MAX),
            0x1_0000_0002, 0x0002_0001, 0x7ff0_0000_7ff0,
        ]),
        1 => any::<u64>(),
    ]
}

fn hypercall() -> impl Strategy<Value = u64> {
    let known = vec![
        EVENT_CHANNEL_OP,
        GRANT_TABLE_OP,
        SCHED_OP,
        SET_TIMER_OP,
        CONSOLE_IO,
        MEMORY_OP,
        XEN_VERSION,
        DEVICE_OP,
        CONTROL_OP,
        CONTROL_OP,
        GRANT_TABLE_OP,
        EVENT_CHANNEL_OP,
    ];
    prop_oneof![8 => prop::sample::select(known), 1 => 0_u64..64, 1 => any::<u64>()]
}

#[derive(Clone, Debug)]
struct Attack {
    who: u8,
    number: u64,
    command: u64,
    gpa: u64,
    count: u64,
    words: Vec<u64>,
    advance: u64,
}

fn attack() -> impl Strategy<Value = Attack> {
    let command = prop_oneof![9 => 0_u64..20, 1 => any::<u64>()];
    let gpa = prop_oneof![6 => Just(SCRATCH), 1 => number()];
    let count = prop_oneof![6 => 0_u64..4, 1 => number()];
    let rest = (vec(number(), 6), 0_u64..20_000_000);
    (any::<u8>(), hypercall(), command, gpa, count, rest).prop_map(
        |(who, number, command, gpa, count, (words, advance))| Attack {
            who,
            number,
            command,
            gpa,
            count,
            words,
            advance,
        },
    )
}

/// A control domain, one that may build, one with a device, and one without any right.
fn system() -> (System, [DomainId; 4]) {
    let functions = vec![FakeFunction::nic(1, 0x8000_0000)];
    let mut system = System::with(Config { functions, ..Config::default() });
    let rights = Rights::BUILD.bits();
    let builder = system.create(Create { rights, ..System::plan("builder") });
    let driver = system.create(Create {
        class: control::CLASS_DRIVER,
        budget_us: 2_000,
        period_us: 10_000,
        ..System::plan("driver")
    });
    let guest = system.guest("guest");
    assert_eq!(system.control_domain(control::RESTART, driver), 0);
    let flags = ASSIGN_DMA_TRUSTED;
    let op = AssignDevice { domid: driver, pad: 0, bdf: 8, flags, pad2: 0, gpa: MMIO_GPA };
    assert_eq!(system.control(control::ASSIGN_DEVICE, op).0, 0);
    system.start(driver);
    // Something to attack.
    let port = system.alloc_unbound(guest, driver).unwrap();
    system.bind(driver, guest, port).unwrap();
    system.grant(guest, GrantRef(8), driver, DATA, false);
    system.map(driver, guest, GrantRef(8), xen_abi::Gfn(0x4_0000), false).unwrap();
    (system, [D0, builder, driver, guest])
}

fn call_on_poison(
    system: &mut System,
    byte: u8,
    id: DomainId,
    number: u64,
    args: [u64; 5],
    words: &[u64],
) -> i64 {
    for (at, word) in (SCRATCH..).step_by(8).zip(words) {
        system.write(id, at, &word.to_le_bytes());
    }
    poison_stack(byte);
    system.call(id, number, args)
}

/// Calls that are answered with a structure: caller, number, command, argument.
fn fruitful_calls([d0, _, driver, guest]: [DomainId; 4]) -> Vec<(DomainId, u64, u64, Vec<u64>)> {
    let mut calls = Vec::new();
    for command in [1, 2, 3, 4, 5, 6, 8, 9] {
        calls.push((guest, XEN_VERSION, command, vec![0]));
    }
    let itself = u64::from(DomainId::SELF.0);
    for command in [6, 8, 10] {
        calls.push((
            guest,
            GRANT_TABLE_OP,
            command,
            vec![if command == 8 { 1 } else { itself }, 0, 0],
        ));
    }
    // Status, a new port, and one to itself.
    for (command, first) in [(5, itself | 1 << 32), (6, itself), (7, 0)] {
        calls.push((driver, EVENT_CHANNEL_OP, command, vec![first, 0, 0, 0]));
    }
    for command in [control::GET_INFO, control::GET_DEATH, control::PHYSINFO] {
        calls.push((d0, CONTROL_OP, command, vec![guest.0.into()]));
    }
    for command in [control::GET_PCI_FUNCTION, control::CONSOLE_READ] {
        calls.push((d0, CONTROL_OP, command, vec![0; 8]));
    }
    calls
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: if cfg!(miri) { 1 } else { 20 },
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn every_hypercall_with_any_arguments_is_answered(
        attacks in vec(attack(), 1..if cfg!(miri) { 12 } else { 100 }),
    ) {
        let (mut system, who) = system();
        for attack in attacks {
            let id = who[usize::from(attack.who) % who.len()];
            let can_act = {
                let core = system.core.lock();
                // One that was made to fault does so before anything else.
                core.domain(id).is_some_and(|d| !d.paused && d.vcpu().crashed_at.is_none())
            };
            if !can_act || !system.is_live(id) {
                continue;
            }
            for (at, word) in (SCRATCH..).step_by(8).zip(&attack.words) {
                system.write(id, at, &word.to_le_bytes());
            }
            let args = [attack.command, attack.gpa, attack.count, attack.words[0], 0];
            // Console and timer calls have their numbers elsewhere.
            system.call(id, attack.number, args);
            system.advance(attack.advance);
            system.step(0);
            system.check();
        }
        system.check_whole();
    }

    /// What domains see after any calls does not depend on what was on the core's stack: neither a
    /// structure with a hole nor one that is not filled goes back to a caller. The types make it
    /// so: what is written to memory of domains is `IntoBytes`, which no type with padding is, and
    /// without `unsafe` nothing is uninitialized.
    #[test]
    fn nothing_of_the_stack_reaches_a_domain(
        attacks in vec(attack(), 1..if cfg!(miri) { 6 } else { 60 }),
    ) {
        let seen = [0x5a, 0xc3].map(|byte| {
            let (mut system, who) = system();
            for (id, number, command, words) in fruitful_calls(who) {
                let args = [command, SCRATCH, 1, 0, 0];
                let result = call_on_poison(&mut system, byte, id, number, args, &words);
                assert!(result >= 0, "{number} {command}: {result}");
            }
            for attack in &attacks {
                let id = who[usize::from(attack.who) % who.len()];
                if !system.is_live(id) || system.core.lock().domain(id).is_none_or(|d| d.paused) {
                    continue;
                }
                let args = [attack.command, attack.gpa, attack.count, attack.words[0], 0];
                call_on_poison(&mut system, byte, id, attack.number, args, &attack.words);
            }
            system.visible()
        });
        prop_assert!(seen[0] == seen[1], "the same with anything on the stack");
    }

    #[test]
    fn a_bundle_with_any_fault_is_refused_or_started(
        flips in vec((0_usize..4096 + 64, any::<u8>()), 1..6),
        cut in prop::option::weighted(0.3, 0_usize..12_288),
        pages in prop_oneof![Just(110_u32), 0_u32..600, any::<u32>()],
    ) {
        let mut bytes = bundle(&image(), pages);
        for (at, value) in flips {
            // The headers of the bundle and of its image.
            let at = if at < 4096 { at % 88 } else { at };
            bytes[at] = value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut);
        }
        let (system, _) = System::boot(Config::default(), &bytes);
        let (total, free) = system.core.lock().frames().counts();
        prop_assert!(free <= total);
    }
}

#[test]
#[cfg_attr(miri, ignore = "twenty boots; the property has some")]
fn bundles_with_one_fault_each_are_refused() {
    let good = bundle(&image(), 110);
    assert_eq!(System::boot(Config::default(), &good).1, Ok(()));
    let faults: [(usize, u64); 10] = [
        (0, 0),
        (8, u64::MAX),
        (16, u64::MAX),
        (24, 65 << 32),
        (40, 1),
        (40, u64::MAX - 4095),
        (48, u64::MAX),
        (4096 + 8, 1 << 47),
        (4096 + 16, 17),
        (4096 + 24, (1 << 35) - 1),
    ];
    for (at, value) in faults {
        let mut bytes = good.clone();
        bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        assert!(System::boot(Config::default(), &bytes).1.is_err(), "{at} {value:#x}");
    }
    for pages in [0, 3, 4, 5, 40, 88, 65_537, u32::MAX] {
        let bytes = bundle(&image(), pages);
        assert!(System::boot(Config::default(), &bytes).1.is_err(), "{pages}");
    }
    assert!(System::boot(Config::default(), &[]).1.is_err());
}
