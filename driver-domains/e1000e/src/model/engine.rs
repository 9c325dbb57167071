//! What the controller does to a packet on its way: checksums and segmentation outwards, the look
//! at checksums inwards.

use crate::descriptor::{
    CONTEXT_IPV4, CONTEXT_TCP, DATA, DEXT, EOP, IFCS, INSERT_IP, INSERT_L4, RS, TSE,
};
use crate::registers as reg;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

/// Commands that a data descriptor may have.
const KNOWN: u64 = EOP | IFCS | RS | DEXT | DATA | TSE | INSERT_IP | INSERT_L4;

/// A context, as the driver left it.
#[derive(Clone, Copy, Debug)]
pub struct Context {
    ip: Span,
    l4: Span,
    command: u64,
    payload: usize,
    header: usize,
    mss: usize,
}

/// What one checksum is over, and where it goes.
#[derive(Clone, Copy, Debug)]
struct Span {
    start: usize,
    field: usize,
    /// The last byte; 0: that of the packet.
    end: usize,
}

/// What a transmit descriptor is.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// All of a frame, or a part of one.
    Legacy,
    /// Sets the context.
    Context(Context),
    /// A part of a packet.
    Data,
}

impl Kind {
    /// Decodes a descriptor.
    pub fn of(first: u64, second: u64) -> Self {
        match second & (DEXT | 0xf << 20) {
            DEXT => Self::Context(Context::of(first, second)),
            value if value & DEXT != 0 => Self::Data,
            _ => Self::Legacy,
        }
    }
}

impl Context {
    #[expect(clippy::cast_possible_truncation, reason = "fields are small")]
    fn of(first: u64, second: u64) -> Self {
        let field = |word: u64, at: u32, bits: u32| (word >> at & ((1 << bits) - 1)) as usize;
        let span = |at: u32| Span {
            start: field(first, at, 8),
            field: field(first, at + 8, 8),
            end: field(first, at + 16, 16),
        };
        Self {
            ip: span(0),
            l4: span(32),
            command: second & 0xff << 24,
            payload: field(second, 0, 20),
            header: field(second, 40, 8),
            mss: field(second, 48, 16),
        }
    }
}

/// The frames that leave for `packet`, whose data descriptors had `command`.
///
/// # Errors
/// What the driver did wrong.
pub fn send(packet: &[u8], command: u64, context: Option<Context>) -> Result<Vec<Vec<u8>>, String> {
    if command & !(KNOWN | 0xf_ffff) != 0 {
        return Err(format!("data command {command:#x}"));
    }
    let context = context.ok_or("data without a context")?;
    if command & TSE != 0 {
        return segment(packet, command, &context);
    }
    let mut frame = packet.to_vec();
    if command & INSERT_IP != 0 {
        insert(&mut frame, context.ip)?;
    }
    if command & INSERT_L4 != 0 {
        insert(&mut frame, context.l4)?;
    }
    Ok(alloc::vec![frame])
}

fn insert(frame: &mut [u8], span: Span) -> Result<(), String> {
    let end = if span.end == 0 { frame.len() } else { span.end + 1 };
    let covered = frame.get(span.start..end).ok_or(format!("{span:?} of {}", frame.len()))?;
    let value = !sum(covered);
    let field = frame.get_mut(span.field..span.field + 2).ok_or(format!("{span:?}"))?;
    field.copy_from_slice(&value.to_be_bytes());
    Ok(())
}

fn segment(packet: &[u8], command: u64, context: &Context) -> Result<Vec<Vec<u8>>, String> {
    let ipv4 = context.command & CONTEXT_IPV4 != 0;
    let tcp = context.command & CONTEXT_TCP != 0 && context.command & TSE != 0;
    let header = packet.get(..context.header).ok_or("longer headers than the packet")?;
    let payload = &packet[context.header..];
    let length = context.ip.start + if ipv4 { 2 } else { 4 };
    if !tcp || payload.len() != context.payload || context.mss == 0 {
        return Err(format!("{} bytes of payload, {context:?}", payload.len()));
    }
    if ipv4 != (command & INSERT_IP != 0) || command & INSERT_L4 == 0 {
        return Err(format!("segmentation without checksums: {command:#x}"));
    }
    if header.get(length..length + 2) != Some(&[0, 0]) {
        return Err("a prototype with a length".into());
    }
    let pieces = payload.chunks(context.mss);
    let last = pieces.len() - 1;
    let cut = |(number, piece): (usize, &[u8])| {
        let mut frame = [header, piece].concat();
        adapt(&mut frame, context, ipv4, number, number == last);
        if ipv4 {
            insert(&mut frame, context.ip)?;
        }
        insert(&mut frame, context.l4)?;
        Ok(frame)
    };
    pieces.enumerate().map(cut).collect()
}

/// Makes the `number`th frame's headers of the prototype.
fn adapt(frame: &mut [u8], context: &Context, ipv4: bool, number: usize, last: bool) {
    let (ip, l4) = (context.ip.start, context.l4.start);
    let (all, of_l4) = (frame.len() - ip, frame.len() - l4);
    if ipv4 {
        add(frame, ip + 2, 2, all);
        add(frame, ip + 4, 2, number);
    } else {
        add(frame, ip + 4, 2, all - 40);
    }
    add(frame, l4 + 4, 4, number * context.mss);
    if !last {
        frame[l4 + 13] &= !(1 << 0 | 1 << 3);
    }
    // The prototype has the sum over the pseudo header without a length.
    let field = context.l4.field;
    let pseudo = [&frame[field..field + 2], &u32::try_from(of_l4).expect("short").to_be_bytes()];
    let pseudo = sum(&pseudo.concat());
    frame[field..field + 2].copy_from_slice(&pseudo.to_be_bytes());
}

/// Adds to a number of `len` bytes; it wraps.
fn add(frame: &mut [u8], at: usize, len: usize, value: usize) {
    let mut carry = value;
    for byte in frame[at..at + len].iter_mut().rev() {
        carry += usize::from(*byte);
        *byte = carry.to_le_bytes()[0];
        carry >>= 8;
    }
}

/// Status and errors of what was found of the checksums in a frame that arrived, where `control` asks
/// for them.
pub fn look(frame: &[u8], control: u32) -> (u8, u8) {
    let Some((ip, l4)) = find(frame) else { return (1 << 2, 0) };
    let (mut status, mut errors) = (0, 0);
    if control & reg::RXCSUM_IPOFLD != 0 && frame[ip] >> 4 == 4 {
        status |= 1 << 6;
        errors |= u8::from(sum(&frame[ip..l4]) != 0xffff) << 6;
    }
    let (protocol, addresses) = match frame[ip] >> 4 {
        4 => (frame[ip + 9], &frame[ip + 12..ip + 20]),
        _ => (frame[ip + 6], &frame[ip + 8..ip + 40]),
    };
    let unused = protocol == 17 && frame[l4 + 6..l4 + 8] == [0, 0];
    if control & reg::RXCSUM_TUOFLD != 0 && matches!(protocol, 6 | 17) && !unused {
        let len = u32::try_from(frame.len() - l4).expect("a frame").to_be_bytes();
        let all = [addresses, &len, &[0, protocol], &frame[l4..]].concat();
        status |= if protocol == 6 { 1 << 5 } else { 1 << 5 | 1 << 4 };
        errors |= u8::from(sum(&all) != 0xffff) << 5;
    }
    (status, errors)
}

/// Where the IP header is, and what follows it; of plain packets only.
fn find(frame: &[u8]) -> Option<(usize, usize)> {
    let tagged = frame.get(12..14)? == [0x81, 0x00];
    let ip = if tagged { 18 } else { 14 };
    let l4 = match (frame.get(ip - 2..ip)?, frame.get(ip)?) {
        ([0x08, 0x00], first @ 0x45..=0x4f) => ip + usize::from(first & 0xf) * 4,
        ([0x86, 0xdd], 0x60..=0x6f) => ip + 40,
        _ => return None,
    };
    (frame.len() >= l4 + 8).then_some((ip, l4))
}

fn sum(bytes: &[u8]) -> u16 {
    let word = |pair: &[u8]| u32::from_be_bytes([0, 0, pair[0], pair.get(1).copied().unwrap_or(0)]);
    let mut sum: u32 = bytes.chunks(2).map(word).sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).expect("folded")
}
