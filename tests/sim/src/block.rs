//! The work of a guest on its disk, and the book that judges it.
//!
//! Each sector's content says which sector it is and which write it comes from. The book knows
//! which writes were submitted, acknowledged, and made durable by a flush; what a read brings,
//! and what is on the medium, must agree with it.

use crate::domain::{Domain, XenstoreRing};
use crate::random::{Random, scramble};
use crate::world::World;
use frontends::blkfront::{Blkfront, Completion, Config, Error, Operation, Part};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use xenbus::Client;

/// Bytes of a sector.
pub const SECTOR: usize = 512;
/// The number of a guest's disk: xvda.
pub const DEVICE: u32 = 51712;

/// What is known of one sector.
#[derive(Clone, Debug)]
struct Sector {
    /// Writes whose content a reader may see now; 0: zeros.
    visible: Vec<u32>,
    /// Writes whose content may be on the medium.
    durable: Vec<u32>,
    /// Last write submitted.
    last: u32,
    readers: u32,
    writer: bool,
}

/// A guest's disk as it must be.
#[derive(Clone, Debug)]
pub struct Book {
    /// Tells one guest's content from another's.
    key: u64,
    sectors: Vec<Sector>,
    /// Writes that are discards: their content is zeros.
    discards: BTreeSet<u32>,
    /// Requests acknowledged.
    pub acknowledged: u64,
    /// Without a volatile cache, what is acknowledged is durable.
    pub write_through: bool,
}

/// What a flush will have made durable: visible writes of each sector at its submission.
type Snapshot = Vec<Vec<u32>>;

impl Book {
    /// A disk of zeros.
    #[must_use]
    pub fn new(key: u64, sectors: usize, write_through: bool) -> Self {
        let sector =
            Sector { visible: vec![0], durable: vec![0], last: 0, readers: 0, writer: false };
        let sectors = vec![sector; sectors];
        Self { key, sectors, discards: BTreeSet::new(), acknowledged: 0, write_through }
    }

    /// The content of a sector after a write.
    fn content(&self, sector: usize, write: u32) -> [u8; SECTOR] {
        let mut bytes = [0; SECTOR];
        if write == 0 || self.discards.contains(&write) {
            return bytes;
        }
        let mut state = scramble(self.key ^ (sector as u64) << 32 ^ u64::from(write));
        for word in bytes.chunks_exact_mut(8) {
            word.copy_from_slice(&state.to_le_bytes());
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        }
        bytes[..8].copy_from_slice(&(sector as u64).to_le_bytes());
        bytes[8..12].copy_from_slice(&write.to_le_bytes());
        bytes
    }

    fn describe(&self, sector: usize, found: &[u8]) -> String {
        let word = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|n| found[at + n]));
        let Sector { visible, durable, last, .. } = &self.sectors[sector];
        let whose = (0..=*last).find(|&write| self.content(sector, write) == found);
        format!(
            "sector {sector} has write {whose:?} (words {:#x} {:#x} {:#x}), but may have {visible:?}, \
             durably {durable:?}, of {last} submitted",
            word(0),
            word(4),
            word(8)
        )
    }

    /// Whether content is what a reader may see.
    fn is_visible(&self, sector: usize, found: &[u8]) -> bool {
        self.sectors[sector].visible.iter().any(|&write| self.content(sector, write) == found)
    }

    /// Checks all that a reader sees at the end.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check_visible(&self, mut read: impl FnMut(usize) -> Vec<u8>) -> Result<(), String> {
        for sector in 0..self.sectors.len() {
            let found = read(sector);
            if !self.is_visible(sector, &found) {
                return Err(self.describe(sector, &found));
            }
        }
        Ok(())
    }

    /// Checks what is on the medium after a loss of power.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check_durable(&self, mut read: impl FnMut(usize) -> Vec<u8>) -> Result<(), String> {
        for sector in 0..self.sectors.len() {
            let found = read(sector);
            let mut may = self.sectors[sector].durable.iter();
            if !may.any(|&write| self.content(sector, write) == found[..]) {
                return Err(format!("after the loss of power: {}", self.describe(sector, &found)));
            }
        }
        Ok(())
    }

    fn snapshot(&self) -> Snapshot {
        self.sectors.iter().map(|sector| sector.visible.clone()).collect()
    }

    /// A flush ended: older than what was visible at its submission nothing can be any more.
    fn flushed(&mut self, snapshot: &Snapshot) {
        for (sector, visible) in self.sectors.iter_mut().zip(snapshot) {
            let newest = visible.iter().copied().max().unwrap_or(0);
            sector.durable.retain(|write| visible.contains(write) || *write > newest);
        }
    }
}

/// A request under way.
struct Order {
    operation: Operation,
    first: usize,
    count: usize,
    write: u32,
    snapshot: Snapshot,
}

/// The work of a guest on its disk.
#[derive(Clone)]
pub struct BlkWork {
    /// How the frontend is to work.
    pub config: Config,
    /// Requests to make, in all.
    pub requests: u32,
    /// Most at a time.
    pub depth: usize,
    /// Which requests.
    pub random: Random,
    /// The book.
    pub book: Rc<RefCell<Book>>,
}

/// The disk half of a guest.
pub struct BlkHalf {
    /// The frontend.
    pub front: Blkfront,
    work: BlkWork,
    made: u32,
    next_tag: u64,
    orders: BTreeMap<u64, Order>,
}

impl BlkHalf {
    /// Finds its disk.
    pub fn new(domain: &Domain, client: &mut Client<XenstoreRing>, work: BlkWork) -> Self {
        let front = Blkfront::new(client, domain.id(), DEVICE, work.config);
        let front = front.expect("its nodes are there");
        Self { front, work, made: 0, next_tag: 1, orders: BTreeMap::new() }
    }

    /// Whether all requests were made and answered.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.made == self.work.requests && self.orders.is_empty()
    }

    /// Where it is, for messages.
    #[must_use]
    pub fn describe(&self) -> String {
        let Self { front, made, orders, .. } = self;
        let (state, backend, flight) = (front.state(), front.backend_state(), front.in_flight());
        let (waits, of) = (orders.len(), self.work.requests);
        format!("{state:?} {backend:?} in flight {flight}, made {made} of {of}, {waits} wait")
    }

    /// Takes answers and makes requests.
    ///
    /// # Errors
    /// What is wrong; the run ends.
    pub fn go_on(&mut self, world: &World, domain: &mut Domain) -> Result<(), String> {
        if !self.front.is_connected() {
            return self.front.fault().map_or(Ok(()), |fault| Err(fault.to_string()));
        }
        while let Some(done) = self.front.complete(domain).map_err(|error| error.to_string())? {
            self.judge(world, done)?;
        }
        let mut attempts = 0;
        while self.made < self.work.requests && self.orders.len() < self.work.depth && attempts < 20
        {
            attempts += 1;
            if !self.make(world, domain)? {
                break;
            }
        }
        self.front.kick(domain);
        Ok(())
    }

    /// Makes a request. False: there is no room now.
    fn make(&mut self, world: &World, domain: &mut Domain) -> Result<bool, String> {
        let random = &mut self.work.random;
        let unit = usize::try_from(self.front.info().sector_size / 512).unwrap_or(1).max(1);
        let operation = match random.below(20) {
            0..9 => Operation::Write,
            9..17 => Operation::Read,
            17 if self.front.info().discard => Operation::Discard,
            _ => Operation::Flush,
        };
        if operation == Operation::Flush {
            return self.flush(domain);
        }
        let total = self.work.book.borrow().sectors.len() / unit;
        let most = (self.front.info().max_parts as usize * 8 / unit / 2).max(1).min(total / 2);
        let count = usize::try_from(random.magnitude(most as u64)).unwrap_or(1);
        let first = random.index(total - count + 1);
        let (first, count) = (first * unit, count * unit);
        if !self.is_free(operation, first, count) {
            return Ok(true);
        }
        match operation {
            Operation::Discard => self.discard(domain, first, count),
            _ => self.transfer(world, domain, operation, first, count),
        }
    }

    /// Whether nothing under way would make the outcome uncertain.
    fn is_free(&self, operation: Operation, first: usize, count: usize) -> bool {
        let book = self.work.book.borrow();
        book.sectors[first..first + count]
            .iter()
            .all(|sector| !sector.writer && (operation == Operation::Read || sector.readers == 0))
    }

    fn tag(&mut self) -> u64 {
        self.next_tag += 1;
        self.next_tag
    }

    fn flush(&mut self, domain: &mut Domain) -> Result<bool, String> {
        if !self.front.info().flush {
            return Ok(true);
        }
        let (tag, snapshot) = (self.tag(), self.work.book.borrow().snapshot());
        match self.front.flush(domain, tag) {
            Ok(()) => {}
            Err(Error::Full) => return Ok(false),
            Err(error) => return Err(error.to_string()),
        }
        let operation = Operation::Flush;
        self.note(tag, Order { operation, first: 0, count: 0, write: 0, snapshot });
        Ok(true)
    }

    fn discard(&mut self, domain: &mut Domain, first: usize, count: usize) -> Result<bool, String> {
        let tag = self.tag();
        match self.front.discard(domain, tag, first as u64, count as u64) {
            Ok(()) => {}
            Err(Error::Full) => return Ok(false),
            Err(error) => return Err(error.to_string()),
        }
        let write = u32::try_from(tag).unwrap_or(u32::MAX);
        let shared = self.work.book.clone();
        let book = &mut *shared.borrow_mut();
        book.discards.insert(write);
        for sector in &mut book.sectors[first..first + count] {
            sector.writer = true;
            sector.last = write;
            sector.durable.push(write);
        }
        let operation = Operation::Discard;
        self.note(tag, Order { operation, first, count, write, snapshot: Vec::new() });
        Ok(true)
    }

    /// Buffers for so many sectors, in parts of any size.
    fn parts(&mut self, count: usize, unit: usize) -> Option<Vec<Part>> {
        let mut parts = Vec::new();
        let mut left = count;
        while left > 0 {
            let Some(buffer) = self.front.take_buffer() else {
                self.give_back(parts);
                return None;
            };
            let (first, sectors) = if parts.len() + left.div_ceil(8) + 1
                < usize::from(self.front.info().max_parts)
                && self.work.random.one_in(3)
            {
                let units = 8 / unit;
                let sectors = (1 + self.work.random.index(units)) * unit;
                let first = self.work.random.index((8 - sectors) / unit + 1) * unit;
                (first, sectors.min(left))
            } else {
                (0, left.min(8))
            };
            left -= sectors;
            let (first, sectors) = (to_u8(first), to_u8(sectors));
            parts.push(Part { buffer, first, sectors });
        }
        Some(parts)
    }

    fn give_back(&mut self, parts: Vec<Part>) {
        for part in parts {
            self.front.give_back(part.buffer);
        }
    }

    fn transfer(
        &mut self,
        world: &World,
        domain: &mut Domain,
        operation: Operation,
        first: usize,
        count: usize,
    ) -> Result<bool, String> {
        let unit = usize::try_from(self.front.info().sector_size / 512).unwrap_or(1).max(1);
        let Some(parts) = self.parts(count, unit) else { return Ok(false) };
        if parts.len() > usize::from(self.front.info().max_parts) {
            self.give_back(parts);
            return Ok(true);
        }
        let tag = self.tag();
        let mut write = 0;
        if operation == Operation::Write {
            write = u32::try_from(tag).unwrap_or(u32::MAX);
            self.fill(&parts, first, write);
        }
        let sector = first as u64;
        let submitted = match operation {
            Operation::Write => self.front.write(domain, tag, sector, parts),
            _ => self.front.read(domain, tag, sector, parts),
        };
        if let Err(refused) = submitted {
            self.give_back(refused.parts);
            return match refused.error {
                Error::Full => Ok(false),
                error => Err(format!("{operation:?} of {count} at {first}: {error}")),
            };
        }
        world.note(|| format!("{} {operation:?} {tag}: {count} at {first}", domain.id()));
        for sector in &mut self.work.book.borrow_mut().sectors[first..first + count] {
            match operation {
                Operation::Write => {
                    sector.writer = true;
                    sector.last = write;
                    sector.durable.push(write);
                }
                _ => sector.readers += 1,
            }
        }
        self.note(tag, Order { operation, first, count, write, snapshot: Vec::new() });
        Ok(true)
    }

    fn fill(&self, parts: &[Part], first: usize, write: u32) {
        let book = self.work.book.borrow();
        let mut sector = first;
        for part in parts {
            for n in part.first..part.first + part.sectors {
                let bytes = book.content(sector, write);
                part.buffer.page().write(usize::from(n) * SECTOR, &bytes);
                sector += 1;
            }
        }
    }

    fn note(&mut self, tag: u64, order: Order) {
        self.made += 1;
        self.orders.insert(tag, order);
    }

    fn judge(&mut self, world: &World, done: Completion) -> Result<(), String> {
        let Completion { tag, operation, result, parts } = done;
        let Some(order) = self.orders.remove(&tag) else {
            return Err(format!("request {tag} is answered, but was not under way"));
        };
        if order.operation != operation {
            return Err(format!(
                "request {tag} was {:?}, answered is {operation:?}",
                order.operation
            ));
        }
        if let Err(error) = result {
            return Err(format!(
                "{operation:?} {tag} of {} at {}: {error}",
                order.count, order.first
            ));
        }
        world.note(|| format!("{operation:?} {tag} is done"));
        let checked = if operation == Operation::Read {
            self.check_read(tag, &order, &parts)
        } else {
            Ok(())
        };
        self.give_back(parts);
        self.settle(&order);
        checked
    }

    fn check_read(&self, tag: u64, order: &Order, parts: &[Part]) -> Result<(), String> {
        let book = self.work.book.borrow();
        let mut sector = order.first;
        for part in parts {
            for n in part.first..part.first + part.sectors {
                let mut found = [0; SECTOR];
                part.buffer.page().read(usize::from(n) * SECTOR, &mut found);
                if !book.is_visible(sector, &found) {
                    return Err(format!("read {tag}: {}", book.describe(sector, &found)));
                }
                sector += 1;
            }
        }
        Ok(())
    }

    fn settle(&self, order: &Order) {
        let book = &mut *self.work.book.borrow_mut();
        book.acknowledged += 1;
        let through = book.write_through;
        if order.operation == Operation::Flush {
            return book.flushed(&order.snapshot);
        }
        for sector in &mut book.sectors[order.first..order.first + order.count] {
            match order.operation {
                Operation::Read => sector.readers -= 1,
                Operation::Write => {
                    sector.writer = false;
                    sector.visible = vec![order.write];
                    if through {
                        sector.durable = vec![order.write];
                    }
                }
                _ => {
                    sector.writer = false;
                    sector.visible.push(order.write);
                }
            }
        }
    }
}

fn to_u8(count: usize) -> u8 {
    u8::try_from(count).unwrap_or(8)
}
