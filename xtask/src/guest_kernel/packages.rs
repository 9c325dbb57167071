//! Debian's packages: downloaded by apt and unpacked once, without installing anything.

use crate::project;
use miette::{Context, IntoDiagnostic, miette};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Packages of programs that tests and measurements run in guests.
const TOOLS: [&str; 4] = ["fio", "iperf3", "e2fsprogs", "ethtool"];

/// Where unpacked packages are.
fn cache() -> PathBuf {
    project::root().join("target/guest-packages")
}

/// The content of a package.
pub(super) fn unpacked(package: &str) -> miette::Result<PathBuf> {
    together(package, || Ok(vec![package.to_owned()]))
}

/// The content of all packages with the tools and the libraries that they need, in one tree.
pub(super) fn tools() -> miette::Result<PathBuf> {
    together("tools", || {
        let mut command = Command::new("apt-cache");
        command.args(["depends", "--recurse", "--no-recommends", "--no-suggests"]);
        command.args(["--no-conflicts", "--no-breaks", "--no-replaces", "--no-enhances"]);
        let listed = output(command.args(TOOLS))?;
        Ok(listed.lines().filter(|name| is_wanted(name)).map(str::to_owned).collect())
    })
}

/// Whether a line of `apt-cache depends` names a package that programs are linked with: these
/// stand at the line's start, and some are there for their scripts only.
fn is_wanted(line: &str) -> bool {
    let library = line.starts_with("lib") || line.starts_with("zlib");
    let script = ["perl", "python", "-common", "pam"].iter().any(|part| line.contains(part));
    TOOLS.contains(&line) || library && !script
}

/// The package that a kernel's metapackage stands for; others stand for themselves.
pub(super) fn newest(package: &str) -> miette::Result<String> {
    let text = output(Command::new("apt-cache").args(["depends", package]))?;
    let mut names = text.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
    let real = names.find(|name| name.starts_with("linux-image-"));
    Ok(real.unwrap_or(package).to_owned())
}

/// Downloads and unpacks `packages` into one directory, unless that was done before.
fn together(
    name: &str,
    packages: impl FnOnce() -> miette::Result<Vec<String>>,
) -> miette::Result<PathBuf> {
    let dir = cache().join(name);
    if dir.join("done").exists() {
        return Ok(dir);
    }
    let packages = packages()?;
    let archives = dir.join("archives");
    std::fs::create_dir_all(&archives).into_diagnostic()?;
    eprintln!("downloading {name} by apt");
    output(
        Command::new("apt-get").current_dir(&archives).args(["-q", "download"]).args(&packages),
    )?;
    for archive in std::fs::read_dir(&archives).into_diagnostic()? {
        let archive = archive.into_diagnostic()?.path();
        output(Command::new("dpkg-deb").arg("-x").arg(&archive).arg(&dir))?;
    }
    std::fs::remove_dir_all(&archives).into_diagnostic()?;
    std::fs::write(dir.join("done"), packages.join("\n")).into_diagnostic()?;
    Ok(dir)
}

/// Runs a command that must succeed, and returns what it printed.
fn output(command: &mut Command) -> miette::Result<String> {
    let shown = format!("{command:?}");
    let output = command.output().into_diagnostic().wrap_err_with(|| shown.clone())?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let help = "kernels of Debian come by apt; on other systems name a file";
    Err(miette!(help = help, "{shown} failed: {}", said.trim()))
}

/// The only entry of a directory that begins so.
pub(super) fn find(dir: &Path, start: &str) -> miette::Result<PathBuf> {
    let entries = std::fs::read_dir(dir).into_diagnostic()?;
    let names = entries.filter_map(Result::ok).map(|entry| entry.path());
    let mut found = names
        .filter(|path| path.file_name().is_some_and(|n| n.to_string_lossy().starts_with(start)));
    found.next().ok_or_else(|| miette!("nothing in {} begins with {start}", dir.display()))
}

/// All files below a directory; links to directories are not followed.
pub(super) fn files(dir: &Path) -> miette::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut directories = vec![dir.to_owned()];
    while let Some(dir) = directories.pop() {
        for entry in std::fs::read_dir(&dir).into_diagnostic()? {
            let path = entry.into_diagnostic()?.path();
            if path.is_dir() && !path.is_symlink() {
                directories.push(path);
            } else {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

/// A command for one of the tools' programs on the host, with its own libraries: nothing need be
/// installed.
///
/// # Errors
/// The packages cannot be had.
pub fn host_program(path: &str) -> miette::Result<Command> {
    let tools = tools()?;
    let loader = find(&tools.join("lib/x86_64-linux-gnu"), "ld-linux-x86-64.so.2")?;
    let libraries = ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"].map(|dir| tools.join(dir));
    let libraries = std::env::join_paths(libraries).into_diagnostic()?;
    let mut command = Command::new(loader);
    command.arg("--library-path").arg(libraries).arg(tools.join(path));
    Ok(command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_and_tools_are_wanted() {
        assert!(["fio", "libc6", "zlib1g"].iter().all(|name| is_wanted(name)));
        let others = ["  Depends: libc6", "<libc-dev>", "perl", "libperl5.36", "libpam0g", "dpkg"];
        assert!(!others.iter().any(|name| is_wanted(name)));
    }
}
