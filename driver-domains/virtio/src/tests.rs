//! Queues and start-up against the model.

use crate::model::{Faults, Model};
use crate::queue::is_passed;
use crate::{
    ACCESS_PLATFORM, DeviceStatus, DeviceType, EVENT_IDX, Part, Queue, StartError, Transport,
    VERSION_1, needs_reset, negotiate, reset,
};
use domain_api::{Dma, Errno};
use proptest::collection::vec;
use proptest::prelude::*;
use std::collections::BTreeMap;

fn model(size: u16) -> Model {
    Model::new(DeviceType::Block, EVENT_IDX, &[], &[size])
}

fn start(model: &Model, wanted: u64) -> Result<Queue, StartError> {
    let mut transport = model.clone();
    reset(&mut transport, DeviceType::Block, model)?;
    model.set_bus_master(true);
    let features = negotiate(&mut transport, wanted)?;
    let event_idx = features & EVENT_IDX != 0;
    let queue = Queue::new(&mut transport, &mut model.clone(), 0, 4, event_idx)?;
    let all = transport.get_status() | DeviceStatus::DRIVER_OK;
    transport.set_status(all);
    Ok(queue)
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Add(u8),
    Publish,
    DeviceTakes,
    DeviceGives(usize),
    Arm,
    Disarm,
    Take,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (1_u8..5).prop_map(Step::Add),
        3 => Just(Step::Publish),
        4 => Just(Step::DeviceTakes),
        4 => any::<usize>().prop_map(Step::DeviceGives),
        2 => Just(Step::Arm),
        1 => Just(Step::Disarm),
        3 => Just(Step::Take),
    ]
}

/// Both ends, and what each must know.
struct Bench {
    model: Model,
    queue: Queue,
    page: u64,
    /// Chains that were added: number of parts, by cookie.
    added: BTreeMap<u16, u8>,
    next: u16,
    /// Chains that the device has.
    held: Vec<(crate::model::Chain, u16)>,
    given: Vec<u16>,
    /// The device sleeps until it is notified.
    device_sleeps: bool,
    /// The driver sleeps until it is interrupted.
    driver_sleeps: bool,
}

impl Bench {
    fn apply(&mut self, step: Step) {
        match step {
            Step::Add(parts) => self.add(parts),
            Step::Publish => {
                if self.queue.publish() {
                    self.device_sleeps = false;
                }
            }
            Step::DeviceTakes => self.device_takes(),
            Step::DeviceGives(choice) => self.device_gives(choice),
            Step::Arm => self.driver_sleeps = !self.queue.arm(),
            Step::Disarm => {
                self.queue.disarm();
                self.driver_sleeps = false;
            }
            Step::Take => {
                self.driver_sleeps = false;
                if let Some((cookie, len)) = self.queue.take() {
                    assert_eq!(self.given.remove(0), cookie, "in the order of the device");
                    assert_eq!(len, u32::from(cookie % 7));
                    assert!(self.added.remove(&cookie).is_some());
                }
            }
        }
    }

    fn add(&mut self, parts: u8) {
        let (cookie, page) = (self.next, self.page);
        let part = |n: u8| Part { address: page + u64::from(n), len: 1, writable: n + 1 == parts };
        let free = self.queue.free();
        let added = self.queue.add(cookie, (0..parts).map(part));
        assert_eq!(added, u16::from(parts) <= free);
        if added {
            assert_eq!(self.queue.free(), free - u16::from(parts));
            self.added.insert(cookie, parts);
            self.next += 1;
        }
    }

    fn device_takes(&mut self) {
        let Some(chain) = self.model.take(0) else {
            self.model.want_notification(0);
            // What came between the look and the wish does not notify: look again.
            match self.model.take(0) {
                Some(chain) => self.hold(chain),
                None => self.device_sleeps = true,
            }
            return;
        };
        self.hold(chain);
    }

    fn hold(&mut self, chain: crate::model::Chain) {
        let taken = u16::try_from(self.held.len() + self.given_ever()).expect("few");
        assert_eq!(chain.writable.len(), 1);
        assert_eq!(chain.readable.len() + 1, usize::from(self.added[&taken]), "chain {taken}");
        self.held.push((chain, taken));
    }

    fn given_ever(&self) -> usize {
        usize::from(self.next) - self.added.len() + self.given.len()
    }

    fn device_gives(&mut self, choice: usize) {
        if self.held.is_empty() {
            return;
        }
        let (chain, cookie) = self.held.remove(choice % self.held.len());
        let wanted = self.model.give(0, &chain, &vec![1; usize::from(cookie % 7)]);
        self.given.push(cookie);
        if self.driver_sleeps {
            assert!(wanted, "a sleeping driver is woken");
            self.driver_sleeps = false;
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Whatever both ends do, and whenever, each chain goes over and comes back once, no
    /// descriptor is lost, and who sleeps is woken.
    #[test]
    fn chains_come_back_once(
        event_idx in any::<bool>(),
        size in 2_u32..7,
        steps in vec(step(), 1..300),
    ) {
        let model = model(1 << size);
        let queue = start(&model, if event_idx { EVENT_IDX } else { 0 }).expect("a good device");
        let page = model.clone().alloc().expect("memory").bus_address;
        let mut bench = Bench {
            model, queue, page,
            added: BTreeMap::new(), next: 0, held: Vec::new(), given: Vec::new(),
            device_sleeps: false, driver_sleeps: false,
        };
        for step in steps {
            bench.apply(step);
        }
        // All that was added goes through now, by notifications and interrupts alone.
        bench.apply(Step::Publish);
        while !bench.device_sleeps {
            bench.apply(Step::DeviceTakes);
        }
        while !bench.held.is_empty() {
            bench.apply(Step::DeviceGives(0));
        }
        while !bench.given.is_empty() {
            bench.apply(Step::Take);
        }
        prop_assert!(bench.added.is_empty(), "{:?} did not arrive", bench.added);
        prop_assert_eq!(bench.queue.free(), bench.queue.size());
        prop_assert_eq!(bench.model.violations(), Vec::<String>::new());
    }

    /// §2.6.7.2: an index that moves passes an event when it steps over it, also around zero.
    #[test]
    fn an_event_is_passed_when_it_is_stepped_over(event in any::<u16>(), old in any::<u16>(), by in 0_u16..300) {
        let new = old.wrapping_add(by);
        let expected = (0..by).any(|step| old.wrapping_add(step) == event);
        prop_assert_eq!(is_passed(event, old, new), expected);
    }
}

/// A queue's indices have 16 bits: nothing ends when they do.
#[test]
fn indices_wrap() {
    for (wanted, rounds) in [(0, 1000), (EVENT_IDX, 66_000)] {
        let model = model(8);
        let mut queue = start(&model, wanted).expect("a good device");
        let address = model.clone().alloc().expect("memory").bus_address;
        let mut cookies = 0_u32..;
        for _ in 0..rounds {
            model.want_notification(0);
            let cookie = u16::try_from(cookies.next().expect("endless") % 1000).expect("small");
            assert!(queue.add(cookie, [Part { address, len: 1, writable: true }].into_iter()));
            assert!(queue.publish(), "the device asked for it");
            let chain = model.take(0).expect("published");
            assert!(!queue.arm());
            assert!(model.give(0, &chain, &[]), "the driver asked for it");
            assert_eq!(queue.take(), Some((cookie, 0)));
        }
        assert_eq!(model.violations(), Vec::<String>::new());
    }
}

#[test]
fn a_device_that_returns_what_it_does_not_have_is_broken() {
    for head in [0, 1, 3, 8, 0xffff] {
        let model = model(8);
        let mut queue = start(&model, 0).expect("a good device");
        let address = model.clone().alloc().expect("memory").bus_address;
        let parts = [Part { address, len: 1, writable: true }; 2];
        assert!(queue.add(5, parts.into_iter()));
        let _ = queue.publish();
        let chain = model.take(0).expect("published");
        // Descriptor 0 is the chain's head; the others are inside of it, free, or nowhere.
        if head == 0 {
            let _ = model.give(0, &chain, &[]);
            assert_eq!(queue.take(), Some((5, 0)));
        }
        model.lie(0, head);
        assert_eq!(queue.take(), None);
        assert!(queue.is_broken() && !queue.has_used());
    }
}

#[test]
fn a_device_that_does_not_start_is_an_error_and_not_a_hang() {
    let good = model(8);
    assert!(start(&good, EVENT_IDX).is_ok());
    assert_eq!(good.accepted(), VERSION_1 | EVENT_IDX);
    let stuck = model(8);
    stuck.set_faults(Faults { stuck_reset: true, ..Faults::default() });
    assert_eq!(start(&stuck, 0).expect_err("stuck"), StartError::ResetStuck);
    let old = model(8);
    old.set_offered(0);
    assert_eq!(start(&old, 0).expect_err("old"), StartError::Legacy);
    let refusing = model(8);
    refusing.set_faults(Faults { refuses: true, ..Faults::default() });
    assert_eq!(start(&refusing, 0).expect_err("refuses"), StartError::Features(VERSION_1));
    assert_eq!(start(&model(2), 0).expect_err("too small"), StartError::Queue(0));
    let poor = model(8);
    poor.set_memory(2);
    assert_eq!(start(&poor, 0).expect_err("no memory"), StartError::Memory(Errno::ENOMEM));
    let other = Model::new(DeviceType::Network, 0, &[], &[8]);
    let error = start(&other, 0).expect_err("no disk");
    assert_eq!(error, StartError::Type(DeviceType::Network));
}

#[test]
fn a_device_behind_an_iommu_is_told_that_we_know() {
    let model = model(8);
    model.set_offered(VERSION_1 | ACCESS_PLATFORM);
    assert!(start(&model, 0).is_ok());
    assert_eq!(model.accepted(), VERSION_1 | ACCESS_PLATFORM);
    assert_eq!(model.violations(), Vec::<String>::new());
}

#[test]
fn a_device_that_stopped_is_noticed() {
    let model = model(8);
    assert!(start(&model, 0).is_ok());
    assert!(!needs_reset(&model));
    model.set_faults(Faults { needs_reset: true, ..Faults::default() });
    assert!(needs_reset(&model));
    model.set_faults(Faults::default());
    assert!(!needs_reset(&model));
    model.clone().set_status(DeviceStatus::empty());
    assert!(needs_reset(&model), "somebody has reset it");
}

#[test]
fn a_queue_has_a_size_that_both_sides_take() {
    for (most, size) in [(1024, 256), (256, 256), (200, 128), (4, 4)] {
        let model = model(most);
        assert_eq!(start(&model, 0).expect("a good device").size(), size);
        assert_eq!(model.violations(), Vec::<String>::new());
    }
}
