//! As much of an instruction as is needed where the processor does not say: how long it is, and
//! which register a plain load or store to memory means.
//!
//! Source: AMD64 APM volume 3, chapter 1.

/// Most bytes of an instruction.
pub const MAX_BYTES: usize = 15;

/// The prefixes before an opcode.
#[derive(Clone, Copy, Default, Debug)]
struct Prefixes {
    count: usize,
    operand: bool,
    address: bool,
    rex: u8,
}

fn prefixes(code: &[u8], bits: u8) -> Prefixes {
    let mut found = Prefixes::default();
    for &byte in code {
        match byte {
            0x66 => found.operand = true,
            0x67 => found.address = true,
            0xf0 | 0xf2 | 0xf3 | 0x2e | 0x36 | 0x3e | 0x26 | 0x64 | 0x65 => {}
            0x40..=0x4f if bits == 64 => {
                // Only directly before the opcode does it count.
                found.rex = byte;
                found.count += 1;
                continue;
            }
            _ => break,
        }
        found.rex = 0;
        found.count += 1;
    }
    found
}

/// Length of an instruction whose opcode has `opcode` bytes and nothing behind it.
#[must_use]
pub fn length(code: &[u8], bits: u8, opcode: usize) -> u64 {
    (prefixes(code, bits).count + opcode) as u64
}

/// A load or store between memory and a register or constant.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Move {
    /// Bytes of memory.
    pub bytes: u8,
    /// What with.
    pub with: Operand,
    /// From memory.
    pub is_load: bool,
    /// Of the instruction.
    pub length: u64,
}

/// The side that is not memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Operand {
    /// A general register, by the processor's number; loads set it to the memory's value, extended
    /// with zeros to so many bytes.
    Register(u8, u8),
    /// The second byte of one of the first four registers.
    HighByte(u8),
    /// A constant.
    Constant(u64),
}

/// Decodes a MOV or MOVZX that accesses memory; nothing for all other instructions.
#[must_use]
pub fn decode_move(code: &[u8], bits: u8) -> Option<Move> {
    let before = prefixes(code, bits);
    let rest = code.get(before.count..)?;
    let narrow = if (bits == 16) != before.operand { 2 } else { 4 };
    let word = if before.rex & 8 != 0 { 8 } else { narrow };
    let (opcode, behind) = match rest {
        [0x0f, second @ (0xb6 | 0xb7), ..] => (u16::from(*second) | 0x0f00, 2),
        [first, ..] => (u16::from(*first), 1),
        [] => return None,
    };
    let address_bits = match (bits, before.address) {
        (64, false) => 64,
        (64, true) | (32, false) | (16, true) => 32,
        _ => 16,
    };
    if let 0xa0..=0xa3 = opcode {
        // The address is in the instruction.
        let length = before.count + 1 + address_bits / 8;
        let bytes = if opcode & 1 == 0 { 1 } else { word };
        let with = Operand::Register(0, bytes);
        return Some(Move { bytes, with, is_load: opcode < 0xa2, length: length as u64 });
    }
    let modrm = *rest.get(behind)?;
    if modrm >> 6 == 3 {
        return None;
    }
    let tail = behind + modrm_bytes(&rest[behind..], address_bits)?;
    let register = modrm >> 3 & 7 | (before.rex & 4) << 1;
    let (bytes, is_load, constant) = match opcode {
        0x8a => (1, true, 0),
        0x8b => (word, true, 0),
        0x88 => (1, false, 0),
        0x89 => (word, false, 0),
        0x0fb6 => (1, true, 0),
        0x0fb7 => (2, true, 0),
        0xc6 => (1, false, 1),
        0xc7 => (word, false, word.min(4)),
        _ => return None,
    };
    let with = if constant > 0 {
        Operand::Constant(constant_at(rest.get(tail..)?, constant)?)
    } else if bytes == 1 && opcode < 0x100 && before.rex == 0 && register >= 4 {
        Operand::HighByte(register - 4)
    } else {
        Operand::Register(register, if opcode > 0xff { word } else { bytes })
    };
    let length = (before.count + tail + usize::from(constant)) as u64;
    Some(Move { bytes, with, is_load, length })
}

/// A constant of 1, 2 or 4 bytes, sign-extended.
fn constant_at(code: &[u8], bytes: u8) -> Option<u64> {
    let mut raw = [0; 4];
    raw[..bytes.into()].copy_from_slice(code.get(..bytes.into())?);
    let unused = 32 - 8 * u32::from(bytes);
    Some(i64::from(i32::from_le_bytes(raw) << unused >> unused).cast_unsigned())
}

/// Bytes of ModRM, SIB and displacement.
fn modrm_bytes(code: &[u8], address_bits: usize) -> Option<usize> {
    let modrm = *code.first()?;
    let (mode, memory) = (modrm >> 6, modrm & 7);
    if address_bits == 16 {
        return Some(match (mode, memory) {
            (0, 6) | (2, _) => 3,
            (1, _) => 2,
            _ => 1,
        });
    }
    let has_sib = memory == 4;
    let base = if has_sib { *code.get(1)? & 7 } else { memory };
    let displacement = match mode {
        0 if base == 5 => 4,
        1 => 1,
        2 => 4,
        _ => 0,
    };
    Some(1 + usize::from(has_sib) + displacement)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_count_for_the_length() {
        assert_eq!(length(&[0x0f, 0xa2], 64, 2), 2);
        assert_eq!(length(&[0x66, 0x48, 0x0f, 0xa2], 64, 2), 4);
        assert_eq!(length(&[0xf3, 0x2e, 0xf4], 32, 1), 3);
        assert_eq!(length(&[0x48, 0xf4], 32, 1), 1, "no REX outside of 64-bit mode");
    }

    #[test]
    fn the_forms_that_kernels_use_for_registers_of_devices() {
        let eax = Operand::Register(0, 4);
        // mov eax, [rdi]
        let plain = Move { bytes: 4, with: eax, is_load: true, length: 2 };
        assert_eq!(decode_move(&[0x8b, 0x07], 64), Some(plain));
        // mov eax, [rip + 0x1000]
        let relative = [0x8b, 0x05, 0, 0x10, 0, 0];
        assert_eq!(decode_move(&relative, 64), Some(Move { length: 6, ..plain }));
        // mov r9d, [rax + rbx * 4 + 0x10]
        let scaled = [0x44, 0x8b, 0x4c, 0x98, 0x10];
        let with = Operand::Register(9, 4);
        assert_eq!(decode_move(&scaled, 64), Some(Move { with, length: 5, ..plain }));
        // mov [0xfee000b0], eax, with the address in the instruction
        let store = Move { bytes: 4, with: eax, is_load: false, length: 5 };
        assert_eq!(decode_move(&[0xa3, 0xb0, 0, 0xe0, 0xfe], 32), Some(store));
        // mov dword [rax + 0x300], 0x500
        let constant = [0xc7, 0x80, 0, 3, 0, 0, 0, 5, 0, 0];
        let with = Operand::Constant(0x500);
        let expected = Move { bytes: 4, with, is_load: false, length: 10 };
        assert_eq!(decode_move(&constant, 64), Some(expected));
    }

    #[test]
    fn bytes_and_words() {
        // mov ah, [rdi]; with REX it is spl's place instead.
        let high = Move { bytes: 1, with: Operand::HighByte(0), is_load: true, length: 2 };
        assert_eq!(decode_move(&[0x8a, 0x27], 64), Some(high));
        let low = Move { with: Operand::Register(4, 1), length: 3, ..high };
        assert_eq!(decode_move(&[0x40, 0x8a, 0x27], 64), Some(low));
        // movzx eax, word [rdi]
        let extended = Move { bytes: 2, with: Operand::Register(0, 4), is_load: true, length: 3 };
        assert_eq!(decode_move(&[0x0f, 0xb7, 0x07], 64), Some(extended));
        // mov word [bx + si], 0x1234 in 16-bit code
        let with = Operand::Constant(0x1234);
        let word = Move { bytes: 2, with, is_load: false, length: 4 };
        assert_eq!(decode_move(&[0xc7, 0x00, 0x34, 0x12], 16), Some(word));
        // mov qword [rax], -1
        let with = Operand::Constant(u64::MAX);
        let wide = Move { bytes: 8, with, is_load: false, length: 7 };
        assert_eq!(decode_move(&[0x48, 0xc7, 0, 0xff, 0xff, 0xff, 0xff], 64), Some(wide));
    }

    #[test]
    fn everything_else_is_refused() {
        for code in [&[0x8b_u8, 0xc0][..], &[0x90], &[0x8b], &[], &[0x48], &[0xc7, 0x80, 0, 3]] {
            assert_eq!(decode_move(code, 64), None, "{code:x?}");
        }
    }
}
