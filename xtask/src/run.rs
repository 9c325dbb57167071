//! `cargo xtask run`: a system on the terminal.

use crate::build::Built;
use crate::console::{self, Colour, Ended, Line};
use crate::machine::{Machine, wait_web};
use crate::qemu::{Accel, Forward, Options, resolve};
use crate::{build, interrupt, setup};
use miette::{IntoDiagnostic, miette};
use std::io::Write;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use system::DiskContent;

/// How often a run looks whether somebody asked it to end.
const TICK: Duration = Duration::from_millis(200);
/// Guests' port of web pages.
const WEB_PORT: u16 = 80;
/// How long a guest may take to answer before we say that it does not.
const GUEST_COMES_UP: Duration = Duration::from_secs(120);

/// What `run` was asked for.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// No colours, no hints for people.
    pub headless: bool,
    /// Ends by itself after this time.
    pub limit: Option<Duration>,
    /// How to boot.
    pub options: Options,
}

/// Builds, boots, and shows the consoles until somebody ends it.
///
/// # Errors
/// The system cannot be built or booted; the core stopped, or QEMU ended by itself.
pub fn run(system: &Path, wanted: &Wanted) -> miette::Result<()> {
    interrupt::catch()?;
    setup::qemu()?;
    let built = build::build_named(system)?;
    let colour = if wanted.headless { Colour::Off } else { Colour::for_stdout() };
    say_how(&built, resolve(wanted.options.accel));
    let machine = Machine::start(&built, &wanted.options, move |line| {
        // A closed pipe behind us is no reason to stop the machine; `follow` goes on.
        let _ = console::show(line, colour, &mut std::io::stdout().lock());
    })?;
    let over = Arc::new(AtomicBool::new(false));
    let disks = &built.compiled.machine.disks;
    let has_files = disks.iter().any(|disk| disk.content == DiskContent::DemoFiles);
    let watchers: Vec<_> = machine
        .forwards
        .iter()
        .filter(|forward| forward.tcp && forward.guest_port == WEB_PORT)
        .map(|forward| announce_web(forward.clone(), has_files, Arc::clone(&over)))
        .collect();
    let result = follow(machine, wanted.limit);
    over.store(true, Ordering::Relaxed);
    for watcher in watchers {
        let _ = watcher.join();
    }
    result
}

fn say_how(built: &Built, accel: Accel) {
    let how = match accel {
        Accel::Kvm => "KVM",
        Accel::Icount | Accel::IcountIdle => "emulation, counting instructions",
        Accel::Tcg | Accel::Auto => "emulation: KVM is not usable here",
    };
    eprintln!("booting `{}` in QEMU ({how}); Ctrl-C ends it", built.compiled.system.name);
}

/// Says how to reach a guest as soon as it answers.
fn announce_web(
    forward: Forward,
    has_files: bool,
    over: Arc<AtomicBool>,
) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        let start = Instant::now();
        let server = SocketAddr::V4(forward.host);
        let stop = || over.load(Ordering::Relaxed) || interrupt::asked();
        let result = wait_web(server, GUEST_COMES_UP, stop);
        if stop() {
            return;
        }
        match result {
            Ok(_) => {
                let time = start.elapsed().as_secs_f32();
                eprintln!(
                    "up after {time:.1} s: curl http://{server}/   (and in another terminal: cargo axl list)"
                );
                if has_files {
                    eprintln!("files from a disk: curl http://{server}/disk/");
                }
            }
            Err(error) => eprintln!("warning: {error}"),
        }
    })
}

/// Stays with the machine until its end, ours, or the limit.
fn follow(mut machine: Machine, limit: Option<Duration>) -> miette::Result<()> {
    let deadline = limit.map(|limit| machine.started + limit);
    let mut panicked: Option<(Line, Instant)> = None;
    loop {
        let now = Instant::now();
        if interrupt::asked() || deadline.is_some_and(|deadline| now >= deadline) {
            let _ = std::io::stdout().flush();
            return Ok(());
        }
        // The lines behind a panic are worth a moment.
        if let Some((line, since)) = &panicked
            && since.elapsed() > Duration::from_secs(2)
        {
            return Err(miette!("the core stopped: {}", line.text));
        }
        let tick = deadline.map_or(now + TICK, |deadline| deadline.min(now + TICK));
        match console::next(&machine.lines, tick) {
            Ok(Some(line)) if line.is_core_panic() && panicked.is_none() => {
                panicked = Some((line, now));
            }
            Ok(_) => {}
            Err(Ended) => return Err(early_end(&mut machine)?),
        }
    }
}

/// What there is to say when QEMU closed its console by itself.
fn early_end(machine: &mut Machine) -> miette::Result<miette::Report> {
    for _ in 0..20 {
        if let Some((status, said)) = machine.ended()? {
            return Ok(miette!("QEMU ended by itself ({status}): {said}"));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(miette!("QEMU closed the console"))
}

/// Parses `30s`, `2m`, `500ms`, or a bare number of seconds.
///
/// # Errors
/// Anything else.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let number: u32 = number.parse().map_err(|_| "a time such as 30s or 2m".to_owned())?;
    match unit {
        "ms" => Ok(Duration::from_millis(number.into())),
        "" | "s" => Ok(Duration::from_secs(number.into())),
        "m" => Ok(Duration::from_secs(u64::from(number) * 60)),
        "h" => Ok(Duration::from_secs(u64::from(number) * 3600)),
        _ => Err(format!("`{unit}` is no unit of time: use ms, s, m or h")),
    }
}

/// Builds without booting and shows the sizes.
///
/// # Errors
/// As [`build::build`].
pub fn build_only(system: &Path) -> miette::Result<()> {
    let built = build::build_named(system)?;
    std::io::stdout().write_all(build::sizes(&built).as_bytes()).into_diagnostic()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_units() {
        assert_eq!(parse_duration("30s"), Ok(Duration::from_secs(30)));
        assert_eq!(parse_duration("5"), Ok(Duration::from_secs(5)));
        assert_eq!(parse_duration("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(parse_duration("2m"), Ok(Duration::from_secs(120)));
        for wrong in ["", "s", "-1s", "3 s", "3d", "99999999999s"] {
            assert!(parse_duration(wrong).is_err(), "{wrong}");
        }
    }
}
