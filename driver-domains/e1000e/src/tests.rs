//! The driver against the model.

use crate::model::{Defect, Dialect, Faults, MAC, Model};
use crate::receive::RECEIVE_BUFFERS;
use crate::registers as reg;
use crate::transmit::TRANSMIT_BUFFERS;
use crate::{E1000e, Hang, PciId, StartError, TRANSMIT_TIMEOUT_NS, VECTOR_OTHER, VECTOR_QUEUES};
use card_buffers::Holder;
use domain_api::nic::{Buffer, MAX_FRAME, MIN_FRAME, Nic, Offload};
use domain_api::packets::Shape;
use domain_api::{Clock, Errno};
use proptest::collection::vec;
use proptest::prelude::*;
use std::collections::VecDeque;

mod offload;

const DIALECTS: [Dialect; 2] = [Dialect::Datasheet, Dialect::Lazy];

fn start(model: &Model) -> Result<E1000e<Model>, StartError> {
    start_as(Model::ID, model)
}

/// Starts a device whose last owner's bus mastering was taken away. A frame that arrives at the very
/// moment when it is back must find nothing running.
fn start_as(id: PciId, model: &Model) -> Result<E1000e<Model>, StartError> {
    model.set_bus_master(false);
    let _ = model.sent();
    E1000e::start(id, model.clone(), &mut model.clone(), model, || {
        model.set_bus_master(true);
        assert!(!model.deliver(&frame(99, 60), Defect::None), "old rings are off");
        model.transmit(usize::MAX);
        assert!(model.sent().is_empty(), "old rings are off");
        Ok(())
    })
}

fn started(dialect: Dialect) -> (Model, E1000e<Model>) {
    let model = Model::new(dialect);
    let device = start(&model).expect("a good device");
    (model, device)
}

fn frame(number: usize, len: usize) -> Vec<u8> {
    (0..len).map(|i| u8::try_from((number * 7 + i) % 251).expect("below 251")).collect()
}

fn content(buffer: &Buffer) -> Vec<u8> {
    let mut bytes = vec![0; usize::from(buffer.len)];
    buffer.page.read(usize::from(buffer.offset), &mut bytes);
    bytes
}

/// An empty buffer for a frame.
fn lend(device: &mut E1000e<Model>) -> Option<Buffer> {
    let mut buffers = Vec::new();
    let lent = device.tx_buffers(MAX_FRAME, &mut buffers);
    assert_eq!(buffers.len(), usize::from(lent));
    buffers.pop()
}

fn transmit(device: &mut E1000e<Model>, buffer: Buffer) {
    device.transmit(vec![buffer].drain(..), Offload::Nothing);
}

fn receive(device: &mut E1000e<Model>) -> Option<Buffer> {
    device.receive().map(|received| received.buffer)
}

fn send(device: &mut E1000e<Model>, bytes: &[u8]) -> bool {
    let Some(mut buffer) = lend(device) else { return false };
    buffer.page.write(usize::from(buffer.offset), bytes);
    buffer.len = u16::try_from(bytes.len()).expect("a frame");
    transmit(device, buffer);
    true
}

#[test]
fn the_first_start_finds_address_and_link() {
    for dialect in DIALECTS {
        let (model, device) = started(dialect);
        assert_eq!(device.mac(), MAC);
        assert!(device.link_up());
        assert!(model.violations().is_empty(), "{:?}", model.violations());
    }
}

#[test]
fn a_restart_keeps_the_link_and_takes_less_than_a_millisecond() {
    for dialect in DIALECTS {
        let (model, mut first) = started(dialect);
        assert!(send(&mut first, &frame(1, 60)));
        first.flush();
        assert!(model.deliver(&frame(2, 60), Defect::None));
        drop(first); // Dies with rings running and an interrupt pending.
        let begin = model.now_ns();
        let mut second = start(&model).expect("restart");
        assert!(model.now_ns() - begin < 1_000_000);
        assert!(second.link_up());
        assert_eq!(model.negotiations(), 1, "the PHY was left alone");
        assert!(receive(&mut second).is_none(), "nothing of the old life");
        assert!(model.deliver(&frame(3, 60), Defect::None));
        assert_eq!(content(&receive(&mut second).expect("frame")), frame(3, 60));
        assert!(model.violations().is_empty(), "{:?}", model.violations());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever a previous owner left in the registers, a start leads to a working device.
    #[test]
    fn a_start_does_not_depend_on_what_was_there(
        lazy in any::<bool>(),
        left in vec((0_u32..0x1600, any::<u32>()), 0..200),
    ) {
        let model = Model::new(if lazy { Dialect::Lazy } else { Dialect::Datasheet });
        let kept = [reg::EECD, reg::RAL0, reg::RAH0];
        for (offset, value) in left {
            if !kept.contains(&(offset * 4)) {
                model.poke(offset * 4, value);
            }
        }
        let mut device = start(&model).expect("a good device");
        let _ = model.messages();
        prop_assert!(model.deliver(&frame(1, 100), Defect::None));
        prop_assert_eq!(model.messages(), [VECTOR_QUEUES]);
        prop_assert_eq!(content(&receive(&mut device).expect("frame")), frame(1, 100));
        prop_assert!(send(&mut device, &frame(2, 100)));
        device.flush();
        prop_assert_eq!(model.sent(), [frame(2, 100)]);
        prop_assert_eq!(model.violations(), Vec::<String>::new());
    }
}

#[test]
fn other_devices_are_refused_by_name() {
    let model = Model::new(Dialect::Datasheet);
    let id = PciId { device: 0x100e, ..Model::ID };
    let error = start_as(id, &model).expect_err("82540EM");
    assert_eq!(error, StartError::Unsupported(id));
    assert!(error.to_string().contains("8086:100e") && error.to_string().contains("82574L"));
}

#[test]
fn a_device_that_does_not_start_is_an_error_and_not_a_hang() {
    let cases: [(Faults, StartError); 3] = [
        (Faults { stuck_reset: true, ..Faults::default() }, StartError::ResetStuck),
        (Faults { stuck_auto_read: true, ..Faults::default() }, StartError::EepromStuck),
        (Faults { gone: true, ..Faults::default() }, StartError::Gone),
    ];
    for (faults, expected) in cases {
        let model = Model::new(Dialect::Datasheet);
        model.set_faults(faults);
        assert_eq!(start(&model).expect_err("broken"), expected);
    }
    let model = Model::new(Dialect::Datasheet);
    model.set_memory(20);
    assert_eq!(start(&model).expect_err("no memory"), StartError::Memory(Errno::ENOMEM));
}

#[test]
fn faults_that_a_reset_repairs_only_cost_time() {
    for dialect in DIALECTS {
        let model = Model::new(dialect);
        model.set_faults(Faults { stuck_master: true, stuck_firmware: true, ..Faults::default() });
        let begin = model.now_ns();
        assert!(start(&model).is_ok());
        assert!(model.now_ns() - begin < 50_000_000);
    }
}

#[test]
fn without_an_eeprom_the_address_register_serves() {
    let model = Model::new(Dialect::Datasheet);
    model.set_faults(Faults { dead_eeprom: true, ..Faults::default() });
    assert_eq!(start(&model).expect("start").mac(), MAC);
}

#[test]
fn a_group_address_is_nobodys() {
    let model = Model::new(Dialect::Datasheet);
    model.set_eeprom([0xff; 6], true);
    assert_eq!(start(&model).expect_err("no address"), StartError::NoAddress);
}

#[test]
fn defective_frames_are_dropped_and_counted() {
    let (model, mut device) = started(Dialect::Datasheet);
    let defects = [
        Defect::Errors(1 << 0),
        Defect::Errors(1 << 7),
        Defect::Length(13),
        Defect::Length(0),
        Defect::Length(1519),
        Defect::Length(u16::MAX),
        Defect::Pieces,
        Defect::Pieces,
    ];
    for defect in defects {
        assert!(model.deliver(&frame(0, 200), defect));
    }
    assert!(model.deliver(&frame(9, 200), Defect::None));
    assert_eq!(content(&receive(&mut device).expect("the good one")), frame(9, 200));
    assert!(receive(&mut device).is_none());
    let counters = device.statistics().counters;
    assert_eq!((counters.bad_frames, counters.bad_lengths, counters.bad_pieces), (2, 4, 2));
    assert_eq!(counters.received, 1);
    assert_eq!(device.receiver.buffers.held(Holder::Lent), 1);
}

#[test]
fn buffers_that_were_never_lent_are_not_believed() {
    let (model, mut device) = started(Dialect::Datasheet);
    let forged = |token, len| {
        let page = domain_api::Page::new_zeroed();
        Buffer { page, offset: 0, len, token }
    };
    for token in [0, 5, RECEIVE_BUFFERS, 0x4000, 0x4000 + TRANSMIT_BUFFERS, u16::MAX] {
        device.recycle(forged(token, 60));
        transmit(&mut device, forged(token, 60));
        device.cancel(forged(token, 60));
    }
    device.flush();
    assert_eq!(device.statistics().counters.bad_buffers, 18);
    assert!(model.sent().is_empty());
    let buffer = lend(&mut device).expect("buffer");
    let token = buffer.token;
    device.cancel(buffer);
    device.cancel(forged(token, 60));
    assert_eq!(device.statistics().counters.bad_buffers, 19);
    assert_eq!(
        device.transmitter.buffers.buffers().held(Holder::Free),
        usize::from(TRANSMIT_BUFFERS)
    );
}

#[test]
fn impossible_lengths_are_not_sent() {
    let (model, mut device) = started(Dialect::Datasheet);
    for len in [0, MIN_FRAME - 1, MAX_FRAME + 1, 2048] {
        let mut buffer = lend(&mut device).expect("buffer");
        buffer.len = u16::try_from(len).expect("small");
        transmit(&mut device, buffer);
    }
    device.flush();
    assert!(model.sent().is_empty());
    assert_eq!(device.statistics().counters.refused, 4);
    assert!(send(&mut device, &frame(1, MAX_FRAME)) && send(&mut device, &frame(2, MIN_FRAME)));
    device.flush();
    assert_eq!(model.sent(), [frame(1, MAX_FRAME), frame(2, MIN_FRAME)]);
}

#[test]
fn a_link_flap_is_told_and_a_lost_interrupt_only_delays_the_news() {
    for dialect in DIALECTS {
        let (model, mut device) = started(dialect);
        let _ = model.messages();
        model.set_link(false);
        assert_eq!(model.messages(), [VECTOR_OTHER]);
        assert_eq!(device.service_other().link, Some(false));
        assert!(!device.link_up());
        model.set_link(true);
        assert_eq!(model.messages(), [VECTOR_OTHER], "the cause was cleared");
        assert_eq!(device.service_other().link, Some(true));
        model.set_faults(Faults { lost_interrupts: true, ..Faults::default() });
        model.set_link(false);
        assert!(model.messages().is_empty());
        assert_eq!(device.check(model.now_ns()), Ok(Some(false)));
        assert_eq!(device.statistics().counters.link_changes, 3);
    }
}

#[test]
fn a_queue_cause_that_is_read_with_the_others_is_raised_again() {
    let (model, mut device) = started(Dialect::Datasheet);
    let _ = model.messages();
    // The queue's message masks it; the next frame's cause stays in ICR.
    assert!(model.deliver(&frame(0, 60), Defect::None));
    assert!(model.deliver(&frame(1, 60), Defect::None));
    model.set_link(false);
    assert_eq!(model.messages(), [VECTOR_QUEUES, VECTOR_OTHER]);
    let _ = device.service_other();
    assert!(device.arm(), "there is work");
}

#[test]
fn a_transmitter_that_stops_is_found() {
    let (model, mut device) = started(Dialect::Datasheet);
    model.set_faults(Faults { paused_transmitter: true, ..Faults::default() });
    assert!(send(&mut device, &frame(1, 60)) && send(&mut device, &frame(2, 60)));
    device.flush();
    let now = model.now_ns();
    assert_eq!(device.check(now), Ok(None));
    assert_eq!(device.check(now + TRANSMIT_TIMEOUT_NS), Ok(None));
    model.transmit(1);
    assert_eq!(device.check(now + TRANSMIT_TIMEOUT_NS + 1), Ok(None), "one left");
    assert_eq!(device.check(now + 2 * TRANSMIT_TIMEOUT_NS + 2), Err(Hang::Transmitter));
    model.set_link(false);
    assert_eq!(device.check(now + 3 * TRANSMIT_TIMEOUT_NS), Ok(Some(false)), "no link, no blame");
    model.set_faults(Faults { gone: true, ..Faults::default() });
    assert_eq!(device.check(now), Err(Hang::Gone));
}

#[test]
fn whoever_waits_for_a_transmit_buffer_is_woken() {
    for dialect in DIALECTS {
        let (model, mut device) = started(dialect);
        model.set_faults(Faults { paused_transmitter: true, ..Faults::default() });
        while send(&mut device, &frame(1, 60)) {}
        device.flush();
        let _ = model.messages();
        assert!(!device.arm());
        model.transmit(1);
        assert_eq!(model.messages(), [VECTOR_QUEUES]);
        assert!(lend(&mut device).is_some());
        assert!(!device.arm());
        model.transmit(1);
        assert!(model.messages().is_empty(), "nobody waits now");
    }
}

#[test]
fn the_device_counts_frames_and_reading_adds_up() {
    let (model, mut device) = started(Dialect::Datasheet);
    for round in 1..=3 {
        assert!(model.deliver(&frame(0, 60), Defect::None));
        assert!(send(&mut device, &frame(0, 60)));
        device.flush();
        let statistics = device.statistics();
        assert_eq!((statistics.rx_frames, statistics.tx_frames), (round, round));
    }
}

#[derive(Clone, Debug)]
enum Step {
    Deliver(usize, u8),
    Take,
    Recycle(usize),
    Lend,
    Send(usize, usize),
    Packet(Shape, Offload, u16),
    Cancel(usize),
    Flush,
    Transmit(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        5 => (MIN_FRAME..=MAX_FRAME, any::<u8>()).prop_map(|(len, d)| Step::Deliver(len, d)),
        4 => Just(Step::Take),
        3 => any::<usize>().prop_map(Step::Recycle),
        5 => Just(Step::Lend),
        4 => (any::<usize>(), MIN_FRAME..=MAX_FRAME).prop_map(|(i, len)| Step::Send(i, len)),
        2 => (offload::packets(), 0_u16..2000).prop_map(|((s, o), at)| Step::Packet(s, o, at)),
        1 => any::<usize>().prop_map(Step::Cancel),
        2 => Just(Step::Flush),
        2 => (0_usize..40).prop_map(Step::Transmit),
    ];
    vec(step, 0..700)
}

/// The driver, its users and the wire, with what each shall see.
struct Rig {
    model: Model,
    device: E1000e<Model>,
    number: usize,
    arriving: VecDeque<Vec<u8>>,
    taken: Vec<Buffer>,
    lent: Vec<Buffer>,
    leaving: VecDeque<Leaving>,
}

/// What was queued, and shall leave.
enum Leaving {
    Frame(Vec<u8>),
    Packet(Shape, Offload),
}

impl Rig {
    fn step(&mut self, step: &Step) {
        self.number += 1;
        match step.clone() {
            Step::Deliver(len, kind) => self.deliver(len, kind),
            Step::Take => self.take(),
            Step::Recycle(i) if !self.taken.is_empty() => {
                let buffer = self.taken.swap_remove(i % self.taken.len());
                self.device.recycle(buffer);
            }
            Step::Lend => self.lent.extend(lend(&mut self.device)),
            Step::Send(i, len) if !self.lent.is_empty() => {
                let mut buffer = self.lent.swap_remove(i % self.lent.len());
                let bytes = frame(self.number, len);
                buffer.page.write(usize::from(buffer.offset), &bytes);
                buffer.len = u16::try_from(len).expect("a frame");
                transmit(&mut self.device, buffer);
                self.leaving.push_back(Leaving::Frame(bytes));
            }
            Step::Packet(shape, offload, split) => {
                if offload::send_packet(&mut self.device, &shape, offload, split) {
                    self.leaving.push_back(Leaving::Packet(shape, offload));
                }
            }
            Step::Cancel(i) if !self.lent.is_empty() => {
                let buffer = self.lent.swap_remove(i % self.lent.len());
                self.device.cancel(buffer);
            }
            Step::Flush => self.device.flush(),
            Step::Transmit(count) => self.model.transmit(count),
            Step::Recycle(_) | Step::Send(..) | Step::Cancel(_) => {}
        }
        let mut sent = self.model.sent().into();
        while let Some(leaving) = self.leaving.pop_front_if(|_| !VecDeque::is_empty(&sent)) {
            match leaving {
                Leaving::Frame(bytes) => {
                    assert_eq!(Some(bytes), sent.pop_front(), "in order, unchanged");
                }
                Leaving::Packet(shape, offload) => offload::judge(&shape, offload, &mut sent),
            }
        }
        assert!(sent.is_empty(), "nothing leaves that was not sent");
    }

    fn deliver(&mut self, len: usize, kind: u8) {
        let defect = match kind {
            0..8 => Defect::Pieces,
            8..16 => Defect::Errors(1 << 4),
            16..24 => Defect::Length(u16::from(kind % 14)),
            _ => Defect::None,
        };
        let bytes = frame(self.number, len);
        if self.model.deliver(&bytes, defect) && defect == Defect::None {
            self.arriving.push_back(bytes);
        }
    }

    fn take(&mut self) {
        let buffer = receive(&mut self.device);
        assert_eq!(
            buffer.as_ref().map(content),
            self.arriving.pop_front(),
            "frames arrive in order"
        );
        self.taken.extend(buffer);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// All frames go through in order and unchanged, packets as right frames, and no buffer is lost, whatever the order
    /// of deliveries, completions and calls.
    #[test]
    fn frames_keep_their_order_and_buffers_come_back(lazy in any::<bool>(), steps in steps()) {
        let (model, device) = started(if lazy { Dialect::Lazy } else { Dialect::Datasheet });
        model.set_faults(Faults { paused_transmitter: true, ..Faults::default() });
        let mut rig = Rig {
            model, device, number: 0, arriving: VecDeque::new(), taken: Vec::new(),
            lent: Vec::new(), leaving: VecDeque::new(),
        };
        steps.iter().for_each(|step| rig.step(step));
        rig.step(&Step::Flush);
        rig.step(&Step::Transmit(usize::MAX));
        while !rig.arriving.is_empty() {
            rig.step(&Step::Take);
        }
        for (step, count) in [(Step::Recycle(0), rig.taken.len()), (Step::Cancel(0), rig.lent.len())] {
            (0..count).for_each(|_| rig.step(&step));
        }
        prop_assert!(rig.leaving.is_empty());
        prop_assert!(receive(&mut rig.device).is_none());
        rig.device.transmitter.is_stuck(0, true); // Collects.
        let rx = &rig.device.receiver.buffers;
        let tx = rig.device.transmitter.buffers.buffers();
        prop_assert_eq!(rx.held(Holder::Device), usize::from(RECEIVE_BUFFERS));
        prop_assert_eq!(tx.held(Holder::Free), usize::from(TRANSMIT_BUFFERS));
        prop_assert_eq!(rig.model.violations(), Vec::<String>::new());
    }

    /// An owner that works only when a message came, or when `arm` says so, sees every frame:
    /// whenever it sleeps, frames that are there have a message under way.
    #[test]
    fn no_wake_up_is_lost(
        lazy in any::<bool>(),
        bursts in vec((0_usize..4, 0_usize..4, 0_usize..4, any::<bool>()), 1..60),
    ) {
        let (model, mut device) = started(if lazy { Dialect::Lazy } else { Dialect::Datasheet });
        let _ = model.messages();
        let (mut delivered, mut seen) = (0, 0);
        let mut deliver = |count: usize| {
            for _ in 0..count {
                delivered += usize::from(model.deliver(&frame(0, 60), Defect::None));
            }
        };
        for (asleep, working, arming, link) in bursts {
            deliver(asleep);
            if link {
                model.set_link(false);
                model.set_link(true);
            }
            let mut awake = !model.messages().is_empty();
            let mut rounds = 0;
            while awake {
                let _ = device.service_other();
                while let Some(buffer) = receive(&mut device) {
                    seen += 1;
                    device.recycle(buffer);
                }
                device.flush();
                if rounds == 0 {
                    deliver(working);
                }
                awake = device.arm();
                if rounds == 0 && !awake {
                    deliver(arming);
                }
                awake |= !model.messages().is_empty();
                rounds += 1;
                prop_assert!(rounds < 20, "interrupts without end");
            }
        }
        prop_assert_eq!(seen, delivered);
    }
}
