//! Cuts the data of a request into pieces that a disk takes.
//!
//! A controller has limits on length and on the number and shape of buffers
//! ([`Geometry::takes`]). A request that does not fit is done in several pieces, each of whole
//! sectors of the disk. Only where a single sector of the disk lies in several parts that cannot
//! be in one piece is it gathered in a page of our own.

use crate::request::Part;
use domain_api::DmaPage;
use domain_api::disk::{Buffer, Geometry, SECTOR};
use heapless::Vec;
use xen_abi::PAGE_SIZE;

/// Most buffers of a piece, whatever the disk takes.
pub const MAX_BUFFERS: usize = 128;

/// The buffers of a piece.
pub type Buffers<'a> = Vec<Buffer<'a>, MAX_BUFFERS>;

/// A place in the data of a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Cursor {
    part: usize,
    /// Bytes of the part that lie before it.
    byte: usize,
}

impl Cursor {
    /// Whether all data lie before it.
    #[must_use]
    pub fn is_end(self, parts: &[Part]) -> bool {
        self.part >= parts.len()
    }

    /// The place so many bytes further on.
    #[must_use]
    pub fn skip(mut self, parts: &[Part], mut bytes: usize) -> Self {
        while let Some(part) = parts.get(self.part) {
            let rest = part.bytes() - self.byte;
            if bytes < rest {
                self.byte += bytes;
                break;
            }
            bytes -= rest;
            self = Self { part: self.part + 1, byte: 0 };
        }
        self
    }

    /// What lies from here to `bytes` further on: each part's mapping, where in the page, and how
    /// many bytes.
    pub fn walk(
        mut self,
        parts: &[Part],
        mut bytes: usize,
    ) -> impl Iterator<Item = (u16, usize, usize)> {
        core::iter::from_fn(move || {
            let part = parts.get(self.part).filter(|_| bytes > 0)?;
            let len = bytes.min(part.bytes() - self.byte);
            let offset = part.offset() + self.byte;
            bytes -= len;
            self = self.skip(parts, len);
            Some((part.mapping, offset, len))
        })
    }
}

/// Bytes of the longest piece.
fn longest(geometry: &Geometry) -> usize {
    let unit = u64::from(geometry.sector_size);
    let bytes = u64::from(geometry.max_sectors) * SECTOR;
    usize::try_from(bytes - bytes % unit).unwrap_or(usize::MAX)
}

/// Makes the longest piece that begins at `from`, and returns its bytes. 0: the next sector of
/// the disk has to be gathered.
#[inline]
pub fn cut<'a>(
    parts: &[Part],
    from: Cursor,
    geometry: &Geometry,
    page: impl Fn(u16) -> &'a DmaPage,
    buffers: &mut Buffers<'a>,
) -> usize {
    let most = usize::from(geometry.max_buffers).min(MAX_BUFFERS);
    let mut bytes = 0;
    for (mapping, offset, len) in from.walk(parts, longest(geometry)) {
        let joins = |last: &Buffer<'_>| {
            offset == 0 && usize::from(last.offset) + usize::from(last.len) == PAGE_SIZE
        };
        let fits = !geometry.whole_pages || buffers.last().is_none_or(joins);
        if buffers.len() == most || !fits {
            break;
        }
        // There is room, and both numbers are at most a page.
        let _ =
            buffers.push(Buffer { page: page(mapping), offset: to_u16(offset), len: to_u16(len) });
        bytes += len;
    }
    let excess = bytes % usize::try_from(geometry.sector_size).unwrap_or(PAGE_SIZE);
    shorten(buffers, excess);
    bytes - excess
}

/// Takes bytes away at the end.
fn shorten(buffers: &mut Buffers<'_>, mut excess: usize) {
    while excess > 0
        && let Some(last) = buffers.last_mut()
    {
        let len = usize::from(last.len);
        if len > excess {
            last.len = to_u16(len - excess);
            return;
        }
        excess -= len;
        buffers.pop();
    }
}

#[expect(clippy::cast_possible_truncation, reason = "offsets and lengths inside of a page")]
fn to_u16(value: usize) -> u16 {
    value as u16
}

#[cfg(test)]
mod tests {
    use super::*;
    use domain_api::{GrantRef, Page};
    use proptest::collection::vec;
    use proptest::prelude::*;

    fn geometry() -> impl Strategy<Value = Geometry> {
        let size = prop_oneof![Just(512_u32), Just(4096)];
        (size, 8_u32..64, 1_u16..12, any::<bool>()).prop_map(
            |(sector_size, max_sectors, max_buffers, whole_pages)| Geometry {
                sectors: 1 << 20,
                sector_size,
                physical_sector_size: sector_size,
                read_only: false,
                volatile_cache: true,
                max_discard_sectors: 0,
                max_write_zeroes_sectors: 0,
                max_sectors,
                max_buffers,
                whole_pages,
                queue_depth: 4,
            },
        )
    }

    /// Parts that are whole sectors of the disk together.
    fn parts(unit: u64) -> impl Strategy<Value = std::vec::Vec<Part>> {
        vec((0_u8..8, 0_u8..8), 1..20).prop_map(move |ends| {
            let mut parts: std::vec::Vec<Part> = ends
                .into_iter()
                .enumerate()
                .map(|(at, (a, b))| Part {
                    gref: GrantRef(0),
                    mapping: u16::try_from(at).unwrap(),
                    first: a.min(b),
                    last: a.max(b),
                })
                .collect();
            let odd = crate::request::sectors_of(&parts) % unit;
            if odd > 0 {
                let last = u8::try_from(unit - odd).unwrap() - 1;
                let mapping = u16::try_from(parts.len()).unwrap();
                parts.push(Part { gref: GrantRef(0), mapping, first: 0, last });
            }
            parts
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 4 } else { 400 }))]

        /// Every piece is one that the disk takes, and together they are all the data in order.
        /// What is gathered is one sector of the disk that could not be had otherwise.
        #[test]
        fn pieces_are_taken_and_cover_everything(
            (geometry, parts) in geometry()
                .prop_flat_map(|it| (Just(it), parts(u64::from(it.sector_size) / 512)))
        ) {
            let pages: std::vec::Vec<DmaPage> = (0..parts.len())
                .map(|at| DmaPage { page: Page::new_zeroed(), bus_address: at as u64 * 4096 })
                .collect();
            let all: std::vec::Vec<_> = Cursor::default()
                .walk(&parts, usize::MAX)
                .flat_map(|(page, offset, len)| (0..len).step_by(512).map(move |it| (usize::from(page), offset + it)))
                .collect();
            let mut seen = std::vec::Vec::new();
            let mut cursor = Cursor::default();
            while !cursor.is_end(&parts) {
                let mut buffers = Buffers::new();
                let mut bytes = cut(&parts, cursor, &geometry, |at| &pages[usize::from(at)], &mut buffers);
                prop_assert!(geometry.takes(&buffers));
                if bytes == 0 {
                    prop_assert!(buffers.is_empty());
                    prop_assert_eq!(geometry.sector_size, 4096);
                    bytes = 4096;
                    let pieces: std::vec::Vec<_> = cursor.walk(&parts, bytes).collect();
                    prop_assert!(pieces.len() > 1, "one part of a page never needs gathering");
                    for (page, offset, len) in pieces {
                        seen.extend((0..len).step_by(512).map(|it| (usize::from(page), offset + it)));
                    }
                }
                prop_assert_eq!(bytes % geometry.sector_size as usize, 0);
                for buffer in &buffers {
                    let page = usize::try_from(buffer.page.bus_address / 4096).unwrap();
                    let offset = usize::from(buffer.offset);
                    seen.extend((0..usize::from(buffer.len)).step_by(512).map(|it| (page, offset + it)));
                }
                cursor = cursor.skip(&parts, bytes);
            }
            prop_assert_eq!(seen, all);
        }
    }
}
