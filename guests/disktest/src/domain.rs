//! The event loop: disks, engines, reports.

extern crate alloc;

use alloc::string::String;
use alloc::vec::Vec;
use disktest::config::{Config, ConfigError, DiskConfig, disk_name};
use disktest::engine::{Engine, Phase, Violation};
use disktest::sector::Owner;
use frontends::blkfront::{self, Blkfront, FrontDisk, GrantPolicy};
use unikernel::domain_api::disk::Disk;
use unikernel::{Domain, XenstoreRing, log, println};
use xenbus::{Client, Errno, Nodes, Store, XenbusState};

/// Where the toolstack asks a guest to end, relative to its home.
const SHUTDOWN: &str = "control/shutdown";
/// While requests wait, so often is looked for answers, which makes pauses measurable.
const LOOK_NS: u64 = 1_000_000;

unikernel::main!(run);

fn run(domain: Domain) {
    let config = Config::parse(domain.config_text())
        .unwrap_or_else(|error| panic!("configuration: {error}"));
    let mut store = Client::new(domain.xenstore().expect("a connection to the store"));
    let test = Test::new(domain, &mut store, &config)
        .unwrap_or_else(|errno| panic!("no disks: {errno:?}"));
    test.run(&mut store, &config);
}

/// A disk under test.
struct Tested {
    name: String,
    config: DiskConfig,
    /// Until it is connected.
    front: Option<Blkfront>,
    running: Option<(Engine, FrontDisk<Domain>)>,
    told_phase: Option<Phase>,
}

struct Test {
    domain: Domain,
    disks: Vec<Tested>,
    report_at_ns: u64,
    asked_to_end: bool,
}

/// What ended the test too early.
enum Failure {
    Violation(Violation),
    Fault(blkfront::Fault),
    State(XenbusState),
    Config(ConfigError),
    Store(Errno),
}

impl core::fmt::Display for Failure {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Violation(violation) => write!(f, "{violation}"),
            Self::Fault(fault) => write!(f, "backend: {fault}"),
            Self::State(state) => write!(f, "the backend closed the disk (state {})", state.0),
            Self::Config(error) => write!(f, "{error}"),
            Self::Store(errno) => write!(f, "xenstore: {errno:?}"),
        }
    }
}

impl Test {
    fn new(
        domain: Domain,
        store: &mut Client<XenstoreRing>,
        config: &Config,
    ) -> Result<Self, Errno> {
        let mut disks = Vec::new();
        for number in blkfront::devices(store, domain.id())? {
            let name = disk_name(number);
            let config = config.for_disk(&name).unwrap_or_else(|error| panic!("{name}: {error}"));
            if !config.used {
                continue;
            }
            let grants =
                if config.persistent { GrantPolicy::Persistent } else { GrantPolicy::PerRequest };
            let shape = blkfront::Config {
                queues: config.queues,
                ring_page_order: config.ring_order,
                indirect_segments: config.indirect,
                grants,
                buffers: config.buffers,
            };
            let front = Blkfront::new(store, domain.id(), number, shape)?;
            let (front, running, told_phase) = (Some(front), None, None);
            disks.push(Tested { name, config, front, running, told_phase });
        }
        if disks.is_empty() {
            return Err(Errno::ENODEV);
        }
        store.watch(SHUTDOWN, SHUTDOWN)?;
        let report_at_ns = domain.now_ns();
        Ok(Self { domain, disks, report_at_ns, asked_to_end: false })
    }

    fn run(mut self, store: &mut Client<XenstoreRing>, config: &Config) {
        loop {
            self.follow_store(store);
            let mut more = false;
            for at in 0..self.disks.len() {
                match self.step(at) {
                    Ok(any) => more |= any,
                    Err(failure) => self.fail(at, &failure),
                }
            }
            if self.disks.iter().all(Tested::is_done) {
                self.end(config.stay);
                return;
            }
            self.report(config.report_ms);
            let deadline_ns = if more { Some(0) } else { self.deadline_ns() };
            // What is pending is found by looking at the rings.
            let _ = self.domain.wait(deadline_ns);
        }
    }

    fn deadline_ns(&self) -> Option<u64> {
        let waiting = self.disks.iter().any(|disk| match &disk.running {
            Some((engine, _)) => engine.in_flight() > 0,
            None => false,
        });
        let look_ns = waiting.then(|| self.domain.now_ns() + LOOK_NS);
        Some(look_ns.map_or(self.report_at_ns, |look_ns| look_ns.min(self.report_at_ns)))
    }

    fn follow_store(&mut self, store: &mut Client<XenstoreRing>) {
        let mut env = self.domain.clone();
        while let Some(event) = store.next_event() {
            if event.token == SHUTDOWN {
                let asked = store.read_string(SHUTDOWN).is_ok_and(|value| !value.is_empty());
                if asked && !self.asked_to_end {
                    self.asked_to_end = true;
                    println!("asked to end: verifying everything");
                }
                continue;
            }
            for at in 0..self.disks.len() {
                let disk = &mut self.disks[at];
                let front = match (&mut disk.front, &mut disk.running) {
                    (Some(front), _) => front,
                    (None, Some((_, running))) => running.front(),
                    (None, None) => continue,
                };
                match front.store_event(&mut env, store, &event) {
                    Ok(_) => {}
                    Err(errno) => self.fail(at, &Failure::Store(errno)),
                }
            }
        }
    }

    /// Goes on with a disk. True: there is more to do at once.
    fn step(&mut self, at: usize) -> Result<bool, Failure> {
        let now_ns = self.domain.now_ns();
        let disk = &mut self.disks[at];
        if let Some(front) = disk.front.take_if(|front| front.is_connected()) {
            disk.start(front, &self.domain)?;
        }
        let Some((engine, front)) = &mut disk.running else { return Ok(false) };
        if self.asked_to_end {
            engine.finish();
        }
        let more = engine.step(front, now_ns).map_err(Failure::Violation)?;
        if let Some(fault) = front.front().fault() {
            return Err(Failure::Fault(fault));
        }
        if !front.front().is_connected() {
            return Err(Failure::State(front.front().backend_state()));
        }
        let phase = engine.phase();
        if disk.told_phase != Some(phase) {
            disk.told_phase = Some(phase);
            log::info!("{}: {phase:?} at request {}", disk.name, engine.made());
        }
        Ok(more)
    }

    fn report(&mut self, report_ms: u64) {
        let now_ns = self.domain.now_ns();
        if now_ns < self.report_at_ns {
            return;
        }
        self.report_at_ns = now_ns + report_ms * 1_000_000;
        self.disks.iter().for_each(|disk| disk.report(""));
    }

    /// Says what is wrong, and stops: whoever looks finds the domain as it was.
    fn fail(&self, at: usize, failure: &Failure) -> ! {
        self.disks.iter().for_each(|disk| disk.report(""));
        println!("VIOLATION {}: {failure}", self.disks[at].name);
        loop {
            let _ = self.domain.wait(None);
        }
    }

    fn end(&self, stay: bool) {
        self.disks.iter().for_each(|disk| disk.report("DONE "));
        if !stay {
            return;
        }
        loop {
            let _ = self.domain.wait(None);
        }
    }
}

impl Tested {
    fn is_done(&self) -> bool {
        self.running.as_ref().is_some_and(|(engine, _)| engine.phase() == Phase::Done)
    }

    fn start(&mut self, front: Blkfront, domain: &Domain) -> Result<(), Failure> {
        let info = *front.info();
        let number = front.device().index;
        let disk = FrontDisk::new(front, domain.clone());
        // Another one for every life of ours.
        let run = domain.tsc() ^ domain.unix_time_ns().unwrap_or(0).rotate_left(24) | 1;
        let owner = Owner { disk: u64::from(number), run };
        let options = self.config.options(disk.geometry(), owner).map_err(Failure::Config)?;
        let p = options.parameters;
        log::info!(
            "{}: {} sectors of {}, {} queues, {} slots, {} parts; testing {}+{}, run {run:#x}",
            self.name,
            info.sectors,
            info.sector_size,
            info.queues,
            info.slots,
            info.max_parts,
            p.area,
            p.area_sectors
        );
        let engine = Engine::new(options, disk.pages().to_vec());
        self.running = Some((engine, disk));
        Ok(())
    }

    fn report(&self, prefix: &str) {
        let Some((engine, _)) = &self.running else {
            return println!("{prefix}disktest: {}: not connected", self.name);
        };
        let stats = engine.stats();
        let pause_us = stats.longest_pause_ns / 1000;
        println!(
            "{prefix}disktest: {}: {} requests, {} sectors verified, {} written, {} pauses, longest pause {}.{:03} ms",
            self.name,
            stats.requests,
            stats.verified,
            stats.written,
            stats.pauses,
            pause_us / 1000,
            pause_us % 1000
        );
    }
}
