//! Packets of which the device does a part.

use super::*;
use domain_api::nic::{Headers, MAX_PACKET};
use domain_api::packets::{self, Shape};

const CSUM: u64 = FEATURE_CSUM | FEATURE_GUEST_CSUM;
const EVERYTHING: u64 = ALL | CSUM | FEATURE_HOST_TSO4 | FEATURE_HOST_TSO6;
const NEEDS_CSUM: u8 = 1;
const DATA_VALID: u8 = 2;

fn offers(features: u64, size: u16) -> (u64, [bool; 4]) {
    let model = model(features, size);
    let offers = start(&model).offloads();
    let flags = [offers.checksum_v4, offers.checksum_v6, offers.segment_v4, offers.segment_v6];
    (model.accepted() & !(ALL | virtio::VERSION_1), flags)
}

#[test]
fn what_is_offered_is_what_the_device_takes() {
    let (tso4, tso6) = (FEATURE_HOST_TSO4, FEATURE_HOST_TSO6);
    assert_eq!(offers(EVERYTHING, 256), (CSUM | tso4 | tso6, [true; 4]));
    assert_eq!(offers(ALL | CSUM | tso4, 256), (CSUM | tso4, [true, true, true, false]));
    assert_eq!(offers(EVERYTHING, 16).1, [true, true, false, false], "no room for a packet");
    assert_eq!(offers(ALL | tso4 | tso6, 256), (0, [false; 4]), "not without checksums");
    assert_eq!(offers(ALL, 256), (0, [false; 4]));
    // What comes to be cut, and other things, are not for us.
    assert_eq!(offers(u64::MAX >> 31 | EVERYTHING, 256).0, CSUM | tso4 | tso6);
}

/// A packet, and what the device is asked to do for it.
fn packet() -> impl Strategy<Value = (Shape, Offload)> {
    let headers = (any::<[bool; 4]>(), 0_u8..4, 0_u8..11);
    (headers, any::<[u16; 2]>()).prop_map(|((bits, ip_options, tcp_options), [len, mss])| {
        let [ipv6, tcp, vlan, cut] = bits;
        let tcp = tcp || cut;
        let shape = Shape { ipv6, tcp, vlan, ip_options, tcp_options, ..Shape::tcp(0) };
        let headers = shape.headers();
        let most = MAX_FRAME - usize::from(headers.end);
        let longest = if cut { MAX_PACKET - usize::from(headers.end) } else { most };
        let shape = Shape { payload: Shape::tcp(usize::from(len) % longest + 1).payload, ..shape };
        let mss = u16::try_from(usize::from(mss) % most + 1).expect("less than a frame");
        (shape, if cut { Offload::Segment { headers, mss } } else { Offload::Checksum(headers) })
    })
}

fn send_packet(device: &mut VirtioNet<Model>, shape: &Shape, offload: Offload) -> bool {
    let (bytes, mut packet) = (shape.blank(), Vec::new());
    if !device.tx_buffers(bytes.len(), &mut packet) {
        assert!(packet.is_empty());
        return false;
    }
    let mut rest = &bytes[..];
    for buffer in &mut packet {
        let (part, others) = rest.split_at(rest.len().min(buffer.len.into()));
        buffer.page.write(usize::from(buffer.offset), part);
        buffer.len = u16::try_from(part.len()).expect("a page");
        rest = others;
    }
    device.transmit(packet.drain(..), offload);
    true
}

/// The header of §5.1.6, field by field.
fn expected(offload: &Offload) -> Vec<u8> {
    let fields = match offload {
        Offload::Nothing => [0; 6],
        Offload::Checksum(Headers { tcp, l4, .. }) => [1, 0, 0, *l4, if *tcp { 16 } else { 6 }, 0],
        Offload::Segment { headers: Headers { ipv6, l4, end, .. }, mss } => {
            [if *ipv6 { 0x0401 } else { 0x0101 }, *end, *mss, *l4, 16, 0]
        }
    };
    fields.into_iter().flat_map(u16::to_le_bytes).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Packets and frames leave in order and unchanged, with the header that is theirs, whatever
    /// their buffers were used for before; and no buffer is lost.
    #[test]
    fn packets_leave_with_their_headers(
        steps in vec((prop::option::weighted(0.6, packet()), 0_usize..4), 1..120),
    ) {
        let model = model(EVERYTHING, 64);
        let mut device = start(&model);
        let mut outgoing = VecDeque::new();
        let leave = |outgoing: &mut VecDeque<(Vec<u8>, Vec<u8>)>, most: usize| {
            for chain in std::iter::from_fn(|| model.take(TRANSMIT)).take(most) {
                let (header, bytes) = chain.readable.split_at(usize::from(HEADER));
                assert_eq!(Some((header.to_vec(), bytes.to_vec())), outgoing.pop_front());
                model.give(TRANSMIT, &chain, &[]);
            }
        };
        for (number, (packet, leaving)) in steps.into_iter().enumerate() {
            if let Some((shape, offload)) = packet {
                if send_packet(&mut device, &shape, offload) {
                    outgoing.push_back((expected(&offload), shape.blank()));
                }
            } else if send(&mut device, &frame(number, 900)) {
                outgoing.push_back((expected(&Offload::Nothing), frame(number, 900)));
            }
            device.flush();
            leave(&mut outgoing, leaving);
        }
        leave(&mut outgoing, usize::MAX);
        prop_assert!(outgoing.is_empty());
        prop_assert_eq!(std::iter::from_fn(|| lend(&mut device)).count(), 64);
        prop_assert_eq!(device.counters().refused, 0);
        prop_assert_eq!(model.violations(), Vec::<String>::new());
    }
}

#[test]
fn what_the_device_does_not_take_is_refused() {
    let (tcp, tcp6) = (Shape::tcp(3000), Shape { ipv6: true, ..Shape::tcp(3000) });
    let cut = |shape: &Shape| Offload::Segment { headers: shape.headers(), mss: 1000 };
    let short = Shape::tcp(100);
    let cases = [
        (EVERYTHING & !FEATURE_HOST_TSO4, &tcp, cut(&tcp)),
        (EVERYTHING & !FEATURE_HOST_TSO6, &tcp6, cut(&tcp6)),
        (ALL, &short, Offload::Checksum(short.headers())),
        (EVERYTHING, &tcp, Offload::Checksum(tcp.headers())),
        (EVERYTHING, &tcp, Offload::Nothing),
        (EVERYTHING, &short, Offload::Checksum(Headers { end: 9000, ..short.headers() })),
    ];
    for (features, shape, offload) in cases {
        let model = model(features, 64);
        let mut device = start(&model);
        assert!(send_packet(&mut device, shape, offload));
        device.flush();
        assert!(model.take(TRANSMIT).is_none(), "{offload:?}");
        assert_eq!(device.counters().refused, 1);
        assert_eq!(std::iter::from_fn(|| lend(&mut device)).count(), 64);
    }
}

#[test]
fn whoever_waits_for_several_buffers_is_woken_when_there_are_enough() {
    for features in [EVERYTHING, EVERYTHING & !EVENT_IDX] {
        let model = model(features, 4);
        let mut device = start(&model);
        while send(&mut device, &frame(0, 60)) {}
        device.flush();
        let mut buffers = Vec::new();
        assert!(!device.tx_buffers(10_000, &mut buffers));
        for _ in 0..2 {
            assert!(!device.arm(), "not enough yet");
            assert!(sent(&model).expect("a frame").1, "somebody waits");
        }
        assert!(!device.arm(), "not enough yet");
        assert!(sent(&model).expect("a frame").1, "somebody waits");
        assert!(device.arm(), "three are enough");
        assert!(device.tx_buffers(10_000, &mut buffers) && buffers.len() == 3);
        assert!(!device.arm());
        assert!(!sent(&model).expect("a frame").1, "nobody waits any more");
    }
}

/// A frame arrives with a header; what the driver makes of it.
fn arrive(
    device: &mut VirtioNet<Model>,
    model: &Model,
    fields: [u16; 3],
    frame: &[u8],
) -> Option<(Checksum, Vec<u8>)> {
    let [flags, start, offset] = fields;
    let chain = model.take(RECEIVE).expect("a buffer");
    let header: Vec<u8> =
        [flags, 0, 0, start, offset, 1].into_iter().flat_map(u16::to_le_bytes).collect();
    model.give(RECEIVE, &chain, &[&header[..], frame].concat());
    let received = device.receive()?;
    let bytes = content(&received.buffer);
    device.recycle(received.buffer);
    device.flush();
    Some((received.checksum, bytes))
}

#[test]
fn the_device_says_what_it_knows_of_checksums() {
    let model = model(EVERYTHING, 16);
    let mut device = start(&model);
    let [needs, valid] = [NEEDS_CSUM, DATA_VALID].map(u16::from);
    for bits in 0..8_u8 {
        let [ipv6, tcp, vlan] = [0, 1, 2].map(|bit| bits >> bit & 1 != 0);
        let shape = Shape { ipv6, tcp, vlan, ..Shape::tcp(201) };
        let (l4, field) = (shape.headers().l4, if tcp { 16 } else { 6 });
        let mut arrives = |fields, bytes: &[u8]| arrive(&mut device, &model, fields, bytes);
        let (good, blank) = (shape.finished(), shape.blank());
        assert_eq!(arrives([0, 0, 0], &good), Some((Checksum::Unknown, good.clone())));
        assert_eq!(arrives([valid, 0, 0], &good), Some((Checksum::Good, good.clone())));
        assert_eq!(arrives([needs, l4, field], &blank), Some((Checksum::Blank, blank.clone())));
        // Not where a guest would look for it: the driver finishes it.
        let long = Shape { ip_options: 2, ipv6: true, ..shape.clone() };
        let found = arrives([needs, long.headers().l4, field], &long.blank()).expect("a frame");
        assert_eq!(found.0, Checksum::Unknown);
        assert!(packets::judge(&found.1, &long.headers()).is_ok());
        assert_eq!(found.1, long.finished());
        // Nowhere.
        let len = u16::try_from(blank.len()).expect("a frame");
        for (start, offset) in [(1500, 16), (l4, len - l4 - 1), (u16::MAX, u16::MAX), (len, 0)] {
            assert_eq!(arrives([needs, start, offset], &blank), None);
        }
    }
    assert_eq!(device.counters().bad_headers, 8 * 4);
}

/// A sum of 0 means in UDP that there is none (RFC 768), so all ones are stored.
#[test]
fn a_finished_checksum_of_udp_is_never_zero() {
    let model = model(EVERYTHING, 16);
    let mut device = start(&model);
    let mut shape = Shape { ipv6: true, tcp: false, ip_options: 1, ..Shape::tcp(2) };
    shape.payload = vec![0; 2];
    let field = usize::from(shape.headers().l4) + 6;
    shape.payload = shape.finished()[field..field + 2].to_vec();
    let fields = [NEEDS_CSUM.into(), shape.headers().l4, 6];
    let (_, found) = arrive(&mut device, &model, fields, &shape.blank()).expect("a frame");
    assert_eq!(found[field..field + 2], [0xff; 2]);
    assert_eq!(found, shape.finished());
}

#[test]
fn flags_that_were_not_agreed_on_mean_nothing() {
    let model = model(EVERYTHING & !FEATURE_GUEST_CSUM, 16);
    let mut device = start(&model);
    let bytes = Shape::tcp(100).finished();
    for flags in [1, 2, 3, 0xffff] {
        let found = arrive(&mut device, &model, [flags, 34, 16], &bytes);
        assert_eq!(found, Some((Checksum::Unknown, bytes.clone())));
    }
}
