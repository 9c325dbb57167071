//! The bytes of `/bytes/N`: cheap to make anywhere in the stream, and no two words of eight
//! bytes alike, so that a lost, doubled or misplaced piece shows.
//!
//! Bytes `8 * k .. 8 * k + 8` are [`word`]`(k)`, lowest byte first. `N` only says where the
//! stream ends: a shorter stream is a prefix of a longer one.

/// Word `k` of the stream: the output function of SplitMix64 (Steele, Lea and Flood, "Fast
/// splittable pseudorandom number generators", 2014) for the state `k * gamma`. It is a bijection.
#[must_use]
pub const fn word(k: u64) -> u64 {
    let mut z = k.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Byte `i` of the stream.
#[must_use]
pub const fn byte(i: u64) -> u8 {
    word(i / 8).to_le_bytes()[(i % 8) as usize]
}

/// Fills `buffer` with the stream from byte `offset` on.
pub fn fill(offset: u64, buffer: &mut [u8]) {
    let lead = usize::min((8 - (offset % 8) as usize) % 8, buffer.len());
    let (head, rest) = buffer.split_at_mut(lead);
    for (i, out) in (offset..).zip(head) {
        *out = byte(i);
    }
    let first = offset.div_ceil(8);
    let (words, tail) = rest.as_chunks_mut::<8>();
    for (k, out) in (first..).zip(&mut *words) {
        *out = word(k).to_le_bytes();
    }
    let end = first + words.len() as u64;
    tail.copy_from_slice(&word(end).to_le_bytes()[..tail.len()]);
}

/// Where `bytes`, received from `offset` of the stream on, first differ from it.
#[must_use]
pub fn first_difference(offset: u64, bytes: &[u8]) -> Option<u64> {
    let mut expected = [0; 512];
    let mut at = offset;
    for piece in bytes.chunks(expected.len()) {
        let expected = &mut expected[..piece.len()];
        fill(at, expected);
        if let Some(i) = piece.iter().zip(&*expected).position(|(a, b)| a != b) {
            return Some(at + i as u64);
        }
        at += piece.len() as u64;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_first_words_are_fixed() {
        assert_eq!(word(0), 0);
        // SplitMix64 seeded with 0 yields this first.
        assert_eq!(word(1), 0xe220_a839_7b1d_cdaf);
        assert_eq!(byte(8), 0xaf);
    }

    proptest! {
        #[test]
        fn filling_and_single_bytes_agree(offset in 0_u64..1 << 40, len in 0_usize..100) {
            let mut buffer = vec![0; len];
            fill(offset, &mut buffer);
            for (i, b) in (offset..).zip(&buffer) {
                prop_assert_eq!(*b, byte(i));
            }
            prop_assert_eq!(first_difference(offset, &buffer), None);
        }

        #[test]
        fn every_wrong_byte_is_found(len in 1_usize..2000, at in any::<prop::sample::Index>()) {
            let mut buffer = vec![0; len];
            fill(7, &mut buffer);
            let at = at.index(len);
            buffer[at] ^= 1;
            prop_assert_eq!(first_difference(7, &buffer), Some(7 + at as u64));
        }
    }
}
