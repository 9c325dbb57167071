//! Consoles: the last bytes of each domain, and of the core itself (ADR 2).

use crate::domain::Domain;
use crate::fault::{Answer, Fault};
use crate::platform::Platform;
use crate::state::Core;
use axolotl_abi::control::{CONSOLE_OF_CORE, ConsoleRead, Rights};
use core::fmt::{self, Write};
use xen_abi::hypercall::{CONSOLEIO_READ, CONSOLEIO_WRITE};
use xen_abi::{DomainId, Errno, event};

/// Bytes that are kept of each domain's console.
const RING: u64 = 4096;
/// Bytes that are kept of the core's own messages.
const LOG_BYTES: usize = 8192;
/// Bytes that one hypercall moves before others get a chance.
const CHUNK: usize = 128;
/// The same of the machine's console, which takes 87 us for a byte at 115,200 baud.
const DIRECT_CHUNK: usize = 16;
/// Chunks of a domain's own ring that one hypercall moves.
const CHUNKS: usize = 16;

/// The core's own messages.
pub(crate) struct Log {
    bytes: [u8; LOG_BYTES],
    written: u64,
    /// Where the part begins that is not on the machine's console yet.
    shown: u64,
    /// Who has begun a line there, and not ended it.
    writer: Option<DomainId>,
}

impl Log {
    pub(crate) const fn new() -> Self {
        Self { bytes: [0; LOG_BYTES], written: 0, shown: 0, writer: None }
    }

    fn push(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.bytes[ring_index(self.written, LOG_BYTES)] = byte;
            self.written += 1;
        }
    }
}

fn ring_index(position: u64, bytes: usize) -> usize {
    usize::try_from(position % bytes as u64).unwrap_or(0)
}

impl Write for Log {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.push(text.as_bytes());
        Ok(())
    }
}

impl Log {
    /// Writes what is new to the machine's console, each line as `core| text`.
    fn show<P: Platform>(&mut self, p: &mut P) {
        let mut at = self.shown.max(self.written.saturating_sub(LOG_BYTES as u64));
        let mut is_start = true;
        while at < self.written {
            if is_start {
                p.console_write(b"core| ");
            }
            let index = ring_index(at, LOG_BYTES);
            let left = usize::try_from(self.written - at).unwrap_or(LOG_BYTES);
            let piece = &self.bytes[index..LOG_BYTES.min(index + left)];
            let end = piece.iter().position(|&byte| byte == b'\n');
            let len = end.map_or(piece.len(), |end| end + 1);
            p.console_write(&piece[..len]);
            is_start = end.is_some();
            at += len as u64;
        }
        self.shown = self.written;
    }
}

impl<P: Platform> Core<P> {
    /// Writes a line to the machine's console as `core| text`, and to the core's log. The text
    /// must be one that no domain can cause without limit.
    pub fn print(&mut self, p: &mut P, text: fmt::Arguments<'_>) {
        // A sink that cannot fail.
        let _ = self.log.write_fmt(text);
        let _ = self.log.write_str("\n");
        self.show_log(p);
    }

    /// Shows the core's messages, unless they would fall into a line that a domain has begun: then
    /// they wait for its end. They do not wait for the dead, nor until they are overwritten.
    fn show_log(&mut self, p: &mut P) {
        if let Some(writer) = self.log.writer {
            let is_going_on = self.domain(writer).is_some_and(Domain::is_alive);
            if is_going_on && self.log.written - self.log.shown < LOG_BYTES as u64 / 2 {
                return;
            }
            p.console_write(b"\n");
            self.log.writer = None;
        }
        self.log.show(p);
    }

    /// Writes a part of a domain's text to the machine's console.
    fn write_through(&mut self, p: &mut P, id: DomainId, bytes: &[u8]) {
        p.console_write(bytes);
        self.log.writer = bytes.last().is_some_and(|&byte| byte != b'\n').then_some(id);
        self.show_log(p);
    }

    /// `console_io`.
    pub(crate) fn console_io(
        &mut self,
        p: &mut P,
        id: DomainId,
        [command, count, buffer, ..]: [u64; 5],
    ) -> Answer {
        match command {
            CONSOLEIO_WRITE => self.console_out(p, id, count, buffer),
            // There is no input: `axl` comes by the second serial port.
            CONSOLEIO_READ => Ok(0),
            _ => Err(Errno::ENOSYS.into()),
        }
    }

    fn console_out(&mut self, p: &mut P, id: DomainId, count: u64, buffer: u64) -> Answer {
        // As Xen does it; what is beyond could not be meant.
        let count = count.min(i32::MAX as u64);
        let direct = self.me(id).rights.contains(Rights::CONSOLE);
        let mut done = u64::from(self.me(id).vcpu().progress).min(count);
        for _ in 0..if direct { 1 } else { CHUNKS } {
            if done == count {
                break;
            }
            let mut chunk = [0; CHUNK];
            let most = if direct { DIRECT_CHUNK } else { CHUNK };
            let len = most.min(usize::try_from(count - done).unwrap_or(most));
            self.read_caller(p, id, buffer.wrapping_add(done), &mut chunk[..len])?;
            let mut part = &chunk[..len];
            if direct && done + (len as u64) < count {
                // Others get their chance between two lines rather than within one.
                let end = part.iter().rposition(|&byte| byte == b'\n');
                part = &part[..end.map_or(len, |end| end + 1)];
            }
            append(p, self.me_mut(id), part);
            if direct {
                self.write_through(p, id, part);
            }
            done += part.len() as u64;
        }
        if done < count {
            self.me_mut(id).vcpu_mut().progress = u32::try_from(done).unwrap_or(0);
            return Err(Fault::Again);
        }
        if !direct && count > 0 {
            self.raise_global(p, event::VIRQ_CON_RING);
        }
        Ok(0)
    }

    /// [`ConsoleRead`].
    pub(crate) fn console_read(&mut self, p: &mut P, id: DomainId, gpa: u64) -> Answer {
        let mut op: ConsoleRead = self.get(p, id, gpa)?;
        let (written, ring) = if op.domid == CONSOLE_OF_CORE {
            (self.log.written, LOG_BYTES as u64)
        } else {
            (self.domain(op.domid).ok_or(Errno::ESRCH)?.console_written, RING)
        };
        op.position = op.position.clamp(written.saturating_sub(ring), written);
        let wanted = u64::from(op.len.min(4096)).min(written - op.position);
        let mut done = 0;
        while done < wanted {
            let mut chunk = [0; CHUNK];
            let len = (wanted - done).min(CHUNK as u64);
            let part = &mut chunk[..usize::try_from(len).unwrap_or(CHUNK)];
            self.console_bytes(p, op.domid, op.position + done, part);
            self.write_caller(p, id, op.buffer.wrapping_add(done), part)?;
            done += len;
        }
        op.position += wanted;
        op.len = u32::try_from(wanted).unwrap_or(0);
        self.put(p, id, gpa, &op)?;
        Ok(0)
    }

    fn console_bytes(&self, p: &P, whose: DomainId, position: u64, part: &mut [u8]) {
        for (byte, position) in part.iter_mut().zip(position..) {
            *byte = match self.domain(whose) {
                Some(domain) => p.load8(domain.console, ring_index(position, 4096)),
                None => self.log.bytes[ring_index(position, LOG_BYTES)],
            };
        }
    }

    /// The last bytes that a domain wrote, newest last, as far as they fit; for tests.
    #[must_use]
    pub fn console_tail(&self, p: &P, id: DomainId, buffer: &mut [u8]) -> usize {
        let Some(domain) = self.domain(id) else { return 0 };
        let len = domain.console_written.min(RING).min(buffer.len() as u64);
        let part = &mut buffer[..usize::try_from(len).unwrap_or(0)];
        self.console_bytes(p, id, domain.console_written - len, part);
        part.len()
    }
}

pub(crate) fn append<P: Platform>(p: &mut P, domain: &mut Domain<P>, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        let at = ring_index(domain.console_written, 4096);
        let (now, later) = bytes.split_at(bytes.len().min(4096 - at));
        p.write(domain.console, at, now);
        domain.console_written += now.len() as u64;
        bytes = later;
    }
}
