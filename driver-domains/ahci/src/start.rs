//! From any state to running disks.
//!
//! Source: AHCI 1.3.1, §10.1.2 (initialization), §10.4.3 (reset of the controller), §10.6.3
//! (hand-over from the firmware); Serial ATA, OOB (a device answers within 10 ms).

use crate::command::Memory;
use crate::disk::{AtaDisk, SLOTS};
use crate::engine::Engine;
use crate::identify::Unusable;
use crate::recovery::identify;
use crate::registers as reg;
use crate::{Ahci, Attached, Port};
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::fmt;
use domain_api::{Clock, Dma, Errno, Registers};

/// Longest reset of the controller (§10.4.3).
const RESET_NS: u64 = 1_000_000_000;
/// How long the firmware may take to let go, and how long when it says that it is busy (§10.6.3).
const HAND_OVER_NS: u64 = 25_000_000;
const HAND_OVER_BUSY_NS: u64 = 2_000_000_000;
/// How long a port without a sign of a device is given.
const DETECT_NS: u64 = 10_000_000;
/// How long a link with a device may take to work.
const LINK_NS: u64 = 1_000_000_000;
/// How long a device may take to be ready: it may have to spin up.
const READY_NS: u64 = 20_000_000_000;
/// How long a ready device may take to identify itself.
const IDENTIFY_NS: u64 = 5_000_000_000;

/// Why a controller could not be started.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StartError {
    /// All registers read as ones.
    Gone,
    /// The reset did not end.
    ResetStuck,
    /// A port did not stop after the reset.
    PortStuck(u32),
    /// No memory for commands.
    Memory(Errno),
    /// The controller takes addresses of 32 bits, and our memory lies above.
    Narrow,
    /// Bus mastering could not be turned on.
    BusMaster(Errno),
}

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gone => f.write_str("the controller does not answer on the bus"),
            Self::ResetStuck => f.write_str("the controller's reset did not end"),
            Self::PortStuck(port) => write!(f, "port {port} does not stop"),
            Self::Memory(errno) => write!(f, "no memory for commands: {errno:?}"),
            Self::Narrow => f.write_str("the controller cannot reach memory above 4 GiB"),
            Self::BusMaster(errno) => write!(f, "bus mastering cannot be turned on: {errno:?}"),
        }
    }
}

impl core::error::Error for StartError {}

/// What the controller can do.
#[derive(Clone, Copy, Debug)]
struct Abilities {
    slots: u32,
    ncq: bool,
    wide: bool,
}

impl<R: Registers + Clone, C: Clock + Clone> Ahci<R, C> {
    /// Resets the controller behind `registers`, `bytes` long, and starts every disk that it has.
    ///
    /// Bus mastering should be off: the controller may still have the memory of an earlier owner.
    /// `master` turns it on; it is called once, when the controller has been reset.
    ///
    /// A disk that has to spin up is waited for, 20 s at most.
    ///
    /// # Errors
    /// See [`StartError`]. A device that does not work is none: its port is empty.
    pub fn start(
        mut registers: R,
        bytes: u32,
        dma: &mut impl Dma,
        clock: &C,
        master: impl FnOnce() -> Result<(), Errno>,
    ) -> Result<Self, StartError> {
        let implemented = implemented(&registers, bytes)?;
        let known = Known::collect(&mut registers, clock, implemented);
        reset(&mut registers, clock)?;
        let cap = registers.read(reg::CAP);
        let can = Abilities {
            slots: (cap >> reg::CAP_NCS_SHIFT & 0x1f) + 1,
            ncq: cap & reg::CAP_SNCQ != 0,
            wide: cap & reg::CAP_S64A != 0,
        };
        let mut engines = power_up(&registers, clock, implemented)?;
        known.wait_for_links(clock, &engines);
        master().map_err(StartError::BusMaster)?;
        let mut ports: Vec<Port<R, C>> = Vec::new();
        for number in 0..u32::BITS - implemented.leading_zeros() {
            let engine = engines[number as usize].take();
            let attached = match engine {
                Some(engine) if engine.link_is_up() => attach(engine, dma, can)?,
                _ => Attached::None,
            };
            ports.push(Port::new(number, attached));
        }
        registers.write(reg::IS, u32::MAX);
        registers.write(reg::GHC, reg::GHC_AE | reg::GHC_IE);
        let last = ports.iter().rposition(|port| port.disk().is_some());
        let served = last.map_or(0, |last| last + 1);
        Ok(Self { registers, ports, served, armed: true })
    }
}

/// The ports that there are, as far as their registers lie in the BAR.
fn implemented(registers: &impl Registers, bytes: u32) -> Result<u32, StartError> {
    if registers.read(reg::CAP) == u32::MAX {
        return Err(StartError::Gone);
    }
    let fit = bytes.saturating_sub(reg::PORTS) / reg::PORT_BYTES;
    let mask = if fit >= reg::MAX_PORTS { u32::MAX } else { (1 << fit) - 1 };
    Ok(registers.read(reg::PI) & mask)
}

/// What is known of the ports before the reset.
///
/// A restart must not wait for devices that are not there. Ports whose link was trained before the
/// reset tell what is on them, so that only those are waited for; when nothing is known, as after
/// power-on, all ports have their time.
#[derive(Clone, Copy, Debug)]
struct Known {
    present: u32,
    trained: bool,
}

impl Known {
    fn collect<R: Registers>(registers: &mut R, clock: &impl Clock, implemented: u32) -> Self {
        let trained = registers.read(reg::GHC) & reg::GHC_AE != 0;
        take_from_firmware(registers, clock);
        registers.write(reg::GHC, reg::GHC_AE);
        let mut known = Self { present: 0, trained };
        for port in (0..reg::MAX_PORTS).filter(|port| implemented >> port & 1 == 1) {
            let base = reg::PORTS + port * reg::PORT_BYTES;
            let status = registers.read(base + reg::SSTS) & reg::DET_MASK;
            known.present |= u32::from(status != reg::DET_NONE) << port;
            known.trained &= registers.read(base + reg::CMD) & reg::CMD_SUD != 0;
        }
        known.trained &= known.present != 0;
        known
    }

    fn wait_for_links<R: Registers, C: Clock>(self, clock: &C, engines: &[Option<Engine<R, C>>]) {
        let begin = clock.now_ns();
        loop {
            let waited_ns = clock.now_ns().saturating_sub(begin);
            let is_pending = |(port, engine): (u32, &Option<Engine<R, C>>)| {
                engine.as_ref().is_some_and(|engine| match engine.read(reg::SSTS) & reg::DET_MASK {
                    reg::DET_UP => false,
                    reg::DET_NONE if self.present >> port & 1 == 0 => {
                        !self.trained && waited_ns <= DETECT_NS
                    }
                    _ => waited_ns <= LINK_NS,
                })
            };
            if !(0..).zip(engines).any(is_pending) {
                return;
            }
            core::hint::spin_loop();
        }
    }
}

/// Waits until `done`, at most `limit_ns`.
fn wait(clock: &impl Clock, limit_ns: u64, mut done: impl FnMut() -> bool) -> bool {
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

/// Makes the firmware let go of the controller. If it does not, it is taken nevertheless: the
/// reset that follows takes it from anybody.
fn take_from_firmware<R: Registers>(r: &mut R, clock: &impl Clock) {
    if r.read(reg::CAP2) & reg::CAP2_BOH == 0 {
        return;
    }
    let control = r.read(reg::BOHC);
    if control & reg::BOHC_BOS == 0 {
        return;
    }
    r.write(reg::BOHC, control | reg::BOHC_OOS);
    let is_free = || r.read(reg::BOHC) & reg::BOHC_BOS == 0;
    if !wait(clock, HAND_OVER_NS, is_free) && r.read(reg::BOHC) & reg::BOHC_BB != 0 {
        wait(clock, HAND_OVER_BUSY_NS, is_free);
    }
}

/// Resets the controller, which ends all its activity. What the firmware wrote once into the
/// capabilities and the ports implemented is put back: some controllers lose it.
fn reset<R: Registers>(r: &mut R, clock: &impl Clock) -> Result<(), StartError> {
    let kept = [reg::CAP, reg::PI].map(|offset| (offset, r.read(offset)));
    r.write(reg::GHC, reg::GHC_AE | reg::GHC_HR);
    if !wait(clock, RESET_NS, || r.read(reg::GHC) & reg::GHC_HR == 0) {
        return Err(StartError::ResetStuck);
    }
    r.write(reg::GHC, reg::GHC_AE);
    for (offset, value) in kept {
        if r.read(offset) != value {
            r.write(offset, value);
        }
    }
    Ok(())
}

/// Stops all ports and powers what is on them. An engine for each, by number.
fn power_up<R: Registers + Clone, C: Clock + Clone>(
    registers: &R,
    clock: &C,
    implemented: u32,
) -> Result<Vec<Option<Engine<R, C>>>, StartError> {
    let mut engines = Vec::new();
    for port in 0..reg::MAX_PORTS {
        if implemented >> port & 1 == 0 {
            engines.push(None);
            continue;
        }
        let mut engine = Engine::new(registers.clone(), clock.clone(), port);
        engine.stop_all().map_err(|_| StartError::PortStuck(port))?;
        engine.power_up();
        engines.push(Some(engine));
    }
    Ok(engines)
}

/// Starts the device on a port, if it is a disk that works.
fn attach<R: Registers, C: Clock>(
    mut engine: Engine<R, C>,
    dma: &mut impl Dma,
    can: Abilities,
) -> Result<Attached<R, C>, StartError> {
    let memory = Memory::new(dma, can.slots.min(SLOTS)).map_err(StartError::Memory)?;
    if !can.wide && memory.last_address() + 4096 > 1 << 32 {
        return Err(StartError::Narrow);
    }
    engine.receive(&memory);
    match start_disk(&mut engine, &memory) {
        Ok(identity) => {
            engine.clear_causes();
            engine.enable_interrupts();
            let hba = (can.slots, can.ncq, can.wide);
            Ok(Attached::Disk(Box::new(AtaDisk::new(engine, memory, identity, hba))))
        }
        Err(why) => {
            let port = engine.port();
            // The controller must be done with `memory`, which ends here.
            engine.stop_all().map_err(|_| StartError::PortStuck(port))?;
            Ok(Attached::Ignored(why))
        }
    }
}

fn start_disk<R: Registers, C: Clock>(
    engine: &mut Engine<R, C>,
    memory: &Memory,
) -> Result<crate::identify::Identity, Unusable> {
    engine.wait(READY_NS, Engine::is_ready).map_err(|_| Unusable::NotReady)?;
    let signature = engine.read(reg::SIG);
    if signature != reg::SIG_ATA {
        return Err(Unusable::Signature(signature));
    }
    engine.clear_causes();
    engine.start();
    identify(engine, memory, IDENTIFY_NS)
}
