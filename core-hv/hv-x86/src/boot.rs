//! The way up: boot information, memory, tables, processors, `hv-core`.

#![expect(unsafe_code, reason = "takes over the machine from the boot loader")]

use crate::acpi::{self, Acpi};
use crate::boot_info::{BootInfo, BootMap};
use crate::machine::{self, Machine, SHARED, Shared};
use crate::paging::{self, BootMemory, CpuArea, Ranges, Tables};
use crate::{apic, cpu, ioapic, multiboot2, pci, pvh, serial, smp, svm, time, vcpu};
use core::arch::global_asm;
use core::ops::Range;
use core::sync::atomic::{AtomicBool, Ordering};
use heapless::Vec;
use hv_core::frame::FrameInfo;
use hv_core::platform::{CpuId, MAX_CPUS, Platform as _};
use hv_core::{Boot, Core, EcamRange};
use spin::{Mutex, Once};
use x86_64::PhysAddr;
use x86_64::registers::control::{Cr3, Cr3Flags};
use x86_64::structures::paging::PhysFrame;

global_asm!(include_str!("boot.s"), options(att_syntax));

/// The core lock. Guards everything that `hv-core` knows. Outermost; only the console's lock is
/// taken under it.
static CORE: Mutex<Core<Machine>> = Mutex::new(Core::empty());

/// Set when the other processors may run domains.
static READY: AtomicBool = AtomicBool::new(false);

/// What the boot stack leaves to the first processor's own stack.
struct Hand {
    acpi: Acpi,
    tables: Tables,
    memory: BootMemory,
    usable: Ranges,
    reserved: Reserved,
    bundle: Range<u64>,
    area: CpuArea,
    end: u64,
    /// Whether the trampoline's page is memory.
    trampoline: bool,
}

/// Where interrupt messages go, and the local APIC is.
const MESSAGES: Range<u64> = 0xfee0_0000..0xfef0_0000;

/// As in `hv_core::Boot`.
type Reserved =
    Vec<Range<u64>, { crate::boot_info::MAX_RANGES + acpi::MAX_IOAPICS + acpi::MAX_ECAM + 1 }>;

static HAND: Mutex<Option<Hand>> = Mutex::new(None);
static STARTS: [Once<smp::Start>; MAX_CPUS] = [const { Once::new() }; MAX_CPUS];

/// Called by `boot.s` on the boot stack. `kind` is 0 for PVH and 1 for Multiboot2.
#[unsafe(no_mangle)]
extern "C" fn boot_main(kind: u32, info: u64) -> ! {
    time::start();
    serial::init();
    cpu::fill_idt();
    cpu::load_tables(0);
    let (info, acpi) = {
        // SAFETY: 1. We came here from `boot.s`; the map is gone before its tables are. 2.
        // Firmware and loader have ended.
        let map = unsafe { BootMap::new() };
        let info = if kind == 0 { pvh::read(&map, info) } else { multiboot2::read(&map, info) };
        let info = info.expect("the boot loader's information is well-formed");
        let acpi = acpi::read(&map, &info);
        (info, acpi)
    };
    let hand = take_memory(&info, acpi);
    let root = PhysFrame::containing_address(PhysAddr::new(hand.tables.root()));
    // SAFETY: maps this code, this stack, and everything that was reached so far through the
    // direct map and is still needed.
    unsafe { Cr3::write(root, Cr3Flags::empty()) };
    *HAND.lock() = Some(hand);
    // SAFETY: mapped by `take_memory`, and not in use.
    unsafe { vcpu::switch_stack(paging::main_stack(0), first_processor, 0) }
}

/// Divides memory, and makes the page tables.
fn take_memory(info: &BootInfo, acpi: Acpi) -> Hand {
    let bundle = info.module.clone().expect("the boot loader passes the bundle as a module");
    assert!(bundle.start.is_multiple_of(4096), "the bundle is page-aligned");
    let all = info.clean_memory();
    let mut usable = all.clone();
    let end = machine::end_of(&usable);
    let bundle_pages = bundle.start..bundle.end.next_multiple_of(4096);
    let page = u64::from(smp::TRAMPOLINE);
    let mut low = usable.clone();
    paging::subtract(&mut low, &bundle_pages);
    let trampoline = low.iter().any(|r| r.start <= page && page + 4096 <= r.end);
    for hole in [0..1 << 20, paging::image(), bundle_pages] {
        paging::subtract(&mut usable, &hole);
    }
    let mut memory = BootMemory::new(&mut usable);
    let mut tables = Tables::new(&mut memory, &all);
    let area = tables.map_stacks(&mut memory, 0);
    let reserved = reserved(&all, &acpi);
    Hand { acpi, tables, memory, usable, reserved, bundle, area, end, trampoline }
}

extern "C" fn first_processor(_: u64) -> ! {
    let Hand { acpi, mut tables, mut memory, usable, reserved, bundle, area, end, trampoline } =
        HAND.lock().take().expect("`boot_main` left it");
    ioapic::mask_8259();
    apic::choose(|| tables.map_mmio(&mut memory, acpi.local_apic, 4096));
    apic::init();
    ioapic::init(&acpi, apic::id(), |address| tables.map_mmio(&mut memory, address, 4096));
    time::calibrate(acpi.pm_timer);
    let ecam = acpi.ecam.iter().map(|entry| EcamRange {
        segment: entry.segment,
        first_bus: entry.first_bus,
        last_bus: entry.last_bus,
    });
    let ecam: Vec<EcamRange, { acpi::MAX_ECAM }> = ecam.collect();
    if !trampoline {
        serial::write(b"core| one processor only: its page below 1 MiB is taken\n");
    }
    let others = if trampoline { acpi.apic_ids.as_slice() } else { &[] };
    let apic_ids = start_others(others, &mut tables, &mut memory);
    svm::prepare(&mut memory);
    pci::init(acpi.ecam, |address, bytes| tables.map_mmio(&mut memory, address, bytes));
    let cpus = apic_ids.len();
    SHARED.call_once(|| Shared { root: tables.root(), apic_ids, memory_end: end });
    let devices = Devices { ecam: &ecam, reserved: &reserved };
    run(&mut Machine::new(CpuId(0), area), cpus, memory, usable, &bundle, end, &devices)
}

/// What `hv-core` learns of devices.
struct Devices<'a> {
    ecam: &'a [EcamRange],
    reserved: &'a [Range<u64>],
}

/// Addresses at which no PCI function has registers: memory, and what the core itself drives.
fn reserved(memory: &Ranges, acpi: &Acpi) -> Reserved {
    let ioapics = acpi.ioapics.iter().map(|ioapic| {
        let address = u64::from(ioapic.address);
        address..address + 4096
    });
    let ecam = acpi.ecam.iter().map(|entry| {
        let bus = |number: u64| entry.address + (number << 20);
        bus(entry.first_bus.into())..bus(u64::from(entry.last_bus) + 1)
    });
    memory.iter().cloned().chain(ioapics).chain(ecam).chain([MESSAGES]).collect()
}

/// Starts all processors but this one; returns who runs, by number.
fn start_others(
    listed: &[u32],
    tables: &mut Tables,
    memory: &mut BootMemory,
) -> Vec<u32, MAX_CPUS> {
    let own = apic::id();
    let mut running = Vec::new();
    let _ = running.push(own);
    let others = listed.iter().copied().filter(|&id| id != own);
    for (slot, apic_id) in (1..MAX_CPUS).zip(others) {
        if slot == 1 {
            smp::prepare(tables, memory);
        }
        let area = tables.map_stacks(memory, slot);
        let start = STARTS[slot].call_once(|| smp::Start { area });
        if smp::start(apic_id, tables.root(), start, other_processor) {
            let _ = running.push(apic_id);
        } else {
            serial::write(b"core| a processor did not start, or its TSC disagrees\n");
        }
    }
    tables.unmap_lower_half();
    running
}

/// First Rust code of a processor that the trampoline started.
extern "C" fn other_processor(start: &'static smp::Start) -> ! {
    smp::arrive(start);
    while !SHARED.is_completed() {
        core::hint::spin_loop();
    }
    x86_64::instructions::tlb::flush_all();
    let own = apic::id();
    let number = SHARED.get().and_then(|shared| shared.apic_ids.iter().position(|&id| id == own));
    let Some(number) = number else { machine::halt() };
    let mut machine = Machine::new(cpu_id(number), start.area);
    while !READY.load(Ordering::SeqCst) {
        machine.wait();
    }
    hv_core::cpu_loop(&mut machine, &CORE)
}

#[expect(clippy::cast_possible_truncation, reason = "there are at most MAX_CPUS")]
fn cpu_id(number: usize) -> CpuId {
    CpuId(number as u8)
}

/// Hands the machine over to `hv-core`.
fn run(
    machine: &mut Machine,
    cpus: usize,
    mut memory: BootMemory,
    mut usable: Ranges,
    bundle: &Range<u64>,
    end: u64,
    devices: &Devices<'_>,
) -> ! {
    let frames = frame_table(&mut memory, end);
    let (rest, taken) = memory.finish();
    // In place of the range that boot memory was cut from.
    if let Some(empty) = usable.iter_mut().find(|range| range.is_empty()) {
        *empty = rest;
    }
    let image = paging::image();
    let mut core = CORE.lock();
    core.init(
        machine,
        Boot {
            frames,
            usable: &usable,
            bundle: bundle_bytes(bundle),
            bundle_address: bundle.start,
            cpus,
            guest_cpus: svm::processors(cpus),
            core_pages: (image.end - image.start) / 4096 + taken,
            ecam: devices.ecam,
            reserved: devices.reserved,
        },
    );
    let clock = machine.clock();
    core.print(machine, format_args!("{cpus} processors, TSC {} MHz", clock.tsc_khz / 1000));
    if let Err(error) = core.start_control(machine) {
        panic!("the control domain cannot start: {error:?}");
    }
    drop(core);
    READY.store(true, Ordering::SeqCst);
    for cpu in 1..cpus {
        machine.kick(cpu_id(cpu));
    }
    if ioapic::has_console() {
        // Interrupts are taken while domains run, or nobody does.
        serial::by_interrupt();
    }
    hv_core::cpu_loop(machine, &CORE)
}

/// One zeroed entry for each frame below `end`.
fn frame_table(memory: &mut BootMemory, end: u64) -> &'static mut [FrameInfo] {
    let count = usize::try_from(end >> 12).expect("usize has 64 bits");
    let pages = (count * size_of::<FrameInfo>()).div_ceil(4096) as u64;
    let start = paging::direct::<FrameInfo>(memory.take(pages));
    // SAFETY: zeroed pages given out once; all zero is a valid entry by `FrameInfo`'s contract.
    unsafe { core::slice::from_raw_parts_mut(start, count) }
}

fn bundle_bytes(bundle: &Range<u64>) -> &'static [u8] {
    let len = usize::try_from(bundle.end - bundle.start).expect("usize has 64 bits");
    // SAFETY: memory that is nobody's, mapped, and never written from now on: domains get it
    // read-only.
    unsafe { core::slice::from_raw_parts(paging::direct(bundle.start), len) }
}
