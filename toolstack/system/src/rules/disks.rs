//! Rules of the disks that the machine emulates.

use super::guests::Once;
use super::{Checked, Rules, models, schema};
use crate::machine::{DiskContent, FileFormat, MachineDisk, Partition};
use crate::names::bdf_text;
use axolotl_abi::drivers::Service;
use axolotl_abi::volume;
use toml::Spanned;

const MIB: u64 = 1 << 20;
/// What a GPT needs beside its partitions: a MiB at either end, for both copies of the table and
/// the alignment.
const GPT_BYTES: u64 = 2 * MIB;
/// Largest disk: what a sparse file on any usual file system can be.
const MAX_BYTES: u64 = 8 << 40;
/// Longest serial number: NVMe's, ATA's and virtio's field.
const MAX_SERIAL: usize = 20;
/// Most characters of a partition's name.
const MAX_PARTITION_NAME: usize = 36;
/// Most partitions: the usual table's entries.
const MAX_PARTITIONS: usize = 128;

/// Most disks of a controller.
fn most_disks(model: &str) -> usize {
    match model {
        "nvme" => 16,
        "ahci" => 6,
        _ => 1,
    }
}

impl Rules<'_> {
    /// The emulated disks; `slots` are the places of other devices.
    pub(super) fn machine_disks(
        &self,
        disks: &[Spanned<schema::MachineDisk>],
        slots: &mut Once<u32>,
    ) -> Checked<Vec<MachineDisk>> {
        let mut files = Once::new();
        let mut done: Vec<MachineDisk> = Vec::new();
        for disk in disks {
            let d = disk.get_ref();
            let made = self.machine_disk(d, done.len())?;
            let shares = done.iter().filter(|other| other.bdf == made.bdf).count();
            let same = done.iter().all(|other| other.bdf != made.bdf || other.model == made.model);
            let place = bdf_text(made.bdf);
            if (shares == 0 && slots.taken(made.bdf, &made.model).is_some()) || !same {
                let message = format!("two cards at {place}");
                return self.refuse(d.bdf.span(), message, "give each its own `bdf`");
            }
            if shares == most_disks(&made.model) {
                let message = format!("too many disks at the {} at {place}", made.model);
                let hint = format!("it has at most {}", most_disks(&made.model));
                return self.refuse(d.bdf.span(), message, hint);
            }
            if let Some(serial) = d.serial.as_ref().filter(|_| shares > 0 && made.model == "nvme") {
                let message = "`serial` on a further disk of an NVMe controller";
                return self.refuse(serial.span(), message, "the controller has one: its first's");
            }
            if files.taken(made.file.clone(), "").is_some() {
                let message = format!("two disks in the file `{}`", made.file);
                return self.refuse(d.file.span(), message, "give each its own");
            }
            done.push(made);
        }
        Ok(done)
    }

    fn machine_disk(&self, d: &schema::MachineDisk, index: usize) -> Checked<MachineDisk> {
        let model = self.word("model", &d.model, &models(Service::Block))?;
        let bdf = self.slot(&d.bdf)?;
        if d.file.get_ref().is_empty() {
            return self.refuse(d.file.span(), "a disk without a file", "name a file");
        }
        let sector_size = self.sector_size(d, model)?;
        let content = self.content(d)?;
        let formats = [("raw", FileFormat::Raw), ("qcow2", FileFormat::Qcow2)];
        let format = match &d.format {
            Some(format) => self.word("format", format, &formats)?,
            None => FileFormat::Raw,
        };
        let is_made = !matches!(content, DiskContent::Existing | DiskContent::Empty { .. });
        if let Some(span) = d.format.as_ref().filter(|_| is_made && format == FileFormat::Qcow2) {
            let message = "`format = \"qcow2\"` of a file with content";
            return self.refuse(span.span(), message, "content is only written to raw files");
        }
        let files = content == DiskContent::DemoFiles;
        let readonly = d.readonly.as_ref().map_or(files, |readonly| *readonly.get_ref());
        if let Some(span) = d.readonly.as_ref().filter(|_| files && !readonly) {
            let message = "a writable disk with `content`";
            return self.refuse(
                span.span(),
                message,
                "it is made anew when the files change: remove the line",
            );
        }
        Ok(MachineDisk {
            model: model.to_owned(),
            bdf,
            file: d.file.get_ref().clone(),
            format,
            readonly,
            content,
            serial: self.serial(d, index)?,
            sector_size,
        })
    }

    fn sector_size(&self, d: &schema::MachineDisk, model: &str) -> Checked<u32> {
        let Some(size) = &d.sector_size else { return Ok(512) };
        let hint = match *size.get_ref() {
            512 => return Ok(512),
            4096 if model != "ahci" => return Ok(4096),
            4096 => "the emulated AHCI controller has sectors of 512 bytes",
            _ => "it is 512 or 4096",
        };
        self.refuse(size.span(), format!("`sector_size` is {}", size.get_ref()), hint)
    }

    fn serial(&self, d: &schema::MachineDisk, index: usize) -> Checked<String> {
        let Some(serial) = &d.serial else { return Ok(format!("axolotl-{index}")) };
        let text = serial.get_ref();
        let good = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if (1..=MAX_SERIAL).contains(&text.len()) && text.chars().all(good) {
            return Ok(text.clone());
        }
        let message = format!("`{text}` is not a serial number");
        let hint = format!("1 to {MAX_SERIAL} of a-z, A-Z, 0-9, -, _ and .");
        self.refuse(serial.span(), message, hint)
    }

    fn content(&self, d: &schema::MachineDisk) -> Checked<DiskContent> {
        if let Some(content) = &d.content {
            let known = [("demo-files", DiskContent::DemoFiles)];
            let names: Vec<_> = known.iter().map(|(name, _)| (*name, *name)).collect();
            let name = self.word("content", content, &names)?;
            let other = d.size.as_ref().map(Spanned::span);
            if let Some(span) = other.or_else(|| d.partitions.first().map(Spanned::span)) {
                let message = "`size` or `partitions` beside `content`";
                return self.refuse(span, message, "the content decides both: remove the line");
            }
            let found = known.into_iter().find(|(known, _)| *known == name);
            return Ok(found.map_or(DiskContent::Existing, |(_, content)| content));
        }
        let size = d.size.as_ref().map(|size| self.size("size", size)).transpose()?;
        if d.partitions.is_empty() {
            return Ok(size.map_or(DiskContent::Existing, |bytes| DiskContent::Empty { bytes }));
        }
        let partitions = self.partitions(&d.partitions)?;
        let needed = partitions.iter().map(|partition| partition.bytes).sum::<u64>() + GPT_BYTES;
        let bytes = size.unwrap_or(needed);
        if let Some(span) = d.size.as_ref().filter(|_| bytes < needed) {
            let message = format!("the partitions do not fit into {}", span.get_ref());
            let hint = format!("with the table they need {}M", needed / MIB);
            return self.refuse(span.span(), message, hint);
        }
        Ok(DiskContent::Partitions { bytes, partitions })
    }

    fn partitions(&self, list: &[Spanned<schema::Partition>]) -> Checked<Vec<Partition>> {
        if let Some(partition) = list.get(MAX_PARTITIONS) {
            let hint = format!("at most {MAX_PARTITIONS}");
            return self.refuse(partition.span(), "too many partitions", hint);
        }
        let mut names = Once::new();
        let mut one = |partition: &Spanned<schema::Partition>| {
            let partition = partition.get_ref();
            let (name, span) = (partition.name.get_ref(), partition.name.span());
            if !(1..=MAX_PARTITION_NAME).contains(&name.encode_utf16().count()) {
                let message = format!("`{name}` cannot name a partition");
                let hint = format!("a name has 1 to {MAX_PARTITION_NAME} characters");
                return self.refuse(span, message, hint);
            }
            if names.taken(name.clone(), "").is_some() {
                let message = format!("two partitions are named `{name}`");
                return self.refuse(span, message, "volumes are found by these names");
            }
            Ok(Partition {
                name: name.clone(),
                bytes: self.size("size", &partition.size)?,
                cow_bytes: partition.cow.as_ref().map(|cow| self.size("cow", cow)).transpose()?,
            })
        };
        list.iter().map(&mut one).collect()
    }

    /// A size in whole MiB.
    fn size(&self, key: &str, text: &Spanned<String>) -> Checked<u64> {
        let size = volume::size(text.get_ref());
        match size.filter(|size| *size > 0 && size % MIB == 0 && *size <= MAX_BYTES) {
            Some(size) => Ok(size),
            None => {
                let message = format!("`{key}` is `{}`", text.get_ref());
                self.refuse(text.span(), message, "write whole MiB, such as 64M or 2G, up to 8T")
            }
        }
    }
}
