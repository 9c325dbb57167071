//! Answering `axl`.

use crate::control::{Control, Tag, errno_name};
use crate::domain::Phase;
use crate::hypervisor::{Hypervisor, until_done};
use crate::names::nearest;
use crate::store::Op;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use axolotl_abi::control::{
    CONSOLE_OF_CORE, DeathRecord, DomainInfo, INFO_DMA_TRUSTED, STATE_BLOCKED, STATE_BUILDING,
    STATE_DEAD, STATE_DYING, STATE_PAUSED,
};
use axolotl_abi::protocol::{
    self, DomainLine, DomainState, Failure, FrameError, FromControl, GuestExits, Info, MAX_CONSOLE,
    MAX_TEXT, Request, Response, ToControl, Why,
};
use axolotl_abi::system::{Dma, Role};
use xen_abi::{DomainId, Errno};
use xenbus::Transport;
use xenbus::device::home;

/// The control domain's own name and id.
const OWN_NAME: &str = "control";
const OWN_ID: DomainId = DomainId(0);
/// Most bytes that wait for a host that does not read.
const MAX_OUTGOING: usize = 256 * 1024;
/// Most requests at a time that wait for the store.
const MAX_NODE_REQUESTS: usize = 32;
/// Least memory that a guest is asked to live with: what a system file gives it at least.
const LEAST_MEMORY_MIB: u32 = 32;
/// Most bytes of a node's value, and of the names of its children, in a response.
const MAX_NODE: usize = 6000;

impl<H: Hypervisor, T: Transport> Control<'_, H, T> {
    /// Takes a frame from `axl`. A damaged one is dropped: its sender asks again or gives up.
    pub(crate) fn request(&mut self, frame: Result<ToControl, FrameError>) {
        match frame {
            Ok(ToControl { id, request }) => {
                if let Some(response) = self.answer(id, request) {
                    self.respond(id, response);
                }
            }
            Err(FrameError::NotUnderstood { id: Some(id) }) => {
                self.respond(id, Response::Failed(Failure::NotUnderstood));
            }
            Err(_) => {}
        }
    }

    fn respond(&mut self, id: u32, response: Response) {
        let too_large = || {
            let response = Response::Failed(Failure::TooLarge);
            protocol::encode(&FromControl { id, response }).unwrap_or_default()
        };
        let frame = protocol::encode(&FromControl { id, response }).unwrap_or_else(|_| too_large());
        if self.outgoing.len() + frame.len() <= MAX_OUTGOING {
            self.outgoing.extend(frame);
        }
    }

    /// The response, or `None` when it comes later.
    fn answer(&mut self, id: u32, request: Request) -> Option<Response> {
        let result = match request {
            Request::Hello { .. } => {
                Ok(Response::Hello { version: protocol::VERSION, system: self.system.clone() })
            }
            Request::List => Ok(Response::List(self.list())),
            Request::Info => self.info(),
            Request::Why(name) => self.why(&name),
            Request::ConsoleRead { name, position } => self.console(&name, position),
            Request::ConsoleWrite { name, bytes } => self.type_on(&name, &bytes),
            Request::Dmesg { position } => self.console_of(CONSOLE_OF_CORE, position),
            Request::XenstoreLs(path) => return self.ask_store(id, path),
            Request::Crash(name) => self.crash(&name),
            Request::Restart(name) => self.restart_by_hand(&name),
            Request::Pause(name) => self.pause(&name),
            Request::Unpause(name) => self.unpause(&name),
            Request::Destroy(name) => self.destroy(&name),
            Request::Shutdown { name, reboot } => match self.shutdown(id, &name, reboot) {
                Ok(()) => return None,
                Err(failure) => Err(failure),
            },
            Request::SetMemory { name, mib } => match self.set_memory(id, &name, mib) {
                Ok(()) => return None,
                Err(failure) => Err(failure),
            },
        };
        Some(result.unwrap_or_else(Response::Failed))
    }

    // ---- looking ----

    fn list(&mut self) -> Vec<DomainLine> {
        let now = self.hv.now_ns();
        let own = self.hv.info(OWN_ID).ok();
        let line = DomainLine {
            name: OWN_NAME.to_string(),
            domid: OWN_ID.0,
            incarnation: own.map_or(1, |info| info.incarnation),
            state: DomainState::Running,
            role: Role::Control,
            memory_bytes: own.map_or(0, |info| u64::from(info.pages) * 4096),
            uptime_ms: own.map_or(0, |info| uptime_ms(&info, now)),
            cpu_us: own.map_or(0, |info| info.cpu_ns / 1000),
            restarts: 0,
            held: None,
        };
        let mut lines = Vec::from([line]);
        for at in 0..self.domains.len() {
            if self.domains[at].phase != Phase::Gone {
                lines.push(self.line(at, now));
            }
        }
        lines.sort_by_key(|line| line.domid);
        lines
    }

    fn line(&mut self, at: usize, now: u64) -> DomainLine {
        let domid = self.domains[at].domid;
        let info = self.hv.info(domid).ok().filter(|info| info.domid == domid);
        let managed = &self.domains[at];
        let state = state_of(&managed.phase, info.as_ref(), managed.restarts);
        let is_up = managed.phase == Phase::Live && state != DomainState::Restarting;
        DomainLine {
            name: managed.domain.name.clone(),
            domid: domid.0,
            incarnation: info.map_or(0, |info| info.incarnation),
            state,
            role: managed.domain.role,
            memory_bytes: info.map_or(0, |info| u64::from(info.pages) * 4096),
            uptime_ms: info.filter(|_| is_up).map_or(0, |info| uptime_ms(&info, now)),
            cpu_us: info.map_or(0, |info| info.cpu_ns / 1000),
            restarts: managed.restarts,
            held: held(&managed.phase),
        }
    }

    fn info(&mut self) -> Result<Response, Failure> {
        let physical = self.hv.physical().map_err(core)?;
        let mut dma_trusted = Vec::new();
        for managed in &self.domains {
            let domid = managed.domid;
            let known = self
                .hv
                .info(domid)
                .is_ok_and(|info| info.domid == domid && info.flags & INFO_DMA_TRUSTED != 0);
            let devices = managed.domain.devices.iter();
            dma_trusted.extend(
                devices
                    .filter(|device| known || device.dma == Dma::Trusted)
                    .map(|device| (device.bdf, managed.domain.name.clone())),
            );
        }
        Ok(Response::Info(Info {
            system: self.system.clone(),
            version: env!("CARGO_PKG_VERSION").to_string(),
            control_interface: physical.version,
            cpus: physical.cpus,
            memory_bytes: physical.total_pages.saturating_mul(4096),
            free_bytes: physical.free_pages.saturating_mul(4096),
            core_bytes: physical.core_pages.saturating_mul(4096),
            uptime_ms: self.hv.now_ns() / 1_000_000,
            tsc_khz: physical.tsc_khz,
            started_after_us: self.started_after_ns.unwrap_or(0) / 1000,
            dma_trusted,
            guests: self.guest_exits(),
        }))
    }

    /// What the core counts of guests with kernels of their own.
    fn guest_exits(&mut self) -> Vec<GuestExits> {
        let mut guests = Vec::new();
        for managed in self.domains.iter().filter(|managed| managed.domain.kernel.is_some()) {
            if let Ok(counts) = self.hv.exits(managed.domid) {
                guests.push(GuestExits {
                    name: managed.domain.name.clone(),
                    exits: counts.exits.to_vec(),
                    unlisted: counts.unlisted,
                    last_unlisted: counts.last_unlisted,
                });
            }
        }
        guests
    }

    fn why(&mut self, name: &str) -> Result<Response, Failure> {
        if name == OWN_NAME {
            return Err(bad_state("control has not died: it answers"));
        }
        let at = self.lookup(name)?;
        let death = match self.hv.death(self.domains[at].domid) {
            Ok(death) => death,
            Err(Errno::ENOENT | Errno::ENODATA) => DeathRecord { incarnation: 0, ..NO_DEATH },
            Err(errno) => return Err(core(errno)),
        };
        if death.incarnation == 0 {
            return Err(bad_state(&format!("{name} has not died")));
        }
        let managed = &self.domains[at];
        let backtrace = death.backtrace.into_iter().take_while(|address| *address != 0);
        Ok(Response::Why(Why {
            name: name.to_string(),
            incarnation: death.incarnation,
            cause: death.cause,
            detail: death.detail,
            vector: death.vector,
            error: death.error,
            address: death.address,
            time_ns: death.time_ns,
            lived_ns: death.lived_ns,
            restarted_ns: death.restarted_ns,
            registers: death.registers,
            rip: death.rip,
            rflags: death.rflags,
            backtrace: backtrace.collect(),
            console_tail: managed.tail_at_death.clone(),
            restarts: managed.restarts,
            held: held(&managed.phase),
        }))
    }

    fn console(&mut self, name: &str, position: u64) -> Result<Response, Failure> {
        if name == OWN_NAME {
            let oldest = self.own_log_end - self.own_log.len() as u64;
            let start = position.clamp(oldest, self.own_log_end);
            let skip = usize::try_from(start - oldest).unwrap_or(usize::MAX);
            let bytes = self.own_log.iter().skip(skip).take(MAX_CONSOLE).copied().collect();
            return Ok(Response::Console { start, bytes });
        }
        let at = self.lookup(name)?;
        let managed = &self.domains[at];
        if managed.domain.kernel.is_some() {
            let (start, bytes) = managed.console.part(position, MAX_CONSOLE);
            return Ok(Response::Console { start, bytes });
        }
        self.console_of(managed.domid, position)
    }

    fn type_on(&mut self, name: &str, bytes: &[u8]) -> Result<Response, Failure> {
        /// Most bytes of one request.
        const MOST: usize = 256;
        let at = self.lookup(name)?;
        let managed = &self.domains[at];
        let Some(port) = managed.console_port else {
            return Err(bad_state("its console cannot be typed on"));
        };
        if bytes.len() > MOST {
            return Err(Failure::TooLong);
        }
        match self.hv.console_type(managed.domid, port, bytes) {
            Ok(true) => Ok(Response::Done),
            Ok(false) => Err(Failure::Busy),
            Err(errno) => Err(core(errno)),
        }
    }

    fn console_of(&mut self, domid: DomainId, position: u64) -> Result<Response, Failure> {
        let mut bytes = alloc::vec![0; MAX_CONSOLE];
        let mut end = position;
        let len = self.hv.console_read(domid, &mut end, &mut bytes).map_err(core)?;
        bytes.truncate(len);
        Ok(Response::Console { start: end.saturating_sub(bytes.len() as u64), bytes })
    }

    fn ask_store(&mut self, id: u32, path: String) -> Option<Response> {
        if path.len() > MAX_TEXT {
            return Some(Response::Failed(Failure::TooLong));
        }
        if self.node_requests >= MAX_NODE_REQUESTS {
            return Some(Response::Failed(Failure::Busy));
        }
        let unfit = |c: char| !(c.is_ascii_alphanumeric() || "-/_@".contains(c));
        if !path.starts_with('/') || path.contains(unfit) {
            return Some(Response::Failed(Failure::Store { name: "EINVAL".to_string() }));
        }
        self.node_requests += 1;
        let ops = [Op::Read(path.clone()), Op::Directory(path.clone()), Op::GetPermissions(path)];
        self.store.at_once(Tag::Node(id), ops.into());
        self.store.pump();
        None
    }

    /// The store answered a request for a node.
    pub(crate) fn node_answered(&mut self, id: u32, result: Result<Vec<Vec<u8>>, Errno>) {
        self.node_requests = self.node_requests.saturating_sub(1);
        let response = match result.as_deref() {
            Ok([value, children, perms]) if value.len() + children.len() <= MAX_NODE => {
                Response::Node {
                    value: value.clone(),
                    children: strings(children),
                    perms: strings(perms),
                }
            }
            Ok(_) => Response::Failed(Failure::TooLarge),
            Err(errno) => Response::Failed(Failure::Store { name: errno_name(*errno) }),
        };
        self.respond(id, response);
    }

    // ---- acting ----

    fn crash(&mut self, name: &str) -> Result<Response, Failure> {
        let at = self.lookup_live(name)?;
        let domid = self.domains[at].domid;
        self.hv.crash(domid).map_err(core)?;
        Ok(Response::Done)
    }

    fn restart_by_hand(&mut self, name: &str) -> Result<Response, Failure> {
        let at = self.lookup_other(name)?;
        if self.domains[at].is_store() {
            return Err(bad_state("the store cannot be restarted: its tree would be lost"));
        }
        self.domains[at].history.forget();
        match &self.domains[at].phase {
            Phase::Gone => self.build_again(at),
            Phase::Live | Phase::Delayed(_) | Phase::Ended => {
                self.end_console(at);
                self.restart(at);
            }
            Phase::Held(_) => {
                let domid = self.domains[at].domid;
                // One that could not be built is not in the core.
                match self.hv.info(domid) {
                    Ok(info) if info.domid == domid => self.restart(at),
                    _ => self.build_again(at),
                }
            }
            Phase::Starting => return Err(bad_state(&format!("{name} is being started"))),
            Phase::Removing | Phase::Destroying => {
                return Err(bad_state(&format!("{name} is being destroyed")));
            }
        }
        match &self.domains[at].phase {
            Phase::Held(why) => Err(bad_state(&format!("{name} {why}"))),
            _ => Ok(Response::Done),
        }
    }

    fn pause(&mut self, name: &str) -> Result<Response, Failure> {
        let at = self.lookup_live(name)?;
        if self.domains[at].is_store() {
            return Err(bad_state("the store cannot be paused: all others need it"));
        }
        let domid = self.domains[at].domid;
        until_done(|| self.hv.pause(domid)).map_err(core)?;
        Ok(Response::Done)
    }

    fn unpause(&mut self, name: &str) -> Result<Response, Failure> {
        let at = self.lookup_live(name)?;
        let domid = self.domains[at].domid;
        if self.hv.info(domid).map_err(core)?.state != STATE_PAUSED {
            return Err(bad_state(&format!("{name} is not paused")));
        }
        self.hv.unpause(domid).map_err(core)?;
        Ok(Response::Done)
    }

    fn destroy(&mut self, name: &str) -> Result<Response, Failure> {
        let at = self.lookup_other(name)?;
        if self.domains[at].is_store() {
            return Err(bad_state("the store cannot be destroyed: all others need it"));
        }
        match self.domains[at].phase {
            Phase::Removing | Phase::Destroying | Phase::Gone => {
                return Err(bad_state(&format!("{name} is destroyed already")));
            }
            _ => self.remove(at),
        }
        Ok(Response::Done)
    }

    /// Asks a guest to end, by the node at which it looks; the answer comes with the store's.
    fn shutdown(&mut self, id: u32, name: &str, reboot: bool) -> Result<(), Failure> {
        let at = self.lookup_live(name)?;
        let managed = &self.domains[at];
        if managed.domain.role != Role::Guest {
            return Err(bad_state(&format!("{name} is no guest: it serves others until it dies")));
        }
        let path = format!("{}/control/shutdown", home(managed.domid));
        self.ask_guest(id, path, if reboot { "reboot" } else { "poweroff" })
    }

    /// Asks a guest to change how much memory it uses, by the node at which its balloon looks.
    fn set_memory(&mut self, id: u32, name: &str, mib: u32) -> Result<(), Failure> {
        let at = self.lookup_live(name)?;
        let managed = &self.domains[at];
        if managed.domain.kernel.is_none() {
            return Err(bad_state(&format!("{name} has no kernel of its own to ask")));
        }
        let most = managed.domain.memory_pages / 256;
        if !(LEAST_MEMORY_MIB..=most).contains(&mib) {
            let message = format!("{name} can have {LEAST_MEMORY_MIB} to {most} MiB");
            return Err(bad_state(&message));
        }
        let path = format!("{}/memory/target", home(managed.domid));
        self.ask_guest(id, path, &(mib * 1024).to_string())
    }

    fn ask_guest(&mut self, id: u32, path: String, word: &str) -> Result<(), Failure> {
        if self.node_requests >= MAX_NODE_REQUESTS {
            return Err(Failure::Busy);
        }
        self.node_requests += 1;
        self.store.at_once(Tag::Asked(id), [Op::Write(path, word.into())].into());
        self.store.pump();
        Ok(())
    }

    /// The store has what a guest is asked for.
    pub(crate) fn asked(&mut self, id: u32, result: Result<Vec<Vec<u8>>, Errno>) {
        self.node_requests = self.node_requests.saturating_sub(1);
        let response = match result {
            Ok(_) => Response::Done,
            Err(errno) => Response::Failed(Failure::Store { name: errno_name(errno) }),
        };
        self.respond(id, response);
    }

    // ---- names ----

    fn lookup(&self, name: &str) -> Result<usize, Failure> {
        if name.len() > MAX_TEXT {
            return Err(Failure::TooLong);
        }
        self.find(name).ok_or_else(|| {
            let known = self.domains.iter().map(|managed| managed.domain.name.as_str());
            let near = nearest(name, known.chain([OWN_NAME]));
            Failure::UnknownName { name: name.to_string(), nearest: near.map(str::to_string) }
        })
    }

    /// A domain that may be acted upon.
    fn lookup_other(&self, name: &str) -> Result<usize, Failure> {
        if name == OWN_NAME {
            return Err(bad_state("control cannot do that to itself"));
        }
        self.lookup(name)
    }

    /// One that has not died.
    fn lookup_live(&self, name: &str) -> Result<usize, Failure> {
        let at = self.lookup_other(name)?;
        match &self.domains[at].phase {
            Phase::Live => Ok(at),
            Phase::Starting => Err(bad_state(&format!("{name} is being started"))),
            Phase::Delayed(_) => Err(bad_state(&format!("{name} is about to be restarted"))),
            Phase::Held(why) => Err(bad_state(&format!("{name} is held: {why}"))),
            Phase::Ended => Err(bad_state(&format!("{name} is dead"))),
            _ => Err(bad_state(&format!("{name} is destroyed"))),
        }
    }
}

const NO_DEATH: DeathRecord = DeathRecord {
    incarnation: 0,
    cause: 0,
    detail: 0,
    vector: 0,
    error: 0,
    address: 0,
    time_ns: 0,
    lived_ns: 0,
    restarted_ns: 0,
    registers: [0; 16],
    rip: 0,
    rflags: 0,
    backtrace: [0; 16],
};

fn core(errno: Errno) -> Failure {
    Failure::Core { errno: errno.0, name: errno_name(errno) }
}

fn bad_state(message: &str) -> Failure {
    Failure::BadState { message: message.to_string() }
}

fn held(phase: &Phase) -> Option<String> {
    match phase {
        Phase::Held(why) => Some(why.clone()),
        _ => None,
    }
}

fn state_of(phase: &Phase, info: Option<&DomainInfo>, restarts: u32) -> DomainState {
    match (phase, info.map(|info| info.state)) {
        (Phase::Starting, _) if restarts > 0 => DomainState::Restarting,
        (Phase::Starting, _) => DomainState::Building,
        (Phase::Delayed(_), _) => DomainState::Restarting,
        (Phase::Held(_), _) => DomainState::Held,
        (Phase::Ended, _) => DomainState::Dead,
        (Phase::Removing | Phase::Destroying | Phase::Gone, _) => DomainState::Dying,
        // It died a moment ago.
        (Phase::Live, Some(STATE_DEAD) | None) => DomainState::Restarting,
        (Phase::Live, Some(STATE_BLOCKED)) => DomainState::Blocked,
        (Phase::Live, Some(STATE_PAUSED)) => DomainState::Paused,
        (Phase::Live, Some(STATE_DYING)) => DomainState::Dying,
        (Phase::Live, Some(STATE_BUILDING)) => DomainState::Building,
        (Phase::Live, Some(_)) => DomainState::Running,
    }
}

fn uptime_ms(info: &DomainInfo, now: u64) -> u64 {
    match info.started_ns {
        0 if info.domid != OWN_ID => 0,
        started => now.saturating_sub(started) / 1_000_000,
    }
}

/// NUL-terminated strings of a reply. What is not UTF-8 is shown as far as it is.
fn strings(payload: &[u8]) -> Vec<String> {
    let parts = payload.split(|byte| *byte == 0).filter(|part| !part.is_empty());
    parts.map(|part| String::from_utf8_lossy(part).into_owned()).collect()
}
