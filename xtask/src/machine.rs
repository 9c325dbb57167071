//! A running machine: QEMU, its console, and the way to its control domain.
//!
//! QEMU connects its second serial port to a socket at which we listen, so that no byte of it is
//! lost before somebody reads; the first one is its standard output. Dropping a [`Machine`] ends
//! QEMU, and only this one, and removes what it left in the file system.

use crate::build::Built;
use crate::console::{self, Ended, Line};
use crate::qemu::{self, Files, Forward, Options};
use crate::{disks, http, project};
use axl::mux::Mux;
use miette::{IntoDiagnostic, WrapErr, miette};
use std::io::{ErrorKind, Read};
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

/// How long QEMU may take to open its serial port.
const QEMU_STARTS: Duration = Duration::from_secs(20);

/// A machine that runs until it is dropped.
pub struct Machine {
    child: Child,
    /// Lines of the console, as they come.
    pub lines: Receiver<Line>,
    /// The way to the control domain; other processes share it by the socket of `axl`.
    pub mux: Mux,
    /// Guests' ports that the host can reach.
    pub forwards: Vec<Forward>,
    /// The files of its disks, in the order of the system file.
    pub disks: Vec<PathBuf>,
    errors: Receiver<String>,
    /// When QEMU was started.
    pub started: Instant,
    /// Dropped last, when nothing is left in it.
    _directory: Directory,
}

impl Machine {
    /// Boots `built`. `sink` sees every line of the console, on another thread.
    ///
    /// # Errors
    /// A port is taken, QEMU cannot be started or dies at once; the message holds what it said.
    pub fn start(
        built: &Built,
        options: &Options,
        sink: impl FnMut(&Line) + Send + 'static,
    ) -> miette::Result<Self> {
        let socket = axl::rundir::socket_path(&built.compiled.system.name);
        refuse_second(&socket, &built.compiled.system.name)?;
        let directory = Directory::new()?;
        let com2 = directory.0.join("com2");
        let listener = UnixListener::bind(&com2).into_diagnostic()?;
        let (machine, made) = (&built.compiled.machine, project::image_dir(&built.file));
        let disks = disks::provide(machine, &built.file, &made, &options.disks)?;
        let files = Files { core: &built.core, bundle: &built.bundle, com2: &com2, disks: &disks };
        let mut plan = qemu::plan(machine, options, files)?;
        let started = Instant::now();
        let mut child = plan
            .command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // Ctrl-C at the terminal is ours alone.
            .process_group(0)
            .spawn()
            .into_diagnostic()
            .wrap_err("cannot start QEMU")?;
        let errors = collect(child.stderr.take());
        let mut guard = Guard(Some(child));
        let stream = guard.accept(&listener, &errors)?;
        child = guard.0.take().ok_or_else(|| miette!("QEMU is gone"))?;
        let output = child.stdout.take();
        let mut guard = Guard(Some(child));
        let output = output.ok_or_else(|| miette!("QEMU has no console"))?;
        let lines = console::follow(output, sink);
        let mux = Mux::start(stream, &socket)
            .into_diagnostic()
            .wrap_err_with(|| format!("cannot serve {}", socket.display()))?;
        let child = guard.0.take().ok_or_else(|| miette!("QEMU is gone"))?;
        let forwards = plan.forwards;
        Ok(Self { child, lines, mux, forwards, disks, errors, started, _directory: directory })
    }

    /// Where the host reaches the web server of the guest behind the network card `nic`.
    #[must_use]
    pub fn web(&self, nic: usize) -> Option<SocketAddr> {
        let web =
            |forward: &&Forward| forward.tcp && forward.guest_port == 80 && forward.nic == nic;
        self.forwards.iter().find(web).map(|forward| SocketAddr::V4(forward.host))
    }

    /// How QEMU ended, if it has, and what it said.
    ///
    /// # Errors
    /// The system does not tell.
    pub fn ended(&mut self) -> miette::Result<Option<(ExitStatus, String)>> {
        let status = self.child.try_wait().into_diagnostic()?;
        Ok(status.map(|status| (status, said(&self.errors))))
    }

    /// An error, and how the machine ended in case that is why.
    #[must_use]
    pub fn explain(&mut self, error: miette::Report) -> miette::Report {
        let panic = self.lines.try_iter().find(Line::is_core_panic);
        match (panic, self.ended()) {
            (Some(line), _) => error.wrap_err(format!("the core stopped: {}", line.text)),
            (None, Ok(Some((status, said)))) => {
                error.wrap_err(format!("QEMU ended: {status}, {said}"))
            }
            (None, _) => error,
        }
    }

    /// Waits for a line that `wanted` accepts.
    ///
    /// # Errors
    /// None came in time, the core panicked, or the machine ended.
    pub fn wait_line(
        &mut self,
        limit: Duration,
        mut wanted: impl FnMut(&Line) -> bool,
    ) -> miette::Result<Line> {
        let deadline = Instant::now() + limit;
        loop {
            match console::next(&self.lines, deadline) {
                Ok(Some(line)) if wanted(&line) => return Ok(line),
                Ok(Some(line)) if line.is_core_panic() => {
                    return Err(miette!("the core stopped: {}", line.text));
                }
                Ok(Some(_)) => {}
                Ok(None) => return Err(miette!("the awaited line did not come in {limit:?}")),
                Err(Ended) => return Err(miette!("QEMU ended: {}", said(&self.errors))),
            }
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Ends a child that nobody has taken over.
struct Guard(Option<Child>);

impl Guard {
    /// Waits until QEMU has connected its second serial port.
    fn accept(
        &mut self,
        listener: &UnixListener,
        errors: &Receiver<String>,
    ) -> miette::Result<UnixStream> {
        listener.set_nonblocking(true).into_diagnostic()?;
        let deadline = Instant::now() + QEMU_STARTS;
        while Instant::now() < deadline {
            match listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(false).into_diagnostic()?;
                    return Ok(stream);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error).into_diagnostic(),
            }
            if let Some(child) = &mut self.0
                && let Some(status) = child.try_wait().into_diagnostic()?
            {
                return Err(miette!("QEMU ended at once ({status}): {}", said(errors)));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Err(miette!("QEMU did not open its serial port within {QEMU_STARTS:?}"))
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Two machines of one name would share a socket.
fn refuse_second(socket: &Path, name: &str) -> miette::Result<()> {
    if UnixStream::connect(socket).is_ok() {
        return Err(miette!(
            help = "end it with Ctrl-C where it was started",
            "the system `{name}` is already running ({})",
            socket.display()
        ));
    }
    Ok(())
}

/// Waits until the web server at `server` answers, and returns how long that took.
///
/// # Errors
/// It did not within `limit`, or `stop` said so.
pub fn wait_web(
    server: SocketAddr,
    limit: Duration,
    stop: impl Fn() -> bool,
) -> miette::Result<Duration> {
    let start = Instant::now();
    let mut last = String::from("no attempt");
    while start.elapsed() < limit && !stop() {
        // QEMU accepts at once for a guest that is not there yet: only an answer counts.
        match http::get(server, "/", Duration::from_secs(2)) {
            Ok(answer) if answer.status == 200 => return Ok(start.elapsed()),
            Ok(answer) => last = format!("status {}", answer.status),
            Err(error) => last = error.to_string(),
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Err(miette!("http://{server}/ did not answer within {limit:?}: {last}"))
}

/// Collects what QEMU says about itself. Warnings about processor features that emulation lacks
/// are left out: every start has them.
fn collect(stderr: Option<impl Read + Send + 'static>) -> Receiver<String> {
    let (sender, receiver) = std::sync::mpsc::channel();
    if let Some(stderr) = stderr {
        let lines = console::follow(stderr, |_| ());
        std::thread::spawn(move || {
            for line in lines {
                let noise = line.text.contains("TCG doesn't support requested feature");
                if !noise && sender.send(line.text).is_err() {
                    return;
                }
            }
        });
    }
    receiver
}

/// All that was collected; waits a moment for the rest of it.
fn said(errors: &Receiver<String>) -> String {
    let mut lines = Vec::new();
    while let Ok(line) = errors.recv_timeout(Duration::from_millis(200)) {
        lines.push(line);
    }
    if lines.is_empty() { "it said nothing".into() } else { lines.join("\n") }
}

/// A directory of our own for QEMU's socket, as short as the names of sockets must be.
struct Directory(PathBuf);

impl Directory {
    fn new() -> miette::Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("axolotl-qemu-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .into_diagnostic()
            .wrap_err_with(|| format!("cannot make {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
