//! Guest-physical addresses where no memory is: the local APIC's registers, and nothing else.
//! Reads of nothing are all ones, writes go nowhere (`xen-abi.md` §5.4).

use super::Unlisted;
use super::decode::{Move, Operand, decode_move};
use super::msr::low;
use crate::domain::Cause;
use crate::platform::{Platform, Registers};
use crate::state::Core;
use crate::vcpu::VcpuId;
use axolotl_abi::control::DEATH_FAULT;

const PAGE_FAULT: u8 = 14;

impl<P: Platform> Core<P> {
    /// An access that the address space does not allow.
    pub(super) fn guest_memory(
        &mut self,
        p: &mut P,
        v: VcpuId,
        state: &mut P::Vcpu,
        gpa: u64,
        implicit: bool,
    ) {
        let register = self.apic_register(v, gpa);
        if register.is_none() {
            self.note_unlisted(v, Unlisted::Memory, low(gpa >> 12));
        }
        let (code, len) = self.instruction(p, v, state);
        let bits = self.vcpu(v).virt.mode.code_bits;
        let decoded = decode_move(&code[..len], bits).filter(|_| !implicit);
        let Some(decoded) = decoded else {
            // Code or page tables where no memory is, or an instruction that nobody uses for
            // registers of a device.
            let cause =
                Cause { cause: DEATH_FAULT, detail: 0, vector: PAGE_FAULT, error: 0, address: gpa };
            self.me_mut(v.domain).doomed.get_or_insert((cause, v.index));
            return;
        };
        if decoded.is_load {
            let value = register
                .and_then(|register| self.vcpu(v).virt.lapic.read(register, v.index))
                .unwrap_or(u64::MAX);
            load(P::registers_mut(state), decoded, value);
        } else if let Some(register) = register {
            let value = stored(P::registers(state), decoded);
            let sent = self.vcpu_mut(v).virt.lapic.write(register, value & 0xffff_ffff);
            if let Ok(Some(command)) = sent {
                self.send_interrupt(p, v, command);
            }
        }
        let rip = P::registers(state).rip;
        P::skip_to(state, self.truncated(v, rip.wrapping_add(decoded.length)));
    }
}

/// A general register by the processor's number.
fn register(registers: &mut Registers, number: u8) -> &mut u64 {
    let r = registers;
    match number {
        0 => &mut r.rax,
        1 => &mut r.rcx,
        2 => &mut r.rdx,
        3 => &mut r.rbx,
        4 => &mut r.rsp,
        5 => &mut r.rbp,
        6 => &mut r.rsi,
        7 => &mut r.rdi,
        8 => &mut r.r8,
        9 => &mut r.r9,
        10 => &mut r.r10,
        11 => &mut r.r11,
        12 => &mut r.r12,
        13 => &mut r.r13,
        14 => &mut r.r14,
        _ => &mut r.r15,
    }
}

const fn mask(bytes: u8) -> u64 {
    u64::MAX >> (64 - 8 * bytes as u32)
}

fn load(registers: &mut Registers, decoded: Move, value: u64) {
    let value = value & mask(decoded.bytes);
    match decoded.with {
        Operand::Register(number, bytes) => {
            let place = register(registers, number);
            // A result of 32 bits clears the upper half; smaller ones leave the rest alone.
            let kept = if bytes >= 4 { 0 } else { *place & !mask(bytes) };
            *place = kept | value;
        }
        Operand::HighByte(number) => {
            let place = register(registers, number);
            *place = *place & !0xff00 | value << 8;
        }
        Operand::Constant(_) => {}
    }
}

fn stored(registers: &Registers, decoded: Move) -> u64 {
    let mut copy = *registers;
    let value = match decoded.with {
        Operand::Register(number, _) => *register(&mut copy, number),
        Operand::HighByte(number) => *register(&mut copy, number) >> 8,
        Operand::Constant(value) => value,
    };
    value & mask(decoded.bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loads_change_as_much_of_a_register_as_the_processor_would() {
        let mut registers = Registers { rbx: u64::MAX, ..Registers::default() };
        let with = |operand, bytes| Move { bytes, with: operand, is_load: true, length: 0 };
        load(&mut registers, with(Operand::Register(3, 2), 2), 0x1234);
        assert_eq!(registers.rbx, 0xffff_ffff_ffff_1234);
        load(&mut registers, with(Operand::HighByte(3), 1), 0xab);
        assert_eq!(registers.rbx, 0xffff_ffff_ffff_ab34);
        load(&mut registers, with(Operand::Register(3, 4), 4), 0x5);
        assert_eq!(registers.rbx, 5);
        // MOVZX: one byte of memory, four of the register.
        registers.rbx = u64::MAX;
        load(&mut registers, with(Operand::Register(3, 4), 1), 0xfff);
        assert_eq!(registers.rbx, 0xff);
    }

    #[test]
    fn stores_take_what_the_instruction_names() {
        let registers = Registers { rcx: 0x1234_5678_9abc_def0, ..Registers::default() };
        let with = |operand, bytes| Move { bytes, with: operand, is_load: false, length: 0 };
        assert_eq!(stored(&registers, with(Operand::Register(1, 4), 4)), 0x9abc_def0);
        assert_eq!(stored(&registers, with(Operand::HighByte(1), 1)), 0xde);
        assert_eq!(stored(&registers, with(Operand::Constant(u64::MAX), 4)), 0xffff_ffff);
    }
}
