//! Builds everything that a system needs, and puts its bootable image together.

use crate::bundle::{self, NamedImage};
use crate::{elf, guest_kernel, project, setup};
use indicatif::{HumanBytes, MultiProgress, ProgressBar, ProgressStyle};
use miette::{Context, IntoDiagnostic, Report, miette};
use std::io::{BufRead, BufReader, IsTerminal};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;
use system::{Compiled, Program};

/// The package of the hypervisor.
const CORE: &str = "hv-x86";

/// A system that can boot.
pub struct Built {
    /// The compiled system file.
    pub compiled: Compiled,
    /// The system file.
    pub file: PathBuf,
    /// The core's ELF file, with symbols.
    pub core: PathBuf,
    /// The bundle.
    pub bundle: PathBuf,
    /// Each image and its bytes in the bundle, the control domain's first.
    pub images: Vec<(String, u64)>,
}

/// Reads a system file and shows its warnings.
///
/// # Errors
/// The file breaks a rule; the report shows where.
pub fn load(file: &Path) -> miette::Result<Compiled> {
    let shown = file.strip_prefix(project::root()).unwrap_or(file);
    let text = std::fs::read_to_string(file)
        .into_diagnostic()
        .wrap_err_with(|| format!("cannot read {}", shown.display()))?;
    system::compile(&shown.to_string_lossy(), &text).map_err(|error| Report::new(*error))
}

/// Builds what `file` needs.
///
/// # Errors
/// The system file, the compiler, or a rule for images.
pub fn build(file: &Path) -> miette::Result<Built> {
    setup::rust_target()?;
    let compiled = load(file)?;
    compiled.warnings.iter().for_each(|warning| eprintln!("warning: {warning}"));
    let parts: Vec<String> =
        std::iter::once(CORE.to_owned()).chain(compiled.images.iter().cloned()).collect();
    let display = Display::new(&parts);
    let core = compile(&parts[0], &display.bars[0])?;
    display.done(0, std::fs::metadata(&core).into_diagnostic()?.len());
    let mut images = Vec::new();
    for (index, name) in compiled.images.iter().enumerate() {
        let bytes = match Program::of(name) {
            Program::Package(package) => {
                elf::flatten_file(&compile(package, &display.bars[index + 1])?)?
            }
            Program::Kernel(path) => match guest_kernel::package_of_ours(file, path) {
                Some(own) => guest_kernel::from_file(&compile(&own, &display.bars[index + 1])?)?,
                None => guest_kernel::kernel(file, path)?,
            },
            Program::Ramdisk(path) => guest_kernel::ramdisk(file, path)?,
        };
        compiled.check_image(index, &bytes).map_err(|error| Report::new(*error))?;
        display.done(index + 1, bytes.len() as u64);
        images.push(NamedImage { name: guest_kernel::short_name(name), bytes });
    }
    write(file, compiled, &core, &images)
}

/// Writes the core and the bundle to the system's directory.
fn write(
    file: &Path,
    compiled: Compiled,
    core: &Path,
    images: &[NamedImage],
) -> miette::Result<Built> {
    let bytes = bundle::write(&compiled.system, images, compiled.control_pages)
        .into_diagnostic()
        .wrap_err("cannot make the bundle")?;
    let dir = project::image_dir(file);
    std::fs::create_dir_all(&dir).into_diagnostic()?;
    let built = at(file, compiled, images);
    std::fs::copy(core, &built.core).into_diagnostic()?;
    std::fs::write(&built.bundle, &bytes).into_diagnostic()?;
    Ok(built)
}

fn at(file: &Path, compiled: Compiled, images: &[NamedImage]) -> Built {
    let dir = project::image_dir(file);
    Built {
        compiled,
        file: file.into(),
        core: dir.join("core.elf"),
        bundle: dir.join("bundle.bin"),
        images: images.iter().map(|image| (image.name.clone(), image.bytes.len() as u64)).collect(),
    }
}

/// What an earlier [`build`] of `file` left.
///
/// # Errors
/// It was never built, or the bundle is damaged.
pub fn locate(file: &Path) -> miette::Result<Built> {
    let bundle = project::image_dir(file).join("bundle.bin");
    let bytes = std::fs::read(&bundle)
        .into_diagnostic()
        .wrap_err_with(|| format!("{} is not built", file.display()))?;
    let read = bundle::read(&bytes).into_diagnostic()?;
    Ok(at(file, load(file)?, &read.images))
}

/// Compiles one program and returns where it is. Each part is compiled by a Cargo of its own: the
/// features of one part's dependencies must not reach the other parts, least of all the core.
fn compile(package: &str, bar: &ProgressBar) -> miette::Result<PathBuf> {
    bar.enable_steady_tick(Duration::from_millis(120));
    let mut command = project::cargo();
    command
        .args(["build", "--release", "--target", project::TARGET, "--package", package, "--bins"])
        .args(["--message-format", "json-render-diagnostics", "--quiet"])
        // It would replace the flags of .cargo/config.toml, without which nothing links right.
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .stdout(Stdio::piped());
    let mut child = command.spawn().into_diagnostic().wrap_err("cannot start cargo")?;
    let mut program = None;
    for line in child.stdout.take().into_iter().flat_map(|out| BufReader::new(out).lines()) {
        let line = line.into_diagnostic()?;
        if let Some((crate_name, executable)) = artifact(&line) {
            bar.set_message(format!("compiling {crate_name}"));
            program = executable.or(program);
        }
    }
    let status = child.wait().into_diagnostic()?;
    if !status.success() {
        return Err(miette!("`{package}` does not build"));
    }
    program.ok_or_else(|| miette!("the package `{package}` has no program"))
}

/// The crate, and perhaps the program, that a message of Cargo reports as finished.
fn artifact(line: &str) -> Option<(String, Option<PathBuf>)> {
    let message: serde_json::Value = serde_json::from_str(line).ok()?;
    if message["reason"] != "compiler-artifact" {
        return None;
    }
    let name = message["target"]["name"].as_str()?.to_owned();
    Some((name, message["executable"].as_str().map(PathBuf::from)))
}

/// One line per part on a terminal, nothing elsewhere.
struct Display {
    bars: Vec<ProgressBar>,
}

impl Display {
    fn new(parts: &[String]) -> Self {
        let all = MultiProgress::new();
        let style = ProgressStyle::with_template("{spinner} {prefix:16} {msg}")
            .unwrap_or_else(|_| ProgressStyle::default_spinner());
        let visible = std::io::stderr().is_terminal();
        let bar = |name: &String| {
            let bar =
                if visible { all.add(ProgressBar::new_spinner()) } else { ProgressBar::hidden() };
            bar.set_style(style.clone());
            bar.set_prefix(name.clone());
            bar.set_message("waiting");
            bar
        };
        Self { bars: parts.iter().map(bar).collect() }
    }

    fn done(&self, part: usize, bytes: u64) {
        self.bars[part].finish_with_message(HumanBytes(bytes).to_string());
    }
}

/// Builds a system file and returns what can boot, for a task that then uses it.
///
/// # Errors
/// As [`build`].
pub fn build_named(wanted: &Path) -> miette::Result<Built> {
    build(&project::system_file(wanted)?)
}

/// A short report of sizes.
#[must_use]
pub fn sizes(built: &Built) -> String {
    let bundle = std::fs::metadata(&built.bundle).map_or(0, |meta| meta.len());
    let mut text = format!("{} {}\n", built.bundle.display(), HumanBytes(bundle));
    for (name, bytes) in &built.images {
        text += &format!("  {name:16} {}\n", HumanBytes(*bytes));
    }
    text
}

/// Another Cargo command, such as `clippy`, for each of the freestanding packages. One command
/// for all of them would mix their features, which [`build`] avoids too.
pub fn freestanding(verb: &str) -> impl Iterator<Item = Command> {
    project::FREESTANDING.iter().map(move |package| {
        let mut command = project::cargo();
        command.args([verb, "--release", "--target", project::TARGET, "--package", package]);
        command
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found_in_cargos_messages() {
        let lib = r#"{"reason":"compiler-artifact","target":{"name":"shmem"},"executable":null}"#;
        assert_eq!(artifact(lib), Some(("shmem".into(), None)));
        let bin = r#"{"reason":"compiler-artifact","target":{"name":"net"},"executable":"/t/net"}"#;
        assert_eq!(artifact(bin), Some(("net".into(), Some("/t/net".into()))));
        assert_eq!(artifact(r#"{"reason":"build-finished","success":true}"#), None);
        assert_eq!(artifact("warning: no message"), None);
    }
}
