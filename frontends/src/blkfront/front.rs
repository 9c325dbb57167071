//! The device: its life in the store, and what its user calls.

use super::buffers::Pool;
use super::channel::{Agreed, Channel, Order, indirect_pages};
use super::{
    Buffer, Completion, Config, Env, Error, Fault, GrantPolicy, Held, Info, IoError, MAX_QUEUES,
    Operation, Part, Refused, Stats, TOKEN,
};
use alloc::collections::VecDeque;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use domain_api::{DomainId, Errno, EventPort};
use xen_abi::blkif::{INFO_READ_ONLY, MAX_SEGMENTS, PROTOCOL};
use xenbus::device::{self, Device, DeviceKind};
use xenbus::{Event, Nodes, Store, XenbusState};

/// A disk.
pub struct Blkfront {
    device: Device,
    config: Config,
    state: XenbusState,
    backend_state: XenbusState,
    info: Info,
    buffers: Pool,
    channel: Option<Channel>,
    /// Of earlier connections: pages that the backend still held when they ended.
    held: Vec<Held>,
    /// Of earlier connections: requests without an answer.
    lost: VecDeque<Completion>,
    fault: Option<Fault>,
    stats: Stats,
}

impl Blkfront {
    /// Finds disk `index` of the domain `own` in the store (a number from
    /// [`devices`](super::devices)), and watches its backend. The connection is made by
    /// [`Self::store_event`] or [`Self::refresh`], when the backend is ready.
    ///
    /// # Errors
    /// `ENOENT` when there is no such disk, `EINVAL` when its keys make no sense or `config` is
    /// out of bounds, `ENODEV` when it is no disk, and the store's.
    pub fn new<S: Store>(
        store: &mut S,
        own: DomainId,
        index: u32,
        config: Config,
    ) -> Result<Self, Errno> {
        if !config.is_sound() {
            return Err(Errno::EINVAL);
        }
        let device = device::find_backend(store, own, DeviceKind::Vbd, index)?;
        let directory = device.frontend_path();
        let kind = store.read_optional(&format!("{directory}/device-type"))?;
        if kind.is_some_and(|kind| kind != "disk") {
            return Err(Errno::ENODEV);
        }
        let state = device::state(store, &directory)?;
        let mut front = Self {
            device,
            config,
            state,
            backend_state: XenbusState::UNKNOWN,
            info: Info::default(),
            buffers: Pool::new(config.buffers),
            channel: None,
            held: Vec::new(),
            lost: VecDeque::new(),
            fault: None,
            stats: Stats::default(),
        };
        // A state left by an earlier life of this domain, which nobody reset.
        if state != XenbusState::INITIALISING {
            front.switch(store, XenbusState::INITIALISING)?;
        }
        store.watch(&front.backend_node("state"), &front.token())?;
        Ok(front)
    }

    /// Which device it is.
    #[must_use]
    pub const fn device(&self) -> &Device {
        &self.device
    }

    /// Whether requests can be made.
    #[must_use]
    pub const fn is_connected(&self) -> bool {
        matches!(self.state, XenbusState::CONNECTED)
            && self.channel.is_some()
            && self.fault.is_none()
    }

    /// `state` of our end.
    #[must_use]
    pub const fn state(&self) -> XenbusState {
        self.state
    }

    /// `state` of the backend's end, as last seen.
    #[must_use]
    pub const fn backend_state(&self) -> XenbusState {
        self.backend_state
    }

    /// What the disk is; meaningful from the first connection on.
    #[must_use]
    pub const fn info(&self) -> &Info {
        &self.info
    }

    /// What the backend did wrong, if it did.
    #[must_use]
    pub const fn fault(&self) -> Option<Fault> {
        self.fault
    }

    /// The counters.
    #[must_use]
    pub const fn stats(&self) -> Stats {
        self.stats
    }

    /// Requests that the backend has not answered.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.channel.as_ref().map_or(0, Channel::in_flight)
    }

    /// Lends a buffer. Its content is what the last user left. `None`: all are lent.
    pub fn take_buffer(&mut self) -> Option<Buffer> {
        let index = self.buffers.take()?;
        Some(Buffer { index, page: self.buffers.page(index).clone() })
    }

    /// Buffers that can be lent now.
    #[must_use]
    pub fn free_buffers(&self) -> usize {
        self.buffers.free()
    }

    /// Takes a buffer back.
    ///
    /// # Panics
    /// When it is another frontend's.
    pub fn give_back(&mut self, buffer: Buffer) {
        assert!(self.buffers.owns(&buffer), "a buffer is given back to the frontend that lent it");
        self.buffers.put(buffer.index);
    }

    /// Takes an event of the store. False: it belongs to somebody else.
    ///
    /// # Errors
    /// See [`Self::refresh`].
    pub fn store_event<E: Env, S: Store>(
        &mut self,
        env: &mut E,
        store: &mut S,
        event: &Event,
    ) -> Result<bool, Errno> {
        if event.token != self.token() {
            return Ok(false);
        }
        self.refresh(env, store)?;
        Ok(true)
    }

    /// Looks at the backend's state and acts on it.
    ///
    /// # Errors
    /// The store's; `ENOSPC` when there are no ports or grants for a connection; `EINVAL` when
    /// what the backend says about the disk makes no sense.
    pub fn refresh<E: Env, S: Store>(&mut self, env: &mut E, store: &mut S) -> Result<(), Errno> {
        self.backend_state = device::state(store, &self.device.backend_path())?;
        match (self.backend_state, self.state) {
            (XenbusState::INIT_WAIT, XenbusState::INITIALISING) => self.connect(env, store),
            (XenbusState::CONNECTED, XenbusState::INITIALISED) => self.go_live(env, store),
            // A state that is written again says that the disk's size has changed.
            (XenbusState::CONNECTED, XenbusState::CONNECTED) => {
                self.info.sectors = self.read_sectors(store)?;
                Ok(())
            }
            (
                XenbusState::CLOSING | XenbusState::CLOSED,
                XenbusState::INITIALISED | XenbusState::CONNECTED | XenbusState::CLOSING,
            ) => {
                self.disconnect(env);
                self.switch(store, XenbusState::CLOSED)
            }
            _ => Ok(()),
        }
    }

    /// Ends the connection in good order.
    ///
    /// # Errors
    /// The store's.
    pub fn close<E: Env, S: Store>(&mut self, env: &mut E, store: &mut S) -> Result<(), Errno> {
        if self.state == XenbusState::CLOSED {
            return Ok(());
        }
        self.switch(store, XenbusState::CLOSING)?;
        self.disconnect(env);
        self.refresh(env, store)
    }

    /// Asks for a new connection after the last one was closed.
    ///
    /// # Errors
    /// See [`Self::refresh`].
    pub fn reopen<E: Env, S: Store>(&mut self, env: &mut E, store: &mut S) -> Result<(), Errno> {
        self.disconnect(env);
        self.fault = None;
        self.switch(store, XenbusState::INITIALISING)?;
        self.refresh(env, store)
    }

    /// Takes an event channel's event. False: the port is not ours. Then complete until there is
    /// nothing left.
    pub fn event(&mut self, port: EventPort) -> bool {
        self.channel.as_ref().is_some_and(|channel| channel.owns(port))
    }

    /// Queues a read into `parts`; [`Self::kick`] tells the backend.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn read<E: Env>(
        &mut self,
        env: &mut E,
        tag: u64,
        sector: u64,
        parts: Vec<Part>,
    ) -> Result<(), Refused> {
        self.transfer(env, Operation::Read, tag, sector, parts)
    }

    /// Queues a write of `parts`; [`Self::kick`] tells the backend.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn write<E: Env>(
        &mut self,
        env: &mut E,
        tag: u64,
        sector: u64,
        parts: Vec<Part>,
    ) -> Result<(), Refused> {
        self.transfer(env, Operation::Write, tag, sector, parts)
    }

    /// Queues a flush: once it is completed, every write that was completed before this call is
    /// durable. [`Self::kick`] tells the backend.
    ///
    /// # Errors
    /// See [`Error`]; [`Error::Unsupported`] where completed writes are durable anyway.
    pub fn flush<E: Env>(&mut self, env: &mut E, tag: u64) -> Result<(), Error> {
        let supported = self.info.flush;
        self.bare(env, supported, Operation::Flush, tag, 0, 0)
    }

    /// Queues a discard; [`Self::kick`] tells the backend.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn discard<E: Env>(
        &mut self,
        env: &mut E,
        tag: u64,
        sector: u64,
        sectors: u64,
    ) -> Result<(), Error> {
        let supported = self.info.discard;
        self.bare(env, supported, Operation::Discard, tag, sector, sectors)
    }

    /// Shows the backend what was queued. To be called after each burst of requests, before the
    /// domain sleeps.
    pub fn kick<E: Env>(&mut self, env: &mut E) {
        if let Ok(channel) = live(&mut self.channel, self.fault) {
            channel.publish(env, &mut self.stats);
        }
    }

    /// The next request that ended. `None` when there is none; then an event follows when there
    /// is one.
    ///
    /// # Errors
    /// See [`Error`].
    #[inline]
    pub fn complete<E: Env>(&mut self, env: &mut E) -> Result<Option<Completion>, Error> {
        if let Some(lost) = self.lost.pop_front() {
            self.stats.lost += 1;
            return Ok(Some(lost));
        }
        let channel = live(&mut self.channel, self.fault)?;
        let done = channel.complete(env, &mut self.buffers);
        if let Err(Error::Broken(fault)) = done {
            log::error!("{}: {fault}", self.device.frontend_path());
            self.fault = Some(fault);
        }
        let done = done?;
        if let Some(completion) = &done {
            self.note(completion);
        }
        Ok(done)
    }

    fn note(&mut self, completion: &Completion) {
        self.stats.answered += 1;
        let Err(error) = completion.result else { return };
        self.stats.errors += 1;
        match (error, completion.operation) {
            (IoError::Unsupported, Operation::Flush) => self.info.flush = false,
            (IoError::Unsupported, Operation::Discard) => self.info.discard = false,
            _ => {}
        }
    }

    fn transfer<E: Env>(
        &mut self,
        env: &mut E,
        operation: Operation,
        tag: u64,
        sector: u64,
        parts: Vec<Part>,
    ) -> Result<(), Refused> {
        if let Err(error) = self.check_transfer(operation, sector, &parts) {
            return Err(Refused { error, parts });
        }
        let sectors = sectors_of(&parts);
        self.submit(env, Order { tag, operation, sector, sectors, parts })
    }

    fn bare<E: Env>(
        &mut self,
        env: &mut E,
        supported: bool,
        operation: Operation,
        tag: u64,
        sector: u64,
        sectors: u64,
    ) -> Result<(), Error> {
        live(&mut self.channel, self.fault)?;
        if !supported {
            return Err(Error::Unsupported);
        }
        if operation == Operation::Discard {
            if self.info.read_only {
                return Err(Error::ReadOnly);
            }
            if sectors == 0 || !self.is_inside(sector, sectors) {
                return Err(Error::BadRequest);
            }
        }
        let order = Order { tag, operation, sector, sectors, parts: Vec::new() };
        self.submit(env, order).map_err(|refused| refused.error)
    }

    #[inline]
    fn submit<E: Env>(&mut self, env: &mut E, order: Order) -> Result<(), Refused> {
        if self.state != XenbusState::CONNECTED {
            return Err(Refused { error: Error::NotConnected, parts: order.parts });
        }
        let channel = match live(&mut self.channel, self.fault) {
            Ok(channel) => channel,
            Err(error) => return Err(Refused { error, parts: order.parts }),
        };
        let (operation, sectors) = (order.operation, order.sectors);
        match channel.submit(env, order, &mut self.buffers) {
            Ok(()) => {
                self.stats.count(operation, sectors);
                Ok(())
            }
            Err((error, parts)) => Err(Refused { error, parts }),
        }
    }

    /// Whether a range of sectors lies on the disk and consists of whole sectors of the disk.
    #[inline]
    fn is_inside(&self, sector: u64, sectors: u64) -> bool {
        let unit = u64::from(self.info.sector_size / 512);
        (sector | sectors) & (unit - 1) == 0
            && sector.checked_add(sectors).is_some_and(|end| end <= self.info.sectors)
    }

    #[inline]
    fn check_transfer(
        &self,
        operation: Operation,
        sector: u64,
        parts: &[Part],
    ) -> Result<(), Error> {
        match (self.is_connected(), self.fault) {
            (_, Some(fault)) => return Err(Error::Broken(fault)),
            (false, None) => return Err(Error::NotConnected),
            (true, None) => {}
        }
        if operation == Operation::Write && self.info.read_only {
            return Err(Error::ReadOnly);
        }
        let unit = u8::try_from(self.info.sector_size / 512).unwrap_or(1);
        let sound = |part: &Part| {
            part.is_sound()
                && (part.first | part.sectors) & (unit - 1) == 0
                && self.buffers.owns(&part.buffer)
        };
        let fits = (1..=usize::from(self.info.max_parts)).contains(&parts.len());
        if !fits || !parts.iter().all(sound) || !self.is_inside(sector, sectors_of(parts)) {
            return Err(Error::BadRequest);
        }
        Ok(())
    }

    /// Makes rings and tells the backend of them.
    fn connect<E: Env, S: Store>(&mut self, env: &mut E, store: &mut S) -> Result<(), Errno> {
        self.release_held(env);
        let backend = self.device.backend_path();
        let order: u8 = device::read_or(store, &backend, "max-ring-page-order", 0)?;
        let queues: u16 = device::read_or(store, &backend, "multi-queue-max-queues", 1)?;
        let agreed = Agreed {
            backend: self.device.backend,
            #[expect(clippy::cast_possible_truncation, reason = "as the protocol has it")]
            handle: self.device.index as u16,
            queues: self.config.queues.min(queues.clamp(1, MAX_QUEUES)),
            ring_page_order: self.config.ring_page_order.min(order),
        };
        let channel = Channel::open(env, agreed, &self.config, &mut self.buffers, &mut self.held)?;
        let directory = self.device.frontend_path();
        let persistent = self.config.grants == GrantPolicy::Persistent;
        let written =
            store.transaction(|nodes| write_keys(nodes, &directory, &channel, agreed, persistent));
        if let Err(errno) = written {
            channel.close(env, &mut self.buffers, &mut self.held, &mut self.lost);
            return Err(errno);
        }
        self.info.queues = agreed.queues;
        self.info.slots = channel.slots();
        self.channel = Some(channel);
        self.fault = None;
        self.switch(store, XenbusState::INITIALISED)
    }

    /// Reads what the disk is, and goes to work.
    fn go_live<E: Env, S: Store>(&mut self, env: &mut E, store: &mut S) -> Result<(), Errno> {
        let info = self.read_info(store)?;
        let Some(channel) = &mut self.channel else { return Ok(()) };
        if indirect_pages(usize::from(info.max_parts)) > 0 {
            channel.allow_indirect(env, info.max_parts, self.config.buffers)?;
        }
        self.info = info;
        self.switch(store, XenbusState::CONNECTED)
    }

    fn read_sectors<S: Store>(&self, store: &mut S) -> Result<u64, Errno> {
        device::read(store, &self.device.backend_path(), "sectors")
    }

    fn read_info<S: Store>(&self, store: &mut S) -> Result<Info, Errno> {
        let sectors = self.read_sectors(store)?;
        let directory = self.device.backend_path();
        let flags: u32 = device::read_or(store, &directory, "info", 0)?;
        let sector_size: u32 = device::read_or(store, &directory, "sector-size", 512)?;
        let physical_sector_size =
            device::read_or(store, &directory, "physical-sector-size", sector_size)?;
        if !matches!(sector_size, 512 | 1024 | 2048 | 4096) {
            return Err(Errno::EINVAL);
        }
        let indirect: u32 = device::read_or(store, &directory, "feature-max-indirect-segments", 0)?;
        let indirect = indirect.min(self.config.indirect_segments.into());
        let discard_granularity =
            device::read_or(store, &directory, "discard-granularity", physical_sector_size)?;
        let persistent = self.config.grants == GrantPolicy::Persistent
            && device::has_feature(store, &directory, "feature-persistent")?;
        Ok(Info {
            sectors,
            sector_size,
            physical_sector_size,
            read_only: flags & INFO_READ_ONLY != 0,
            flush: device::has_feature(store, &directory, "feature-flush-cache")?,
            discard: device::has_feature(store, &directory, "feature-discard")?,
            discard_granularity,
            persistent,
            max_parts: u16::try_from(indirect).unwrap_or(u16::MAX).max(DIRECT_PARTS),
            ..self.info
        })
    }

    fn disconnect<E: Env>(&mut self, env: &mut E) {
        if let Some(channel) = self.channel.take() {
            channel.close(env, &mut self.buffers, &mut self.held, &mut self.lost);
        }
        self.release_held(env);
    }

    fn release_held<E: Env>(&mut self, env: &mut E) {
        self.held.retain(|granted| env.revoke(granted.gref) == Err(Errno::EBUSY));
    }

    fn switch<S: Store>(&mut self, store: &mut S, state: XenbusState) -> Result<(), Errno> {
        self.state = state;
        device::switch_state(store, &self.device.frontend_path(), state)
    }

    fn backend_node(&self, key: &str) -> String {
        format!("{}/{key}", self.device.backend_path())
    }

    fn token(&self) -> String {
        format!("{TOKEN}{}", self.device.index)
    }
}

#[expect(clippy::cast_possible_truncation, reason = "11")]
const DIRECT_PARTS: u16 = MAX_SEGMENTS as u16;

#[inline]
fn sectors_of(parts: &[Part]) -> u64 {
    parts.iter().map(|part| u64::from(part.sectors)).sum()
}

fn live(channel: &mut Option<Channel>, fault: Option<Fault>) -> Result<&mut Channel, Error> {
    match (channel, fault) {
        (_, Some(fault)) => Err(Error::Broken(fault)),
        (Some(channel), None) => Ok(channel),
        (None, None) => Err(Error::NotConnected),
    }
}

/// Writes the keys of a connection, and removes those of an earlier one of another shape.
fn write_keys(
    nodes: &mut dyn Nodes,
    directory: &str,
    channel: &Channel,
    agreed: Agreed,
    persistent: bool,
) -> Result<(), Errno> {
    for name in nodes.directory(directory)? {
        let old = ["ring-ref", "queue-", "event-channel", "ring-page-order", "multi-queue-num"];
        if old.iter().any(|old| name.starts_with(old)) {
            nodes.rm(&format!("{directory}/{name}"))?;
        }
    }
    if agreed.queues > 1 {
        device::write(nodes, directory, "multi-queue-num-queues", agreed.queues)?;
    }
    if agreed.ring_page_order > 0 {
        device::write(nodes, directory, "ring-page-order", agreed.ring_page_order)?;
    }
    for (number, (refs, port)) in channel.queue_keys().enumerate() {
        let place = match agreed.queues {
            1 => String::from(directory),
            _ => format!("{directory}/queue-{number}"),
        };
        if let [gref] = refs.as_slice() {
            device::write(nodes, &place, "ring-ref", gref.0)?;
        } else {
            for (page, gref) in refs.iter().enumerate() {
                device::write(nodes, &place, &format!("ring-ref{page}"), gref.0)?;
            }
        }
        device::write(nodes, &place, "event-channel", port.0)?;
    }
    device::write(nodes, directory, "protocol", PROTOCOL)?;
    device::write(nodes, directory, "feature-persistent", u8::from(persistent))
}
