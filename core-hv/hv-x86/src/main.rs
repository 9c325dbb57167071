//! The hypervisor's machine layer for x86-64: from a boot loader to `hv-core` on all processors.
//!
//! All `unsafe` of the core is in this crate, module by module. Decisions are `hv-core`'s.

#![no_std]
#![no_main]

mod acpi;
mod apic;
mod boot;
mod boot_info;
mod cpu;
mod ioapic;
mod machine;
mod multiboot2;
mod paging;
mod panic;
mod pci;
mod pvh;
mod serial;
mod smp;
mod svm;
mod time;
mod vcpu;
