//! The messages between `axl` and the control domain.
//!
//! A frame is a postcard-encoded [`ToControl`] or [`FromControl`], behind it its CRC-32
//! (ISO-HDLC) in little-endian order, all of it COBS-encoded, and a zero byte. Zero bytes stand
//! nowhere else, so that a receiver that lost its place finds it again at the next one. No frame
//! is longer than [`MAX_FRAME`]; whatever may be longer (console contents, xenstore's tree) is
//! asked for in parts.
//!
//! Every request has an id that its response repeats. [`Request::Hello`] stays the same in all
//! versions. In later versions, requests and responses are only added at the end.

use alloc::string::String;
use alloc::vec::Vec;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Version of this protocol.
pub const VERSION: u32 = 2;
/// Most bytes of a frame, without the zero byte that ends it.
pub const MAX_FRAME: usize = 16_384;
/// Most bytes of console in one response.
pub const MAX_CONSOLE: usize = 4096;
/// Longest name or path that a request may hold.
pub const MAX_TEXT: usize = 3072;

/// What `axl` sends.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ToControl {
    /// Repeated by the response.
    pub id: u32,
    /// What is wanted.
    pub request: Request,
}

/// What the control domain answers.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FromControl {
    /// The request's.
    pub id: u32,
    /// The answer.
    pub response: Response,
}

/// A request. The text behind it is the name of a domain unless something else is said.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Request {
    /// First of all: do we speak the same language? [`Response::Hello`].
    Hello {
        /// The sender's [`VERSION`].
        version: u32,
    },
    /// All domains: [`Response::List`].
    List,
    /// The machine: [`Response::Info`].
    Info,
    /// Makes a domain fault: [`Response::Done`].
    Crash(String),
    /// Starts a domain's next incarnation, whatever its state: [`Response::Done`].
    Restart(String),
    /// Why a domain's last incarnation ended: [`Response::Why`].
    Why(String),
    /// Part of a domain's console: [`Response::Console`].
    ConsoleRead {
        /// The domain.
        name: String,
        /// Bytes ever written before the first one wanted.
        position: u64,
    },
    /// Part of the core's log: [`Response::Console`].
    Dmesg {
        /// Bytes ever written before the first one wanted.
        position: u64,
    },
    /// One node of xenstore: [`Response::Node`]. The text is its absolute path.
    XenstoreLs(String),
    /// Stops a domain: [`Response::Done`].
    Pause(String),
    /// Continues it: [`Response::Done`].
    Unpause(String),
    /// Frees all that a domain has: [`Response::Done`].
    Destroy(String),
    /// Asks a guest to end by itself: [`Response::Done`] when it has been asked.
    Shutdown {
        /// The domain.
        name: String,
        /// To start again, not to end.
        reboot: bool,
    },
    /// Types on the console of a guest that has one to read from: [`Response::Done`], or
    /// [`Failure::Busy`] when it has not read what was typed before.
    ConsoleWrite {
        /// The domain.
        name: String,
        /// What is typed, at most 256 bytes.
        bytes: Vec<u8>,
    },
    /// Asks a guest to give memory back, or to take it again: [`Response::Done`] when it has been
    /// asked.
    SetMemory {
        /// The domain.
        name: String,
        /// What it shall have, MiB.
        mib: u32,
    },
}

/// A response.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Response {
    /// To [`Request::Hello`], whatever the sender's version.
    Hello {
        /// The control domain's [`VERSION`].
        version: u32,
        /// Name of the system.
        system: String,
    },
    /// It was done, or is on its way.
    Done,
    /// It was not.
    Failed(Failure),
    /// To [`Request::List`], in order of domain ids.
    List(Vec<DomainLine>),
    /// To [`Request::Info`].
    Info(Info),
    /// To [`Request::Why`].
    Why(Why),
    /// To [`Request::ConsoleRead`] and [`Request::Dmesg`].
    Console {
        /// Position of the first byte: later than asked for when older bytes are gone.
        start: u64,
        /// At most [`MAX_CONSOLE`]; empty when nothing newer is there.
        bytes: Vec<u8>,
    },
    /// To [`Request::XenstoreLs`].
    Node {
        /// The node's value.
        value: Vec<u8>,
        /// The names of its children.
        children: Vec<String>,
        /// Its permissions, owner first, such as `n0`.
        perms: Vec<String>,
    },
}

/// Why a request was not carried out.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Failure {
    /// There is no domain of that name.
    UnknownName {
        /// The name.
        name: String,
        /// One that was probably meant.
        nearest: Option<String>,
    },
    /// The domain's state, or the domain, does not allow it.
    BadState {
        /// A sentence for people.
        message: String,
    },
    /// The core refused: a Xen error number.
    Core {
        /// The number.
        errno: u16,
        /// Its name.
        name: String,
    },
    /// The store refused, or does not answer: the name of its error.
    Store {
        /// Such as `ENOENT`.
        name: String,
    },
    /// A name or path is too long.
    TooLong,
    /// The answer does not fit into a frame.
    TooLarge,
    /// Too many requests wait for the store.
    Busy,
    /// The request is none that the control domain knows.
    NotUnderstood,
    /// The platform went away while the request was under way; from the host's side only.
    Gone,
}

/// A line of [`Response::List`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DomainLine {
    /// Name.
    pub name: String,
    /// Domain id.
    pub domid: u16,
    /// Which life, from 1.
    pub incarnation: u32,
    /// What it does.
    pub state: DomainState,
    /// What it is for.
    pub role: crate::system::Role,
    /// Memory charged to it.
    pub memory_bytes: u64,
    /// How long this incarnation has run.
    pub uptime_ms: u64,
    /// CPU time of all incarnations.
    pub cpu_us: u64,
    /// Restarts by the supervisor and by hand.
    pub restarts: u32,
    /// Why it is not running, when it is held: a sentence.
    pub held: Option<String>,
}

/// What a domain does.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum DomainState {
    /// Being built; has not started.
    Building,
    /// Running or ready to.
    Running,
    /// Waits for an event.
    Blocked,
    /// Stopped by `axl pause`.
    Paused,
    /// Died; a restart is on its way.
    Restarting,
    /// Died, and is not restarted before somebody asks for it.
    Held,
    /// Died, and stays as it is for inspection.
    Dead,
    /// Being destroyed.
    Dying,
}

/// [`Response::Info`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Info {
    /// Name of the system.
    pub system: String,
    /// Version of the control domain.
    pub version: String,
    /// Version of the control interface of the core.
    pub control_interface: u32,
    /// Processors.
    pub cpus: u32,
    /// Memory that the core manages.
    pub memory_bytes: u64,
    /// Of this, free.
    pub free_bytes: u64,
    /// Memory that the core itself uses.
    pub core_bytes: u64,
    /// Time since the core was entered.
    pub uptime_ms: u64,
    /// TSC frequency.
    pub tsc_khz: u64,
    /// Time from the core's entry to the last domain's start.
    pub started_after_us: u64,
    /// Devices whose DMA nothing confines, and their owners.
    pub dma_trusted: Vec<(u32, String)>,
    /// Guests with kernels of their own.
    pub guests: Vec<GuestExits>,
}

/// Why the vCPUs of a guest with a kernel of its own needed the core, as
/// [`crate::control::ExitCounts`] has it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct GuestExits {
    /// The domain.
    pub name: String,
    /// How often, by `EXIT_*`.
    pub exits: Vec<u64>,
    /// Accesses that no specification lists.
    pub unlisted: u64,
    /// The last of them.
    pub last_unlisted: u64,
}

/// [`Response::Why`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Why {
    /// The domain.
    pub name: String,
    /// Which life ended; 0 when none has.
    pub incarnation: u32,
    /// `DEATH_*` of [`crate::control`].
    pub cause: u32,
    /// Meaning set by `cause`.
    pub detail: u32,
    /// Exception number.
    pub vector: u32,
    /// Exception error code.
    pub error: u64,
    /// CR2 of a page fault.
    pub address: u64,
    /// Time of death since the core was entered.
    pub time_ns: u64,
    /// How long the incarnation had run.
    pub lived_ns: u64,
    /// Time at which the next incarnation could run; 0: none has.
    pub restarted_ns: u64,
    /// rax rbx rcx rdx rsi rdi rbp rsp r8..r15.
    pub registers: [u64; 16],
    /// `rip`.
    pub rip: u64,
    /// `rflags`.
    pub rflags: u64,
    /// Return addresses, innermost first.
    pub backtrace: Vec<u64>,
    /// What the domain had last written to its console when it died.
    pub console_tail: Vec<u8>,
    /// Restarts so far.
    pub restarts: u32,
    /// Why it is not restarted, when it is held.
    pub held: Option<String>,
}

/// Why bytes are no message.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FrameError {
    /// Longer than [`MAX_FRAME`].
    TooLong,
    /// Not COBS, shorter than a checksum, or the checksum does not match.
    Damaged,
    /// A sound frame that holds no message of this version.
    NotUnderstood {
        /// The id in front of it, when there is one.
        id: Option<u32>,
    },
}

/// Encodes a message as a frame, the zero byte at its end included.
///
/// # Errors
/// [`FrameError::TooLong`] when it does not fit into [`MAX_FRAME`].
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, FrameError> {
    let mut bytes = postcard::to_allocvec(message).map_err(|_| FrameError::TooLong)?;
    bytes.extend_from_slice(&crc32(&bytes).to_le_bytes());
    let frame = stuff(&bytes);
    if frame.len() > MAX_FRAME + 1 { Err(FrameError::TooLong) } else { Ok(frame) }
}

/// Decodes a frame, without the zero byte at its end.
///
/// # Errors
/// See [`FrameError`].
pub fn decode<T: DeserializeOwned>(frame: &[u8]) -> Result<T, FrameError> {
    if frame.len() > MAX_FRAME {
        return Err(FrameError::TooLong);
    }
    let bytes = unstuff(frame).ok_or(FrameError::Damaged)?;
    let (body, sum) = bytes.split_last_chunk::<4>().ok_or(FrameError::Damaged)?;
    if crc32(body) != u32::from_le_bytes(*sum) {
        return Err(FrameError::Damaged);
    }
    match postcard::take_from_bytes(body) {
        Ok((message, [])) => Ok(message),
        _ => {
            let id = postcard::take_from_bytes::<u32>(body).ok().map(|(id, _)| id);
            Err(FrameError::NotUnderstood { id })
        }
    }
}

/// Finds frames in a stream of bytes. Holds at most [`MAX_FRAME`] of them.
#[derive(Clone, Default, Debug)]
pub struct Framer {
    held: Vec<u8>,
    /// Skips bytes up to the next zero, because the frame was too long.
    skipping: bool,
}

impl Framer {
    /// A framer at the start of a frame.
    #[must_use]
    pub const fn new() -> Self {
        Self { held: Vec::new(), skipping: false }
    }

    /// Takes one byte. A frame, or what is wrong with it, when it ends one. Empty frames are
    /// passed over: a sender may start with a zero byte to end whatever stands before it.
    pub fn push<T: DeserializeOwned>(&mut self, byte: u8) -> Option<Result<T, FrameError>> {
        if byte != 0 {
            if self.held.len() == MAX_FRAME {
                self.skipping = true;
                self.held.clear();
            }
            if !self.skipping {
                self.held.push(byte);
            }
            return None;
        }
        if core::mem::take(&mut self.skipping) {
            return Some(Err(FrameError::TooLong));
        }
        if self.held.is_empty() {
            return None;
        }
        let result = decode(&self.held);
        self.held.clear();
        Some(result)
    }
}

/// CRC-32 as Ethernet and zip have it (ISO-HDLC): polynomial 0x04c11db7, reflected, all ones at
/// the start and inverted at the end.
#[must_use]
pub fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0_u32, |crc, byte| crc >> 8 ^ CRC[usize::from(crc.to_le_bytes()[0] ^ byte)])
}

const CRC: [u32; 256] = {
    let mut table = [0; 256];
    let mut at = 0_u32;
    while at < 256 {
        let mut crc = at;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 };
            bit += 1;
        }
        table[at as usize] = crc;
        at += 1;
    }
    table
};

/// COBS: groups of up to 254 bytes that are not zero, each behind its length + 1; a group
/// shorter than 254 stands for itself and a zero. The end is marked by a zero byte.
fn stuff(bytes: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(bytes.len() + bytes.len() / 254 + 2);
    let mut groups = bytes.split(|byte| *byte == 0).peekable();
    while let Some(mut group) = groups.next() {
        while group.len() >= 254 {
            let (full, rest) = group.split_at(254);
            frame.push(255);
            frame.extend_from_slice(full);
            group = rest;
            if group.is_empty() && groups.peek().is_none() {
                frame.push(0);
                return frame;
            }
        }
        frame.push(u8::try_from(group.len() + 1).unwrap_or(255));
        frame.extend_from_slice(group);
    }
    frame.push(0);
    frame
}

/// The bytes in a frame without its zero at the end; `None` when it is none.
fn unstuff(frame: &[u8]) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(frame.len());
    let mut rest = frame;
    while let Some((&code, behind)) = rest.split_first() {
        let len = usize::from(code.checked_sub(1)?);
        let group = behind.get(..len)?;
        if group.contains(&0) {
            return None;
        }
        bytes.extend_from_slice(group);
        rest = &behind[len..];
        if code < 255 && !rest.is_empty() {
            bytes.push(0);
        }
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    #[test]
    fn the_checksum_is_that_of_the_catalogue() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
        assert_eq!(crc32(b""), 0);
    }

    /// Examples of the COBS paper (Cheshire and Baker), and the lengths around a full group.
    #[test]
    fn stuffing_is_cobs() {
        let run = |range: core::ops::RangeInclusive<u8>| range.collect::<Vec<u8>>();
        let cases: Vec<(Vec<u8>, Vec<u8>)> = vec![
            (vec![], vec![1, 0]),
            (vec![0], vec![1, 1, 0]),
            (vec![0, 0], vec![1, 1, 1, 0]),
            (vec![0x11, 0x22, 0, 0x33], vec![3, 0x11, 0x22, 2, 0x33, 0]),
            (vec![0x11, 0, 0, 0], vec![2, 0x11, 1, 1, 1, 0]),
            (run(1..=254), [vec![255], run(1..=254), vec![0]].concat()),
            (run(0..=254), [vec![1, 255], run(1..=254), vec![0]].concat()),
            (run(1..=255), [vec![255], run(1..=254), vec![2, 255, 0]].concat()),
            ([run(2..=255), vec![0]].concat(), [vec![255], run(2..=255), vec![1, 1, 0]].concat()),
        ];
        for (plain, stuffed) in cases {
            assert_eq!(stuff(&plain), stuffed, "{plain:?}");
            assert_eq!(unstuff(&stuffed[..stuffed.len() - 1]), Some(plain));
        }
    }

    #[test]
    fn whatever_is_stuffed_comes_out_again() {
        let mut state = 1_u32;
        for len in (0..1200).step_by(7) {
            let bytes: Vec<u8> = (0..len)
                .map(|_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    if state >> 24 < 3 { 0 } else { (state >> 16).to_le_bytes()[0] }
                })
                .collect();
            let stuffed = stuff(&bytes);
            assert_eq!(stuffed.iter().filter(|byte| **byte == 0).count(), 1);
            assert_eq!(unstuff(&stuffed[..stuffed.len() - 1]), Some(bytes));
        }
    }

    fn request() -> ToControl {
        ToControl { id: 7, request: Request::Crash("net0".into()) }
    }

    /// Whatever stands before a frame, the frame behind the next zero is found.
    #[test]
    fn a_framer_finds_its_place_again() {
        let frame = encode(&request()).unwrap();
        for garbage in
            [vec![], vec![0; 3], vec![1, 2, 3], frame[..5].to_vec(), vec![7; MAX_FRAME * 2]]
        {
            let mut framer = Framer::new();
            let stream = [garbage.as_slice(), &[0], &frame].concat();
            let found: Vec<_> =
                stream.iter().filter_map(|b| framer.push::<ToControl>(*b)).collect();
            assert_eq!(found.last(), Some(&Ok(request())), "{} bytes", garbage.len());
            assert!(found.len() <= 2);
        }
    }

    /// No frame that differs in one bit is taken for a message.
    #[test]
    fn every_flipped_bit_is_noticed() {
        let frame = encode(&request()).unwrap();
        let frame = &frame[..frame.len() - 1];
        for bit in 0..frame.len() * 8 {
            let mut damaged = frame.to_vec();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(decode::<ToControl>(&damaged), Err(FrameError::Damaged), "bit {bit}");
        }
    }

    /// A request of a later version is answered by its id.
    #[test]
    fn an_unknown_request_keeps_its_id() {
        let mut body = vec![9, 200, 1];
        body.extend_from_slice(&crc32(&[9, 200, 1]).to_le_bytes());
        let frame = stuff(&body);
        let wanted = Err(FrameError::NotUnderstood { id: Some(9) });
        assert_eq!(decode::<ToControl>(&frame[..frame.len() - 1]), wanted);
    }

    #[test]
    fn a_message_that_is_too_long_is_not_sent() {
        let response = Response::Console { start: 0, bytes: vec![1; MAX_FRAME] };
        assert_eq!(encode(&FromControl { id: 1, response }), Err(FrameError::TooLong));
    }
}
