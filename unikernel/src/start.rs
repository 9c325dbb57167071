//! The first instruction and the last one.
#![expect(unsafe_code, reason = "raw start-up memory, and hypercalls that end the domain")]

use crate::domain::Domain;
use crate::{console, heap, hypercall};
use axolotl_abi::start::{HEAP_GPA, START_INFO_GPA, START_INFO_PAGES, START_MAGIC, StartInfo};
use core::sync::atomic::{AtomicBool, Ordering};
use xen_abi::hypercall::SCHED_OP;
use xen_abi::sched::{SHUTDOWN, SHUTDOWN_CRASH, SHUTDOWN_POWEROFF, Shutdown, YIELD};
use zerocopy::FromBytes;

/// Where `main!` enters with what the builder left in `rdi`.
///
/// # Panics
/// When the start info is not what we were built for, or when called twice.
pub fn enter(start_info: u64, run: fn(Domain)) -> ! {
    static ENTERED: AtomicBool = AtomicBool::new(false);
    assert!(!ENTERED.swap(true, Ordering::Relaxed), "a domain is entered once");
    assert_eq!(start_info, START_INFO_GPA, "the builder passes the start info's address");
    let (info, config) = read_start_info();
    let heap_bytes = usize::try_from(info.heap_bytes).expect("addresses have 64 bits");
    // SAFETY: the builder put so much memory there, for the heap alone; we are here once.
    unsafe { heap::init(HEAP_GPA as *mut u8, heap_bytes) };
    console::init_log();
    run(Domain::new(info, config));
    exit()
}

/// The start info, and the configuration behind it.
fn read_start_info() -> (StartInfo, &'static [u8]) {
    let head = START_INFO_GPA as *const u8;
    // SAFETY: the builder mapped the page read-only before our first instruction, and nobody
    // writes to it while we live.
    let head = unsafe { core::slice::from_raw_parts(head, size_of::<StartInfo>()) };
    let info = StartInfo::read_from_bytes(head).expect("the slice has this size");
    assert!(info.magic == START_MAGIC, "the start info has another version");
    let config_bytes = info.config_bytes as usize;
    let end = size_of::<StartInfo>() as u64 + u64::from(info.config_bytes);
    assert!(end <= START_INFO_PAGES * 4096, "the configuration is too long");
    let config = (START_INFO_GPA + size_of::<StartInfo>() as u64) as *const u8;
    // SAFETY: as above; `config_bytes` of it follow the structure in the same mapping.
    (info, unsafe { core::slice::from_raw_parts(config, config_bytes) })
}

/// Ends the domain in good order.
pub fn exit() -> ! {
    shutdown(SHUTDOWN_POWEROFF)
}

fn shutdown(reason: u32) -> ! {
    loop {
        // SAFETY: 1. the structure is that of the operation. 2. It names no memory.
        let _ = unsafe { hypercall::sched(SHUTDOWN, &mut Shutdown { reason }) };
    }
}

/// Lets other domains of the same priority run.
pub fn yield_now() {
    // SAFETY: no pointers.
    let _ = unsafe { hypercall::plain(SCHED_OP, [YIELD, 0]) };
}

#[cfg_attr(target_os = "none", panic_handler)]
#[cfg_attr(not(target_os = "none"), expect(dead_code, reason = "a host has its own"))]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    crate::println!("{info}");
    shutdown(SHUTDOWN_CRASH)
}
