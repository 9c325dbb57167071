//! The control domain as a whole.

use crate::bundle::{Bundle, BundleError};
use crate::console::write_line;
use crate::domain::{BuildError, Built, DriverProgram, Managed, Phase, Program, bdf_text};
use crate::hypervisor::{Hypervisor, until_done};
use crate::store::{Finished, Op, StoreQueue};
use crate::supervision::{Decision, describe};
use crate::tree;
use alloc::collections::VecDeque;
use alloc::format;
use alloc::rc::Rc;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use axolotl_abi::control::{DeathRecord, STATE_DEAD};
use axolotl_abi::drivers::{self, Service};
use axolotl_abi::protocol::Framer;
use axolotl_abi::system::{FIND_DRIVER, Role};
use core::fmt;
use xen_abi::{DomainId, Errno, EventPort};
use xenbus::Transport;
use xenbus::device::DeviceKind;

/// Bytes of own messages that are kept for `axl console control`.
const OWN_LOG: usize = 16 * 1024;
/// Console bytes of one domain that are taken before others get their turn.
const CONSOLE_SHARE: usize = 4096;

/// What the control domain starts with.
#[derive(Debug)]
pub struct Setup<'b, H, T> {
    /// The bundle.
    pub bundle: &'b [u8],
    /// The core.
    pub hypervisor: H,
    /// The control domain's own connection to the store, which need not be up yet.
    pub store: T,
    /// The control domain's own end of it, unbound for the store domain.
    pub store_port: EventPort,
}

/// Why there is nothing to control.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum StartError {
    /// The bundle cannot be used.
    Bundle(BundleError),
}

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bundle(error) => error.fmt(f),
        }
    }
}

/// What happened since the last [`Control::work`]. Too much is only slower, never wrong.
#[derive(Clone, Copy, Default, Debug)]
pub struct Wake {
    /// `VIRQ_DOM_EXC`: a domain may have died.
    pub domains: bool,
    /// `VIRQ_CON_RING`: a domain wrote to its console.
    pub consoles: bool,
}

impl Wake {
    /// Everything may have happened.
    pub const ALL: Self = Self { domains: true, consoles: true };
}

/// What a store job was for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Tag {
    /// The home of a domain is there; `true`: that is all it needs.
    Home(usize, bool),
    /// The devices of a domain are there (again).
    Devices(usize),
    /// The store knows a domain's incarnation.
    Introduced(usize),
    /// The nodes of a domain are gone.
    Removed(usize),
    /// The store forgot a domain.
    Released,
    /// One node, for the request of this id.
    Node(u32),
    /// A guest was asked to end, for the request of this id.
    Asked(u32),
}

/// The control domain's state.
#[derive(Debug)]
pub struct Control<'b, H, T> {
    pub(crate) hv: H,
    pub(crate) store: StoreQueue<T, Tag>,
    store_port: EventPort,
    pub(crate) system: String,
    pub(crate) domains: Vec<Managed<'b>>,
    /// For the machine's console, written at the end of each turn: it is slow.
    out: Vec<u8>,
    pub(crate) own_log: VecDeque<u8>,
    pub(crate) own_log_end: u64,
    pub(crate) framer: Framer,
    pub(crate) outgoing: VecDeque<u8>,
    pub(crate) node_requests: usize,
    pub(crate) started_after_ns: Option<u64>,
}

impl<'b, H: Hypervisor, T: Transport> Control<'b, H, T> {
    /// Reads the bundle and builds what it describes. Domains run as soon as their nodes are in
    /// the store, which takes some turns of [`Self::work`].
    ///
    /// # Errors
    /// Only when there is nothing to build at all. What is wrong with one domain is said on the
    /// console, and costs that domain and those that need it.
    pub fn start(setup: Setup<'b, H, T>) -> Result<Self, StartError> {
        let bundle = Bundle::read(setup.bundle).map_err(StartError::Bundle)?;
        let mut control = Self {
            hv: setup.hypervisor,
            store: StoreQueue::new(setup.store),
            store_port: setup.store_port,
            system: bundle.system.name.clone(),
            domains: managed(&bundle),
            out: Vec::new(),
            own_log: VecDeque::new(),
            own_log_end: 0,
            framer: Framer::new(),
            outgoing: VecDeque::new(),
            node_requests: 0,
            started_after_ns: None,
        };
        control.boot();
        Ok(control)
    }

    /// The store first, since everybody waits for it; the others are built while it starts.
    fn boot(&mut self) {
        let all = 0..self.domains.len();
        let store = all.clone().find(|&at| self.domains[at].is_store());
        match store {
            Some(at) => self.build(at),
            None => {
                self.store.lose();
                self.say("there is no store domain");
            }
        }
        let others = || all.clone().filter(|&at| Some(at) != store);
        // All homes come before all devices: a device's backend directory inherits from its
        // backend's home.
        for at in all.clone() {
            self.write_home(at, Vec::new());
        }
        for at in others() {
            self.write_devices(at);
        }
        self.store.pump();
        for role in [Role::Driver, Role::Guest] {
            for at in
                others().filter(|&at| self.domains[at].domain.role == role).collect::<Vec<_>>()
            {
                self.build(at);
                self.store.pump();
            }
        }
        self.write_out();
    }

    /// Does all that can be done now. Deaths first: an outage lasts until the restart.
    pub fn work(&mut self, wake: Wake) {
        if wake.domains {
            self.look_for_deaths();
        }
        self.expire_timers();
        self.store.pump();
        for finished in self.store.finished() {
            self.store_answered(finished);
        }
        self.store.pump();
        if wake.consoles {
            for at in 0..self.domains.len() {
                self.read_console(at);
            }
        }
        self.go_on_filling();
        self.note_start();
        self.write_out();
    }

    /// When [`Self::work`] must be called although nothing happened: a system time.
    #[must_use]
    pub fn deadline(&self) -> Option<u64> {
        let delayed = self.domains.iter().filter_map(|managed| match managed.phase {
            Phase::Delayed(until) => Some(until),
            _ => None,
        });
        let lines = self.domains.iter().filter_map(|managed| managed.console.deadline());
        // These go on turn by turn.
        let goes_on = |it: &Managed<'_>| it.filling.is_some() || it.phase == Phase::Destroying;
        let now = self.domains.iter().any(goes_on).then(|| self.hv.now_ns());
        delayed.chain(lines).chain(now).min()
    }

    /// Takes a byte that `axl` sent.
    pub fn serial_input(&mut self, byte: u8) {
        if let Some(frame) = self.framer.push(byte) {
            self.request(frame);
        }
    }

    /// Bytes for `axl`; whoever sends them takes them off the front.
    pub fn serial_output(&mut self) -> &mut VecDeque<u8> {
        &mut self.outgoing
    }

    /// The core.
    pub fn hypervisor(&mut self) -> &mut H {
        &mut self.hv
    }

    /// Says something on the console, as `control| …`.
    pub fn say(&mut self, text: &str) {
        let before = self.out.len();
        write_line("control", text.as_bytes(), &mut self.out);
        let line = self.out.get(before + "control| ".len()..).unwrap_or(&[]);
        self.own_log.extend(line);
        self.own_log_end += line.len() as u64;
        let excess = self.own_log.len().saturating_sub(OWN_LOG);
        self.own_log.drain(..excess);
    }

    fn say_of(&mut self, at: usize, text: &str) {
        let text = format!("{} {text}", self.domains[at].domain.name);
        self.say(&text);
    }

    fn write_out(&mut self) {
        if !self.out.is_empty() {
            self.hv.console_write(&self.out);
            self.out.clear();
        }
    }

    fn note_start(&mut self) {
        let starting = self.domains.iter().any(|managed| managed.phase == Phase::Starting);
        if self.started_after_ns.is_none() && !starting {
            let now = self.hv.now_ns();
            self.started_after_ns = Some(now);
            let live = self.domains.iter().filter(|managed| managed.phase == Phase::Live).count();
            let text = format!(
                "system '{}' running: {} domains in {} ms",
                self.system,
                live + 1,
                now / 1_000_000
            );
            self.say(&text);
        }
    }

    // ---- building ----

    fn build(&mut self, at: usize) {
        let managed = &mut self.domains[at];
        managed.phase = Phase::Starting;
        match managed.build(&mut self.hv, self.store_port) {
            Ok(built) => {
                self.say_found(at);
                self.built(at, built);
            }
            Err(error) => self.give_up_building(at, &error),
        }
    }

    /// One step for each domain that is being filled.
    fn go_on_filling(&mut self) {
        for at in 0..self.domains.len() {
            if self.domains[at].filling.is_some() {
                match self.domains[at].fill_step(&mut self.hv) {
                    Ok(built) => self.built(at, built),
                    Err(error) => self.give_up_building(at, &error),
                }
            }
        }
    }

    fn give_up_building(&mut self, at: usize, error: &BuildError) {
        let text = format!("cannot be built: {}", error.what);
        // Whatever was made of it so far goes; a domain that was not created is no error.
        let domid = self.domains[at].domid;
        if error.errno != Errno::EEXIST {
            let _ = until_done(|| self.hv.destroy(domid));
        }
        self.say_of(at, &text);
        self.domains[at].filling = None;
        self.domains[at].phase = Phase::Held(text);
    }

    /// Says which driver was found for a domain, and whose devices it cannot serve.
    fn say_found(&mut self, at: usize) {
        let Managed { domid, found: Some(driver), domain, .. } = &self.domains[at] else { return };
        let place = domain.devices.first().map_or_else(String::new, |device| bdf_text(device.bdf));
        let mut lines = Vec::from([format!("runs the driver {} for {place}", driver.name)]);
        let kind = match driver.service {
            Service::Network => DeviceKind::Vif,
            Service::Block => DeviceKind::Vbd,
        };
        for guest in &self.domains {
            let devices = guest.splits.iter().map(|split| split.device);
            let wrong = devices.filter(|device| device.backend == *domid && device.kind != kind);
            lines.extend(wrong.map(|device| {
                let (what, index, guest) = (device.kind.name(), device.index, &guest.domain.name);
                format!("cannot serve {what} {index} of {guest}: that is no work of its driver's")
            }));
        }
        for line in lines {
            self.say_of(at, &line);
        }
    }

    /// When the domain is filled, the store is told, and it starts when its nodes are there.
    fn built(&mut self, at: usize, built: Built) {
        let Built::Whole(port) = built else { return };
        let domid = self.domains[at].domid;
        if let Some(port) = port {
            self.store.at_once(Tag::Introduced(at), Vec::from([Op::Introduce(domid, port)]));
            self.store.pump();
        }
        self.start_if_ready(at);
    }

    fn start_if_ready(&mut self, at: usize) {
        let managed = &mut self.domains[at];
        let is_ready = managed.is_built && (managed.has_nodes || managed.is_store());
        if !is_ready || managed.phase != Phase::Starting {
            return;
        }
        managed.is_built = false;
        match self.hv.unpause(managed.domid) {
            Ok(()) => managed.phase = Phase::Live,
            Err(errno) => self.hold(at, format!("cannot be started: {errno}")),
        }
    }

    fn hold(&mut self, at: usize, why: String) {
        self.say_of(at, &why);
        self.domains[at].phase = Phase::Held(why);
    }

    /// With the backends' directories that its home is to have from the start.
    fn write_home(&mut self, at: usize, backends: Vec<Op>) {
        let managed = &self.domains[at];
        let last = managed.splits.is_empty();
        let mut ops = tree::home_of(&managed.domain, managed.domid);
        ops.extend(backends);
        self.store.transaction(Tag::Home(at, last), ops);
    }

    /// Backends' directories too: they are there before the guest.
    fn write_devices(&mut self, at: usize) {
        let splits = &self.domains[at].splits;
        if splits.is_empty() {
            return;
        }
        let both = |split| [tree::backend_of(split), tree::frontend_of(split)].concat();
        let ops = splits.iter().flat_map(both).collect();
        self.store.transaction(Tag::Devices(at), ops);
    }

    /// The directories of the guest itself and of its frontends, for its next incarnation. Its
    /// backends' directories are theirs.
    fn reset_nodes(&mut self, at: usize) {
        let managed = &self.domains[at];
        let mut ops = tree::clean_home(managed.domid);
        ops.extend(managed.splits.iter().flat_map(tree::frontend_of));
        self.store.transaction(Tag::Devices(at), ops);
    }

    fn store_answered(&mut self, finished: Finished<Tag>) {
        match (finished.tag, finished.result) {
            (Tag::Home(at, true) | Tag::Devices(at), Ok(_)) => {
                self.domains[at].has_nodes = true;
                self.start_if_ready(at);
            }
            (Tag::Home(at, _) | Tag::Devices(at), Err(errno)) => {
                if self.domains[at].phase == Phase::Starting {
                    self.hold(
                        at,
                        format!("cannot be started: the store refused its nodes ({errno})"),
                    );
                }
            }
            (Tag::Introduced(at), Err(errno)) => {
                self.say_of(at, &format!("has no store connection ({errno})"));
            }
            (Tag::Removed(at), _) => {
                let domid = self.domains[at].domid;
                self.store.at_once(Tag::Released, Vec::from([Op::Release(domid)]));
                self.domains[at].phase = Phase::Destroying;
                self.try_destroy(at);
            }
            (Tag::Node(id), result) => self.node_answered(id, result),
            (Tag::Asked(id), result) => self.asked(id, result),
            (Tag::Home(_, false) | Tag::Introduced(_) | Tag::Released, _) => {}
        }
    }

    // ---- deaths ----

    fn look_for_deaths(&mut self) {
        for at in 0..self.domains.len() {
            let managed = &self.domains[at];
            if managed.phase != Phase::Live {
                continue;
            }
            let domid = managed.domid;
            match self.hv.info(domid) {
                Ok(info) if info.domid == domid => {
                    if info.state == STATE_DEAD {
                        self.died(at);
                    }
                }
                _ => self.hold(at, "is not known to the core any more".into()),
            }
        }
    }

    fn died(&mut self, at: usize) {
        let now = self.hv.now_ns();
        let domid = self.domains[at].domid;
        let Ok(death) = self.hv.death(domid) else {
            return self.hold(at, "died, and the core does not say why".into());
        };
        self.end_console(at);
        let managed = &mut self.domains[at];
        let decision = managed.history.decide(&managed.domain, &death, now);
        self.carry_out(at, &death, decision, now);
        if self.domains[at].is_store() {
            self.store.lose();
            self.say("the store is gone: connections stay, new ones cannot be made");
        }
    }

    fn carry_out(&mut self, at: usize, death: &DeathRecord, decision: Decision, now: u64) {
        let mut text = format!("died, incarnation {}: {}", death.incarnation, describe(death));
        match decision {
            Decision::Restart => {
                self.restart(at);
                if self.domains[at].filling.is_some() {
                    text += "; is being started again";
                } else {
                    let us = self.hv.now_ns().saturating_sub(now) / 1000;
                    text += &format!("; restarted in {us} us");
                }
            }
            Decision::RestartAt(until) => {
                self.domains[at].phase = Phase::Delayed(until);
                text += &format!("; restarts in {} ms", until.saturating_sub(now) / 1_000_000);
            }
            Decision::Hold(why) => {
                text += &format!("; held, because {why}: `axl restart` starts it again");
                self.domains[at].phase = Phase::Held(why);
            }
            Decision::Preserve => {
                text += "; stays for inspection";
                self.domains[at].phase = Phase::Ended;
            }
            Decision::Destroy => {
                text += "; destroyed";
                self.remove(at);
            }
        }
        self.say_of(at, &text);
    }

    /// The next incarnation in place. For a driver, nothing in here waits for anybody.
    pub(crate) fn restart(&mut self, at: usize) {
        let managed = &mut self.domains[at];
        managed.phase = Phase::Starting;
        let is_guest = managed.domain.role == Role::Guest;
        managed.has_nodes = !is_guest;
        managed.is_built = false;
        managed.restarts = managed.restarts.saturating_add(1);
        match managed.rebuild(&mut self.hv, self.store_port) {
            Ok(built) => {
                if is_guest {
                    self.reset_nodes(at);
                }
                self.built(at, built);
            }
            Err(error) => self.hold(at, format!("cannot be restarted: {}", error.what)),
        }
    }

    /// What a destroyed domain's home held for the guests that it serves.
    fn lost_backends(&self, at: usize) -> Vec<Op> {
        let is_there = |it: &&Managed<'_>| {
            !matches!(it.phase, Phase::Removing | Phase::Destroying | Phase::Gone)
        };
        let splits = self.domains.iter().filter(is_there).flat_map(|it| &it.splits);
        let served = splits.filter(|split| split.device.backend == self.domains[at].domid);
        served.flat_map(tree::backend_of).collect()
    }

    /// Builds a domain anew that was destroyed.
    pub(crate) fn build_again(&mut self, at: usize) {
        let managed = &mut self.domains[at];
        managed.has_nodes = false;
        managed.restarts = managed.restarts.saturating_add(1);
        self.write_home(at, self.lost_backends(at));
        self.write_devices(at);
        self.build(at);
    }

    /// Takes a domain out of the store, then out of the core.
    pub(crate) fn remove(&mut self, at: usize) {
        let managed = &mut self.domains[at];
        managed.phase = Phase::Removing;
        managed.filling = None;
        let ops = tree::remove(managed.domid, &managed.splits);
        // It must not run on with its nodes gone. One that is dead cannot be paused.
        let domid = managed.domid;
        let _ = until_done(|| self.hv.pause(domid));
        self.end_console(at);
        self.store.transaction(Tag::Removed(at), ops);
    }

    fn try_destroy(&mut self, at: usize) {
        let domid = self.domains[at].domid;
        match self.hv.destroy(domid) {
            Ok(()) | Err(Errno::ESRCH) => {
                self.domains[at].phase = Phase::Gone;
                self.say_of(at, "is destroyed");
            }
            // The next step comes in the next turn.
            Err(Errno::EAGAIN) => {}
            Err(errno) => self.hold(at, format!("cannot be destroyed: {errno}")),
        }
    }

    fn expire_timers(&mut self) {
        let now = self.hv.now_ns();
        for at in 0..self.domains.len() {
            match self.domains[at].phase {
                Phase::Delayed(until) if until <= now => {
                    self.restart(at);
                    self.say_of(at, "is restarted");
                }
                Phase::Destroying => self.try_destroy(at),
                _ => {}
            }
            let managed = &mut self.domains[at];
            managed.console.expire(&managed.domain.name, now, &mut self.out);
        }
    }

    // ---- consoles ----

    /// Takes the last words of an incarnation, before the next one writes into the same ring, and
    /// lets go of the ring's page.
    pub(crate) fn end_console(&mut self, at: usize) {
        self.read_console(at);
        let managed = &mut self.domains[at];
        managed.tail_at_death = managed.console.tail();
        if managed.console_port.take().is_some() {
            self.hv.leave_console(managed.domid);
        }
    }

    /// Takes what a domain wrote to its console.
    pub(crate) fn read_console(&mut self, at: usize) {
        let managed = &mut self.domains[at];
        if matches!(managed.phase, Phase::Gone) {
            return;
        }
        let now = self.hv.now_ns();
        let mut buffer = [0; 1024];
        let mut share = CONSOLE_SHARE;
        while share > 0 {
            let mut position = managed.console.position;
            let Ok(len) = self.hv.console_read(managed.domid, &mut position, &mut buffer) else {
                break;
            };
            let bytes = buffer.get(..len).unwrap_or(&[]);
            managed.console.position = position;
            if managed.domain.kernel.is_some() {
                managed.console.keep(bytes);
            }
            managed.console.feed(&managed.domain.name, bytes, now, &mut self.out);
            share = share.saturating_sub(len.max(1));
            if len < buffer.len() {
                break;
            }
        }
        let Some(port) = managed.console_port else { return };
        while let Ok(len @ 1..) = self.hv.console_ring(managed.domid, port, &mut buffer) {
            let bytes = buffer.get(..len).unwrap_or(&[]);
            managed.console.keep(bytes);
            managed.console.feed(&managed.domain.name, bytes, now, &mut self.out);
            share = share.saturating_sub(len);
            if share == 0 {
                break;
            }
        }
    }

    /// The place of the domain named `name`.
    pub(crate) fn find(&self, name: &str) -> Option<usize> {
        self.domains.iter().position(|managed| managed.domain.name == name)
    }
}

/// The domains of a bundle with their ids: the store is d1, the others follow in the file's
/// order.
fn managed<'b>(bundle: &Bundle<'b>) -> Vec<Managed<'b>> {
    let mut next = 2;
    let domains = &bundle.system.domains;
    let ids: Vec<DomainId> = domains
        .iter()
        .map(|domain| {
            if domain.role == Role::Store {
                return crate::domain::STORE;
            }
            next += 1;
            DomainId(next - 1)
        })
        .collect();
    let id_of = |name: &str| {
        let at = domains.iter().position(|domain| domain.name == name);
        at.and_then(|at| ids.get(at)).copied().unwrap_or(DomainId::INVALID)
    };
    let image = |index: u32| bundle.images.get(index as usize).copied().unwrap_or(&[]);
    let known = bundle.system.drivers.iter().filter_map(|program| {
        let driver = drivers::by_name(&program.driver)?;
        Some(DriverProgram { driver, image: image(program.image) })
    });
    let known: Rc<[_]> = known.collect();
    let with_ids = domains.iter().zip(&ids);
    with_ids
        .map(|(domain, &domid)| {
            let program = match domain.image {
                FIND_DRIVER => Program::ToFind(Rc::clone(&known)),
                index => Program::Image(image(index)),
            };
            let splits = tree::splits(domain, domid, id_of);
            let ramdisk = domain.kernel.as_ref().and_then(|kernel| kernel.ramdisk).map(image);
            Managed::new(domain.clone(), domid, program, ramdisk, splits)
        })
        .collect()
}

/// Names an error number for people.
pub(crate) fn errno_name(errno: Errno) -> String {
    errno.name().to_string()
}
