//! The guest's configuration: words `key=value` from `extra` of the system file.
//!
//! | key          | default      | meaning                                                         |
//! |--------------|--------------|-----------------------------------------------------------------|
//! | `mode`       | `run`        | `run`, `verify` (what the last run left) or `resume` (both)     |
//! | `seed`       | 1            | which stream of requests                                        |
//! | `area`       | `0+32768`    | first sector and number of sectors; cut off at the disk's end   |
//! | `requests`   | endless      | how many requests to make, then verify everything and end       |
//! | `scan_every` | never        | verify everything each time that so many requests were made     |
//! | `depth`      | 32           | most requests in flight, 1 to 192                               |
//! | `max_sectors`| what fits    | most sectors of a request                                       |
//! | `reads`, `flushes`, `discards` | 500, 20, 10 | of 1000 requests; the rest write               |
//! | `fill`       | `yes`        | whether the first requests write the whole area                 |
//! | `grants`     | `persistent` | or `request`                                                    |
//! | `queues`, `ring_order`, `indirect`, `buffers` | 1, 0, 32, 256 | of the frontend              |
//! | `report_ms`  | 1000         | how often to report                                             |
//! | `end`        | `poweroff`   | or `stay`: what to do when all is done                          |
//!
//! `xvdb:seed=2` is for the disk `xvdb` alone, and counts more than what is for all disks.
//! `xvdb:use=no` leaves a disk alone.

use crate::engine::{MAX_DEPTH, Mode, Options};
use crate::sector::Owner;
use crate::stream::{LOG_SECTORS, Parameters, WEIGHTS};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::str::FromStr;
use domain_api::disk::Geometry;

/// What is wrong with a configuration, for its author.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ConfigError(pub String);

impl core::fmt::Display for ConfigError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(&self.0)
    }
}

impl core::error::Error for ConfigError {}

/// What is configured for one disk.
#[derive(Clone, PartialEq, Eq, Debug)]
#[expect(missing_docs, reason = "the keys of the table above")]
pub struct DiskConfig {
    pub used: bool,
    pub mode: Mode,
    pub seed: u64,
    pub area: u64,
    pub area_sectors: u64,
    pub requests: Option<u32>,
    pub scan_every: Option<u32>,
    pub depth: u32,
    pub max_sectors: u32,
    pub reads: u32,
    pub flushes: u32,
    pub discards: u32,
    pub fill: bool,
    pub persistent: bool,
    pub queues: u16,
    pub ring_order: u8,
    pub indirect: u16,
    pub buffers: u16,
}

impl Default for DiskConfig {
    fn default() -> Self {
        Self {
            used: true,
            mode: Mode::Run,
            seed: 1,
            area: 0,
            area_sectors: 32768,
            requests: None,
            scan_every: None,
            depth: 32,
            max_sectors: u32::MAX,
            reads: 500,
            flushes: 20,
            discards: 10,
            fill: true,
            persistent: true,
            queues: 1,
            ring_order: 0,
            indirect: 32,
            buffers: 256,
        }
    }
}

fn parse<T: FromStr>(word: &str, value: &str, example: &str) -> Result<T, ConfigError> {
    let error =
        |_| ConfigError(format!("`{word}` is not understood; write for instance {example}"));
    value.parse().map_err(error)
}

fn choose<T: Copy>(word: &str, value: &str, choices: &[(&str, T)]) -> Result<T, ConfigError> {
    let found = choices.iter().find(|(name, _)| *name == value).map(|(_, choice)| *choice);
    found.ok_or_else(|| {
        let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
        ConfigError(format!("`{word}` is not understood; it is one of {}", names.join(", ")))
    })
}

impl DiskConfig {
    fn set(&mut self, word: &str, key: &str, value: &str) -> Result<(), ConfigError> {
        let bool_words = [("yes", true), ("no", false)];
        match key {
            "use" => self.used = choose(word, value, &bool_words)?,
            "mode" => {
                let modes =
                    [("run", Mode::Run), ("verify", Mode::Verify), ("resume", Mode::VerifyThenRun)];
                self.mode = choose(word, value, &modes)?;
            }
            "seed" => self.seed = parse(word, value, "7")?,
            "area" => {
                let (first, sectors) = value.split_once('+').unwrap_or(("?", value));
                self.area = parse(word, first, "0+32768")?;
                self.area_sectors = parse(word, sectors, "0+32768")?;
            }
            "requests" => self.requests = Some(parse(word, value, "100000")?),
            "scan_every" => self.scan_every = Some(parse(word, value, "10000")?),
            "depth" => self.depth = parse::<u32>(word, value, "32")?.clamp(1, MAX_DEPTH),
            "max_sectors" => self.max_sectors = parse(word, value, "256")?,
            "reads" => self.reads = parse(word, value, "500")?,
            "flushes" => self.flushes = parse(word, value, "20")?,
            "discards" => self.discards = parse(word, value, "10")?,
            "fill" => self.fill = choose(word, value, &bool_words)?,
            "grants" => {
                let policies = [("persistent", true), ("request", false)];
                self.persistent = choose(word, value, &policies)?;
            }
            "queues" => self.queues = parse(word, value, "2")?,
            "ring_order" => self.ring_order = parse(word, value, "1")?,
            "indirect" => self.indirect = parse(word, value, "32")?,
            "buffers" => self.buffers = parse(word, value, "256")?,
            _ => return Err(ConfigError(format!("`{word}` is not known"))),
        }
        let weights = [self.reads, self.flushes, self.discards];
        if weights
            .iter()
            .try_fold(0_u32, |sum, it| sum.checked_add(*it))
            .is_none_or(|it| it > WEIGHTS)
        {
            return Err(ConfigError(format!("`{word}`: the weights are parts of {WEIGHTS}")));
        }
        Ok(())
    }

    /// What an engine shall do with a disk.
    ///
    /// # Errors
    /// The disk is too small, read-only, or too few pages are configured.
    pub fn options(&self, disk: &Geometry, owner: Owner) -> Result<Options, ConfigError> {
        if disk.read_only && self.mode != Mode::Verify {
            return Err(ConfigError("the disk is read-only".to_string()));
        }
        let unit = disk.sector_size / 512;
        let whole = |sectors: u64| sectors - sectors % u64::from(unit.max(1));
        // Data may begin with the last sector of a page.
        let skew = if unit == 1 { 7 } else { 0 };
        let parts = u32::from(disk.max_buffers).min(u32::from(self.buffers).saturating_sub(1));
        let most = (parts * 8).saturating_sub(skew).min(disk.max_sectors).min(self.max_sectors);
        let max_sectors = u32::try_from(whole(most.into())).unwrap_or(0);
        let room = disk.sectors.saturating_sub(self.area);
        let parameters = Parameters {
            seed: self.seed,
            area: self.area,
            area_sectors: whole(self.area_sectors.min(room)),
            max_sectors,
            unit,
            reads: self.reads,
            flushes: self.flushes,
            discards: if disk.max_discard_sectors == 0 { 0 } else { self.discards },
            fill: self.fill.into(),
        };
        if !parameters.is_sound() {
            let least = LOG_SECTORS + u64::from(max_sectors);
            return Err(ConfigError(format!(
                "no test in {} sectors from {} with requests of up to {max_sectors}; {least} are needed",
                parameters.area_sectors, self.area
            )));
        }
        let Self { mode, depth, requests, scan_every, .. } = *self;
        Ok(Options { parameters, owner, mode, depth, requests, scan_every })
    }
}

/// The configuration.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Config {
    /// Words for disks: for which one, the key, the value.
    words: Vec<(Option<String>, String, String)>,
    /// How often to report.
    pub report_ms: u64,
    /// Whether to stay when all is done.
    pub stay: bool,
}

impl Config {
    /// Reads a configuration. Lines that begin with `#` are comments.
    ///
    /// # Errors
    /// An unknown key, or a value that does not fit its key.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let mut config = Self { words: Vec::new(), report_ms: 1000, stay: false };
        let lines = text.lines().filter(|line| !line.trim_start().starts_with('#'));
        for word in lines.flat_map(str::split_whitespace) {
            let (name, value) = word.split_once('=').unwrap_or((word, ""));
            match name {
                "report_ms" => config.report_ms = parse(word, value, "1000")?,
                "end" => config.stay = choose(word, value, &[("stay", true), ("poweroff", false)])?,
                _ => {
                    let (disk, key) = match name.split_once(':') {
                        Some((disk, key)) => (Some(disk.to_string()), key),
                        None => (None, name),
                    };
                    DiskConfig::default().set(word, key, value)?;
                    config.words.push((disk, key.to_string(), value.to_string()));
                }
            }
        }
        config.for_disk("")?;
        Ok(config)
    }

    /// What is configured for the disk `name`, such as `xvda`.
    ///
    /// # Errors
    /// The words for it do not fit each other.
    pub fn for_disk(&self, name: &str) -> Result<DiskConfig, ConfigError> {
        let mut disk = DiskConfig::default();
        for own in [false, true] {
            for (_, key, value) in self.words.iter().filter(|(of, ..)| match of {
                Some(of) => own && of == name,
                None => !own,
            }) {
                disk.set(&format!("{key}={value}"), key, value)?;
            }
        }
        Ok(disk)
    }
}

/// What the disk with this number is called: 51712 is `xvda` (`xen/docs/man/xen-vbd-interface.7`).
#[must_use]
pub fn disk_name(number: u32) -> String {
    let disk = match number {
        _ if number >> 28 == 1 => (number & 0x0fff_ffff) >> 8,
        _ if number >> 8 == 202 => (number & 0xff) >> 4,
        _ => return format!("vbd-{number}"),
    };
    let letter = |at: u32| char::from(b'a' + u8::try_from(at % 26).unwrap_or(0));
    match disk {
        0..26 => format!("xvd{}", letter(disk)),
        26..702 => format!("xvd{}{}", letter(disk / 26 - 1), letter(disk)),
        _ => format!("vbd-{number}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GEOMETRY: Geometry = Geometry {
        sectors: 100_000,
        sector_size: 512,
        physical_sector_size: 512,
        read_only: false,
        volatile_cache: true,
        max_discard_sectors: 0,
        max_write_zeroes_sectors: 0,
        max_sectors: 256,
        max_buffers: 32,
        whole_pages: false,
        queue_depth: 32,
    };

    #[test]
    fn a_disks_own_words_count_more() {
        let config = Config::parse("xvdb:seed=9 seed=3 # no comment\n# seed=8\ngrants=request");
        assert!(config.is_err(), "`#` begins a comment only at the start of a line");
        let config =
            Config::parse("xvdb:seed=9 seed=3\n# seed=8\ngrants=request end=stay").unwrap();
        let (a, b) = (config.for_disk("xvda").unwrap(), config.for_disk("xvdb").unwrap());
        assert_eq!((a.seed, b.seed, a.persistent, b.persistent), (3, 9, false, false));
        assert!(config.stay);
    }

    #[test]
    fn mistakes_are_named() {
        for (text, part) in [
            ("sed=1", "`sed=1` is not known"),
            ("area=5", "0+32768"),
            ("mode=walk", "one of run, verify, resume"),
            ("reads=900 discards=200", "parts of 1000"),
            ("xvda:queues=x", "`xvda:queues=x`"),
        ] {
            let error = Config::parse(text).expect_err(text).to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn options_fit_the_disk() {
        let owner = Owner { disk: 1, run: 2 };
        let options = |config: &DiskConfig, disk: &Geometry| config.options(disk, owner);
        let plain = DiskConfig::default();
        let found = options(&plain, &GEOMETRY).unwrap().parameters;
        assert_eq!((found.max_sectors, found.discards, found.area_sectors), (249, 0, 32768));
        let large = Geometry { sector_size: 4096, max_buffers: 11, ..GEOMETRY };
        let found = options(&plain, &large).unwrap().parameters;
        assert_eq!((found.max_sectors, found.unit), (88, 8));
        let small = Geometry { sectors: 300, ..GEOMETRY };
        assert!(options(&plain, &small).unwrap_err().to_string().contains("377 are needed"));
        let locked = Geometry { read_only: true, ..GEOMETRY };
        assert!(options(&plain, &locked).is_err());
    }

    #[test]
    fn disks_have_their_usual_names() {
        for (number, name) in [
            (51712, "xvda"),
            (51728, "xvdb"),
            (51952, "xvdp"),
            (1 << 28 | 16 << 8, "xvdq"),
            (1 << 28 | 26 << 8, "xvdaa"),
            (5, "vbd-5"),
        ] {
            assert_eq!(disk_name(number), name);
        }
    }

    proptest! {
        #[test]
        fn no_text_is_too_strange(text in "\\PC*") {
            let _ = Config::parse(&text);
        }
    }
}
