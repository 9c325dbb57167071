//! From any state to a running controller.
//!
//! Source: NVM Express Base Specification 1.4, section 7.6.1 ("Initialization") and 3.1.5
//! (what may be done with `CC.EN` when).

use crate::admin::{Admin, Unanswered};
use crate::command::{CNS_ACTIVE, CNS_CONTROLLER, CNS_NAMESPACE, Command};
use crate::controller::Controller;
use crate::identify::{ControllerInfo, NOTHING, Unusable, geometry};
use crate::io::IoQueue;
use crate::namespace::Namespace;
use crate::queue::Rings;
use crate::registers::{self as reg, Capabilities};
use crate::status::Status;
use crate::{MOST_NAMESPACES, MOST_QUEUES, Nvme};
use alloc::rc::Rc;
use alloc::vec::Vec;
use core::cell::RefCell;
use core::fmt;
use core::sync::atomic::Ordering::Relaxed;
use domain_api::disk::Geometry;
use domain_api::{Clock, Dma, DmaPage, Errno, Registers};

/// Why a controller could not be started.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StartError {
    /// All registers read as ones.
    Gone,
    /// It has no NVM command set.
    CommandSet,
    /// Its smallest memory page, as a power of two above 4 KiB, is larger than ours.
    PageSize(u32),
    /// Its queue entries are not of 64 and 16 bytes.
    EntrySize,
    /// It did not stop.
    ResetStuck,
    /// It did not become ready.
    NotReady,
    /// It reported a fatal error, or left the bus.
    Fatal,
    /// It did not answer.
    Timeout,
    /// It refused a command that every controller has: its opcode, and the answer.
    Refused(u8, Status),
    /// None of its namespaces can be used; why not the first, if there is one.
    NoNamespace(Option<Unusable>),
    /// No memory for queues.
    Memory(Errno),
    /// No interrupts.
    NoVector,
    /// Bus mastering could not be turned on.
    BusMaster(Errno),
}

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gone => f.write_str("the controller does not answer on the bus"),
            Self::CommandSet => f.write_str("the controller has no NVM command set"),
            Self::PageSize(shift) => {
                write!(f, "the controller wants memory pages of at least {} KiB", 4_u64 << shift)
            }
            Self::EntrySize => f.write_str("the controller wants larger queue entries"),
            Self::ResetStuck => f.write_str("the controller's reset did not end"),
            Self::NotReady => f.write_str("the controller did not become ready"),
            Self::Fatal => f.write_str("the controller reports a fatal error"),
            Self::Timeout => f.write_str("the controller does not answer admin commands"),
            Self::Refused(opcode, status) => {
                write!(f, "the controller refuses admin command {opcode:#04x}: {status}")
            }
            Self::NoNamespace(None) => f.write_str("the controller has no active namespace"),
            Self::NoNamespace(Some(reason)) => {
                write!(f, "the controller has no namespace of use: {reason}")
            }
            Self::Memory(errno) => write!(f, "no memory for queues: {errno:?}"),
            Self::NoVector => f.write_str("the controller has no MSI-X vector"),
            Self::BusMaster(errno) => write!(f, "bus mastering cannot be turned on: {errno:?}"),
        }
    }
}

impl core::error::Error for StartError {}

impl From<Unanswered> for StartError {
    fn from(unanswered: Unanswered) -> Self {
        match unanswered {
            Unanswered::Fatal => Self::Fatal,
            Unanswered::Timeout => Self::Timeout,
        }
    }
}

/// Waits until `done`, at most `limit_ns`.
pub(crate) fn wait(clock: &impl Clock, limit_ns: u64, mut done: impl FnMut() -> bool) -> bool {
    let begin = clock.now_ns();
    loop {
        if done() {
            return true;
        }
        if clock.now_ns().saturating_sub(begin) > limit_ns {
            return done();
        }
        core::hint::spin_loop();
    }
}

impl<R: Registers> Nvme<R> {
    /// Resets the controller behind `registers` and starts it, with interrupts on its vectors
    /// from 0 to `vectors`; more than [`crate::MOST_VECTORS`] are of no use.
    ///
    /// It may take as long as the controller says that it needs, which is up to two minutes.
    ///
    /// Bus mastering should be off: the controller may still have commands of an earlier owner,
    /// and would write into whatever is there now. `master` turns it on; it is called once,
    /// when the controller was reset and has new queues.
    ///
    /// # Errors
    /// See [`StartError`]; the controller is then stopped.
    pub fn start(
        mut registers: R,
        dma: &mut impl Dma,
        clock: &impl Clock,
        vectors: u16,
        master: impl FnOnce() -> Result<(), Errno>,
    ) -> Result<Self, StartError> {
        let capabilities = Capabilities(reg::read64(&registers, reg::CAP));
        if capabilities.0 == u64::MAX {
            return Err(StartError::Gone);
        }
        disable(&mut registers, clock, capabilities)?;
        if !capabilities.has_nvm() {
            return Err(StartError::CommandSet);
        }
        if capabilities.page_shift_min() != 0 {
            return Err(StartError::PageSize(capabilities.page_shift_min()));
        }
        if vectors == 0 {
            return Err(StartError::NoVector);
        }
        let rings = Rings::new(0, capabilities, dma).map_err(StartError::Memory)?;
        let admin = Admin::new(rings, dma.alloc().map_err(StartError::Memory)?);
        let mut bring_up = BringUp { registers, admin, capabilities, clock, dma };
        match bring_up.run(vectors, master) {
            Ok(found) => Ok(bring_up.finish(found)),
            Err(error) => {
                // Whatever is under way may end in memory that is about to be freed.
                let _ = disable(&mut bring_up.registers, clock, capabilities);
                Err(error)
            }
        }
    }
}

/// Ends all activity of the controller.
///
/// Section 3.1.5: `CC.EN` may be cleared only when `CSTS.RDY` is 1, so one that is just being
/// enabled is waited for, unless it failed. `CSTS.CFS` may stay set until it is enabled again.
fn disable<R: Registers>(
    r: &mut R,
    clock: &impl Clock,
    capabilities: Capabilities,
) -> Result<(), StartError> {
    let limit_ns = capabilities.timeout_ns();
    let configuration = r.read(reg::CC);
    if configuration & reg::CC_EN != 0 {
        wait(clock, limit_ns, || r.read(reg::CSTS) & (reg::CSTS_RDY | reg::CSTS_CFS) != 0);
        r.write(reg::CC, configuration & !(reg::CC_EN | reg::CC_SHN));
    }
    let mut status = 0;
    let stopped = wait(clock, limit_ns, || {
        status = r.read(reg::CSTS);
        status & reg::CSTS_RDY == 0 || status == u32::MAX
    });
    match (stopped, status) {
        (_, u32::MAX) => Err(StartError::Gone),
        (true, _) => Ok(()),
        (false, _) => Err(StartError::ResetStuck),
    }
}

/// Enables the controller with pages of 4 KiB and the NVM command set.
fn enable<R: Registers>(
    r: &mut R,
    clock: &impl Clock,
    capabilities: Capabilities,
) -> Result<(), StartError> {
    r.write(reg::CC, reg::CC_EN | reg::CC_IOSQES | reg::CC_IOCQES | 0 << reg::CC_MPS_SHIFT);
    let mut status = 0;
    wait(clock, capabilities.timeout_ns(), || {
        status = r.read(reg::CSTS);
        status & (reg::CSTS_RDY | reg::CSTS_CFS) != 0
    });
    if status & reg::CSTS_CFS != 0 {
        return Err(StartError::Fatal);
    }
    if status & reg::CSTS_RDY == 0 {
        return Err(StartError::NotReady);
    }
    Ok(())
}

/// A controller that is being started.
struct BringUp<'a, R, C, D> {
    registers: R,
    admin: Admin,
    capabilities: Capabilities,
    clock: &'a C,
    dma: &'a mut D,
}

/// What was found and made.
struct Found {
    info: ControllerInfo,
    queues: Vec<IoQueue>,
    namespaces: Vec<(u32, Result<Geometry, Unusable>)>,
}

impl<R: Registers, C: Clock, D: Dma> BringUp<'_, R, C, D> {
    fn run(
        &mut self,
        vectors: u16,
        master: impl FnOnce() -> Result<(), Errno>,
    ) -> Result<Found, StartError> {
        let [submissions, completions] = self.admin.rings().addresses();
        let [commands, entries] = self.admin.rings().sizes().map(|size| u32::from(size - 1));
        reg::write64(&mut self.registers, reg::ASQ, submissions);
        reg::write64(&mut self.registers, reg::ACQ, completions);
        self.registers.write(reg::AQA, entries << 16 | commands);
        master().map_err(StartError::BusMaster)?;
        enable(&mut self.registers, self.clock, self.capabilities)?;
        let (info, ids, pairs) = self.ask_controller()?;
        let (namespaces, queues) = self.ask_namespaces(&info, &ids, pairs, vectors)?;
        self.create_submission_queues(&queues)?;
        if namespaces.iter().all(|(_, geometry)| geometry.is_err()) {
            let first = namespaces.first().and_then(|(_, geometry)| geometry.err());
            return Err(StartError::NoNamespace(first));
        }
        Ok(Found { info, queues, namespaces })
    }

    fn finish(self, found: Found) -> Nvme<R> {
        let Found { info, queues, namespaces } = found;
        let disks = namespaces.len();
        let controller = Controller::new(self.registers, self.admin, queues, disks);
        let depth = controller.depth();
        let controller = Rc::new(RefCell::new(controller));
        let namespaces = (0..)
            .zip(namespaces)
            .map(|(place, (id, geometry))| Namespace {
                controller: controller.clone(),
                place,
                id,
                geometry: Geometry { queue_depth: depth, ..geometry.unwrap_or(NOTHING) },
                unusable: geometry.err(),
            })
            .collect();
        Nvme { controller, info, namespaces }
    }

    fn page(&mut self) -> Result<DmaPage, StartError> {
        self.dma.alloc().map_err(StartError::Memory)
    }

    /// Runs commands; every one must succeed.
    fn command(&mut self, commands: &[Command]) -> Result<Vec<u32>, StartError> {
        let answers = self.admin.run(&mut self.registers, self.clock, commands)?;
        commands
            .iter()
            .zip(answers)
            .map(|(command, answer)| match answer.status.is_success() {
                true => Ok(answer.result),
                false => Err(StartError::Refused(command.opcode, answer.status)),
            })
            .collect()
    }

    /// The controller, its active namespaces, and how many I/O queue pairs it grants.
    fn ask_controller(&mut self) -> Result<(ControllerInfo, Vec<u32>, u16), StartError> {
        let (about, list) = (self.page()?, self.page()?);
        let mut commands = alloc::vec![
            Command::identify(CNS_CONTROLLER, 0, about.bus_address),
            Command::set_queues(MOST_QUEUES),
        ];
        let has_list = self.registers.read(reg::VS) >= reg::VS_1_1;
        if has_list {
            commands.push(Command::identify(CNS_ACTIVE, 0, list.bus_address));
        }
        let results = self.command(&commands)?;
        let granted = (results[1] & 0xffff).min(results[1] >> 16) + 1;
        let info = ControllerInfo::parse(&about.page, self.capabilities);
        if !info.ordinary_entries {
            return Err(StartError::EntrySize);
        }
        let most = usize::from(MOST_NAMESPACES);
        let ids = if has_list {
            let listed = (0..most).map(|n| u32::from_le(list.page.u32(4 * n).load(Relaxed)));
            listed.take_while(|&id| id != 0).collect()
        } else {
            (1..=info.namespaces).take(most).collect()
        };
        let pairs = u16::try_from(granted).unwrap_or(u16::MAX).min(MOST_QUEUES);
        Ok((info, ids, pairs))
    }

    /// The geometries of namespaces, and I/O queues whose completion queues exist.
    #[expect(clippy::type_complexity, reason = "two lists")]
    fn ask_namespaces(
        &mut self,
        info: &ControllerInfo,
        ids: &[u32],
        pairs: u16,
        vectors: u16,
    ) -> Result<(Vec<(u32, Result<Geometry, Unusable>)>, Vec<IoQueue>), StartError> {
        let pages = ids.iter().map(|_| self.page()).collect::<Result<Vec<_>, _>>()?;
        let queues = (1..=pairs)
            .map(|id| {
                let rings = Rings::new(id, self.capabilities, self.dma)?;
                IoQueue::new(rings, self.dma)
            })
            .collect::<Result<Vec<_>, Errno>>()
            .map_err(StartError::Memory)?;
        let create = queues.iter().map(|queue| {
            let rings = &queue.rings;
            let ([_, page], [_, entries]) = (rings.addresses(), rings.sizes());
            Command::create_cq(rings.id(), entries, rings.id() % vectors, page)
        });
        let identify = ids
            .iter()
            .zip(&pages)
            .map(|(&id, page)| Command::identify(CNS_NAMESPACE, id, page.bus_address));
        let commands: Vec<Command> = create.chain(identify).collect();
        let answers = self.admin.run(&mut self.registers, self.clock, &commands)?;
        let (created, described) = answers.split_at(queues.len());
        if let Some(refused) = created.iter().find(|answer| !answer.status.is_success()) {
            return Err(StartError::Refused(crate::command::admin::CREATE_CQ, refused.status));
        }
        let described = ids.iter().zip(&pages).zip(described).map(|((&id, page), answer)| {
            let refused = Unusable::Refused(answer.status);
            let success = answer.status.is_success();
            (id, if success { geometry(&page.page, info) } else { Err(refused) })
        });
        Ok((described.collect(), queues))
    }

    fn create_submission_queues(&mut self, queues: &[IoQueue]) -> Result<(), StartError> {
        let create = queues.iter().map(|queue| {
            let rings = &queue.rings;
            let ([page, _], [entries, _]) = (rings.addresses(), rings.sizes());
            Command::create_sq(rings.id(), entries, page)
        });
        let commands: Vec<Command> = create.collect();
        self.command(&commands).map(drop)
    }
}
