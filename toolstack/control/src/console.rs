//! Consoles as lines.
//!
//! Several domains share one console, so what each writes is put together to lines, and each
//! line starts with its writer's name. A line that is not finished is shown after a while as it
//! is. Control characters are replaced: no domain may steer the terminal of whoever looks.

use alloc::collections::VecDeque;
use alloc::vec::Vec;

/// Bytes that are kept of each console for a death record.
pub(crate) const TAIL: usize = 2048;
/// Bytes that are kept of a guest's console ring.
const KEPT: usize = 16 * 1024;
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
    /// The last bytes taken, where nobody else keeps them, and how many there ever were.
    kept: VecDeque<u8>,
    kept_end: u64,
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

    /// Keeps bytes for [`Self::part`].
    pub(crate) fn keep(&mut self, bytes: &[u8]) {
        self.kept.extend(bytes);
        self.kept_end += bytes.len() as u64;
        let excess = self.kept.len().saturating_sub(KEPT);
        self.kept.drain(..excess);
    }

    /// At most `most` of the bytes kept, from a position on, or from the oldest, and where they
    /// start.
    pub(crate) fn part(&self, position: u64, most: usize) -> (u64, Vec<u8>) {
        let oldest = self.kept_end - self.kept.len() as u64;
        let start = position.clamp(oldest, self.kept_end);
        let skip = usize::try_from(start - oldest).unwrap_or(usize::MAX);
        (start, self.kept.iter().skip(skip).take(most).copied().collect())
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
