//! Consoles as lines.
//!
//! Several domains share one console, so what each writes is put together to lines, and each
//! line starts with its writer's name. A line that is not finished is shown after a while as it
//! is. Control characters are replaced: no domain may steer the terminal of whoever looks.

use alloc::collections::VecDeque;
use alloc::vec::Vec;

/// Bytes that are kept of each console for a death record.
pub(crate) const TAIL: usize = 2048;
/// A longer line is broken.
const MAX_LINE: usize = 512;
/// How long an unfinished line waits for its end.
const PATIENCE_NS: u64 = 200_000_000;

/// The console of one domain.
#[derive(Clone, Default, Debug)]
pub(crate) struct Console {
    /// Bytes ever written that were read.
    pub(crate) position: u64,
    partial: Vec<u8>,
    partial_since: u64,
    tail: VecDeque<u8>,
}

impl Console {
    /// Takes bytes that the domain wrote; appends finished lines to `out`.
    pub(crate) fn feed(&mut self, name: &str, bytes: &[u8], now: u64, out: &mut Vec<u8>) {
        let excess = (self.tail.len() + bytes.len()).saturating_sub(TAIL);
        self.tail.drain(..excess.min(self.tail.len()));
        self.tail.extend(&bytes[bytes.len().saturating_sub(TAIL)..]);
        for &byte in bytes {
            match byte {
                b'\n' => self.flush(name, out),
                b'\r' => {}
                _ => {
                    if self.partial.is_empty() {
                        self.partial_since = now;
                    }
                    self.partial.push(byte);
                    if self.partial.len() == MAX_LINE {
                        self.flush(name, out);
                    }
                }
            }
        }
    }

    /// The last bytes written.
    pub(crate) fn tail(&self) -> Vec<u8> {
        self.tail.iter().copied().collect()
    }

    /// When the unfinished line is shown, if there is one.
    pub(crate) fn deadline(&self) -> Option<u64> {
        (!self.partial.is_empty()).then(|| self.partial_since.saturating_add(PATIENCE_NS))
    }

    /// Shows the unfinished line if it has waited long enough.
    pub(crate) fn expire(&mut self, name: &str, now: u64, out: &mut Vec<u8>) {
        if self.deadline().is_some_and(|deadline| deadline <= now) {
            self.flush(name, out);
        }
    }

    fn flush(&mut self, name: &str, out: &mut Vec<u8>) {
        write_line(name, &self.partial, out);
        self.partial.clear();
    }
}

/// Appends `NAME| text` as a line.
pub(crate) fn write_line(name: &str, text: &[u8], out: &mut Vec<u8>) {
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(b"| ");
    out.extend(text.iter().map(|byte| match byte {
        b'\t' => b' ',
        0..32 | 127 => b'?',
        other => *other,
    }));
    out.push(b'\n');
}
