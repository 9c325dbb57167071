//! A packet in private memory: its parts, in order.
//!
//! The pages are the card's or our own; no guest reaches them. That is why what is in them may be
//! looked at, and rewritten.

use crate::frame::Sum;
use domain_api::nic::Buffer;
use shmem::Page;

/// Bytes that are summed up at once.
const BLOCK: usize = 256;

/// Goes through a packet, piece by piece.
#[derive(Clone, Debug)]
pub struct Cursor<'a> {
    rest: &'a [Buffer],
    /// Bytes of the first part that are behind us.
    done: u16,
}

/// Bytes in one page.
#[derive(Clone, Copy, Debug)]
pub struct Piece<'a> {
    /// The page.
    pub page: &'a Page,
    /// Where in the page.
    pub offset: u16,
    /// How many.
    pub len: u16,
}

impl<'a> Cursor<'a> {
    /// At byte `at` of a packet.
    #[must_use]
    pub fn new(parts: &'a [Buffer], at: usize) -> Self {
        let mut cursor = Self { rest: parts, done: 0 };
        let mut left = at;
        while left > 0
            && let Some(piece) = cursor.next(left)
        {
            left -= usize::from(piece.len);
        }
        cursor
    }

    /// The next bytes, at most `most`. `None` behind the end, and for none.
    pub fn next(&mut self, most: usize) -> Option<Piece<'a>> {
        loop {
            let (part, rest) = self.rest.split_first()?;
            let len = part.len - self.done;
            let taken = u16::try_from(most).map_or(len, |most| most.min(len));
            if taken > 0 {
                let piece = Piece { page: &part.page, offset: part.offset + self.done, len: taken };
                self.done += taken;
                return Some(piece);
            }
            if len > 0 {
                return None;
            }
            (self.rest, self.done) = (rest, 0);
        }
    }
}

/// Sets the parts' lengths to what `len` bytes take of them, which are as long as their room is.
///
/// # Panics
/// When there is not room for so many.
pub fn fill(parts: &mut [Buffer], len: usize) {
    let mut left = len;
    for part in parts {
        let taken = usize::from(part.len).min(left);
        part.len = u16::try_from(taken).unwrap_or(part.len);
        left -= taken;
    }
    assert_eq!(left, 0, "a packet gets the room that was asked for");
}

/// Copies bytes out of a packet, as many as there are.
pub fn read(parts: &[Buffer], at: usize, bytes: &mut [u8]) {
    let mut cursor = Cursor::new(parts, at);
    let mut done = 0;
    while let Some(piece) = cursor.next(bytes.len() - done) {
        let len = usize::from(piece.len);
        piece.page.read(usize::from(piece.offset), &mut bytes[done..done + len]);
        done += len;
    }
}

/// Copies bytes into a packet.
pub fn write(parts: &[Buffer], at: usize, bytes: &[u8]) {
    let mut cursor = Cursor::new(parts, at);
    let mut rest = bytes;
    while let Some(piece) = cursor.next(rest.len()) {
        let (now, later) = rest.split_at(usize::from(piece.len));
        piece.page.write(usize::from(piece.offset), now);
        rest = later;
    }
}

/// Adds up `len` bytes of a packet.
#[must_use]
pub fn sum(parts: &[Buffer], at: usize, len: usize) -> Sum {
    walk(parts, at, len, |_, _| ())
}

/// Copies `len` bytes of a packet to `to`, from byte `start` of it on, and adds them up.
pub fn copy(parts: &[Buffer], at: usize, len: usize, to: &Buffer, start: usize) -> Sum {
    let start = usize::from(to.offset) + start;
    walk(parts, at, len, |done, block| to.page.write(start + done, block))
}

/// Adds up bytes, and shows them to `see`, which gets to know how many were before them.
fn walk(parts: &[Buffer], at: usize, len: usize, mut see: impl FnMut(usize, &[u8])) -> Sum {
    let mut cursor = Cursor::new(parts, at);
    let mut sum = Sum::default();
    let mut block = [0; BLOCK];
    let mut done = 0;
    while let Some(piece) = cursor.next((len - done).min(BLOCK)) {
        let block = &mut block[..usize::from(piece.len)];
        piece.page.read(usize::from(piece.offset), block);
        sum.add(block);
        see(done, block);
        done += block.len();
    }
    sum
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use alloc::vec::Vec;
    use proptest::prelude::*;

    /// A packet whose parts have these lengths.
    pub(crate) fn packet(bytes: &[u8], lens: &[usize]) -> Vec<Buffer> {
        let (mut parts, mut rest) = (Vec::new(), bytes);
        for (token, len) in (0..).zip(lens.iter().copied().chain([2048; 40])) {
            let (now, later) = rest.split_at(len.min(rest.len()));
            let part = Buffer {
                page: Page::new_zeroed(),
                offset: 8 + token,
                len: u16::try_from(now.len()).unwrap(),
                token,
            };
            part.page.write(usize::from(part.offset), now);
            parts.push(part);
            rest = later;
        }
        parts
    }

    pub(crate) fn bytes_of(parts: &[Buffer], len: usize) -> Vec<u8> {
        let mut bytes = alloc::vec![0; len];
        read(parts, 0, &mut bytes);
        bytes
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 4 } else { 128 }))]

        /// Parts are one run of bytes to all that is done with them.
        #[test]
        fn parts_make_one_packet(
            bytes in proptest::collection::vec(any::<u8>(), 1..3000),
            lens in proptest::collection::vec(0_usize..1000, 0..5),
            at in 0_usize..3000,
            len in 0_usize..2000,
        ) {
            let parts = packet(&bytes, &lens);
            prop_assert_eq!(&bytes_of(&parts, bytes.len()), &bytes);
            let at = at.min(bytes.len());
            let len = len.min(bytes.len() - at);
            let mut expected = Sum::default();
            expected.add(&bytes[at..at + len]);
            prop_assert_eq!(sum(&parts, at, len).folded(), expected.folded());
            let target = packet(&[0; 2048], &[]).remove(0);
            prop_assert_eq!(copy(&parts, at, len, &target, 40).folded(), expected.folded());
            let copied = bytes_of(&[target], 2048);
            prop_assert_eq!(&copied[40..40 + len], &bytes[at..at + len]);
            write(&parts, at, &alloc::vec![0x5a; len]);
            let mut changed = bytes.clone();
            changed[at..at + len].fill(0x5a);
            prop_assert_eq!(bytes_of(&parts, bytes.len()), changed);
        }
    }
}
