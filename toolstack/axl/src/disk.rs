//! `axl disk`: disks as files on the host. Needs no running system.
//!
//! A place is `FILE` or `FILE:VOLUME`, with a volume as system files name it: `disk.img:gpt:root`
//! is a partition of a raw disk, `disk.img:range:1M+64M` a part of it, and `disk.qcow2` the whole
//! file.

use axolotl_abi::volume::{Extent, Volume, VolumeError, size};
use clap::Subcommand;
use gpt::GptConfig;
use gpt::disk::LogicalBlockSize;
use gpt::mbr::ProtectiveMBR;
use gpt::partition_types::LINUX_FS;
use qcow2::check::{CheckError, check};
use qcow2::format::{
    BackingFormat, Create, FormatError, HEADER_BYTES, Header, create, full_extent,
};
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Where the first partition begins, and what is kept free behind the last one.
const ALIGNMENT: u64 = 1 << 20;

/// What to do with a disk.
#[derive(Subcommand)]
pub enum DiskCommand {
    /// Makes a copy-on-write disk (qcow2): as a new file, or inside a raw disk.
    Create {
        /// The file; with `--partition` or `--range` the raw disk that it is put into.
        file: PathBuf,
        /// What the guest sees, such as 512M or 10G. With a backing volume that one's size, if
        /// nothing is said.
        #[arg(long, value_name = "SIZE")]
        size: Option<String>,
        /// Puts it into this GPT partition of the file.
        #[arg(long, value_name = "NAME", conflicts_with = "range")]
        partition: Option<String>,
        /// Puts it into this part of the file: OFFSET+BYTES.
        #[arg(long, value_name = "RANGE")]
        range: Option<String>,
        /// What shines through where nothing was written: a volume of the same file, a file, or
        /// FILE:VOLUME.
        #[arg(long, value_name = "VOLUME")]
        backing: Option<String>,
        /// How much is allocated at a time, from 4K to 2M.
        #[arg(long, value_name = "SIZE", default_value = "64K")]
        cluster_size: String,
        /// Overwrites an image that is there.
        #[arg(long)]
        force: bool,
    },
    /// Shows a copy-on-write disk, and checks it. It must not be in use.
    Info {
        /// FILE or FILE:VOLUME.
        place: String,
    },
    /// Makes a new disk that begins as another one is now, which must only be read from then on.
    Snapshot {
        /// FILE or FILE:VOLUME.
        place: String,
        /// FILE (made anew) or FILE:VOLUME for the new one.
        new: String,
        /// Overwrites an image that is there.
        #[arg(long)]
        force: bool,
    },
    /// Makes a raw disk with a GPT.
    Partition {
        /// The file, made anew.
        file: PathBuf,
        /// NAME=SIZE for each partition, with commas between them.
        #[arg(required = true, value_delimiter = ',', value_name = "NAME=SIZE")]
        partitions: Vec<String>,
        /// Bytes of a sector: 512 or 4096.
        #[arg(long, default_value_t = 512)]
        sector_size: u64,
    },
}

/// Why it was not done.
#[derive(Debug, thiserror::Error)]
pub enum DiskToolError {
    /// A file cannot be used.
    #[error("{0}: {1}")]
    File(String, io::Error),
    /// The text of a volume.
    #[error("`{0}` is no volume: {1}")]
    Volume(String, VolumeError),
    /// Anything about images.
    #[error("{0}: {1}")]
    Format(String, FormatError),
    /// Something else about a place.
    #[error("{0}")]
    Other(String),
}

type Result<T> = std::result::Result<T, DiskToolError>;

/// A place for an image: a part of a file.
struct Place {
    path: PathBuf,
    /// As the user wrote it.
    text: String,
    file: File,
    offset: u64,
    /// Bytes; `None`: as many as it takes.
    bytes: Option<u64>,
}

/// What a place is in words: the file, and the volume if it is not all of it.
struct Named {
    path: PathBuf,
    volume: Option<Volume>,
}

impl Named {
    /// Reads `FILE` or `FILE:VOLUME`.
    fn parse(text: &str) -> Result<Self> {
        let forms = [":gpt:", ":guid:", ":range:", ":whole"];
        let split = forms.iter().filter_map(|form| text.rfind(form)).max();
        let Some(at) = split else { return Ok(Self { path: text.into(), volume: None }) };
        let volume = parse_volume(&text[at + 1..])?;
        Ok(Self { path: text[..at].into(), volume: Some(volume) })
    }
}

fn parse_volume(text: &str) -> Result<Volume> {
    let volume = Volume::parse(text);
    volume.map_err(|error| DiskToolError::Volume(text.to_owned(), error))
}

fn in_file(path: &Path) -> impl Fn(io::Error) -> DiskToolError + '_ {
    |error| DiskToolError::File(path.display().to_string(), error)
}

impl Place {
    /// Opens a place that exists.
    fn open(named: &Named, text: &str, writable: bool) -> Result<Self> {
        let failed = in_file(&named.path);
        let file = File::options().read(true).write(writable).open(&named.path).map_err(&failed)?;
        let length = file.metadata().map_err(&failed)?.len();
        let (offset, bytes) = match named.volume.as_ref().map(|volume| &volume.extent) {
            None | Some(Extent::Whole) => (0, length),
            Some(Extent::Range { offset, bytes }) => (*offset, *bytes),
            Some(Extent::PartitionName(name)) => {
                partition(&named.path, |it| it.name == *name, name)?
            }
            Some(Extent::PartitionGuid(guid)) => {
                let is_it = |it: &gpt::partition::Partition| it.part_guid.to_string() == *guid;
                partition(&named.path, is_it, guid)?
            }
        };
        if offset.checked_add(bytes).is_none_or(|end| end > length) {
            return Err(DiskToolError::Other(format!("{text} is not inside of the file")));
        }
        let path = named.path.clone();
        Ok(Self { path, text: text.to_owned(), file, offset, bytes: Some(bytes) })
    }

    /// A place for something new: a new file, or a volume of one that exists.
    fn make(named: &Named, text: &str, force: bool) -> Result<Self> {
        if named.volume.is_some() {
            let place = Self::open(named, text, true)?;
            if !force && place.header().is_ok() {
                let message = format!("{text} holds an image already; --force overwrites it");
                return Err(DiskToolError::Other(message));
            }
            return Ok(place);
        }
        let mut options = File::options();
        options.read(true).write(true);
        if force {
            options.create(true).truncate(true)
        } else {
            options.create_new(true)
        };
        let file = options.open(&named.path).map_err(in_file(&named.path))?;
        Ok(Self { path: named.path.clone(), text: text.to_owned(), file, offset: 0, bytes: None })
    }

    fn length(&self) -> Result<u64> {
        match self.bytes {
            Some(bytes) => Ok(bytes),
            None => Ok(self.file.metadata().map_err(in_file(&self.path))?.len()),
        }
    }

    /// Fills a buffer from byte `at` on, with zeros behind the end.
    fn read(&self, at: u64, buffer: &mut [u8]) -> io::Result<()> {
        let end = self.bytes.unwrap_or(u64::MAX);
        let mut done = 0;
        buffer.fill(0);
        while done < buffer.len() {
            let from = at + done as u64;
            let most = usize::try_from(end.saturating_sub(from)).unwrap_or(usize::MAX);
            let most = most.min(buffer.len() - done);
            match self.file.read_at(&mut buffer[done..done + most], self.offset + from)? {
                0 => break,
                bytes => done += bytes,
            }
        }
        Ok(())
    }

    fn header(&self) -> Result<Header> {
        self.header_bytes().map(|(header, _)| header)
    }

    fn header_bytes(&self) -> Result<(Header, Vec<u8>)> {
        let mut bytes = vec![0; HEADER_BYTES];
        self.read(0, &mut bytes).map_err(in_file(&self.path))?;
        let header = Header::parse(&bytes);
        let header = header.map_err(|error| DiskToolError::Format(self.text.clone(), error))?;
        Ok((header, bytes))
    }

    /// The file as one that does not depend on where the reader stands.
    fn absolute(&self) -> Result<PathBuf> {
        self.path.canonicalize().map_err(in_file(&self.path))
    }

    /// The name under which QEMU's tools find it.
    fn name(&self, format: BackingFormat) -> Result<String> {
        let path = self.absolute()?;
        let path = path.to_string_lossy();
        let Some(bytes) = self.bytes.filter(|_| self.is_part()) else {
            return Ok(path.into_owned());
        };
        let part = json!({
            "driver": "raw",
            "offset": self.offset,
            "size": bytes,
            // The image may be in the same file, of which QEMU's tools then hold the lock.
            "file": { "driver": "file", "filename": path, "locking": "off" },
        });
        let whole = match format {
            BackingFormat::Qcow2 => json!({ "driver": "qcow2", "file": part }),
            _ => part,
        };
        Ok(format!("json:{whole}"))
    }

    fn is_part(&self) -> bool {
        let length = self.file.metadata().map_or(0, |metadata| metadata.len());
        self.offset != 0 || self.bytes.is_some_and(|bytes| bytes != length)
    }
}

/// Offset and bytes of the partition that `is_it` picks.
fn partition(
    path: &Path,
    is_it: impl Fn(&gpt::partition::Partition) -> bool,
    name: &str,
) -> Result<(u64, u64)> {
    for size in [LogicalBlockSize::Lb512, LogicalBlockSize::Lb4096] {
        let Ok(table) = GptConfig::new().logical_block_size(size).open(path) else { continue };
        let mut found = table.partitions().values().filter(|it| is_it(it));
        return match (found.next(), found.next()) {
            (Some(found), None) => {
                let start = found.bytes_start(size).ok();
                start.zip(found.bytes_len(size).ok()).ok_or_else(|| {
                    DiskToolError::Other(format!("partition `{name}` has an impossible place"))
                })
            }
            (Some(_), Some(_)) => {
                Err(DiskToolError::Other(format!("{} has two partitions `{name}`", path.display())))
            }
            _ => Err(DiskToolError::Other(format!("{} has no partition `{name}`", path.display()))),
        };
    }
    Err(DiskToolError::Other(format!("{} has no GPT", path.display())))
}

fn bytes_of(text: &str) -> Result<u64> {
    let bytes = size(text).filter(|bytes| *bytes > 0 && bytes.is_multiple_of(512));
    bytes.ok_or_else(|| {
        DiskToolError::Other(format!("`{text}` is no size: write whole sectors, such as 64M"))
    })
}

/// Does what was asked for. Returns what to print, as text and as JSON.
///
/// # Errors
/// See [`DiskToolError`].
pub fn run(command: &DiskCommand) -> Result<(String, Value)> {
    match command {
        DiskCommand::Create { file, size, partition, range, backing, cluster_size, force } => {
            let volume = match (partition, range) {
                (Some(name), _) => Some(parse_volume(&format!("gpt:{name}"))?),
                (_, Some(range)) => Some(parse_volume(&format!("range:{range}"))?),
                _ => None,
            };
            let text = shown(file, volume.as_ref());
            let bits = cluster_bits(cluster_size)?;
            let backing = backing.as_deref().map(|text| backing_place(file, text)).transpose()?;
            let size = size.as_deref().map(bytes_of).transpose()?;
            let size = match (size, &backing) {
                (Some(size), _) => size,
                (None, Some(backing)) => virtual_size(backing)?,
                (None, None) => {
                    return Err(DiskToolError::Other("say how large it is: --size".into()));
                }
            };
            let named = Named { path: file.clone(), volume };
            make(&named, &text, size, bits, backing.as_ref(), *force)
        }
        DiskCommand::Info { place } => info(&Place::open(&Named::parse(place)?, place, false)?),
        DiskCommand::Snapshot { place, new, force } => {
            let old = Place::open(&Named::parse(place)?, place, false)?;
            let header = old.header().ok();
            if header.as_ref().is_some_and(Header::has_backing) {
                return Err(DiskToolError::Other(format!(
                    "{place} has a backing file itself: one image behind another is supported"
                )));
            }
            let bits = header.map_or(qcow2::format::USUAL_CLUSTER_BITS, |it| it.cluster_bits);
            make(&Named::parse(new)?, new, virtual_size(&old)?, bits, Some(&old), *force)
        }
        DiskCommand::Partition { file, partitions, sector_size } => {
            make_table(file, partitions, *sector_size)
        }
    }
}

fn shown(path: &Path, volume: Option<&Volume>) -> String {
    match volume {
        Some(volume) => format!("{}:{volume}", path.display()),
        None => path.display().to_string(),
    }
}

fn cluster_bits(text: &str) -> Result<u32> {
    let bytes = size(text).unwrap_or(0);
    let is_one = bytes.is_power_of_two() && (4096..=1 << 21).contains(&bytes);
    let message = format!("`{text}` is no cluster size: 4K, 8K, …, 2M");
    if is_one { Ok(bytes.trailing_zeros()) } else { Err(DiskToolError::Other(message)) }
}

/// What `--backing` names: a volume of the same file, a file, or a volume of another one.
fn backing_place(file: &Path, text: &str) -> Result<Place> {
    let same = Volume::parse(text).ok();
    match same {
        Some(volume) => {
            let named = Named { path: file.to_owned(), volume: Some(volume) };
            Place::open(&named, text, false)
        }
        None => Place::open(&Named::parse(text)?, text, false),
    }
}

/// What a guest would see of it.
fn virtual_size(place: &Place) -> Result<u64> {
    match place.header() {
        Ok(header) => Ok(header.size),
        Err(DiskToolError::Format(_, FormatError::NoImage)) => place.length(),
        Err(error) => Err(error),
    }
}

/// Makes an image.
fn make(
    named: &Named,
    text: &str,
    size: u64,
    bits: u32,
    backing: Option<&Place>,
    force: bool,
) -> Result<(String, Value)> {
    let format = match backing.map(Place::header) {
        Some(Ok(_)) => BackingFormat::Qcow2,
        Some(Err(DiskToolError::Format(_, FormatError::NoImage))) | None => BackingFormat::Raw,
        Some(Err(error)) => return Err(error),
    };
    let name = backing.map(|place| place.name(format)).transpose()?;
    let wish = |extent| Create {
        size,
        cluster_bits: bits,
        extent,
        backing: name.as_deref().map(|name| (name, format)),
    };
    let failed = |error| DiskToolError::Format(text.to_owned(), error);
    let full = full_extent(size, bits);
    // Nothing is overwritten for a wish that cannot be fulfilled.
    create(&wish(full)).map_err(failed)?;
    let place = Place::make(named, text, force)?;
    if backing.is_some_and(|backing| overlaps(&place, backing)) {
        return Err(DiskToolError::Other(format!("{text} overlaps its backing volume")));
    }
    let extent = place.bytes.unwrap_or(full);
    let parts = create(&wish(extent)).map_err(failed)?;
    let write = || -> io::Result<()> {
        if place.bytes.is_none() {
            place.file.set_len(extent)?;
        }
        for part in &parts {
            place.file.write_all_at(&part.bytes, place.offset + part.offset)?;
        }
        place.file.sync_all()
    };
    write().map_err(in_file(&place.path))?;
    let mut line = format!("{text}: {} copy-on-write disk", shown_size(size));
    if let Some(backing) = backing {
        let _ = write!(line, " over {}", backing.text);
    }
    if extent < full {
        let room = shown_size(extent);
        let _ = write!(line, ", which is full when it takes {room}");
    }
    line.push('\n');
    let value = json!({
        "place": text,
        "virtual_bytes": size,
        "cluster_bytes": 1_u64 << bits,
        "volume_bytes": extent,
        "full_bytes": full,
        "backing": name,
    });
    Ok((line, value))
}

fn overlaps(one: &Place, other: &Place) -> bool {
    let is_same = one.absolute().ok().is_some_and(|path| other.absolute().ok() == Some(path));
    let end = |place: &Place| place.offset.saturating_add(place.bytes.unwrap_or(u64::MAX));
    is_same && one.offset < end(other) && other.offset < end(one)
}

/// Bytes for people.
fn shown_size(bytes: u64) -> String {
    for (shift, unit) in [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")] {
        if bytes >= 1 << shift {
            let tenths = (u128::from(bytes) * 10) >> shift;
            return match tenths % 10 {
                0 => format!("{} {unit}", tenths / 10),
                rest => format!("{}.{rest} {unit}", tenths / 10),
            };
        }
    }
    format!("{bytes} bytes")
}

fn info(place: &Place) -> Result<(String, Value)> {
    let (header, bytes) = place.header_bytes()?;
    let failed = in_file(&place.path);
    // A file may end in the middle of its last cluster.
    let length = match place.bytes {
        Some(bytes) if place.is_part() => bytes,
        _ => place.length()?.next_multiple_of(header.cluster()),
    };
    let report =
        check(length, |at, buffer| place.read(at, buffer)).map_err(|error| match error {
            CheckError::Format(error) => DiskToolError::Format(place.text.clone(), error),
            CheckError::Read(error) => failed(error),
        })?;
    let name = backing_name(&header, &bytes);
    let verdict = match (report.errors, report.leaks) {
        (0, 0) => "no errors".to_owned(),
        (0, leaks) => format!("no errors, {leaks} lost clusters (qemu-img check -r leaks)"),
        (errors, leaks) => format!("{errors} errors, {leaks} lost clusters"),
    };
    let mut text = String::new();
    let mut line = |key: &str, value: String| {
        let _ = writeln!(text, "{key:<14} : {value}");
    };
    line("virtual size", shown_size(header.size));
    line("allocated", shown_size(report.allocated << header.cluster_bits));
    line(
        "volume",
        format!(
            "{}, {} in use",
            shown_size(length),
            shown_size(report.used << header.cluster_bits)
        ),
    );
    line("cluster size", shown_size(header.cluster()));
    line("backing", name.clone().unwrap_or_else(|| "none".into()));
    line("snapshots", header.snapshots.to_string());
    line("marked", marks(&header).to_owned());
    line("check", verdict);
    for message in &report.messages {
        let _ = writeln!(text, "  {message}");
    }
    let value = json!({
        "place": place.text,
        "virtual_bytes": header.size,
        "allocated_bytes": report.allocated << header.cluster_bits,
        "used_bytes": report.used << header.cluster_bits,
        "volume_bytes": length,
        "cluster_bytes": header.cluster(),
        "backing": name,
        "snapshots": header.snapshots,
        "dirty": header.is_dirty(),
        "corrupt": header.is_corrupt(),
        "check": { "errors": report.errors, "leaks": report.leaks, "messages": report.messages },
    });
    Ok((text, value))
}

fn marks(header: &Header) -> &'static str {
    match (header.is_dirty(), header.is_corrupt()) {
        (false, false) => "clean",
        (true, false) => "dirty: run qemu-img check -r all",
        (false, true) => "corrupt: only read",
        (true, true) => "dirty and corrupt",
    }
}

/// The name of the backing file, if the header's first bytes have it.
fn backing_name(header: &Header, bytes: &[u8]) -> Option<String> {
    let (offset, len) = header.backing_name;
    let start = usize::try_from(offset).ok()?;
    let name = bytes.get(start..)?.get(..usize::try_from(len).ok()?)?;
    header.has_backing().then(|| String::from_utf8_lossy(name).into_owned())
}

/// Makes a raw disk with partitions.
fn make_table(file: &Path, partitions: &[String], sector: u64) -> Result<(String, Value)> {
    let block = match sector {
        512 => LogicalBlockSize::Lb512,
        4096 => LogicalBlockSize::Lb4096,
        _ => return Err(DiskToolError::Other("a sector has 512 or 4096 bytes".into())),
    };
    let mut wanted = Vec::new();
    for text in partitions {
        let (name, bytes) = text.split_once('=').ok_or_else(|| {
            DiskToolError::Other(format!("`{text}`: write NAME=SIZE, such as root=2G"))
        })?;
        // The same rules as in system files.
        parse_volume(&format!("gpt:{name}"))?;
        if wanted.iter().any(|(other, _)| *other == name) {
            return Err(DiskToolError::Other(format!("two partitions `{name}`")));
        }
        wanted.push((name, bytes_of(bytes)?.next_multiple_of(ALIGNMENT)));
    }
    let total = wanted.iter().map(|(_, bytes)| bytes).sum::<u64>() + 2 * ALIGNMENT;
    let other = |error: &dyn std::fmt::Display| {
        DiskToolError::Other(format!("{}: {error}", file.display()))
    };
    let mut options = File::options();
    let opened = options.read(true).write(true).create_new(true).open(file);
    let mut device = opened.map_err(in_file(file))?;
    device.set_len(total).map_err(in_file(file))?;
    // A size that the old table cannot say is said to be the largest one.
    let last = u32::try_from(total / sector - 1).unwrap_or(u32::MAX);
    ProtectiveMBR::with_lb_size(last).overwrite_lba0(&mut device).map_err(|it| other(&it))?;
    let config = GptConfig::new().writable(true).logical_block_size(block);
    let mut table = config.create_from_device(&mut device, None).map_err(|it| other(&it))?;
    let mut start = ALIGNMENT;
    let mut lines = format!("{}: {}\n", file.display(), shown_size(total));
    let mut values = Vec::new();
    for (number, (name, bytes)) in (1..).zip(&wanted) {
        let (first, count) = (start / sector, bytes / sector);
        let added = table.add_partition_at(name, number, first, count, LINUX_FS, 0);
        added.map_err(|it| other(&it))?;
        let _ = writeln!(lines, "  gpt:{name:<20} {:>10}", shown_size(*bytes));
        values.push(json!({ "name": name, "offset": start, "bytes": bytes }));
        start += bytes;
    }
    table.write().map_err(|it| other(&it))?;
    Ok((lines, json!({ "file": file, "bytes": total, "partitions": values })))
}
