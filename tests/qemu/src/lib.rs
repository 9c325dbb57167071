//! A harness for tests that boot a whole system in QEMU.
//!
//! `cargo xtask test` builds the systems, sets what this crate reads from the environment, and runs the tests
//! one after the other with `--ignored`. Each test owns its machine: it ends with the test, however the test
//! ends, and by a hard time limit if the test hangs. What the machine's console showed is left
//! under `target/qemu-logs/` when a test fails.

#![forbid(unsafe_code)]

pub mod load;

use axolotl_abi::protocol::DomainState;
use serde_json::Value;
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use xtask::console::{Colour, Line, show};
use xtask::disks::Place;
use xtask::guest_shell::{self, Shell};
use xtask::http::{self, Download};
use xtask::machine::{Machine, wait_web};
use xtask::platform::End;
use xtask::qemu::{Options, Ports};
use xtask::{build, platform, project};

/// How long a system may take to its first web page. Emulation on a busy machine is slow.
pub const BOOT: Duration = Duration::from_secs(90);
/// How long the restart of a domain may take.
const RESTART: Duration = Duration::from_secs(20);
/// How long one `axl` command may take.
const AXL: Duration = Duration::from_secs(20);

/// A booted system.
pub struct Platform {
    machine: Machine,
    log: Arc<Log>,
}

impl Platform {
    /// Boots `systems/<name>.toml` as it is.
    #[must_use]
    pub fn boot(name: &str) -> Self {
        Self::boot_with(name, |options| options)
    }

    /// Boots it with other options.
    #[must_use]
    pub fn boot_with(name: &str, change: impl FnOnce(Options) -> Options) -> Self {
        let file = project::root().join("systems").join(name).with_extension("toml");
        Self::boot_built(&build::locate(&file).expect("`cargo xtask test` has built it"), change)
    }

    /// Boots a system file made for one test, with `text` in it.
    #[must_use]
    pub fn boot_text(name: &str, text: &str) -> Self {
        let dir = project::target_dir().join("qemu-tests");
        std::fs::create_dir_all(&dir).expect("target is writable");
        let file = dir.join(name).with_extension("toml");
        std::fs::write(&file, text).expect("target is writable");
        Self::boot_built(&build::build(&file).expect("a valid system"), |options| options)
    }

    /// Boots what a test has put together itself.
    #[must_use]
    pub fn boot_built(built: &build::Built, change: impl FnOnce(Options) -> Options) -> Self {
        let log = Arc::new(Log::new());
        let disks = project::target_dir().join("qemu-tests").join(&log.name);
        let options =
            Options { ports: Ports::Free, disks: Place::Fresh(disks), ..Options::default() };
        let options = change(options);
        let sink = Arc::clone(&log);
        let machine = Machine::start(built, &options, move |line| sink.add(line));
        Self { machine: machine.unwrap_or_else(|error| panic!("{error:?}")), log }
    }

    /// Waits until the guest behind the network card `nic` answers, and returns its address.
    #[must_use]
    pub fn web(&self, nic: usize) -> SocketAddr {
        let server = self.machine.web(nic).expect("the system file forwards port 80");
        let panicked = || self.log.panicked().is_some();
        if let Err(error) = wait_web(server, BOOT, panicked) {
            panic!("{error}; core: {:?}", self.log.panicked());
        }
        server
    }

    /// A shell in the guest behind the network card `nic`, once it answers.
    #[must_use]
    pub fn shell(&self, nic: usize, limit: Duration) -> Shell {
        let mut forwards = self.machine.forwards.iter();
        let found = forwards.find(|it| it.nic == nic && it.guest_port == guest_shell::PORT);
        let address = found.expect("the system file forwards the shell's port").host;
        Shell::connect(SocketAddr::V4(address), limit).unwrap_or_else(|error| panic!("{error}"))
    }

    /// A shell in the guest with this address, once it answers.
    #[must_use]
    pub fn shell_at(&self, guest: Ipv4Addr, limit: Duration) -> Shell {
        let mut forwards = self.machine.forwards.iter();
        let port = guest_shell::PORT;
        let found = forwards.find(|it| it.guest == Some(guest) && it.guest_port == port);
        let address = found.expect("the system file forwards the shell's port").host;
        Shell::connect(SocketAddr::V4(address), limit).unwrap_or_else(|error| panic!("{error}"))
    }

    /// Runs `axl` with these arguments against this system.
    #[must_use]
    pub fn axl(&self, arguments: &[&str]) -> Output {
        axl(arguments)
    }

    /// The JSON that an `axl` command prints, which must succeed.
    #[must_use]
    pub fn axl_json(&self, arguments: &[&str]) -> Value {
        let mut all = arguments.to_vec();
        all.push("--json");
        let output = self.axl(&all);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "axl {all:?}: {errors}");
        serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| panic!("axl {all:?} printed no JSON: {error}"))
    }

    /// The domains of `axl list --json`.
    #[must_use]
    pub fn domains(&self) -> Vec<Listed> {
        let list = self.axl_json(&["list"]);
        list.as_array().expect("an array").iter().map(Listed::from_json).collect()
    }

    /// The incarnation of a domain.
    #[must_use]
    pub fn incarnation(&self, name: &str) -> u64 {
        let domains = self.domains();
        let found = domains.iter().find(|domain| domain.name == name);
        found.unwrap_or_else(|| panic!("no domain `{name}`")).incarnation
    }

    /// Crashes a domain, and waits until it is in its next incarnation.
    pub fn crash(&self, name: &str) {
        let before = self.incarnation(name);
        let output = self.axl(&["crash", name]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        self.wait_for(&format!("the next incarnation of {name}"), Duration::from_secs(20), || {
            let listed = self.domains().into_iter().find(|domain| domain.name == name)?;
            (listed.incarnation > before && listed.is_alive()).then_some(())
        });
    }

    /// Kills a domain as fast as can be, and waits until its next incarnation runs.
    pub fn kill(&self, name: &str) {
        self.end(name, End::Crash);
    }

    /// Ends a domain's incarnation as fast as can be, and waits until the next one runs.
    pub fn end(&self, name: &str, how: End) {
        let mux = &self.machine.mux;
        let line = || {
            let lines = platform::list(mux).unwrap_or_else(|error| panic!("{error:?}"));
            let found = lines.into_iter().find(|line| line.name == name);
            found.unwrap_or_else(|| panic!("no domain `{name}`"))
        };
        let before = line().incarnation;
        platform::end(mux, name, how).unwrap_or_else(|error| panic!("{error:?}"));
        let deadline = Instant::now() + RESTART;
        loop {
            let now = line();
            let lives = matches!(now.state, DomainState::Running | DomainState::Blocked);
            if lives && now.incarnation > before {
                return;
            }
            assert!(Instant::now() < deadline, "{name} is not restarted: {now:?}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Ends the machine, and returns the files of its disks in the order of the system file.
    #[must_use]
    pub fn into_disks(self) -> Vec<PathBuf> {
        self.machine.disks.clone()
    }

    /// Polls until `probe` has an answer; fails the test when it takes longer than `limit`.
    pub fn wait_for<T>(
        &self,
        what: &str,
        limit: Duration,
        mut probe: impl FnMut() -> Option<T>,
    ) -> T {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(found) = probe() {
                return found;
            }
            assert!(self.log.panicked().is_none(), "the core stopped: {:?}", self.log.panicked());
            assert!(Instant::now() < deadline, "{what} did not come within {limit:?}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// The machine's free memory in bytes.
    #[must_use]
    pub fn free_bytes(&self) -> u64 {
        let info = self.axl_json(&["info"]);
        info["free_bytes"].as_u64().unwrap_or_else(|| panic!("no free_bytes in {info}"))
    }

    /// Bytes that are free, or charged to somebody: a guest may ask for more frames of its grant
    /// table.
    #[must_use]
    pub fn all_bytes(&self) -> u64 {
        self.free_bytes() + self.domains().iter().map(|it| it.memory_bytes).sum::<u64>()
    }

    /// Lines of the console so far.
    #[must_use]
    pub fn lines(&self) -> Vec<Line> {
        self.log.lines()
    }
}

impl Drop for Platform {
    fn drop(&mut self) {
        if let Some(line) = self.log.panicked() {
            eprintln!("the core stopped: {line}");
        }
        if std::thread::panicking() {
            if let Ok(Some((status, said))) = self.machine.ended() {
                eprintln!("QEMU ended: {status}, {said}");
            }
            self.log.leave();
        }
    }
}

/// A domain in `axl list --json`. Reading it checks that all promised keys are there.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Listed {
    /// Its name.
    pub name: String,
    /// Its id.
    pub domid: u64,
    /// Which life.
    pub incarnation: u64,
    /// What it does.
    pub state: String,
    /// What it is for.
    pub role: String,
    /// Memory charged to it.
    pub memory_bytes: u64,
    /// How long this incarnation has run.
    pub uptime_ms: u64,
}

impl Listed {
    fn from_json(value: &Value) -> Self {
        let text = |key: &str| {
            value[key].as_str().unwrap_or_else(|| panic!("no text `{key}` in {value}")).to_owned()
        };
        let number = |key: &str| {
            value[key].as_u64().unwrap_or_else(|| panic!("no number `{key}` in {value}"))
        };
        Self {
            name: text("name"),
            domid: number("domid"),
            incarnation: number("incarnation"),
            state: text("state"),
            role: text("role"),
            memory_bytes: number("memory_bytes"),
            uptime_ms: number("uptime_ms"),
        }
    }

    /// Whether it runs or waits for something to do.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        ["running", "blocked"].contains(&self.state.to_ascii_lowercase().as_str())
    }
}

/// The incarnations of all domains but one.
#[must_use]
pub fn others(domains: &[Listed], but: &str) -> Vec<(String, u64)> {
    let others = domains.iter().filter(|domain| domain.name != but);
    others.map(|domain| (domain.name.clone(), domain.incarnation)).collect()
}

/// Runs the `axl` that `cargo xtask test` has built.
#[must_use]
pub fn axl(arguments: &[&str]) -> Output {
    run_limited(Command::new(from_environment("AXOLOTL_AXL")).args(arguments), AXL)
}

/// Runs the `xtask` that runs us.
#[must_use]
pub fn xtask_command() -> Command {
    let mut command = Command::new(from_environment("AXOLOTL_XTASK"));
    command.current_dir(project::root());
    command
}

fn from_environment(name: &str) -> PathBuf {
    std::env::var_os(name)
        .map(PathBuf::from)
        .unwrap_or_else(|| panic!("{name} is not set: these tests are run by `cargo xtask test`"))
}

/// Numbers for choices of a test, by SplitMix64 (Steele, Lea and Flood, 2014).
pub struct Random(u64);

impl Random {
    /// Begins at `AXOLOTL_SEED`, or somewhere; says where, so that a failing run can be repeated.
    #[must_use]
    pub fn new() -> Self {
        let now = std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(1, |time| time.as_secs());
        let seed = dose("AXOLOTL_SEED", now);
        println!("AXOLOTL_SEED={seed}");
        Self(seed)
    }

    /// A number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % end
    }
}

impl Default for Random {
    fn default() -> Self {
        Self::new()
    }
}

/// A number that a longer run may change by the environment.
#[must_use]
pub fn dose(name: &str, usual: u64) -> u64 {
    std::env::var(name).ok().map_or(usual, |text| text.parse().expect("a number"))
}

/// Runs a command to its end; fails the test, and ends the command, when it takes too long.
#[must_use]
pub fn run_limited(command: &mut Command, limit: Duration) -> Output {
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut child = child.unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let (out, err) = (gather(child.stdout.take()), gather(child.stderr.take()));
    let deadline = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait().expect("our own child") {
            let wait = Duration::from_secs(5);
            let stdout = out.recv_timeout(wait).unwrap_or_default();
            return Output { status, stdout, stderr: err.recv_timeout(wait).unwrap_or_default() };
        }
        if Instant::now() >= deadline {
            let _ = child.kill();
            let _ = child.wait();
            panic!("{command:?} did not end within {limit:?}");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn gather(pipe: Option<impl std::io::Read + Send + 'static>) -> Receiver<Vec<u8>> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            let _ = pipe.read_to_end(&mut bytes);
        }
        let _ = sender.send(bytes);
    });
    receiver
}

/// A download that runs on while the test does something else.
pub struct Running {
    result: Receiver<std::io::Result<Download>>,
    progress: Arc<std::sync::atomic::AtomicU64>,
}

impl Running {
    /// Starts to download `count` bytes.
    #[must_use]
    pub fn start(server: SocketAddr, count: u64, limit: Duration) -> Self {
        Self::start_from(server, &format!("/bytes/{count}"), count, limit)
    }

    /// Starts to download the same bytes from `path`.
    #[must_use]
    pub fn start_from(server: SocketAddr, path: &str, count: u64, limit: Duration) -> Self {
        let path = path.to_owned();
        let (sender, result) = channel();
        let progress = Arc::new(std::sync::atomic::AtomicU64::new(0));
        let seen = Arc::clone(&progress);
        std::thread::spawn(move || {
            let note = |bytes| seen.store(bytes, std::sync::atomic::Ordering::Relaxed);
            let _ = sender.send(http::download_from(server, &path, count, limit, note));
        });
        Self { result, progress }
    }

    /// Bytes so far.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.progress.load(std::sync::atomic::Ordering::Relaxed)
    }

    /// Whether it is still under way.
    #[must_use]
    pub fn is_running(&self) -> bool {
        Arc::strong_count(&self.progress) > 1
    }

    /// Waits for the end; fails the test when a byte was wrong or missing.
    #[must_use]
    pub fn finish(self, limit: Duration) -> Download {
        match self.result.recv_timeout(limit) {
            Ok(Ok(download)) => download,
            Ok(Err(error)) => panic!("the download failed after {} bytes: {error}", self.bytes()),
            Err(RecvTimeoutError::Timeout) => {
                panic!("the download did not end within {limit:?}, {} bytes came", self.bytes())
            }
            Err(RecvTimeoutError::Disconnected) => panic!("the download panicked"),
        }
    }
}

/// The console of one machine.
struct Log {
    name: String,
    lines: Mutex<Vec<Line>>,
}

impl Log {
    fn new() -> Self {
        // The test harness names each test's thread after the test.
        let name = std::thread::current().name().unwrap_or("test").replace("::", "-");
        Self { name, lines: Mutex::new(Vec::new()) }
    }

    fn add(&self, line: &Line) {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).push(line.clone());
    }

    fn lines(&self) -> Vec<Line> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn panicked(&self) -> Option<String> {
        self.lines().into_iter().find(Line::is_core_panic).map(|line| line.text)
    }

    /// Leaves the console in a file and shows its end.
    fn leave(&self) {
        let lines = self.lines();
        let dir = project::target_dir().join("qemu-logs");
        let path = dir.join(&self.name).with_extension("log");
        let written = std::fs::create_dir_all(&dir).and_then(|()| write_log(&path, &lines));
        let tail = lines.len().saturating_sub(30);
        for line in &lines[tail..] {
            let _ = show(line, Colour::Off, &mut std::io::stderr().lock());
        }
        match written {
            Ok(()) => eprintln!("the whole console: {}", path.display()),
            Err(error) => eprintln!("cannot write {}: {error}", path.display()),
        }
    }
}

fn write_log(path: &Path, lines: &[Line]) -> std::io::Result<()> {
    let mut file = std::io::BufWriter::new(std::fs::File::create(path)?);
    for line in lines {
        write!(file, "{:>9.3} ", line.at.as_secs_f64())?;
        show(line, Colour::Off, &mut file)?;
    }
    file.flush()
}
