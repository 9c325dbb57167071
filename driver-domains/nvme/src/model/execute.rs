//! What commands do.

use super::{Pending, State};
use crate::command::{CNS_ACTIVE, CNS_CONTROLLER, CNS_NAMESPACE, FEATURE_QUEUES, nvm};
use crate::status::Status;
use alloc::vec;
use alloc::vec::Vec;
use domain_api::Page;
use xen_abi::PAGE_SIZE;

/// Dwords of an entry of the error log, less one.
const LOG_DWORDS: u32 = 15;

impl State {
    fn lookup(&self, address: u64) -> (Page, usize) {
        let found = (self.memory)(address);
        found.unwrap_or_else(|| panic!("driver: no memory at {address:#x}"))
    }

    /// The page that an admin command names.
    fn page(&self, address: u64) -> Page {
        assert_eq!(address % PAGE_SIZE as u64, 0, "driver: {address:#x} is not a page's start");
        self.lookup(address).0
    }

    /// The memory that an I/O command names (section 4.3).
    pub(super) fn data(&self, command: &Pending) -> Vec<(Page, usize, usize)> {
        let (first, second) = (command.words[3], command.words[4]);
        let bytes = match command.opcode() {
            nvm::READ | nvm::WRITE => self.transfer_bytes(command),
            nvm::DATASET_MANAGEMENT => 16 * ((command.dword(10) as usize & 0xff) + 1),
            _ => 0,
        };
        if bytes == 0 {
            return Vec::new();
        }
        assert_eq!(first % 4, 0, "driver: PRP entry 1 is {first:#x}");
        let (page, at) = self.lookup(first);
        let part = bytes.min(PAGE_SIZE - at);
        let mut memory = vec![(page, at, part)];
        let left = bytes - part;
        if left == 0 {
            assert_eq!(second, 0, "driver: PRP entry 2 without need");
        } else if left <= PAGE_SIZE {
            memory.push((self.page(second), 0, left));
        } else {
            self.list(second, left, &mut memory);
        }
        memory
    }

    fn transfer_bytes(&self, command: &Pending) -> usize {
        let disk = self.disks.iter().find(|disk| disk.id == command.namespace());
        let blocks = (command.dword(12) as usize & 0xffff) + 1;
        let bytes = disk.map_or(0, |disk| blocks * disk.block_bytes());
        let most = PAGE_SIZE << self.setup.mdts;
        assert!(self.setup.mdts == 0 || bytes <= most, "driver: {bytes} bytes are more than MDTS");
        bytes
    }

    fn list(&self, mut at: u64, mut left: usize, memory: &mut Vec<(Page, usize, usize)>) {
        assert_eq!(at % 8, 0, "driver: a PRP list at {at:#x}");
        while left != 0 {
            let last_of_page = at % PAGE_SIZE as u64 == PAGE_SIZE as u64 - 8;
            let (page, offset) = self.lookup(at);
            let mut entry = [0; 8];
            page.read(offset, &mut entry);
            let entry = u64::from_le_bytes(entry);
            if last_of_page && left > PAGE_SIZE {
                at = entry;
                continue;
            }
            let part = left.min(PAGE_SIZE);
            memory.push((self.page(entry), 0, part));
            left -= part;
            at += 8;
        }
    }

    /// Does an I/O command.
    pub(super) fn execute(&mut self, command: &Pending) -> Status {
        let opcode = command.opcode();
        let volatile = self.setup.volatile_cache;
        let known = match opcode {
            nvm::DATASET_MANAGEMENT => self.setup.discard,
            nvm::WRITE_ZEROES => self.setup.write_zeroes,
            _ => true,
        };
        let Some(disk) = self.disks.iter_mut().find(|disk| disk.id == command.namespace()) else {
            return Status::INVALID_NAMESPACE.final_one();
        };
        if !known {
            return Status::INVALID_OPCODE.final_one();
        }
        if opcode == nvm::FLUSH {
            disk.flush();
            return Status::SUCCESS;
        }
        if disk.read_only && opcode != nvm::READ {
            return Status::NAMESPACE_WRITE_PROTECTED.final_one();
        }
        let (first, count) = match opcode {
            nvm::DATASET_MANAGEMENT => discarded(command),
            _ => (command.words[5], u64::from(command.dword(12) & 0xffff) + 1),
        };
        if first.checked_add(count).is_none_or(|end| end > disk.blocks) {
            return Status::LBA_OUT_OF_RANGE.final_one();
        }
        let size = disk.block_bytes();
        match opcode {
            nvm::READ => {
                let bytes: Vec<u8> = (first..first + count).flat_map(|b| disk.read(b)).collect();
                scatter(&command.memory, &bytes);
            }
            nvm::WRITE => {
                let bytes = gather(&command.memory);
                let blocks = (first..).zip(bytes.chunks_exact(size));
                blocks.for_each(|(block, bytes)| disk.write(block, bytes));
            }
            nvm::WRITE_ZEROES | nvm::DATASET_MANAGEMENT => {
                (first..first + count).for_each(|block| disk.write(block, &vec![0; size]));
            }
            _ => return Status::INVALID_OPCODE.final_one(),
        }
        if !volatile {
            disk.flush();
        }
        Status::SUCCESS
    }

    pub(super) fn identify(&self, command: &Pending) -> Status {
        let mut bytes = vec![0; PAGE_SIZE];
        match command.dword(10) & 0xff {
            CNS_CONTROLLER => self.describe_controller(&mut bytes),
            CNS_NAMESPACE => match self.describe_namespace(command.namespace(), &mut bytes) {
                Some(()) => {}
                None => return Status::INVALID_NAMESPACE.final_one(),
            },
            CNS_ACTIVE if self.setup.version >= crate::registers::VS_1_1 => {
                let mut ids: Vec<u32> = self.disks.iter().map(|disk| disk.id).collect();
                ids.sort_unstable();
                for (entry, id) in bytes.chunks_exact_mut(4).zip(ids) {
                    entry.copy_from_slice(&id.to_le_bytes());
                }
            }
            _ => return Status::INVALID_FIELD.final_one(),
        }
        self.page(command.words[3]).write(0, &bytes);
        Status::SUCCESS
    }

    fn describe_controller(&self, bytes: &mut [u8]) {
        bytes[4..24].copy_from_slice(b"AX-1                ");
        bytes[24..64].copy_from_slice(b"Model controller                        ");
        bytes[64..72].copy_from_slice(b"1.0     ");
        bytes[77] = self.setup.mdts;
        bytes[512] = 0x66;
        bytes[513] = 0x44;
        let last = self.disks.iter().map(|disk| disk.id).max().unwrap_or(0);
        bytes[516..520].copy_from_slice(&last.to_le_bytes());
        bytes[520] = u8::from(self.setup.discard) << 2 | u8::from(self.setup.write_zeroes) << 3;
        bytes[525] = u8::from(self.setup.volatile_cache);
    }

    /// In a format that is not the first, so that a driver has to look which one it is.
    fn describe_namespace(&self, id: u32, bytes: &mut [u8]) -> Option<()> {
        let disk = self.disks.iter().find(|disk| disk.id == id)?;
        bytes[0..8].copy_from_slice(&disk.blocks.to_le_bytes());
        bytes[8..16].copy_from_slice(&disk.blocks.to_le_bytes());
        bytes[25] = 3;
        bytes[26] = 2;
        bytes[29] = disk.protection;
        if let Some(preferred) = disk.preferred {
            bytes[24] = 1 << 4;
            bytes[64..66].copy_from_slice(&preferred.to_le_bytes());
        }
        bytes[99] = u8::from(disk.read_only);
        bytes[136..138].copy_from_slice(&disk.metadata.to_le_bytes());
        bytes[138] = disk.block_shift;
        Some(())
    }

    pub(super) fn set_features(&self, command: &Pending) -> (Status, u32) {
        let wanted = command.dword(11);
        assert_eq!(command.dword(10), FEATURE_QUEUES, "driver: an unknown feature");
        assert!(wanted & 0xffff != 0xffff && wanted >> 16 != 0xffff, "driver: too many queues");
        let granted = u32::from(self.setup.queue_pairs) - 1;
        (Status::SUCCESS, granted << 16 | granted)
    }

    fn new_queue(&self, command: &Pending) -> (u16, u16) {
        let [queue, entries] = command.halves(10);
        assert!((1..=self.setup.queue_pairs).contains(&queue), "driver: queue {queue}");
        assert!(entries > 0 && entries < self.setup.queue_entries, "driver: a queue's size");
        assert!(command.dword(11) & 1 != 0, "driver: a queue that is not contiguous");
        let _ = self.page(command.words[3]);
        (queue, entries + 1)
    }

    pub(super) fn create_completions(&mut self, command: &Pending) -> Status {
        let (queue, entries) = self.new_queue(command);
        let vector = command.halves(11)[1];
        assert!(command.dword(11) & 2 != 0, "driver: a queue without interrupts");
        assert!(vector < self.setup.vectors, "driver: no vector {vector}");
        self.add_completions(queue, command.words[3], entries, vector);
        Status::SUCCESS
    }

    pub(super) fn create_submissions(&mut self, command: &Pending) -> Status {
        let (queue, entries) = self.new_queue(command);
        let completions = command.halves(11)[1];
        assert!(
            completions != 0 && self.completions.contains_key(&completions),
            "driver: no completion queue {completions}"
        );
        self.add_submissions(queue, command.words[3], entries, completions);
        Status::SUCCESS
    }

    pub(super) fn read_log(&self, command: &Pending) -> Status {
        assert_eq!(command.dword(10), LOG_DWORDS << 16 | 1, "driver: an unknown log");
        let newest = self.errors.last().copied().unwrap_or([0; 64]);
        self.page(command.words[3]).write(0, &newest);
        Status::SUCCESS
    }

    /// 1 when there is no such command.
    pub(super) fn abort(&mut self, command: &Pending) -> u32 {
        let [queue, id] = command.halves(10);
        match self.pending.iter().position(|it| (it.queue, it.id) == (queue, id)) {
            Some(place) => {
                self.pending.remove(place);
                self.post(queue, id, Status::ABORT_REQUESTED, 0);
                0
            }
            None => 1,
        }
    }
}

/// First block and number of blocks of a discard's only range.
fn discarded(command: &Pending) -> (u64, u64) {
    assert_eq!(command.dword(11), 1 << 2, "driver: dataset management that does not deallocate");
    let bytes = gather(&command.memory);
    let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
    (word(8), word(0) >> 32)
}

fn gather(memory: &[(Page, usize, usize)]) -> Vec<u8> {
    let mut all = Vec::new();
    for (page, at, len) in memory {
        let mut bytes = vec![0; *len];
        page.read(*at, &mut bytes);
        all.extend(bytes);
    }
    all
}

fn scatter(memory: &[(Page, usize, usize)], mut bytes: &[u8]) {
    for (page, at, len) in memory {
        let (part, rest) = bytes.split_at(*len);
        page.write(*at, part);
        bytes = rest;
    }
}
