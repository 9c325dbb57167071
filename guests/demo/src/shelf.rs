//! Files on a disk: a tar archive that is read ahead of those who want it, and never as a whole.
//!
//! Each file that is being sent is a [`Reader`], which gets what the [`Shelf`] has read for it:
//! pages that requests brought in, in order. The shelf keeps several requests in flight for each
//! reader. When all pages are taken by readers that do not move, what they have beyond their
//! first piece is given up for those who have nothing, and read again later.

use crate::tar::{self, Header, NoTar, SECTOR};
use alloc::collections::VecDeque;
use alloc::rc::{Rc, Weak};
use alloc::string::String;
use alloc::vec::Vec;
use core::cell::RefCell;
use core::fmt;
use domain_api::disk::{Buffer, Completion, Disk, DiskError, Operation, Request, Tag};
use domain_api::{DmaPage, Page};

/// Pages of a request.
const PIECE_PAGES: usize = 8;
/// Bytes of a request.
pub const PIECE: usize = PIECE_PAGES * PAGE;
/// Pieces of one reader, in flight or read.
const AHEAD: usize = 6;
/// Most files of an archive.
const MAX_FILES: usize = 256;
const PAGE: usize = 4096;

/// A file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct File {
    /// Its name.
    pub name: String,
    /// Its bytes.
    pub bytes: u64,
    /// First sector of its data.
    sector: u64,
}

/// Why there are no files.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ShelfError {
    /// The disk cannot be read.
    Disk(DiskError),
    /// It holds no tar archive, or a damaged one.
    NoArchive,
    /// The archive is longer than the disk, or has too many files.
    TooLong,
}

impl fmt::Display for ShelfError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Disk(error) => write!(f, "the disk cannot be read: {error}"),
            Self::NoArchive => write!(f, "there is no tar archive on the disk"),
            Self::TooLong => write!(f, "the archive does not fit"),
        }
    }
}

impl core::error::Error for ShelfError {}

/// How far the shelf is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    /// Reads the archive's headers.
    Opening,
    /// All files are known.
    Ready,
    /// There are none.
    Failed(ShelfError),
}

/// Part of a file, read: bytes `at..end` of some pages.
#[derive(Debug)]
struct Piece {
    pages: Vec<u16>,
    at: usize,
    end: usize,
    /// At first.
    bytes: usize,
}

/// A file that is being read.
#[derive(Debug)]
struct Stream {
    /// First sector and bytes of what nobody has asked the disk for.
    sector: u64,
    unread: u64,
    /// Read, in order.
    ready: VecDeque<Piece>,
    /// Numbers of pieces: of the next one to ask for, and of the next one for `ready`.
    asked: u64,
    arrived: u64,
    /// Came before an earlier one.
    early: Vec<(u64, Piece)>,
    failed: bool,
    pool: Rc<RefCell<Pool>>,
}

#[derive(Debug)]
struct Pool {
    pages: Vec<Page>,
    free: Vec<u16>,
}

impl Stream {
    /// Pieces that it has, in flight or read.
    fn held(&self) -> usize {
        let in_flight = usize::try_from(self.asked - self.arrived).unwrap_or(usize::MAX);
        self.ready.len() + in_flight
    }

    fn give_up(&mut self, piece: Piece) {
        self.pool.borrow_mut().free.extend(piece.pages);
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let mut pool = self.pool.borrow_mut();
        for piece in self.ready.drain(..).chain(self.early.drain(..).map(|(_, piece)| piece)) {
            pool.free.extend(piece.pages);
        }
    }
}

/// Somebody's place in a file.
#[derive(Debug)]
pub struct Reader {
    stream: Rc<RefCell<Stream>>,
    left: u64,
}

impl Reader {
    /// Bytes that were not taken yet.
    #[must_use]
    pub const fn left(&self) -> u64 {
        self.left
    }

    /// Whether the disk could not be read: there will be no more.
    #[must_use]
    pub fn has_failed(&self) -> bool {
        let stream = self.stream.borrow();
        stream.failed && stream.ready.is_empty()
    }

    /// Copies what is there to `buffer`; its length, 0 while the disk is being read.
    pub fn read(&mut self, buffer: &mut [u8]) -> usize {
        let mut stream = self.stream.borrow_mut();
        let mut len = 0;
        while len < buffer.len()
            && let Some(mut piece) = stream.ready.pop_front()
        {
            len += piece.copy(&stream.pool.borrow().pages, &mut buffer[len..]);
            if piece.at == piece.end {
                stream.give_up(piece);
            } else {
                stream.ready.push_front(piece);
            }
        }
        self.left -= len as u64;
        len
    }
}

impl Piece {
    fn copy(&mut self, pages: &[Page], buffer: &mut [u8]) -> usize {
        let wanted = buffer.len().min(self.end - self.at);
        let mut rest = &mut buffer[..wanted];
        while !rest.is_empty() {
            let (page, offset) = (self.at / PAGE, self.at % PAGE);
            let (part, tail) = rest.split_at_mut(rest.len().min(PAGE - offset));
            pages[usize::from(self.pages[page])].read(offset, part);
            self.at += part.len();
            rest = tail;
        }
        wanted
    }
}

/// What a request in flight is for.
#[derive(Debug)]
enum For {
    Header,
    Stream { stream: Weak<RefCell<Stream>>, number: u64 },
}

#[derive(Debug)]
struct InFlight {
    purpose: For,
    piece: Piece,
}

/// The files.
#[derive(Debug)]
pub struct Shelf {
    state: State,
    files: Vec<File>,
    /// Where the next header is.
    header: u64,
    dma: Vec<DmaPage>,
    pool: Rc<RefCell<Pool>>,
    streams: Vec<Weak<RefCell<Stream>>>,
    /// By tag.
    in_flight: Vec<Option<InFlight>>,
    requests: u64,
    answered: u64,
    read_bytes: u64,
}

impl Shelf {
    /// A shelf that reads into `pages`, which the disk reaches.
    #[must_use]
    pub fn new(pages: Vec<DmaPage>) -> Self {
        let count = u16::try_from(pages.len()).unwrap_or(u16::MAX);
        let pool = Pool {
            pages: pages.iter().map(|page| page.page.clone()).collect(),
            free: (0..count).rev().collect(),
        };
        Self {
            state: State::Opening,
            files: Vec::new(),
            header: 0,
            dma: pages,
            pool: Rc::new(RefCell::new(pool)),
            streams: Vec::new(),
            in_flight: Vec::new(),
            requests: 0,
            answered: 0,
            read_bytes: 0,
        }
    }

    /// How far it is.
    #[must_use]
    pub const fn state(&self) -> State {
        self.state
    }

    /// The files, in the archive's order.
    #[must_use]
    pub fn files(&self) -> &[File] {
        &self.files
    }

    /// Requests made, requests answered, and bytes read.
    #[must_use]
    pub const fn counts(&self) -> (u64, u64, u64) {
        (self.requests, self.answered, self.read_bytes)
    }

    /// Begins to read a file; `None` when there is no such file.
    #[must_use]
    pub fn open(&mut self, name: &str) -> Option<Reader> {
        let file = self.files.iter().find(|file| file.name == name)?;
        let stream = Stream {
            sector: file.sector,
            unread: file.bytes,
            ready: VecDeque::new(),
            asked: 0,
            arrived: 0,
            early: Vec::new(),
            failed: false,
            pool: self.pool.clone(),
        };
        let left = file.bytes;
        let stream = Rc::new(RefCell::new(stream));
        self.streams.push(Rc::downgrade(&stream));
        Some(Reader { stream, left })
    }

    /// Takes what was read, and asks for more. Returns whether a reader has more than before.
    pub fn poll<D: Disk>(&mut self, disk: &mut D) -> bool {
        let mut news = false;
        while let Some(completion) = disk.complete() {
            news |= self.completed(completion);
        }
        let requests = self.requests;
        match self.state {
            State::Opening => self.ask_for_header(disk),
            State::Ready => self.ask_for_pieces(disk),
            State::Failed(_) => {}
        }
        if self.requests != requests {
            disk.kick();
        }
        news
    }

    fn ask_for_header<D: Disk>(&mut self, disk: &mut D) {
        if self.in_flight.iter().any(Option::is_some) {
            return;
        }
        if self.header >= disk.geometry().sectors || self.files.len() > MAX_FILES {
            self.state = State::Failed(ShelfError::TooLong);
            return;
        }
        self.ask(disk, For::Header, self.header, SECTOR);
    }

    /// One piece for each reader in turn, as long as somebody can have one.
    fn ask_for_pieces<D: Disk>(&mut self, disk: &mut D) {
        self.streams.retain(|stream| stream.strong_count() > 0);
        for round in 1..=AHEAD {
            for at in 0..self.streams.len() {
                let Some(stream) = self.streams[at].upgrade() else { continue };
                let wants =
                    |stream: &Stream| stream.unread > 0 && !stream.failed && stream.held() < round;
                if !wants(&stream.borrow()) {
                    continue;
                }
                if round == 1 && self.pool.borrow().free.len() < PIECE_PAGES {
                    self.make_room();
                }
                if !self.ask_for_piece(disk, &stream) {
                    return;
                }
            }
        }
    }

    fn ask_for_piece<D: Disk>(&mut self, disk: &mut D, stream: &Rc<RefCell<Stream>>) -> bool {
        let (sector, number, unread) = {
            let stream = stream.borrow();
            (stream.sector, stream.asked, stream.unread)
        };
        let most = PIECE.min(usize::from(disk.geometry().max_buffers) * PAGE);
        let most = most - skip(disk, sector);
        let bytes = usize::try_from(unread).map_or(most, |unread| unread.min(most));
        let purpose = For::Stream { stream: Rc::downgrade(stream), number };
        let asked = self.ask(disk, purpose, sector, bytes);
        if asked {
            let mut stream = stream.borrow_mut();
            stream.asked += 1;
            stream.unread -= bytes as u64;
            stream.sector += tar::sectors(bytes as u64);
        }
        asked
    }

    /// Takes the last piece of the reader that has most, if it has more than one.
    fn make_room(&self) {
        let streams = self.streams.iter().filter_map(Weak::upgrade);
        let idle = streams.filter(|stream| {
            let stream = stream.borrow();
            stream.asked == stream.arrived && stream.ready.len() > 1
        });
        let Some(stream) = idle.max_by_key(|stream| stream.borrow().ready.len()) else { return };
        let mut stream = stream.borrow_mut();
        let Some(piece) = stream.ready.pop_back() else { return };
        stream.unread += piece.bytes as u64;
        stream.sector -= tar::sectors(piece.bytes as u64);
        stream.give_up(piece);
    }

    /// Submits a read of `bytes` from `sector` on, in whole sectors of the disk.
    fn ask<D: Disk>(&mut self, disk: &mut D, purpose: For, sector: u64, bytes: usize) -> bool {
        let skip = skip(disk, sector);
        let whole = (skip + bytes).next_multiple_of(disk.geometry().sector_size as usize);
        let mut pool = self.pool.borrow_mut();
        let Some(rest) = pool.free.len().checked_sub(whole.div_ceil(PAGE)) else { return false };
        let pages = pool.free.split_off(rest);
        let part = |(n, page): (usize, &u16)| {
            let len = u16::try_from((whole - n * PAGE).min(PAGE)).unwrap_or(0);
            Buffer { page: &self.dma[usize::from(*page)], offset: 0, len }
        };
        let buffers: Vec<Buffer<'_>> = pages.iter().enumerate().map(part).collect();
        let slot = self.in_flight.iter().position(Option::is_none).unwrap_or(self.in_flight.len());
        let request = Request {
            tag: Tag(u32::try_from(slot).unwrap_or(u32::MAX)),
            operation: Operation::Read,
            sector: sector - tar::sectors(skip as u64),
            sectors: tar::sectors(whole as u64),
            buffers: &buffers,
        };
        let taken = disk.submit(request).is_ok();
        drop(buffers);
        if !taken {
            pool.free.extend(pages);
            return false;
        }
        if slot == self.in_flight.len() {
            self.in_flight.push(None);
        }
        let piece = Piece { pages, at: skip, end: skip + bytes, bytes };
        self.in_flight[slot] = Some(InFlight { purpose, piece });
        self.requests += 1;
        true
    }

    fn completed(&mut self, completion: Completion) -> bool {
        let Completion { tag, result } = completion;
        let slot = usize::try_from(tag.0).ok().and_then(|slot| self.in_flight.get_mut(slot));
        let Some(InFlight { purpose, piece }) = slot.and_then(Option::take) else { return false };
        self.answered += 1;
        self.read_bytes += if result.is_ok() { piece.bytes as u64 } else { 0 };
        let (stream, number) = match purpose {
            For::Header => {
                self.read_header(&piece, result);
                self.pool.borrow_mut().free.extend(piece.pages);
                return false;
            }
            For::Stream { stream, number } => (stream, number),
        };
        match stream.upgrade() {
            Some(stream) => stream.borrow_mut().arrive(number, piece, result),
            None => self.pool.borrow_mut().free.extend(piece.pages),
        }
        true
    }

    fn read_header(&mut self, piece: &Piece, result: Result<(), DiskError>) {
        if let Err(error) = result {
            self.state = State::Failed(ShelfError::Disk(error));
            return;
        }
        let mut bytes = [0; SECTOR];
        self.pool.borrow().pages[usize::from(piece.pages[0])].read(piece.at, &mut bytes);
        let sector = self.header + 1;
        match tar::header(&bytes) {
            Ok(Header::End) => self.state = State::Ready,
            Ok(Header::Other { bytes }) => self.header = after(sector, bytes),
            Ok(Header::File { name, bytes }) => {
                self.header = after(sector, bytes);
                self.files.push(File { name, bytes, sector });
            }
            Err(NoTar) => self.state = State::Failed(ShelfError::NoArchive),
        }
    }
}

/// The sector behind data; behind every disk when the archive says so.
const fn after(sector: u64, bytes: u64) -> u64 {
    sector.saturating_add(tar::sectors(bytes))
}

/// Bytes between the start of a sector of the disk and the sector of 512 bytes in it.
fn skip<D: Disk>(disk: &D, sector: u64) -> usize {
    let unit = (u64::from(disk.geometry().sector_size) / SECTOR as u64).max(1);
    usize::try_from(sector % unit).unwrap_or(0) * SECTOR
}

impl Drop for Shelf {
    /// Whoever still reads gets no more.
    fn drop(&mut self) {
        for stream in self.streams.iter().filter_map(Weak::upgrade) {
            stream.borrow_mut().failed = true;
        }
    }
}

impl Stream {
    /// Puts a piece where it belongs; in order, whatever the order in which they come.
    fn arrive(&mut self, number: u64, piece: Piece, result: Result<(), DiskError>) {
        if result.is_err() || self.failed {
            self.failed = true;
            self.arrived = self.arrived.max(number);
            self.give_up(piece);
            return;
        }
        self.early.push((number, piece));
        while let Some(at) = self.early.iter().position(|(number, _)| *number == self.arrived) {
            let (_, piece) = self.early.swap_remove(at);
            self.ready.push_back(piece);
            self.arrived += 1;
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
