//! The driver against a wire behind the model's queues.

use super::*;
use domain_api::nic::MAX_FRAME;
use proptest::collection::vec;
use proptest::prelude::*;
use std::collections::VecDeque;
use virtio::model::{Faults, Model};

mod offload;

const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
const ALL: u64 = FEATURE_MAC | FEATURE_STATUS | EVENT_IDX;
const LINK_UP: [u8; 8] = [0x52, 0x54, 0, 0x12, 0x34, 0x56, 1, 0];
const LINK_DOWN: [u8; 8] = [0x52, 0x54, 0, 0x12, 0x34, 0x56, 0, 0];

fn model(features: u64, size: u16) -> Model {
    Model::new(DeviceType::Network, features, &LINK_UP, &[size, size])
}

fn try_start(model: &Model) -> Result<VirtioNet<Model>, StartError> {
    model.set_bus_master(false);
    let master = || {
        assert!(model.get_status().is_empty(), "the reset comes first");
        model.set_bus_master(true);
        Ok(())
    };
    VirtioNet::start(model.clone(), &mut model.clone(), model, master, |_| true)
}

fn start(model: &Model) -> VirtioNet<Model> {
    try_start(model).expect("a good device")
}

fn frame(number: usize, len: usize) -> Vec<u8> {
    (0..len).map(|i| u8::try_from((number * 7 + i) % 251).expect("below 251")).collect()
}

fn content(buffer: &Buffer) -> Vec<u8> {
    let mut bytes = vec![0; usize::from(buffer.len)];
    buffer.page.read(usize::from(buffer.offset), &mut bytes);
    bytes
}

/// A frame arrives. `None`: there was no buffer; else whether the driver wants an interrupt.
fn deliver(model: &Model, bytes: &[u8]) -> Option<bool> {
    let chain = model.take(RECEIVE)?;
    let mut data = vec![0; usize::from(HEADER)];
    data[10] = 1; // One buffer.
    data.extend(bytes);
    Some(model.give(RECEIVE, &chain, &data))
}

/// The next frame that leaves, and whether the driver wants an interrupt.
fn sent(model: &Model) -> Option<(Vec<u8>, bool)> {
    let chain = model.take(TRANSMIT)?;
    let (header, bytes) = chain.readable.split_at(usize::from(HEADER));
    assert!(header.iter().all(|byte| *byte == 0) && chain.writable.is_empty());
    Some((bytes.to_vec(), model.give(TRANSMIT, &chain, &[])))
}

/// An empty buffer for a frame.
fn lend(device: &mut VirtioNet<Model>) -> Option<Buffer> {
    let mut buffers = Vec::new();
    let lent = device.tx_buffers(MAX_FRAME, &mut buffers);
    assert_eq!(buffers.len(), usize::from(lent));
    buffers.pop()
}

fn transmit(device: &mut VirtioNet<Model>, buffer: Buffer) {
    device.transmit(vec![buffer].drain(..), Offload::Nothing);
}

fn receive(device: &mut VirtioNet<Model>) -> Option<Buffer> {
    device.receive().map(|received| received.buffer)
}

fn send(device: &mut VirtioNet<Model>, bytes: &[u8]) -> bool {
    let Some(mut buffer) = lend(device) else { return false };
    assert!(usize::from(buffer.len) >= MAX_FRAME);
    buffer.page.write(usize::from(buffer.offset), bytes);
    buffer.len = u16::try_from(bytes.len()).expect("a frame");
    transmit(device, buffer);
    true
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Deliver(usize),
    Receive,
    Recycle,
    Lend,
    Transmit(usize),
    Cancel,
    Flush,
    Leave,
    Arm,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (14_usize..1518).prop_map(Step::Deliver),
        4 => Just(Step::Receive),
        3 => Just(Step::Recycle),
        4 => Just(Step::Lend),
        4 => (14_usize..1518).prop_map(Step::Transmit),
        1 => Just(Step::Cancel),
        3 => Just(Step::Flush),
        3 => Just(Step::Leave),
        2 => Just(Step::Arm),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Frames pass unchanged and in order, both ways, and no buffer is ever lost.
    #[test]
    fn frames_pass_unchanged_and_in_order(
        event_idx in any::<bool>(),
        size in 1_u32..6,
        steps in vec(step(), 1..200),
    ) {
        let model = model(if event_idx { ALL } else { ALL & !EVENT_IDX }, 1 << size);
        let mut device = start(&model);
        let (mut incoming, mut outgoing) = (VecDeque::new(), VecDeque::new());
        let (mut received, mut lent) = (Vec::new(), Vec::new());
        for (number, step) in steps.into_iter().enumerate() {
            match step {
                Step::Deliver(len) => {
                    if deliver(&model, &frame(number, len)).is_some() {
                        incoming.push_back(frame(number, len));
                    }
                }
                Step::Receive => {
                    if let Some(buffer) = receive(&mut device) {
                        prop_assert_eq!(Some(content(&buffer)), incoming.pop_front());
                        received.push(buffer);
                    }
                }
                Step::Recycle => received.pop().into_iter().for_each(|b| device.recycle(b)),
                Step::Lend => lent.extend(lend(&mut device)),
                Step::Transmit(len) => {
                    if let Some(mut buffer) = lent.pop() {
                        buffer.page.write(usize::from(buffer.offset), &frame(number, len));
                        buffer.len = u16::try_from(len).expect("a frame");
                        transmit(&mut device, buffer);
                        outgoing.push_back(frame(number, len));
                    }
                }
                Step::Cancel => lent.pop().into_iter().for_each(|b| device.cancel(b)),
                Step::Flush => device.flush(),
                Step::Leave => {
                    if let Some((bytes, _)) = sent(&model) {
                        prop_assert_eq!(Some(bytes), outgoing.pop_front());
                    }
                }
                Step::Arm => { device.arm(); }
            }
        }
        received.into_iter().for_each(|buffer| device.recycle(buffer));
        lent.into_iter().for_each(|buffer| device.cancel(buffer));
        device.flush();
        while let Some((bytes, _)) = sent(&model) {
            prop_assert_eq!(Some(bytes), outgoing.pop_front());
        }
        prop_assert!(outgoing.is_empty());
        while let Some(buffer) = receive(&mut device) {
            prop_assert_eq!(Some(content(&buffer)), incoming.pop_front());
            device.recycle(buffer);
        }
        prop_assert!(incoming.is_empty());
        device.flush();
        let buffers = std::iter::from_fn(|| lend(&mut device)).count();
        prop_assert_eq!(buffers, 1 << size);
        prop_assert_eq!(std::iter::from_fn(|| deliver(&model, &frame(0, 60))).count(), 1 << size);
        prop_assert_eq!(*device.counters(), Counters {
            received: device.counters().received, queued: device.counters().queued,
            ..Counters::default()
        });
        prop_assert_eq!(model.violations(), Vec::<String>::new());
    }
}

#[test]
fn a_start_finds_address_and_link() {
    let device = start(&model(ALL, 256));
    assert_eq!((device.mac(), device.link_up()), (MAC, true));
    let plain = start(&model(0, 256));
    assert!(plain.link_up(), "a device that does not say has its link up");
    assert_eq!(plain.mac()[0] & 3, 2, "made up: local, and a station's");
    let group = model(ALL, 256);
    group.set_config(&[1, 0, 0, 0, 0, 0, 1, 0]);
    assert!(matches!(try_start(&group), Err(StartError::Config(_))));
    let disk = Model::new(DeviceType::Block, ALL, &LINK_UP, &[256, 256]);
    assert_eq!(try_start(&disk).expect_err("a disk"), StartError::Type(DeviceType::Block));
}

#[test]
fn a_change_of_the_link_is_told_once() {
    let model = model(ALL, 16);
    let mut device = start(&model);
    assert_eq!(device.refresh_link(), None);
    model.set_config(&LINK_DOWN);
    assert_eq!(device.check(0), Ok(Some(false)));
    assert_eq!(device.refresh_link(), None);
    model.set_config(&LINK_UP);
    assert_eq!(device.refresh_link(), Some(true));
}

/// One message for a burst of frames; none for sent ones, unless somebody waits for a buffer.
#[test]
fn interrupts_are_few_and_none_is_missing() {
    for features in [ALL, ALL & !EVENT_IDX] {
        let model = model(features, 4);
        let mut device = start(&model);
        assert_eq!(deliver(&model, &frame(0, 60)), Some(true), "armed from the start");
        assert!(device.arm(), "there is a frame");
        let buffer = receive(&mut device).expect("a frame");
        device.recycle(buffer);
        assert!(!device.arm());
        assert_eq!(deliver(&model, &frame(1, 60)), Some(true));
        for number in 0..4 {
            assert!(send(&mut device, &frame(number, 60)));
        }
        device.flush();
        assert!(!sent(&model).expect("a frame").1, "nobody waits");
        let _ = receive(&mut device).map(|buffer| device.recycle(buffer));
        assert!(send(&mut device, &frame(4, 60)), "a collected buffer");
        assert!(!send(&mut device, &frame(5, 60)), "none is left");
        assert!(!device.arm());
        assert!(sent(&model).expect("a frame").1, "somebody waits");
        assert!(device.arm(), "there is a buffer");
        assert!(send(&mut device, &frame(5, 60)));
        assert!(!device.arm());
        assert!(!sent(&model).expect("a frame").1, "nobody waits any more");
    }
}

#[test]
fn a_batch_notifies_once() {
    let model = model(ALL, 16);
    let mut device = start(&model);
    let _ = model.notified();
    model.want_notification(TRANSMIT);
    for number in 0..4 {
        assert!(send(&mut device, &frame(number, 60)));
    }
    assert!(model.notified().is_empty());
    device.flush();
    assert_eq!(model.notified(), [TRANSMIT]);
}

#[test]
fn lengths_that_are_no_frames_are_dropped() {
    let model = model(ALL, 16);
    let mut device = start(&model);
    for len in [0, 13, 1519, 2036] {
        assert!(deliver(&model, &vec![1; len]).is_some());
    }
    let short = model.take(RECEIVE).expect("a buffer");
    model.give(RECEIVE, &short, &[0; 5]);
    assert!(deliver(&model, &frame(3, 100)).is_some());
    assert_eq!(content(&receive(&mut device).expect("the good one")), frame(3, 100));
    assert!(receive(&mut device).is_none());
    assert_eq!(device.counters().bad_lengths, 5);
    device.flush();
    let room = std::iter::from_fn(|| deliver(&model, &frame(4, 60))).count();
    assert_eq!(room, 15, "all but the one that is lent");
    for len in [13, 1519] {
        assert!(send(&mut device, &vec![1; len]));
    }
    device.flush();
    assert!(sent(&model).is_none());
    assert_eq!(device.counters().refused, 2);
}

#[test]
fn buffers_that_were_not_lent_are_not_taken() {
    let model = model(ALL, 4);
    let mut device = start(&model);
    let stranger = |token| {
        let page = model.clone().alloc().expect("memory").page;
        Buffer { page, offset: 12, len: 60, token }
    };
    for token in [0, 3, 4, 0x7fff, 0x8000, 0x8003, 0x8004, 0xffff] {
        transmit(&mut device, stranger(token));
        device.cancel(stranger(token));
        device.recycle(stranger(token));
    }
    assert_eq!(device.counters().bad_buffers, 24);
    assert_eq!(std::iter::from_fn(|| lend(&mut device)).count(), 4);
}

#[test]
fn a_device_that_stops_is_a_hang() {
    let model = model(ALL, 16);
    let mut device = start(&model);
    assert!(send(&mut device, &frame(0, 60)));
    device.flush();
    assert_eq!(device.check(1), Ok(None));
    assert_eq!(device.check(TRANSMIT_TIMEOUT_NS * 2), Err(Hang::Stuck(2)));
    model.set_config(&LINK_DOWN);
    device.refresh_link();
    assert_eq!(device.check(TRANSMIT_TIMEOUT_NS * 4), Ok(None), "no link, no hurry");
    model.set_faults(Faults { needs_reset: true, ..Faults::default() });
    assert_eq!(device.check(0), Err(Hang::NeedsReset));
    model.lie(RECEIVE, 99);
    assert!(receive(&mut device).is_none());
    assert_eq!(device.check(0), Err(Hang::Broken));
}

#[test]
fn a_restart_begins_anew() {
    let model = model(ALL, 16);
    let mut first = start(&model);
    assert!(send(&mut first, &frame(0, 60)));
    first.flush();
    drop(first);
    let mut second = start(&model);
    assert!(sent(&model).is_none() && receive(&mut second).is_none());
    assert!(deliver(&model, &frame(1, 80)).is_some());
    assert_eq!(content(&receive(&mut second).expect("a frame")), frame(1, 80));
    assert_eq!(model.violations(), Vec::<String>::new());
}
