//! The loads: what is requested, and how much at a time.

use alloc::vec::Vec;
use domain_api::DmaPage;
use domain_api::disk::{Buffer, Disk, Operation, Request, SECTOR, Tag};

/// Bytes of a page, and of a short request.
const PAGE: u16 = 4096;
/// Pages of a long request.
const LONG: usize = 32;
/// Sectors of a page.
const PAGE_SECTORS: u64 = PAGE as u64 / SECTOR;
/// Most requests at a time.
const MOST_DEPTH: usize = 32;
/// Long requests at a time.
const LONG_DEPTH: usize = 4;
/// Pages that the loads need at a time.
pub const MOST_PAGES: usize = LONG * LONG_DEPTH;
const _: () = assert!(MOST_DEPTH <= MOST_PAGES);

/// A load.
pub struct Load {
    /// What it is called.
    pub name: &'static str,
    operation: Operation,
    /// Pages of each request.
    pages: usize,
    /// Requests under way at a time.
    depth: usize,
    is_random: bool,
    /// How much fewer requests it makes than others.
    pub divisor: u64,
}

/// All loads, in their order.
pub const LOADS: [Load; 6] = [
    short("read_4k_depth_1", Operation::Read, 1),
    short("read_4k_depth_32", Operation::Read, MOST_DEPTH),
    short("write_4k_depth_1", Operation::Write, 1),
    short("write_4k_depth_32", Operation::Write, MOST_DEPTH),
    long("read_128k", Operation::Read),
    long("write_128k", Operation::Write),
];

const fn short(name: &'static str, operation: Operation, depth: usize) -> Load {
    Load { name, operation, pages: 1, depth, is_random: true, divisor: 1 }
}

const fn long(name: &'static str, operation: Operation) -> Load {
    Load { name, operation, pages: LONG, depth: LONG_DEPTH, is_random: false, divisor: 8 }
}

impl Load {
    /// The requests of one run, over a disk of so many sectors.
    pub fn requests(&self, sectors: u64, count: u64) -> Requests<'_> {
        let places = (sectors / (self.pages as u64 * PAGE_SECTORS)).max(1);
        let free = (0..self.depth).rev().collect();
        Requests { load: self, places, left: count, under_way: 0, free, place: 0, random: 1 }
    }
}

/// The requests of one run.
pub struct Requests<'l> {
    load: &'l Load,
    /// Where requests can be: at multiples of their size.
    places: u64,
    left: u64,
    under_way: usize,
    /// Tags that are not in use; each has pages of its own.
    free: Vec<usize>,
    place: u64,
    random: u64,
}

impl Requests<'_> {
    /// Submits as many as may be under way.
    pub fn submit(&mut self, disk: &mut impl Disk, pages: &[DmaPage]) {
        let len = self.load.pages;
        let mut submitted = false;
        while self.left > 0
            && let Some(&tag) = self.free.last()
        {
            let own = &pages[tag * len..(tag + 1) * len];
            let mut buffers = [Buffer { page: &pages[0], offset: 0, len: PAGE }; LONG];
            for (buffer, page) in buffers.iter_mut().zip(own) {
                buffer.page = page;
            }
            let sectors = len as u64 * PAGE_SECTORS;
            let request = Request {
                tag: Tag(u32::try_from(tag).unwrap_or(u32::MAX)),
                operation: self.load.operation,
                sector: self.place * sectors,
                sectors,
                buffers: &buffers[..len],
            };
            if disk.submit(request).is_err() {
                break;
            }
            submitted = true;
            self.free.pop();
            self.under_way += 1;
            self.left -= 1;
            self.advance();
        }
        if submitted {
            disk.kick();
        }
    }

    /// Chooses the next place.
    fn advance(&mut self) {
        self.place = if self.load.is_random {
            // Marsaglia's xorshift: the same places in every run.
            self.random ^= self.random << 13;
            self.random ^= self.random >> 7;
            self.random ^= self.random << 17;
            self.random % self.places
        } else {
            (self.place + 1) % self.places
        };
    }

    /// Notes that a request has ended.
    pub fn end(&mut self, tag: Tag) {
        self.under_way -= 1;
        self.free.push(tag.0 as usize);
    }

    /// Whether all have ended.
    pub fn are_done(&self) -> bool {
        self.left == 0 && self.under_way == 0
    }
}
