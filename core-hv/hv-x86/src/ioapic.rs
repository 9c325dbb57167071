//! The IOAPIC, for the two serial ports only. All else is MSI.
//!
//! Source: Intel 82093AA data sheet, section 3.

#![expect(unsafe_code, reason = "IOAPIC registers are reached by raw pointer, the 8259 by port")]

use crate::acpi::{Acpi, Override};
use crate::apic;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use x86_64::instructions::port::Port;

const VERSION: u32 = 1;
const ENTRIES: u32 = 0x10;
const MASKED: u32 = 1 << 16;

/// Where the second serial port arrives: address of the registers and number of the pin's entry, or 0.
static BASE: AtomicU64 = AtomicU64::new(0);
static ENTRY: AtomicU64 = AtomicU64::new(0);
static HAS_CONSOLE: AtomicBool = AtomicBool::new(false);

fn read(base: u64, register: u32) -> u32 {
    // SAFETY: register select; mapped by the caller of `init`.
    unsafe { (base as *mut u32).write_volatile(register) };
    // SAFETY: data window.
    unsafe { ((base + 0x10) as *const u32).read_volatile() }
}

fn write(base: u64, register: u32, value: u32) {
    // SAFETY: register select; mapped by the caller of `init`.
    unsafe { (base as *mut u32).write_volatile(register) };
    // SAFETY: data window; interrupts find handlers.
    unsafe { ((base + 0x10) as *mut u32).write_volatile(value) };
}

/// Silences the two 8259, with their vectors out of the way of exceptions. Before the local APIC
/// stops listening to them, so that a request that is already there is taken back.
pub fn mask_8259() {
    let writes = [
        (0x20, 0x11),
        (0xa0, 0x11),
        (0x21, 0x20),
        (0xa1, 0x28),
        (0x21, 4),
        (0xa1, 2),
        (0x21, 1),
        (0xa1, 1),
        (0x21, 0xff),
        (0xa1, 0xff),
    ];
    for (port, value) in writes {
        // SAFETY: nothing is connected that anybody waits for.
        unsafe { Port::<u8>::new(port).write(value) };
    }
}

/// Masks everything, and prepares the serial ports' entries for the processor `apic_id`: the
/// second one's masked. `map` makes registers accessible.
pub fn init(acpi: &Acpi, apic_id: u32, mut map: impl FnMut(u64) -> u64) {
    let serial = acpi.serial.unwrap_or(Override { gsi: 3, flags: 0 });
    let console = acpi.console.unwrap_or(Override { gsi: 4, flags: 0 });
    for ioapic in &acpi.ioapics {
        let base = map(ioapic.address.into());
        let last = read(base, VERSION) >> 16 & 0xff;
        for pin in 0..=last {
            write(base, ENTRIES + pin * 2, MASKED);
        }
        let entry_of = |gsi: u32| {
            let pin = gsi.checked_sub(ioapic.first_gsi).filter(|&pin| pin <= last);
            pin.map(|pin| ENTRIES + pin * 2)
        };
        if let Some(entry) = entry_of(console.gsi) {
            write(base, entry + 1, apic_id << 24);
            write(base, entry, u32::from(apic::CONSOLE) | mode(console.flags));
            HAS_CONSOLE.store(true, Ordering::Relaxed);
        }
        if let Some(entry) = entry_of(serial.gsi) {
            write(base, entry + 1, apic_id << 24);
            write(base, entry, u32::from(apic::SERIAL) | MASKED | mode(serial.flags));
            ENTRY.store(entry.into(), Ordering::Relaxed);
            BASE.store(base, Ordering::Relaxed);
        }
    }
}

/// Whether the first serial port, the console, can interrupt.
pub fn has_console() -> bool {
    HAS_CONSOLE.load(Ordering::Relaxed)
}

/// ISA is active high and edge-triggered unless the table says otherwise.
fn mode(flags: u16) -> u32 {
    let active_low = flags & 3 == 3;
    let level = flags >> 2 & 3 == 3;
    u32::from(active_low) << 13 | u32::from(level) << 15
}

/// Masks or unmasks the second serial port.
#[expect(clippy::cast_possible_truncation, reason = "entries are numbered from 0x10 to 0x20f")]
pub fn serial_interrupt(on: bool) {
    let base = BASE.load(Ordering::Relaxed);
    if base != 0 {
        let entry = ENTRY.load(Ordering::Relaxed) as u32;
        let value = read(base, entry) & !MASKED;
        write(base, entry, if on { value } else { value | MASKED });
    }
}
