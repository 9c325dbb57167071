//! Packets of which the device does a part.

use super::*;
use domain_api::Registers;
use domain_api::nic::{Checksum, Headers, MAX_PACKET, Offloads};
use domain_api::packets::{self, Shape};

/// A packet, and what the device is asked to do for it.
pub fn packets() -> impl Strategy<Value = (Shape, Offload)> {
    let headers = (any::<[bool; 4]>(), 0_u8..4, 0_u8..11, any::<u8>());
    (headers, any::<[u16; 2]>()).prop_map(|((bits, ip_options, tcp_options, flags), [len, mss])| {
        let [ipv6, tcp, vlan, cut] = bits;
        let tcp = tcp || cut;
        let shape = Shape { ipv6, tcp, vlan, ip_options, tcp_options, flags, ..Shape::tcp(0) };
        let headers = shape.headers();
        let most = MAX_FRAME - usize::from(headers.end);
        let longest = if cut { MAX_PACKET - usize::from(headers.end) } else { most };
        // Long ones are rare: they take long to judge.
        let longest = if mss.is_multiple_of(32) { longest } else { longest.min(5000) };
        let len = usize::from(len) % longest + 1;
        let shape = Shape { payload: Shape::tcp(len).payload, ..shape };
        let mss = (usize::from(mss) % most + 1).max(len / 50);
        let mss = u16::try_from(mss).expect("less than a frame");
        (shape, if cut { Offload::Segment { headers, mss } } else { Offload::Checksum(headers) })
    })
}

/// Fills buffers with `bytes`, `first` of them in the first one if they fit. `None`: there are too few
/// buffers.
fn parts(device: &mut E1000e<Model>, bytes: &[u8], first: usize) -> Option<Vec<Buffer>> {
    let mut buffers = Vec::new();
    if !device.tx_buffers((bytes.len() + 4096).min(MAX_PACKET), &mut buffers) {
        assert!(buffers.is_empty());
        return None;
    }
    let (mut rest, mut want, mut packet) = (bytes, first, Vec::new());
    let room: usize = buffers.iter().map(|buffer| usize::from(buffer.len)).sum();
    want = want.max(usize::from(buffers[0].len).saturating_sub(room - bytes.len()));
    for mut buffer in buffers {
        let len = rest.len().min(buffer.len.into()).min(want);
        if len == 0 {
            device.cancel(buffer);
            continue;
        }
        let (part, others) = rest.split_at(len);
        buffer.page.write(usize::from(buffer.offset), part);
        buffer.len = u16::try_from(len).expect("a page");
        packet.push(buffer);
        (rest, want) = (others, usize::MAX);
    }
    assert!(rest.is_empty());
    Some(packet)
}

/// Sends a packet; false while there are no buffers.
pub fn send_packet(
    device: &mut E1000e<Model>,
    shape: &Shape,
    offload: Offload,
    split: u16,
) -> bool {
    let first = usize::from(shape.headers().end) + usize::from(split);
    let Some(mut packet) = parts(device, &shape.blank(), first) else { return false };
    device.transmit(packet.drain(..), offload);
    true
}

/// Takes the frames of a packet off `sent`, and judges them.
pub fn judge(shape: &Shape, offload: Offload, sent: &mut VecDeque<Vec<u8>>) {
    let mss = match offload {
        Offload::Segment { mss, .. } => mss,
        Offload::Nothing | Offload::Checksum(_) => u16::MAX,
    };
    let frames = shape.payload.len().div_ceil(mss.into());
    assert!(frames <= sent.len(), "{frames} frames, not {}", sent.len());
    let frames: Vec<_> = sent.drain(..frames).collect();
    assert_eq!(packets::judge_cut(shape, mss, &frames), Ok(()));
}

fn segment(shape: &Shape, mss: u16) -> Offload {
    Offload::Segment { headers: shape.headers(), mss }
}

fn tail(model: &Model) -> u32 {
    model.read(reg::TDT)
}

#[test]
fn everything_is_offered_at_full_speed() {
    let (model, mut device) = started(Dialect::Datasheet);
    let all = Offloads { checksum_v4: true, checksum_v6: true, segment_v4: true, segment_v6: true };
    assert_eq!(device.offloads(), all);
    model.set_slow(true);
    assert_eq!(device.check(0), Ok(None));
    assert_eq!(device.offloads(), Offloads { segment_v4: false, segment_v6: false, ..all });
    let shape = Shape::tcp(5000);
    assert!(send_packet(&mut device, &shape, segment(&shape, 1460), 0));
    device.flush();
    assert!(model.sent().is_empty());
    assert_eq!(device.statistics().counters.refused, 1);
}

#[test]
fn the_longest_packet_is_cut() {
    for ipv6 in [false, true] {
        let (model, mut device) = started(Dialect::Datasheet);
        let shape = Shape { ipv6, ..Shape::tcp(0) };
        let payload = Shape::tcp(MAX_PACKET - usize::from(shape.headers().end)).payload;
        let shape = Shape { payload, ..shape };
        for _ in 0..40 {
            assert!(send_packet(&mut device, &shape, segment(&shape, 1400), 0));
            device.flush();
            judge(&shape, segment(&shape, 1400), &mut model.sent().into());
        }
        assert_eq!(model.violations(), Vec::<String>::new());
    }
}

#[test]
fn a_context_is_written_when_it_changes() {
    let (model, mut device) = started(Dialect::Datasheet);
    let (tcp, udp) = (Shape::tcp(100), Shape { tcp: false, ..Shape::tcp(100) });
    let blank = |shape: &Shape| Offload::Checksum(shape.headers());
    let long = Shape::tcp(3000);
    // What is sent, and how many descriptors it takes.
    let steps = [
        (&tcp, blank(&tcp), 2),
        (&tcp, blank(&tcp), 1),
        (&udp, blank(&udp), 2),
        (&udp, blank(&udp), 1),
        (&long, segment(&long, 1000), 2),
        (&long, segment(&long, 1000), 2),
        (&udp, blank(&udp), 2),
    ];
    let mut expected = tail(&model);
    for (shape, offload, descriptors) in steps {
        assert!(send_packet(&mut device, shape, offload, u16::MAX));
        assert!(send(&mut device, &frame(1, 60)));
        device.flush();
        let mut sent = model.sent().into();
        judge(shape, offload, &mut sent);
        assert_eq!(sent, [frame(1, 60)], "and plain frames stay as they are");
        expected += descriptors + 1;
        assert_eq!(tail(&model), expected);
    }
    assert_eq!(model.violations(), Vec::<String>::new());
}

#[test]
fn qemu_is_not_asked_to_cut_packets_over_ipv6() {
    let model = Model::new(Dialect::Lazy);
    let id = PciId { subsystem: 0x0000_8086, ..Model::ID };
    let offers = start_as(id, &model).expect("a good device").offloads();
    assert!(offers.segment_v4 && offers.checksum_v6 && !offers.segment_v6);
}

/// Each packet has a context of its own, and the device has sent none.
#[test]
fn there_is_a_slot_for_every_buffer() {
    let (model, mut device) = started(Dialect::Datasheet);
    for round in 0..5 {
        model.set_faults(Faults { paused_transmitter: true, ..Faults::default() });
        let mut count = 0;
        let shape = |count: usize| Shape { vlan: count.is_multiple_of(2), ..Shape::tcp(80) };
        while let Some(buffer) = lend(&mut device) {
            let bytes = shape(count).blank();
            buffer.page.write(usize::from(buffer.offset), &bytes);
            let len = u16::try_from(bytes.len()).expect("a frame");
            let offload = Offload::Checksum(shape(count).headers());
            device.transmit(vec![Buffer { len, ..buffer }].drain(..), offload);
            count += 1;
        }
        assert_eq!(count, usize::from(TRANSMIT_BUFFERS), "round {round}");
        device.flush();
        model.transmit(usize::MAX);
        let mut sent = model.sent().into();
        for number in 0..count {
            judge(&shape(number), Offload::Nothing, &mut sent);
        }
    }
    assert_eq!(model.violations(), Vec::<String>::new());
}

/// A packet that is not what it is said to be is not sent, and its buffers come back.
#[test]
fn what_the_device_would_stumble_over_is_refused() {
    let (model, mut device) = started(Dialect::Datasheet);
    let good = Shape::tcp(4000);
    let Headers { l3, l4, end, .. } = good.headers();
    let cut = |headers| Offload::Segment { headers, mss: 1000 };
    let (head, short) = (good.headers(), Shape::tcp(0));
    let cases = [
        (&good, segment(&good, 0)),
        (&good, segment(&good, 1519 - end)),
        (&good, Offload::Nothing),
        (&good, Offload::Checksum(head)),
        (&short, segment(&short, 1000)),
        (&short, cut(Headers { end: end + 1, ..head })),
        (&good, cut(Headers { end: 241, ..head })),
        (&good, cut(Headers { tcp: false, ..head })),
        (&good, cut(Headers { ipv6: true, ..head })),
        (&good, cut(Headers { l3: l3 - 4, ..head })),
        (&good, cut(Headers { l3: l3 + 4, l4: l4 + 4, end: end + 4, ..head })),
        (&good, cut(Headers { l4: l4 + 4, end: end + 4, ..head })),
        (&good, cut(Headers { end: end + 4, ..head })),
        (&good, cut(Headers { l4: u16::MAX, end: 0, ..head })),
        (&short, Offload::Checksum(Headers { l3: 0, ..head })),
    ];
    for (shape, offload) in &cases {
        assert!(send_packet(&mut device, shape, *offload, u16::MAX), "{offload:?}");
    }
    device.flush();
    assert!(model.sent().is_empty());
    assert_eq!(device.statistics().counters.refused, cases.len() as u64);
    assert_eq!(device.statistics().counters.queued, 0);
    let free = device.transmitter.buffers.buffers().held(Holder::Free);
    assert_eq!(free, usize::from(TRANSMIT_BUFFERS));
    assert!(send_packet(&mut device, &good, segment(&good, 1000), 0));
    device.flush();
    judge(&good, segment(&good, 1000), &mut model.sent().into());
}

#[test]
fn a_packet_with_a_part_of_impossible_length_is_refused() {
    let (model, mut device) = started(Dialect::Datasheet);
    let shape = Shape::tcp(9000);
    for (part, len) in [(1, 0), (1, 4097), (2, u16::MAX), (0, 0)] {
        let mut packet = parts(&mut device, &shape.blank(), 4096).expect("buffers");
        packet[part].len = len;
        device.transmit(packet.drain(..), segment(&shape, 1000));
    }
    device.flush();
    assert!(model.sent().is_empty());
    assert_eq!(device.statistics().counters.refused, 4);
    let free = device.transmitter.buffers.buffers().held(Holder::Free);
    assert_eq!(free, usize::from(TRANSMIT_BUFFERS));
}

#[test]
fn a_packet_with_a_buffer_that_was_never_lent_is_refused() {
    let (model, mut device) = started(Dialect::Datasheet);
    let mut packet = parts(&mut device, &Shape::tcp(9000).blank(), 4096).expect("buffers");
    let twice = packet[1].token;
    packet.push(Buffer { page: domain_api::Page::new_zeroed(), offset: 0, len: 9, token: twice });
    let shape = Shape::tcp(9009);
    device.transmit(packet.drain(..), segment(&shape, 1000));
    device.transmit(packet.drain(..), Offload::Nothing);
    device.flush();
    assert!(model.sent().is_empty());
    assert_eq!(device.statistics().counters.bad_buffers, 2);
    let free = device.transmitter.buffers.buffers().held(Holder::Free);
    assert_eq!(free, usize::from(TRANSMIT_BUFFERS));
}

#[test]
fn whoever_waits_for_several_buffers_is_woken_when_there_are_enough() {
    let (model, mut device) = started(Dialect::Datasheet);
    model.set_faults(Faults { paused_transmitter: true, ..Faults::default() });
    while send(&mut device, &frame(1, 60)) {}
    device.flush();
    let _ = model.messages();
    let mut buffers = Vec::new();
    assert!(!device.tx_buffers(10_000, &mut buffers));
    for _ in 0..2 {
        model.transmit(1);
        assert!(!device.arm(), "not enough yet");
    }
    model.transmit(1);
    assert!(device.arm(), "three pages are enough");
    assert!(device.tx_buffers(10_000, &mut buffers));
    assert_eq!(buffers.len(), 3);
    model.transmit(1);
    assert!(!device.arm(), "nobody waits now");
    buffers.into_iter().for_each(|buffer| device.cancel(buffer));
}

#[test]
fn a_packet_that_is_not_sent_whole_is_stuck() {
    let (model, mut device) = started(Dialect::Datasheet);
    model.set_faults(Faults { paused_transmitter: true, ..Faults::default() });
    let shape = Shape::tcp(30_000);
    assert!(send_packet(&mut device, &shape, segment(&shape, 1000), 0));
    device.flush();
    let now = model.now_ns();
    assert_eq!(device.check(now), Ok(None));
    assert_eq!(device.check(now + TRANSMIT_TIMEOUT_NS + 1), Err(Hang::Transmitter));
}

#[test]
fn the_device_says_which_checksums_are_good() {
    for dialect in DIALECTS {
        let (model, mut device) = started(dialect);
        let mut arrives = |bytes: &[u8], defect| {
            assert!(model.deliver(bytes, defect));
            let received = device.receive().expect("no frame is dropped");
            assert_eq!(content(&received.buffer), bytes);
            device.recycle(received.buffer);
            received.checksum
        };
        for bits in 0..8_u8 {
            let [ipv6, tcp, vlan] = [0, 1, 2].map(|bit| bits >> bit & 1 != 0);
            let shape = Shape { ipv6, tcp, vlan, ..Shape::tcp(300) };
            assert_eq!(arrives(&shape.finished(), Defect::None), Checksum::Good);
            assert_eq!(arrives(&shape.blank(), Defect::None), Checksum::Unknown);
            let mut wrong = shape.finished();
            wrong[usize::from(shape.headers().l3) + 8] ^= 1; // Hop limit, or an address.
            assert_eq!(arrives(&wrong, Defect::None), Checksum::Unknown);
        }
        assert_eq!(arrives(&frame(1, 100), Defect::None), Checksum::Unknown, "not IP");
        let good = Shape::tcp(300).finished();
        assert_eq!(arrives(&good, Defect::Errors(1 << 6)), Checksum::Unknown);
    }
}
