//! The books, against what their user remembers.

use super::*;
use proptest::collection::vec;
use proptest::prelude::*;
use std::collections::BTreeSet;

const FIRST: u16 = 0x4000;

struct Memory(u64);

impl Dma for Memory {
    fn alloc(&mut self) -> Result<DmaPage, Errno> {
        self.0 += 1;
        Ok(DmaPage { page: Page::new_zeroed(), bus_address: self.0 << 20 })
    }
}

fn transmit(count: u16, shape: Shape) -> TransmitBuffers {
    TransmitBuffers::new(&mut Memory(0), FIRST, count, shape).expect("memory")
}

fn forged(token: u16) -> Buffer {
    Buffer { page: Page::new_zeroed(), offset: 0, len: 60, token }
}

#[test]
fn buffers_do_not_overlap_and_the_device_finds_what_we_write() {
    for (shape, pages, room, headroom) in [
        (Shape::half_page(0), 4, 2048, 0),
        (Shape::half_page(12), 4, 2036, 12),
        (Shape::page(0), 7, 4096, 0),
        (Shape::page(12), 7, 4084, 12),
    ] {
        let mut memory = Memory(0);
        let mut buffers = Buffers::new(&mut memory, FIRST, 7, shape).expect("memory");
        assert_eq!((memory.0, shape.room(), buffers.count()), (pages, room, 7));
        let mut bytes = BTreeSet::new();
        for index in 0..7 {
            let headroom = buffers.headroom_address(index);
            let content = buffers.content_address(index);
            let lent = buffers.lend(index, room);
            assert_eq!(content % 4096, u64::from(lent.offset));
            assert_eq!(u64::from(lent.offset + lent.len - 1) / 4096, 0, "within its page");
            lent.page.write(usize::from(lent.offset), &[0xaa; 2]);
            let (page, at) = buffers.content(index);
            assert_eq!(page.u16(at).load(core::sync::atomic::Ordering::Relaxed), 0xaaaa);
            bytes.extend(headroom..content + u64::from(room));
        }
        assert_eq!(bytes.len(), 7 * usize::from(room + headroom));
    }
}

#[test]
fn what_is_in_the_headroom_stays_there() {
    let mut buffers = Buffers::new(&mut Memory(0), 0, 2, Shape::half_page(12)).expect("memory");
    buffers.write_headroom(1, &[7; 12]);
    let lent = [buffers.lend(0, 2036), buffers.lend(1, 2036)];
    for buffer in &lent {
        buffer.page.write(usize::from(buffer.offset), &[9; 2036]);
    }
    let mut bytes = [0; 12];
    buffers.read_headroom(1, &mut bytes);
    assert_eq!(bytes, [7; 12]);
    buffers.read_headroom(0, &mut bytes);
    assert_eq!(bytes, [0; 12]);
}

#[test]
fn a_long_packet_waits_until_enough_buffers_are_free() {
    let mut buffers = transmit(4, Shape::page(12));
    assert!(buffers.can_hold(4 * 4084) && !buffers.can_hold(4 * 4084 + 1));
    let mut lent = Vec::new();
    assert!(buffers.lend(4085, &mut lent) && lent.len() == 2);
    assert!(!buffers.lend(4084 * 3, &mut lent));
    assert!(buffers.is_short() && !buffers.relieve() && lent.len() == 2);
    assert!(buffers.cancel(&lent.pop().expect("two")));
    assert!(buffers.relieve() && !buffers.is_short() && !buffers.relieve());
    assert!(buffers.lend(4084 * 3, &mut lent) && lent.len() == 4);
    assert!(!buffers.lend(1, &mut lent) && buffers.is_short());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Whatever is lent, sent, refused and cancelled, each buffer is in one place.
    #[test]
    fn no_buffer_is_lost_or_had_twice(steps in vec((0_u8..5, 0_usize..20_000, FIRST - 1..FIRST + 8), 1..80)) {
        let mut buffers = transmit(6, Shape::page(0));
        let (mut lent, mut parts): (Vec<Buffer>, Vec<Part>) = (Vec::new(), Vec::new());
        let mut device: Vec<u16> = Vec::new();
        for (step, bytes, token) in steps {
            match step {
                0 => {
                    let before = lent.len();
                    let needed = bytes.div_ceil(4096).max(1);
                    let suffice = needed <= buffers.buffers().held(Holder::Free);
                    prop_assert_eq!(buffers.lend(bytes, &mut lent), suffice);
                    let new = if suffice { needed } else { 0 };
                    prop_assert_eq!(lent.len(), before + new);
                }
                1 => {
                    let packet = lent.len().min(bytes % 4);
                    let good = buffers.take_packet(lent.drain(..packet), &mut parts);
                    prop_assert_eq!(good, packet != 0);
                    device.extend(parts.drain(..).map(|part| part.index));
                }
                2 => if let Some(index) = device.pop() { buffers.release(index) },
                3 => if let Some(buffer) = lent.pop() { prop_assert!(buffers.cancel(&buffer)) },
                _ => {
                    if lent.iter().any(|buffer| buffer.token == token) {
                        continue;
                    }
                    let mut packet = vec![forged(token)];
                    packet.extend(lent.pop());
                    prop_assert!(!buffers.cancel(&packet[0]));
                    prop_assert!(!buffers.take_packet(packet.drain(..), &mut parts));
                    prop_assert!(parts.is_empty());
                }
            }
            let held = |holder| buffers.buffers().held(holder);
            prop_assert_eq!(held(Holder::Lent), lent.len());
            prop_assert_eq!(held(Holder::Device), device.len());
            let tokens: BTreeSet<_> = lent.iter().map(|buffer| buffer.token).collect();
            prop_assert_eq!(tokens.len(), lent.len());
        }
    }
}
