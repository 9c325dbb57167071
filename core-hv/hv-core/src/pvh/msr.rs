//! MSRs that end the guest's run (`xen-abi.md` §5.3). SYSCALL's, SYSENTER's, the segment bases and
//! the TSC's reading do not: the processor switches them.

use super::cpuid::{self, HYPERCALL_PAGE_MSR};
use super::{Unlisted, lapic};
use crate::p2m::Kind;
use crate::platform::{Event, GuestMsr, Platform};
use crate::state::Core;
use crate::vcpu::VcpuId;
use xen_abi::Gfn;

const TSC: u32 = 0x10;
const APIC_BASE: u32 = 0x1b;
const PATCH_LEVEL: u32 = 0x8b;
const MTRR_CAPACITY: u32 = 0xfe;
const MTRR_VARIABLE: u32 = 0x200;
const MTRR_DEFAULT: u32 = 0x2ff;
const PAT: u32 = 0x277;
const DEBUG_CONTROL: u32 = 0x1d9;
const LAST_BRANCHES: u32 = 0x1db;
const LAST_BRANCHES_END: u32 = 0x1de;
const X2APIC: u32 = 0x800;
const EFER: u32 = 0xc000_0080;
const PERFORMANCE: u32 = 0xc001_0000;
const SYSTEM_CONFIG: u32 = 0xc001_0010;
const HARDWARE_CONFIG: u32 = 0xc001_0015;
const NORTHBRIDGE: u32 = 0xc001_001f;
const DECODE_CONFIG: u32 = 0xc001_1029;
const TSC_AUX: u32 = 0xc000_0103;

const EFER_LONG_MODE: u64 = 1 << 8;
const EFER_LONG_ACTIVE: u64 = 1 << 10;
/// SYSCALL, long mode, no-execute, fast FXSR.
const EFER_KNOWN: u64 = 1 | EFER_LONG_MODE | EFER_LONG_ACTIVE | 1 << 11 | 1 << 14;
const CR0_PAGING: u64 = 1 << 31;
/// The TSC counts at the highest frequency always.
const STEADY_TSC: u64 = 1 << 24;
/// LFENCE is serializing.
const DECODE_VALUE: u64 = 2;

/// Memory type registers: remembered, and without effect.
#[derive(Debug)]
pub(crate) struct MemoryTypes {
    variable: [u64; 16],
    fixed: [u64; 11],
    default: u64,
}

impl MemoryTypes {
    pub(crate) const fn new() -> Self {
        Self { variable: [0; 16], fixed: [0; 11], default: 0x806 }
    }

    fn place(&mut self, msr: u32) -> Option<&mut u64> {
        match msr {
            MTRR_VARIABLE..0x210 => Some(&mut self.variable[(msr - MTRR_VARIABLE) as usize]),
            0x250 => Some(&mut self.fixed[0]),
            0x258 | 0x259 => Some(&mut self.fixed[(msr - 0x257) as usize]),
            0x268..0x270 => Some(&mut self.fixed[(msr - 0x265) as usize]),
            MTRR_DEFAULT => Some(&mut self.default),
            _ => None,
        }
    }
}

impl<P: Platform> Core<P> {
    /// RDMSR.
    pub(super) fn guest_rdmsr(&mut self, p: &mut P, v: VcpuId, state: &mut P::Vcpu) {
        let registers = P::registers(state);
        let msr = low(registers.rcx);
        let Some(value) = self.read_msr(p, v, state, msr) else {
            self.note_unlisted(v, Unlisted::ReadMsr, msr);
            return P::inject(state, Event::Exception(13, Some(0)));
        };
        let registers = P::registers_mut(state);
        registers.rax = value & 0xffff_ffff;
        registers.rdx = value >> 32;
        self.skip(p, v, state, 2);
    }

    fn read_msr(&mut self, p: &P, v: VcpuId, state: &P::Vcpu, msr: u32) -> Option<u64> {
        let virt = &self.vcpu(v).virt;
        Some(match msr {
            EFER => P::guest_msr(state, GuestMsr::Efer),
            PAT => P::guest_msr(state, GuestMsr::Pat),
            TSC_AUX if cpuid::has_rdtscp(p) => P::guest_msr(state, GuestMsr::TscAux),
            APIC_BASE => virt.lapic.base(v.index),
            X2APIC..0x900 if virt.lapic.is_wide() => virt.lapic.read(msr - X2APIC, v.index)?,
            PATCH_LEVEL => 1,
            MTRR_CAPACITY => 0x508,
            HARDWARE_CONFIG => STEADY_TSC,
            HYPERCALL_PAGE_MSR | SYSTEM_CONFIG | NORTHBRIDGE => 0,
            DEBUG_CONTROL | LAST_BRANCHES..=LAST_BRANCHES_END => 0,
            PERFORMANCE..=0xc001_0007 => 0,
            DECODE_CONFIG => DECODE_VALUE,
            _ => *self.me_mut(v.domain).pvh.as_mut()?.memory_types.place(msr)?,
        })
    }

    /// WRMSR.
    pub(super) fn guest_wrmsr(&mut self, p: &mut P, v: VcpuId, state: &mut P::Vcpu) {
        let registers = P::registers(state);
        let msr = low(registers.rcx);
        let value = registers.rax & 0xffff_ffff | registers.rdx << 32;
        if self.write_msr(p, v, state, msr, value).is_none() {
            self.note_unlisted(v, Unlisted::WriteMsr, msr);
            return P::inject(state, Event::Exception(13, Some(0)));
        }
        self.skip(p, v, state, 2);
    }

    fn write_msr(
        &mut self,
        p: &mut P,
        v: VcpuId,
        state: &mut P::Vcpu,
        msr: u32,
        value: u64,
    ) -> Option<()> {
        match msr {
            EFER => write_efer::<P>(state, self.vcpu(v).virt.mode.cr0, value),
            PAT => {
                let is_valid = value.to_le_bytes().iter().all(|t| matches!(t, 0 | 1 | 4..=7));
                is_valid.then(|| P::set_guest_msr(state, GuestMsr::Pat, value))
            }
            TSC_AUX if cpuid::has_rdtscp(p) => {
                (value >> 32 == 0).then(|| P::set_guest_msr(state, GuestMsr::TscAux, value))
            }
            APIC_BASE => self.vcpu_mut(v).virt.lapic.set_base(value).then_some(()),
            X2APIC..0x900 if self.vcpu(v).virt.lapic.is_wide() => {
                let written = self.vcpu_mut(v).virt.lapic.write(msr - X2APIC, value);
                let command = written.ok()?;
                if let Some(command) = command {
                    self.send_interrupt(p, v, command);
                }
                Some(())
            }
            HYPERCALL_PAGE_MSR => self.fill_hypercall_page(p, v, value),
            TSC => {
                let offset = value.wrapping_sub(p.tsc());
                self.set_tsc_offset(p, v, state, offset);
                Some(())
            }
            PATCH_LEVEL | SYSTEM_CONFIG | HARDWARE_CONFIG | NORTHBRIDGE | DECODE_CONFIG => Some(()),
            PERFORMANCE..=0xc001_0007 => Some(()),
            DEBUG_CONTROL | LAST_BRANCHES..=LAST_BRANCHES_END => (value == 0).then_some(()),
            _ => {
                let pvh = self.me_mut(v.domain).pvh.as_mut()?;
                *pvh.memory_types.place(msr)? = value;
                Some(())
            }
        }
    }

    /// Fills a page of the guest's with a call for each hypercall (§3.1).
    fn fill_hypercall_page(&mut self, p: &mut P, v: VcpuId, address: u64) -> Option<()> {
        let page = self.me(v.domain).p2m.page(p, Gfn::containing(address));
        let page = page.filter(|page| page.kind == Kind::Ram && page.write)?;
        if !address.is_multiple_of(4096) {
            return None;
        }
        // mov eax, number; vmmcall (on other makes vmcall); ret.
        let [.., call] = if self.is_amd(p) { [0x0f, 0x01, 0xd9] } else { [0x0f, 0x01, 0xc1] };
        for number in 0..128_u8 {
            let mut slot = [0xcc; 32];
            slot[..9].copy_from_slice(&[0xb8, number, 0, 0, 0, 0x0f, 0x01, call, 0xc3]);
            if number == 23 {
                slot[..2].copy_from_slice(&[0x0f, 0x0b]);
            }
            p.write(page.mfn, usize::from(number) * 32, &slot);
        }
        Some(())
    }

    fn is_amd(&self, p: &P) -> bool {
        let [_, ebx, ..] = p.cpuid(0, 0);
        // "Auth", "Hygo".
        matches!(ebx, 0x6874_7541 | 0x6f67_7948)
    }

    /// A read or write in the APIC's register page; `None`: it is not there.
    pub(super) fn apic_register(&self, v: VcpuId, gpa: u64) -> Option<u32> {
        let is_there = self.vcpu(v).virt.lapic.is_in_memory();
        let within = gpa.wrapping_sub(lapic::PAGE);
        (is_there && within < 0x400 && within.is_multiple_of(16)).then(|| low(within >> 4))
    }
}

fn write_efer<P: Platform>(state: &mut P::Vcpu, cr0: u64, value: u64) -> Option<()> {
    let old = P::guest_msr(state, GuestMsr::Efer);
    let toggles = (old ^ value) & EFER_LONG_MODE != 0;
    if value & !EFER_KNOWN != 0 || toggles && cr0 & CR0_PAGING != 0 {
        return None;
    }
    let active = old & EFER_LONG_ACTIVE;
    P::set_guest_msr(state, GuestMsr::Efer, value & !EFER_LONG_ACTIVE | active);
    Some(())
}

#[expect(clippy::cast_possible_truncation, reason = "takes words apart")]
pub(super) const fn low(value: u64) -> u32 {
    value as u32
}
