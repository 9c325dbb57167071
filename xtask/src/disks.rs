//! The host's files behind the disks that a machine emulates.
//!
//! A file that is there is left alone: it holds what guests have written. One that is missing is
//! made as the system file says, under another name until it is whole.

use crate::{image_files, project, setup};
use gpt::GptConfig;
use gpt::disk::LogicalBlockSize;
use gpt::mbr::ProtectiveMBR;
use gpt::partition_types::LINUX_FS;
use miette::{Context, IntoDiagnostic, miette};
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use system::{DiskContent, FileFormat, Machine, MachineDisk, Partition};

/// Where partitions start and end.
const ALIGNMENT: u64 = 1 << 20;

/// Where the files are, and whether those of an earlier boot count.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum Place {
    /// Where the system file says; what is there stays.
    #[default]
    AsWritten,
    /// Those with relative names in this directory, each made anew.
    Fresh(PathBuf),
}

/// The file of each disk of the machine, in order. Those that are missing are made: `made` is the
/// directory of what is made for the system.
///
/// # Errors
/// A file is missing that the system file does not say how to make, or cannot be made.
pub fn provide(
    machine: &Machine,
    system_file: &Path,
    made: &Path,
    place: &Place,
) -> miette::Result<Vec<PathBuf>> {
    let file = |disk: &MachineDisk| {
        let directory = match place {
            Place::Fresh(directory) if disk.content != DiskContent::DemoFiles => directory,
            // Nobody writes demo files: one image is enough.
            _ => made,
        };
        let path = disk.path(system_file, directory);
        let remake = match disk.content {
            DiskContent::DemoFiles => is_outdated(&path),
            _ => *place != Place::AsWritten && path.starts_with(directory),
        };
        if remake || !path.exists() {
            make(disk, &path).wrap_err_with(|| format!("cannot make {}", path.display()))?;
        }
        Ok(path)
    };
    machine.disks.iter().map(file).collect()
}

/// Whether the image of demo files is older than what it is made of, or than we, who make it.
fn is_outdated(image: &Path) -> bool {
    let time = |path: &Path| std::fs::metadata(path).and_then(|meta| meta.modified()).ok();
    let sources = std::fs::read_dir(project::root().join("guests/demo/files"));
    let sources = sources.into_iter().flatten().flatten().map(|entry| entry.path());
    let newest = sources.chain(std::env::current_exe()).filter_map(|path| time(&path)).max();
    time(image) < newest
}

/// Makes the file of a disk.
fn make(disk: &MachineDisk, path: &Path) -> miette::Result<()> {
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory).into_diagnostic()?;
    }
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    let new = PathBuf::from(new);
    match (&disk.content, disk.format) {
        (DiskContent::Existing, _) => {
            return Err(miette!(
                help = "give the disk a `size`, `partitions` or `content`, or make the file",
                "there is no such file"
            ));
        }
        (DiskContent::Empty { bytes }, FileFormat::Qcow2) => qcow2(&new, *bytes)?,
        (DiskContent::Empty { bytes }, FileFormat::Raw) => {
            File::create(&new).and_then(|file| file.set_len(*bytes)).into_diagnostic()?;
        }
        (DiskContent::Partitions { bytes, partitions }, _) => {
            partitioned(&new, *bytes, disk.sector_size.into(), partitions)?;
        }
        (DiskContent::DemoFiles, _) => {
            std::fs::write(&new, image_files::demo_files()?).into_diagnostic()?;
        }
    }
    std::fs::rename(&new, path).into_diagnostic()
}

/// Makes a qcow2 image at `path`.
fn qcow2(path: &Path, bytes: u64) -> miette::Result<()> {
    setup::qemu_img()?;
    let mut command = Command::new(setup::QEMU_IMG);
    let output = command.args(["create", "-q", "-f", "qcow2"]).arg(path).arg(bytes.to_string());
    let output = output.output().into_diagnostic()?;
    let said = String::from_utf8_lossy(&output.stderr);
    if output.status.success() { Ok(()) } else { Err(miette!("{}", said.trim())) }
}

/// Makes a raw file with a GPT, and what its partitions hold.
fn partitioned(
    path: &Path,
    bytes: u64,
    sector: u64,
    partitions: &[Partition],
) -> miette::Result<()> {
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(true);
    let mut file = options.open(path).into_diagnostic()?;
    file.set_len(bytes).into_diagnostic()?;
    let size = if sector == 4096 { LogicalBlockSize::Lb4096 } else { LogicalBlockSize::Lb512 };
    // A size that the old table cannot say is said to be the largest one.
    let last = u32::try_from(bytes / sector - 1).unwrap_or(u32::MAX);
    ProtectiveMBR::with_lb_size(last).overwrite_lba0(&mut file).into_diagnostic()?;
    let config = GptConfig::new().writable(true).logical_block_size(size);
    let mut table = config.create_from_device(&mut file, None).into_diagnostic()?;
    let mut start = ALIGNMENT;
    for (number, partition) in (1..).zip(partitions) {
        let Partition { name, bytes, .. } = partition;
        let (first, count) = (start / sector, bytes / sector);
        table.add_partition_at(name, number, first, count, LINUX_FS, 0).into_diagnostic()?;
        start += bytes;
    }
    table.write().into_diagnostic()?;
    let mut start = ALIGNMENT;
    for partition in partitions {
        if let Some(cow_bytes) = partition.cow_bytes {
            let image = path.with_extension("cow");
            qcow2(&image, cow_bytes)?;
            let bytes = std::fs::read(&image).into_diagnostic()?;
            std::fs::remove_file(&image).into_diagnostic()?;
            file.seek(SeekFrom::Start(start)).into_diagnostic()?;
            file.write_all(&bytes).into_diagnostic()?;
        }
        start += partition.bytes;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory(name: &str) -> PathBuf {
        let path =
            std::env::temp_dir().join(format!("axolotl-disks-{}-{name}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        path
    }

    fn machine(disks: &str) -> Machine {
        let text = format!(
            "[machine]\nmemory = 256\ncpus = 1\n{disks}\n[[domain]]\nname = \"store\"\nrole = \"store\"\nmemory = 4\n"
        );
        system::compile("test.toml", &text)
            .unwrap_or_else(|error| panic!("{}", error.one_line()))
            .machine
    }

    fn disk(rest: &str) -> Machine {
        machine(&format!(
            "[[machine.disk]]\nmodel = \"nvme\"\nbdf = \"00:03.0\"\nfile = \"a.raw\"\n{rest}"
        ))
    }

    fn provided(machine: &Machine, made: &Path, place: &Place) -> miette::Result<Vec<PathBuf>> {
        provide(machine, Path::new("/nonexistent/test.toml"), made, place)
    }

    #[test]
    fn what_guests_have_written_stays() {
        let made = directory("stays");
        let machine = disk("size = \"2M\"");
        let path = provided(&machine, &made, &Place::AsWritten).expect("made").remove(0);
        assert_eq!(std::fs::metadata(&path).expect("there").len(), 2 << 20);
        std::fs::write(&path, b"precious").expect("writable");
        let again = provided(&machine, &made, &Place::AsWritten).expect("there").remove(0);
        assert_eq!(again, path);
        assert_eq!(std::fs::read(&path).expect("there"), b"precious");
        // A fresh one is another file, and starts anew each time.
        let fresh = Place::Fresh(made.join("fresh"));
        for _ in 0..2 {
            let other = provided(&machine, &made, &fresh).expect("made").remove(0);
            assert_eq!(std::fs::metadata(&other).expect("there").len(), 2 << 20);
            std::fs::write(&other, b"of no worth").expect("writable");
        }
        assert_eq!(std::fs::read(&path).expect("there"), b"precious");
        std::fs::remove_dir_all(made).expect("ours");
    }

    #[test]
    fn a_file_that_nobody_can_make_is_an_error() {
        let made = directory("missing");
        for machine in [
            disk(""),
            machine("[[machine.disk]]\nmodel = \"nvme\"\nbdf = \"00:03.0\"\nfile = \"./b.raw\"\n"),
        ] {
            let error = provided(&machine, &made, &Place::AsWritten).expect_err("missing");
            assert!(format!("{error:?}").contains("there is no such file"), "{error:?}");
        }
        let _ = std::fs::remove_dir_all(made);
    }

    /// By another implementation of GPT than the one that wrote it (UEFI 2.10, §5.3).
    #[test]
    fn partitions_are_where_the_table_says() {
        let made = directory("gpt");
        for sector in [512_usize, 4096] {
            let rest = format!(
                "sector_size = {sector}\npartitions = [{{ name = \"root\", size = \"3M\" }}, {{ name = \"dätä\", size = \"1M\" }}]"
            );
            let fresh = Place::Fresh(made.join(sector.to_string()));
            let path = provided(&disk(&rest), &made, &fresh).expect("made").remove(0);
            let bytes = std::fs::read(path).expect("there");
            assert_eq!(bytes.len(), 6 << 20);
            assert_eq!(bytes[510..512], [0x55, 0xaa]);
            assert_eq!(bytes[sector..sector + 8], *b"EFI PART");
            assert_eq!(bytes[bytes.len() - sector..][..8], *b"EFI PART");
            let number = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8"));
            let table = usize::try_from(number(sector + 72)).expect("small") * sector;
            let name = |at: usize| {
                let units = bytes[at..at + 72].chunks_exact(2);
                let units: Vec<u16> =
                    units.map(|unit| u16::from_le_bytes([unit[0], unit[1]])).collect();
                String::from_utf16(&units).expect("UTF-16").trim_end_matches('\0').to_owned()
            };
            let mib = (1 << 20) / sector as u64;
            let entry = |at: usize| (number(at + 32), number(at + 40), name(at + 56));
            assert_eq!(entry(table), (mib, 4 * mib - 1, "root".to_owned()));
            assert_eq!(entry(table + 128), (4 * mib, 5 * mib - 1, "dätä".to_owned()));
            assert_eq!(number(table + 2 * 128), 0);
        }
        std::fs::remove_dir_all(made).expect("ours");
    }
}
