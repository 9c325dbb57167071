//! The device's end, for tests: a transport whose queues lie in the pages given to it.
//!
//! The model moves chains and nothing else; what a disk or a network card does with them is its
//! test's matter. What no driver may do is noted in [`Model::violations`].

use crate::queue::is_passed;
use crate::{ACCESS_PLATFORM, DeviceStatus, DeviceType, EVENT_IDX, Part, Transport, VERSION_1};
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::rc::Rc;
use alloc::string::String;
use alloc::vec::Vec;
use core::cell::RefCell;
use core::sync::atomic::Ordering::{Acquire, Release, SeqCst};
use core::sync::atomic::fence;
use domain_api::{Clock, Dma, DmaPage, Errno, Page};
use virtio_drivers::transport::InterruptStatus;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// What is wrong with the device.
#[derive(Clone, Copy, Default, Debug)]
pub struct Faults {
    /// Its reset never ends.
    pub stuck_reset: bool,
    /// It does not accept what it offered.
    pub refuses: bool,
    /// It wants a reset.
    pub needs_reset: bool,
}

#[derive(Clone, Debug, Default)]
struct QueueState {
    most: u16,
    size: u16,
    descriptors: u64,
    available: u64,
    used: u64,
    taken: u16,
    given: u16,
    /// Descriptors that the device has, by head.
    heads: Vec<u16>,
}

#[derive(Debug)]
struct State {
    kind: DeviceType,
    faults: Faults,
    offered: u64,
    accepted: u64,
    status: DeviceStatus,
    config: Vec<u8>,
    queues: Vec<QueueState>,
    pages: BTreeMap<u64, Page>,
    memory_left: usize,
    bus_master: bool,
    notified: Vec<u16>,
    now_ns: u64,
    violations: Vec<String>,
}

/// A device. Clones are the same one; it serves as transport, as DMA memory and as clock.
#[derive(Clone, Debug)]
pub struct Model(Rc<RefCell<State>>);

/// A chain that the device has.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Chain {
    /// Its first descriptor.
    pub head: u16,
    /// What the device may read.
    pub readable: Vec<u8>,
    /// Where the device may write.
    pub writable: Vec<Part>,
}

impl Model {
    /// A device of `kind` that offers `features`, and has queues of these sizes.
    #[must_use]
    pub fn new(kind: DeviceType, features: u64, config: &[u8], queues: &[u16]) -> Self {
        let queue = |most: &u16| QueueState { most: *most, ..QueueState::default() };
        Self(Rc::new(RefCell::new(State {
            kind,
            faults: Faults::default(),
            offered: features | VERSION_1,
            accepted: 0,
            // As an owner may have left it.
            status: DeviceStatus::DRIVER_OK,
            config: config.into(),
            queues: queues.iter().map(queue).collect(),
            pages: BTreeMap::new(),
            memory_left: 1024,
            bus_master: false,
            notified: Vec::new(),
            now_ns: 0,
            violations: Vec::new(),
        })))
    }

    /// Sets the faults.
    pub fn set_faults(&self, faults: Faults) {
        self.0.borrow_mut().faults = faults;
    }

    /// Changes what the device offers.
    pub fn set_offered(&self, features: u64) {
        self.0.borrow_mut().offered = features;
    }

    /// Changes its configuration.
    pub fn set_config(&self, config: &[u8]) {
        self.0.borrow_mut().config = config.into();
    }

    /// Turns bus mastering on or off, as the PCI command register does.
    pub fn set_bus_master(&self, on: bool) {
        self.0.borrow_mut().bus_master = on;
    }

    /// Limits the memory that [`Dma::alloc`] has left, in pages.
    pub fn set_memory(&self, pages: usize) {
        self.0.borrow_mut().memory_left = pages;
    }

    /// Lets time pass.
    pub fn advance(&self, ns: u64) {
        self.0.borrow_mut().now_ns += ns;
    }

    /// What was agreed on.
    #[must_use]
    pub fn accepted(&self) -> u64 {
        self.0.borrow().accepted
    }

    /// The queues that were notified since the last call.
    #[must_use]
    pub fn notified(&self) -> Vec<u16> {
        core::mem::take(&mut self.0.borrow_mut().notified)
    }

    /// What the driver did wrong.
    #[must_use]
    pub fn violations(&self) -> Vec<String> {
        self.0.borrow().violations.clone()
    }

    /// The next chain that the driver has published.
    pub fn take(&self, queue: u16) -> Option<Chain> {
        self.0.borrow_mut().take(usize::from(queue))
    }

    /// Says that it wants to be notified of what comes after that which it has taken.
    pub fn want_notification(&self, queue: u16) {
        self.0.borrow_mut().want_notification(usize::from(queue));
    }

    /// Returns a chain, having written `data` into it. Whether the driver wants an interrupt.
    pub fn give(&self, queue: u16, chain: &Chain, data: &[u8]) -> bool {
        self.0.borrow_mut().give(usize::from(queue), chain, data)
    }

    /// Returns a chain that the device does not have.
    pub fn lie(&self, queue: u16, head: u16) {
        let chain = Chain { head, readable: Vec::new(), writable: Vec::new() };
        self.0.borrow_mut().return_chain(usize::from(queue), &chain, 0);
    }
}

impl State {
    fn page(&mut self, address: u64, len: usize) -> Option<(Page, usize)> {
        if !self.bus_master || !self.status.contains(DeviceStatus::DRIVER_OK) {
            self.violations.push(format!("access to {address:#x} at a wrong time"));
        }
        let at = usize::try_from(address % 4096).ok()?;
        let page = self.pages.get(&(address / 4096)).filter(|_| at + len <= 4096).cloned();
        if page.is_none() {
            self.violations.push(format!("access to {len} bytes at {address:#x}"));
        }
        Some((page?, at))
    }

    fn u16_at(&mut self, address: u64) -> u16 {
        let Some((page, at)) = self.page(address, 2) else { return 0 };
        u16::from_le(page.u16(at).load(Acquire))
    }

    fn store_u16(&mut self, address: u64, value: u16) {
        if let Some((page, at)) = self.page(address, 2) {
            page.u16(at).store(value.to_le(), Release);
        }
    }

    fn has_event_idx(&self) -> bool {
        self.accepted & EVENT_IDX != 0
    }

    fn take(&mut self, queue: usize) -> Option<Chain> {
        let q = self.queues[queue].clone();
        if q.size == 0 || self.u16_at(q.available + 2) == q.taken {
            return None;
        }
        let slot = u64::from(q.taken % q.size);
        let head = self.u16_at(q.available + 4 + 2 * slot);
        self.queues[queue].taken = q.taken.wrapping_add(1);
        if q.heads.contains(&head) {
            self.violations.push(format!("chain {head} is published twice"));
        }
        self.queues[queue].heads.push(head);
        let (mut readable, mut writable) = (Vec::new(), Vec::new());
        let mut next = Some(head);
        for _ in 0..q.size {
            let Some(index) = next else { break };
            let (part, following) = self.descriptor(&q, index)?;
            next = following;
            if part.writable {
                writable.push(part);
            } else {
                if !writable.is_empty() {
                    self.violations.push("a readable part behind a writable one".into());
                }
                let (page, at) = self.page(part.address, part.len as usize)?;
                let mut bytes = alloc::vec![0; part.len as usize];
                page.read(at, &mut bytes);
                readable.extend(bytes);
            }
        }
        Some(Chain { head, readable, writable })
    }

    fn descriptor(&mut self, q: &QueueState, index: u16) -> Option<(Part, Option<u16>)> {
        if index >= q.size {
            self.violations.push(format!("descriptor {index}"));
            return None;
        }
        let (page, at) = self.page(q.descriptors + u64::from(index) * 16, 16)?;
        let address = u64::from_le(page.u64(at).load(Acquire));
        let rest = u64::from_le(page.u64(at + 8).load(Acquire));
        let len = u32::try_from(rest & 0xffff_ffff).expect("32 bits");
        let next = u16::try_from(rest >> 48).expect("16 bits");
        let part = Part { address, len, writable: rest >> 33 & 1 == 1 };
        Some((part, (rest >> 32 & 1 == 1).then_some(next)))
    }

    fn want_notification(&mut self, queue: usize) {
        let q = self.queues[queue].clone();
        if self.has_event_idx() {
            self.store_u16(q.used + 4 + 8 * u64::from(q.size), q.taken);
        }
        fence(SeqCst);
    }

    fn give(&mut self, queue: usize, chain: &Chain, data: &[u8]) -> bool {
        let mut left = data;
        for part in &chain.writable {
            let (now, rest) = left.split_at(left.len().min(part.len as usize));
            if let Some((page, at)) = self.page(part.address, now.len()) {
                page.write(at, now);
            }
            left = rest;
        }
        self.queues[queue].heads.retain(|head| *head != chain.head);
        self.return_chain(queue, chain, data.len())
    }

    fn return_chain(&mut self, queue: usize, chain: &Chain, len: usize) -> bool {
        let q = self.queues[queue].clone();
        let slot = u64::from(q.given % q.size);
        if let Some((page, at)) = self.page(q.used + 4 + 8 * slot, 8) {
            page.u32(at).store(u32::from(chain.head).to_le(), Release);
            page.u32(at + 4).store(u32::try_from(len).expect("small").to_le(), Release);
        }
        let given = q.given.wrapping_add(1);
        self.queues[queue].given = given;
        self.store_u16(q.used + 2, given);
        fence(SeqCst);
        if !self.has_event_idx() {
            return self.u16_at(q.available) & 1 == 0;
        }
        let event = self.u16_at(q.available + 4 + 2 * u64::from(q.size));
        is_passed(event, q.given, given)
    }
}

impl Transport for Model {
    fn device_type(&self) -> DeviceType {
        self.0.borrow().kind
    }

    fn read_device_features(&mut self) -> u64 {
        self.0.borrow().offered
    }

    fn write_driver_features(&mut self, features: u64) {
        let mut state = self.0.borrow_mut();
        let wrong = features & !state.offered;
        let must = state.offered & ACCESS_PLATFORM;
        if wrong != 0 || features & must != must {
            state.violations.push(format!("features {features:#x}"));
        }
        state.accepted = features;
    }

    fn max_queue_size(&mut self, queue: u16) -> u32 {
        self.0.borrow().queues.get(usize::from(queue)).map_or(0, |q| q.most.into())
    }

    fn notify(&mut self, queue: u16) {
        self.0.borrow_mut().notified.push(queue);
    }

    fn get_status(&self) -> DeviceStatus {
        let state = self.0.borrow();
        let asks = state.faults.needs_reset && !state.status.is_empty();
        state.status | if asks { DeviceStatus::DEVICE_NEEDS_RESET } else { DeviceStatus::empty() }
    }

    fn set_status(&mut self, status: DeviceStatus) {
        let mut state = self.0.borrow_mut();
        if status.is_empty() {
            if state.bus_master {
                state.violations.push("reset with bus mastering on".into());
            }
            if !state.faults.stuck_reset {
                state.status = status;
                for queue in &mut state.queues {
                    *queue = QueueState { most: queue.most, ..QueueState::default() };
                }
            }
            return;
        }
        let steps = [
            DeviceStatus::ACKNOWLEDGE,
            DeviceStatus::DRIVER,
            DeviceStatus::FEATURES_OK,
            DeviceStatus::DRIVER_OK,
        ];
        let reached = steps.iter().filter(|step| state.status.contains(**step)).count();
        let next = steps[..=reached.min(3)].iter().fold(DeviceStatus::empty(), |all, s| all | *s);
        if status != next {
            let before = state.status;
            state.violations.push(format!("status {status:?} after {before:?}"));
        }
        let refused = state.faults.refuses && status.contains(DeviceStatus::FEATURES_OK);
        state.status = if refused { status - DeviceStatus::FEATURES_OK } else { status };
    }

    fn set_guest_page_size(&mut self, _: u32) {}

    fn requires_legacy_layout(&self) -> bool {
        false
    }

    fn queue_set(&mut self, queue: u16, size: u32, descriptors: u64, available: u64, used: u64) {
        let mut state = self.0.borrow_mut();
        let status = state.status;
        if !status.contains(DeviceStatus::FEATURES_OK) || status.contains(DeviceStatus::DRIVER_OK) {
            state.violations.push(format!("queue {queue} is set up at a wrong time"));
        }
        let most = state.queues[usize::from(queue)].most;
        let size = u16::try_from(size).unwrap_or(0);
        if !size.is_power_of_two() || size > most {
            state.violations.push(format!("queue {queue} of {size}"));
        }
        state.queues[usize::from(queue)] =
            QueueState { most, size, descriptors, available, used, ..QueueState::default() };
    }

    fn queue_unset(&mut self, _: u16) {}

    fn queue_used(&mut self, queue: u16) -> bool {
        self.0.borrow().queues[usize::from(queue)].size != 0
    }

    fn ack_interrupt(&mut self) -> InterruptStatus {
        InterruptStatus::empty()
    }

    fn read_config_generation(&self) -> u32 {
        0
    }

    fn read_config_space<T: FromBytes + IntoBytes>(
        &self,
        offset: usize,
    ) -> virtio_drivers::Result<T> {
        let state = self.0.borrow();
        let bytes = state.config.get(offset..offset + size_of::<T>());
        let bytes = bytes.ok_or(virtio_drivers::Error::ConfigSpaceTooSmall)?;
        T::read_from_bytes(bytes).map_err(|_| virtio_drivers::Error::ConfigSpaceTooSmall)
    }

    fn write_config_space<T: IntoBytes + Immutable>(
        &mut self,
        offset: usize,
        _: T,
    ) -> virtio_drivers::Result<()> {
        self.0.borrow_mut().violations.push(format!("write to configuration byte {offset}"));
        Ok(())
    }
}

impl Dma for Model {
    fn alloc(&mut self) -> Result<DmaPage, Errno> {
        let mut state = self.0.borrow_mut();
        state.memory_left = state.memory_left.checked_sub(1).ok_or(Errno::ENOMEM)?;
        let page = Page::new_zeroed();
        // Above 4 GiB, and never one behind the other.
        let frame = 0x10_0000 + state.pages.len() as u64 * 3;
        state.pages.insert(frame, page.clone());
        Ok(DmaPage { page, bus_address: frame * 4096 })
    }
}

impl Clock for Model {
    fn now_ns(&self) -> u64 {
        let mut state = self.0.borrow_mut();
        state.now_ns += 10_000;
        state.now_ns
    }
}
