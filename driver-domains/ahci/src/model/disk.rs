//! Disks of the model: content, cache, commands, faults.

use super::State;
use crate::command::{BLOCK, ata};
use crate::registers as reg;
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::format;
use alloc::vec::Vec;
use domain_api::Page;

/// What a disk holds: only sectors that are not zero, by number.
pub type Content = BTreeMap<u64, Vec<u8>>;

/// What is wrong with a disk. Numbers are how many more commands it happens to.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// Sectors that cannot be read or written.
    pub bad: BTreeSet<u64>,
    /// Transfers that are damaged on the link.
    pub damaged: u32,
    /// Commands that get no answer.
    pub hangs: u32,
    /// Commands at which the link fails.
    pub interface: u32,
    /// Commands that end in a device fault.
    pub device_faults: u32,
    /// Flushes that fail.
    pub flushes: u32,
    /// There is no log of errors.
    pub no_log: bool,
    /// The log's checksum is wrong.
    pub bad_log: bool,
    /// It is never ready.
    pub never_ready: bool,
    /// Its link does not come up again after a reset.
    pub no_link: bool,
    /// It does not answer IDENTIFY.
    pub anonymous: bool,
}

/// A disk.
#[derive(Clone, Debug)]
pub struct ModelDisk {
    /// On the medium.
    pub medium: Content,
    /// Written, and not on the medium.
    pub cache: Content,
    /// What it says about itself.
    pub identify: [u8; BLOCK],
    /// Its signature.
    pub signature: u32,
    /// What is wrong with it.
    pub faults: Faults,
    /// How long it takes to be ready after a reset.
    pub ready_ns: u64,
    /// How long its link takes.
    pub link_ns: u64,
    /// Commands of each kind that it executed.
    pub counts: BTreeMap<u8, u32>,
    sector_bytes: usize,
    reset_at: u64,
    task_file: u32,
    /// A queued command failed: nothing but the log can be had.
    aborting: bool,
    log: [u8; BLOCK],
}

/// A command that the device has.
#[derive(Clone, Debug)]
pub struct Pending {
    pub slot: u32,
    pub queued: bool,
    pub hangs: bool,
    code: u8,
    lba: u64,
    count: u64,
    entries: Vec<(u64, usize)>,
}

impl Pending {
    /// A command that its driver waits for on the spot.
    pub fn is_own(&self) -> bool {
        matches!(self.code, ata::IDENTIFY | ata::READ_LOG_EXT)
    }
}

/// How a command ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Answer {
    Done,
    Hangs,
    Failed,
    Interface,
}

const STATUS_GOOD: u32 = 0x50;

fn set_word(identify: &mut [u8; BLOCK], word: usize, value: u16) {
    identify[2 * word..2 * word + 2].copy_from_slice(&value.to_le_bytes());
}

impl ModelDisk {
    /// A disk of `lbas` sectors of `sector_bytes`, with a cache, NCQ of depth 32 and trim.
    #[must_use]
    pub fn new(lbas: u64, sector_bytes: usize) -> Self {
        let mut identify = [0; BLOCK];
        let words: &[(usize, u16)] = &[
            (49, 1 << 8 | 1 << 9),
            (75, 31),
            (76, 1 << 8),
            (82, 1 << 5),
            (83, 1 << 14 | 1 << 13 | 1 << 12 | 1 << 10),
            (85, 1 << 5),
            (105, 1),
            (169, 1),
        ];
        for (word, value) in words {
            set_word(&mut identify, *word, *value);
        }
        identify[200..208].copy_from_slice(&lbas.to_le_bytes());
        identify[20..40].copy_from_slice(b"S1MODEL             ");
        identify[54..94].copy_from_slice(b"oMed lidks                              ");
        if sector_bytes != 512 {
            set_word(&mut identify, 106, 1 << 14 | 1 << 12);
            let words = u32::try_from(sector_bytes / 2).expect("a small number");
            identify[234..238].copy_from_slice(&words.to_le_bytes());
        }
        Self {
            medium: Content::new(),
            cache: Content::new(),
            identify,
            signature: reg::SIG_ATA,
            faults: Faults::default(),
            ready_ns: 10_000,
            link_ns: 10_000,
            counts: BTreeMap::new(),
            sector_bytes,
            reset_at: 0,
            task_file: 0,
            aborting: false,
            log: [0; BLOCK],
        }
    }

    /// Changes a word of what it says about itself.
    #[must_use]
    pub fn word(mut self, word: usize, value: u16) -> Self {
        set_word(&mut self.identify, word, value);
        self
    }

    /// What a reader sees: the cache over the medium.
    #[must_use]
    pub fn content(&self) -> Content {
        let mut content = self.medium.clone();
        content.extend(self.cache.clone());
        content.retain(|_, bytes| bytes.iter().any(|byte| *byte != 0));
        content
    }

    /// How often it executed a command.
    #[must_use]
    pub fn count(&self, code: u8) -> u32 {
        self.counts.get(&code).copied().unwrap_or(0)
    }

    pub(super) fn reset(&mut self, now: u64) {
        self.reset_at = now;
        self.task_file = STATUS_GOOD;
        self.aborting = false;
    }

    pub(super) fn link(&self, now: u64) -> u32 {
        let is_down = self.faults.no_link && self.reset_at != 0;
        match now.saturating_sub(self.reset_at) {
            waited if waited >= self.link_ns && !is_down => 0x133,
            _ => 0,
        }
    }

    pub(super) fn task_file(&self, now: u64) -> u32 {
        let ready = now.saturating_sub(self.reset_at) >= self.ready_ns + self.link_ns;
        if ready && !self.faults.never_ready { self.task_file } else { 0x80 }
    }

    fn write(&mut self, lba: u64, bytes: &[u8]) {
        for (lba, sector) in (lba..).zip(bytes.chunks_exact(self.sector_bytes)) {
            self.cache.insert(lba, sector.to_vec());
        }
    }

    fn read(&self, lba: u64, bytes: &mut [u8]) {
        for (lba, sector) in (lba..).zip(bytes.chunks_exact_mut(self.sector_bytes)) {
            match self.cache.get(&lba).or_else(|| self.medium.get(&lba)) {
                Some(content) => sector.copy_from_slice(content),
                None => sector.fill(0),
            }
        }
    }

    fn lbas(&self) -> u64 {
        u64::from_le_bytes(self.identify[200..208].try_into().expect("eight bytes"))
    }

    fn fail(&mut self, pending: &Pending, status: u8, error: u8) -> Answer {
        let status = status | reg::STATUS_ERR | reg::STATUS_DRDY;
        self.task_file = u32::from(error) << 8 | u32::from(status);
        if pending.queued {
            self.aborting = true;
            self.log = [0; BLOCK];
            self.log[0] = u8::try_from(pending.slot).expect("a slot");
            (self.log[2], self.log[3]) = (status, error);
            let sum = self.log.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
            self.log[511] = sum.wrapping_neg();
            self.log[100] ^= u8::from(self.faults.bad_log);
        }
        Answer::Failed
    }

    /// Whether a fault strikes the command.
    fn strike(&mut self, pending: &Pending) -> Option<Answer> {
        let mut strikes = |of: fn(&mut Faults) -> &mut u32| {
            let left = of(&mut self.faults);
            let strikes = *left != 0;
            *left -= u32::from(strikes);
            strikes
        };
        if pending.is_own() {
            return None;
        }
        if strikes(|f| &mut f.hangs) {
            return Some(Answer::Hangs);
        }
        if strikes(|f| &mut f.interface) {
            return Some(Answer::Interface);
        }
        let is_flush = matches!(pending.code, ata::FLUSH_CACHE | ata::FLUSH_CACHE_EXT);
        if is_flush && strikes(|f| &mut f.flushes) {
            return Some(self.fail(pending, reg::STATUS_DF, reg::ERROR_ABRT));
        }
        let is_transfer = !is_flush && pending.code != ata::DATA_SET_MANAGEMENT;
        if is_transfer && strikes(|f| &mut f.damaged) {
            return Some(self.fail(pending, 0, reg::ERROR_ICRC | reg::ERROR_ABRT));
        }
        if is_transfer && strikes(|f| &mut f.device_faults) {
            return Some(self.fail(pending, reg::STATUS_DF, 0));
        }
        let mut sectors = pending.lba..pending.lba + pending.count;
        if is_transfer && sectors.any(|lba| self.faults.bad.contains(&lba)) {
            return Some(self.fail(pending, 0, reg::ERROR_UNC));
        }
        None
    }
}

impl State {
    /// Reads the command in a slot.
    pub(super) fn decode(&mut self, port: usize, slot: u32) -> Option<Pending> {
        let list =
            u64::from(self.port(port, reg::CLBU)) << 32 | u64::from(self.port(port, reg::CLB));
        let (page, at) = self.page(list + u64::from(slot) * 32, 32)?;
        let word = |page: &Page, at: usize| {
            let mut bytes = [0; 4];
            page.read(at, &mut bytes);
            u32::from_le_bytes(bytes)
        };
        let (first, done) = (word(&page, at), word(&page, at + 4));
        let table = u64::from(word(&page, at + 12)) << 32 | u64::from(word(&page, at + 8));
        let entries = (first >> 16) as usize;
        if list % 1024 != 0 || first & 0xffbf != 5 || done != 0 || table % 128 != 0 {
            self.violation(format!("header {first:#x} {done:#x} {table:#x}"));
        }
        let (page, at) = self.page(table, 128 + entries * 16)?;
        let mut fis = [0; 64];
        page.read(at, &mut fis);
        let mut list = Vec::new();
        for entry in 0..entries {
            let at = at + 128 + entry * 16;
            let address = u64::from(word(&page, at + 4)) << 32 | u64::from(word(&page, at));
            let count = word(&page, at + 12);
            if address % 2 != 0 || count % 2 != 1 || word(&page, at + 8) != 0 {
                self.violation(format!("entry {address:#x} {count:#x}"));
            }
            list.push((address, (count & 0x3f_ffff) as usize + 1));
        }
        let pending = self.decode_fis(slot, &fis, list);
        let writes = matches!(
            pending.code,
            ata::WRITE_FPDMA | ata::WRITE_DMA_EXT | ata::DATA_SET_MANAGEMENT
        );
        if writes != (first >> 6 & 1 == 1) {
            self.violation(format!("direction of command {:#x}", pending.code));
        }
        Some(pending)
    }

    fn decode_fis(&mut self, slot: u32, fis: &[u8; 64], entries: Vec<(u64, usize)>) -> Pending {
        let code = fis[2];
        let queued = matches!(code, ata::READ_FPDMA | ata::WRITE_FPDMA);
        let lba = [fis[4], fis[5], fis[6], fis[8], fis[9], fis[10], 0, 0];
        let feature = u16::from_le_bytes([fis[3], fis[11]]);
        let count = u16::from_le_bytes([fis[12], fis[13]]);
        let count = if queued {
            if u32::from(count) != slot << 3 {
                self.violation(format!("tag {count:#x} in slot {slot}"));
            }
            feature
        } else {
            count
        };
        if fis[0] != 0x27 || fis[1] != 0x80 || (code != ata::IDENTIFY && fis[7] != 0x40) {
            self.violation(format!("FIS {fis:x?}"));
        }
        let lba = u64::from_le_bytes(lba);
        Pending { slot, queued, hangs: false, code, lba, count: count.into(), entries }
    }

    fn with_disk<T>(&mut self, port: usize, act: impl FnOnce(&mut ModelDisk) -> T) -> T {
        act(self.ports[port].disk.as_mut().expect("commands run on disks"))
    }

    /// Executes a command.
    pub(super) fn perform(&mut self, port: usize, pending: &Pending) -> Answer {
        let reads_log = pending.code == ata::READ_LOG_EXT;
        let answer = self.with_disk(port, |disk| {
            *disk.counts.entry(pending.code).or_default() += 1;
            if disk.aborting && !reads_log {
                return Some(disk.fail(pending, 0, reg::ERROR_ABRT));
            }
            disk.strike(pending)
        });
        if let Some(answer) = answer {
            return answer;
        }
        match pending.code {
            ata::READ_FPDMA | ata::READ_DMA_EXT => self.transfer(port, pending, false),
            ata::WRITE_FPDMA | ata::WRITE_DMA_EXT => self.transfer(port, pending, true),
            ata::FLUSH_CACHE | ata::FLUSH_CACHE_EXT => self.with_disk(port, |disk| {
                let cache = core::mem::take(&mut disk.cache);
                disk.medium.extend(cache);
                Answer::Done
            }),
            ata::DATA_SET_MANAGEMENT => self.trim(port, pending),
            ata::IDENTIFY => {
                let data = self.with_disk(port, |d| (!d.faults.anonymous).then_some(d.identify));
                self.own(port, pending, data)
            }
            ata::READ_LOG_EXT => {
                let data = self.with_disk(port, |d| (!d.faults.no_log).then_some(d.log));
                if data.is_some() {
                    self.with_disk(port, |disk| disk.aborting = false);
                }
                self.own(port, pending, data)
            }
            _ => self.with_disk(port, |disk| disk.fail(pending, 0, reg::ERROR_ABRT)),
        }
    }

    fn own(&mut self, port: usize, pending: &Pending, data: Option<[u8; BLOCK]>) -> Answer {
        let Some(data) = data else {
            return self.with_disk(port, |disk| disk.fail(pending, 0, reg::ERROR_ABRT));
        };
        self.scatter(pending, &data);
        self.with_disk(port, |disk| disk.task_file = STATUS_GOOD);
        Answer::Done
    }

    fn scatter(&mut self, pending: &Pending, mut data: &[u8]) {
        for (address, len) in &pending.entries {
            let Some((page, at)) = self.page(*address, *len) else { return };
            let (part, rest) = data.split_at(*len);
            page.write(at, part);
            data = rest;
        }
    }

    fn gather(&mut self, pending: &Pending) -> Vec<u8> {
        let mut data = Vec::new();
        for (address, len) in &pending.entries {
            let Some((page, at)) = self.page(*address, *len) else { break };
            let mut part = alloc::vec![0; *len];
            page.read(at, &mut part);
            data.extend(part);
        }
        data
    }

    fn transfer(&mut self, port: usize, pending: &Pending, writes: bool) -> Answer {
        let (sector_bytes, lbas) = self.with_disk(port, |disk| (disk.sector_bytes, disk.lbas()));
        let bytes = usize::try_from(pending.count).expect("16 bits") * sector_bytes;
        if pending.entries.iter().map(|(_, len)| len).sum::<usize>() != bytes || bytes == 0 {
            self.violation(format!("{} sectors in {:x?}", pending.count, pending.entries));
            return Answer::Hangs;
        }
        if pending.lba + pending.count > lbas {
            return self.with_disk(port, |disk| disk.fail(pending, 0, reg::ERROR_IDNF));
        }
        if writes {
            let data = self.gather(pending);
            self.with_disk(port, |disk| disk.write(pending.lba, &data));
        } else {
            let mut data = alloc::vec![0; bytes];
            self.with_disk(port, |disk| disk.read(pending.lba, &mut data));
            self.scatter(pending, &data);
        }
        self.with_disk(port, |disk| disk.task_file = STATUS_GOOD);
        Answer::Done
    }

    fn trim(&mut self, port: usize, pending: &Pending) -> Answer {
        let data = self.gather(pending);
        if data.len() != BLOCK || pending.count != 1 {
            self.violation(format!("trim of {} bytes", data.len()));
        }
        let (sector_bytes, lbas) = self.with_disk(port, |disk| (disk.sector_bytes, disk.lbas()));
        for range in data.chunks_exact(8) {
            let value = u64::from_le_bytes(range.try_into().expect("eight bytes"));
            let (lba, count) = (value & 0xffff_ffff_ffff, value >> 48);
            if lba + count > lbas {
                return self.with_disk(port, |disk| disk.fail(pending, 0, reg::ERROR_IDNF));
            }
            self.with_disk(port, |disk| {
                for lba in lba..lba + count {
                    disk.cache.insert(lba, alloc::vec![0; sector_bytes]);
                }
            });
        }
        Answer::Done
    }
}
