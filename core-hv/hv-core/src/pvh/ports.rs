//! I/O ports (`xen-abi.md` §5.4): nothing is behind them, but for a byte console.

use super::Unlisted;
use super::walk::translate;
use crate::access;
use crate::console;
use crate::platform::{Event, Platform, PortAccess};
use crate::state::Core;
use crate::vcpu::VcpuId;
use xen_abi::event;

/// Early messages of kernels.
const DEBUG_CONSOLE: u16 = 0xe9;
/// The 8254's second channel, against which kernels measure the TSC: a counter that stands at 0
/// is given up at once, one that reads 0xff after 100,000 tries.
const COUNTER_2: u16 = 0x42;
/// Elements of a string instruction that one exit deals with.
const STRING_BATCH: u64 = 64;
const DIRECTION: u64 = 1 << 10;

/// Ports that kernels are known to try, and find nothing at.
const fn is_listed(port: u16) -> bool {
    matches!(
        port,
        0x10..=0x13 | 0x20 | 0x21 | 0x40..=0x43 | 0x60..=0x64 | 0x70 | 0x71 | 0x80 | 0xa0 | 0xa1 | 0xe9
            | 0xed | 0x2e8..=0x2ef | 0x2f8..=0x2ff | 0x3e8..=0x3ef | 0x3f8..=0x3ff | 0x4d0 | 0x4d1
            | 0xcf8..=0xcff
    )
}

impl<P: Platform> Core<P> {
    /// IN, OUT, INS, OUTS.
    pub(super) fn guest_port(
        &mut self,
        p: &mut P,
        v: VcpuId,
        state: &mut P::Vcpu,
        access: PortAccess,
    ) {
        if !is_listed(access.port) {
            self.note_unlisted(v, Unlisted::Port, access.port.into());
        }
        if access.string {
            return self.guest_string(p, v, state, access);
        }
        let registers = P::registers_mut(state);
        if access.write {
            let bytes = registers.rax.to_le_bytes();
            self.port_out(p, v, access.port, &bytes[..access.bytes.into()]);
        } else {
            let value = port_in(access.port);
            registers.rax = match access.bytes {
                1 => registers.rax & !0xff | value & 0xff,
                2 => registers.rax & !0xffff | value & 0xffff,
                _ => value & 0xffff_ffff,
            };
        }
        P::skip_to(state, access.next_rip);
    }

    fn port_out(&mut self, p: &mut P, v: VcpuId, port: u16, bytes: &[u8]) {
        if port == DEBUG_CONSOLE {
            console::append(p, self.me_mut(v.domain), &bytes[..1]);
            if bytes[0] == b'\n' {
                self.raise_global(p, event::VIRQ_CON_RING);
            }
        }
    }

    /// Some elements of a string instruction; the rest when it is executed again.
    fn guest_string(&mut self, p: &mut P, v: VcpuId, state: &mut P::Vcpu, access: PortAccess) {
        let mask = u64::MAX >> (64 - 8 * u32::from(access.address_bytes));
        let mut left = if access.repeat { P::registers(state).rcx & mask } else { 1 };
        for _ in 0..STRING_BATCH {
            if left == 0 {
                break;
            }
            if self.string_element(p, v, state, access, mask).is_none() {
                return P::inject(state, Event::Exception(13, Some(0)));
            }
            left -= 1;
            if access.repeat {
                let registers = P::registers_mut(state);
                registers.rcx = registers.rcx & !mask | left;
            }
        }
        if left == 0 {
            P::skip_to(state, access.next_rip);
        }
    }

    fn string_element(
        &mut self,
        p: &mut P,
        v: VcpuId,
        state: &mut P::Vcpu,
        access: PortAccess,
        mask: u64,
    ) -> Option<()> {
        let mode = self.vcpu(v).virt.mode;
        let registers = P::registers_mut(state);
        let flags = registers.rflags;
        let pointer = if access.write { &mut registers.rsi } else { &mut registers.rdi };
        let segment = match (mode.code_bits, access.write) {
            (64, _) => 0,
            (_, true) => mode.ds_base,
            (_, false) => mode.es_base,
        };
        let linear = segment.wrapping_add(*pointer & mask);
        let bytes = u64::from(access.bytes);
        let next = if flags & DIRECTION == 0 { bytes } else { bytes.wrapping_neg() };
        let next = *pointer & !mask | pointer.wrapping_add(next) & mask;
        let mut element = [0xff; 4];
        let element = &mut element[..access.bytes.into()];
        // A byte at a time: an element may lie across pages.
        for (at, byte) in (0..).zip(element.iter_mut()) {
            let p2m = &self.me(v.domain).p2m;
            let gpa = translate(p, p2m, &mode, linear.wrapping_add(at), !access.write)?;
            let part = core::slice::from_mut(byte);
            let moved = if access.write {
                access::read(p, p2m, gpa, part)
            } else {
                access::write(p, p2m, gpa, part)
            };
            moved.ok()?;
        }
        if access.write {
            self.port_out(p, v, access.port, element);
        }
        *(if access.write { &mut registers.rsi } else { &mut registers.rdi }) = next;
        Some(())
    }
}

const fn port_in(port: u16) -> u64 {
    if port == COUNTER_2 { 0 } else { u64::MAX }
}
