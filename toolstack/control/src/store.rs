//! A client of xenstore that never waits.
//!
//! Work is given as jobs. Those that change several nodes run in a transaction, one after the
//! other; single questions and messages overtake them. All operations of a job are sent without
//! waiting for replies in between. A store that hangs keeps its jobs from finishing, and that is
//! all: what is queued is bounded, and further jobs are refused.

use alloc::collections::VecDeque;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use xen_abi::xenstore::MessageKind;
use xen_abi::{DomainId, Errno, EventPort};
use xenbus::wire::{self, Decoder, Message};
use xenbus::{Permission, Transport};

/// Most bytes that wait to be sent.
const MAX_OUTGOING: usize = 256 * 1024;
/// Most jobs at a time.
const MAX_JOBS: usize = 512;
/// How often a transaction that met a conflict is tried again.
const ATTEMPTS: u32 = 64;

/// One request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Op {
    Write(String, Vec<u8>),
    Mkdir(String),
    Permissions(String, Vec<Permission>),
    Rm(String),
    Read(String),
    Directory(String),
    GetPermissions(String),
    Introduce(DomainId, EventPort),
    Release(DomainId),
}

impl Op {
    fn encode(&self, out: &mut Vec<u8>, req_id: u32, tx_id: u32) -> Result<(), Errno> {
        let mut send = |kind, parts: &[&[u8]]| wire::encode(out, kind, req_id, tx_id, parts);
        match self {
            Self::Write(path, value) => send(MessageKind::WRITE, &[path.as_bytes(), b"\0", value]),
            Self::Mkdir(path) => send(MessageKind::MKDIR, &[path.as_bytes(), b"\0"]),
            Self::Permissions(path, list) => {
                let list: String = list.iter().map(|one| format!("{one}\0")).collect();
                send(MessageKind::SET_PERMS, &[path.as_bytes(), b"\0", list.as_bytes()])
            }
            Self::Rm(path) => send(MessageKind::RM, &[path.as_bytes(), b"\0"]),
            Self::Read(path) => send(MessageKind::READ, &[path.as_bytes(), b"\0"]),
            Self::Directory(path) => send(MessageKind::DIRECTORY, &[path.as_bytes(), b"\0"]),
            Self::GetPermissions(path) => send(MessageKind::GET_PERMS, &[path.as_bytes(), b"\0"]),
            Self::Introduce(domid, port) => {
                // The frame number is not looked at: the ring is found by its grant.
                let text = format!("{}\0{}\0{}\0", domid.0, 0, port.0);
                send(MessageKind::INTRODUCE, &[text.as_bytes()])
            }
            Self::Release(domid) => {
                send(MessageKind::RELEASE, &[format!("{}\0", domid.0).as_bytes()])
            }
        }
    }
}

/// A finished job.
#[derive(Debug)]
pub(crate) struct Finished<Tag> {
    pub(crate) tag: Tag,
    /// The replies of all operations, or the first error.
    pub(crate) result: Result<Vec<Vec<u8>>, Errno>,
}

#[derive(Debug)]
struct Job<Tag> {
    tag: Tag,
    ops: Vec<Op>,
    in_transaction: bool,
    attempts: u32,
    /// Request id of the first operation; the others follow.
    first: u32,
    stage: Stage,
    tx_id: u32,
    replies: Vec<Vec<u8>>,
    error: Option<Errno>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    Starting,
    Operations,
    Ending,
}

/// The connection and its jobs.
#[derive(Debug)]
pub(crate) struct StoreQueue<T, Tag> {
    transport: T,
    decoder: Decoder,
    outgoing: Vec<u8>,
    next_id: u32,
    waiting: VecDeque<Job<Tag>>,
    active: Vec<Job<Tag>>,
    finished: Vec<Finished<Tag>>,
    lost: bool,
}

impl<T: Transport, Tag> StoreQueue<T, Tag> {
    pub(crate) fn new(transport: T) -> Self {
        Self {
            transport,
            decoder: Decoder::new(),
            outgoing: Vec::new(),
            next_id: 1,
            waiting: VecDeque::new(),
            active: Vec::new(),
            finished: Vec::new(),
            lost: false,
        }
    }

    /// Does all of `ops`, or, in the eyes of everybody else, none.
    pub(crate) fn transaction(&mut self, tag: Tag, ops: Vec<Op>) {
        self.push(tag, ops, true);
    }

    /// Does `ops`, ahead of transactions that wait.
    pub(crate) fn at_once(&mut self, tag: Tag, ops: Vec<Op>) {
        self.push(tag, ops, false);
    }

    fn push(&mut self, tag: Tag, ops: Vec<Op>, in_transaction: bool) {
        let full = self.outgoing.len() > MAX_OUTGOING
            || self.waiting.len() + self.active.len() >= MAX_JOBS;
        if self.lost || full {
            let errno = if self.lost { Errno::EIO } else { Errno::EBUSY };
            self.finished.push(Finished { tag, result: Err(errno) });
            return;
        }
        let job = Job {
            tag,
            ops,
            in_transaction,
            attempts: 0,
            first: 0,
            stage: Stage::Operations,
            tx_id: 0,
            replies: Vec::new(),
            error: None,
        };
        if in_transaction {
            self.waiting.push_back(job);
            self.start_next();
        } else {
            self.send_operations(job);
        }
    }

    /// The connection is gone: every job ends with `EIO`, and so does every later one.
    pub(crate) fn lose(&mut self) {
        self.lost = true;
        self.outgoing.clear();
        for job in self.active.drain(..).chain(self.waiting.drain(..)) {
            self.finished.push(Finished { tag: job.tag, result: Err(Errno::EIO) });
        }
    }

    /// Sends and receives as much as possible without waiting.
    pub(crate) fn pump(&mut self) {
        let mut buffer = [0; 1024];
        while !self.lost {
            let sent = self.transport.send(&self.outgoing);
            self.outgoing.drain(..sent.min(self.outgoing.len()));
            let received = self.transport.receive(&mut buffer);
            let mut input = buffer.get(..received).unwrap_or(&[]);
            while !input.is_empty() && !self.lost {
                match self.decoder.feed(&mut input) {
                    Ok(Some(message)) => self.reply(&message),
                    Ok(None) => {}
                    Err(_) => self.lose(),
                }
            }
            if received == 0 && (sent == 0 || self.outgoing.is_empty()) {
                break;
            }
        }
    }

    /// Jobs that finished since the last call.
    pub(crate) fn finished(&mut self) -> Vec<Finished<Tag>> {
        core::mem::take(&mut self.finished)
    }

    fn ids(&mut self, count: usize) -> u32 {
        // Ids may wrap: a job is over long before.
        let first = self.next_id;
        self.next_id = first.wrapping_add(u32::try_from(count.max(1)).unwrap_or(1));
        first
    }

    fn start_next(&mut self) {
        if self.active.iter().any(|job| job.in_transaction) {
            return;
        }
        if let Some(job) = self.waiting.pop_front() {
            self.start(job);
        }
    }

    fn start(&mut self, mut job: Job<Tag>) {
        job.first = self.ids(1);
        job.stage = Stage::Starting;
        job.error = None;
        job.replies.clear();
        let parts: &[&[u8]] = &[b"\0"];
        let kind = MessageKind::TRANSACTION_START;
        match wire::encode(&mut self.outgoing, kind, job.first, 0, parts) {
            Ok(()) => self.active.push(job),
            Err(errno) => self.finish(job, Err(errno)),
        }
    }

    fn send_operations(&mut self, mut job: Job<Tag>) {
        job.first = self.ids(job.ops.len());
        job.stage = Stage::Operations;
        let before = self.outgoing.len();
        let mut id = job.first;
        for op in &job.ops {
            if let Err(errno) = op.encode(&mut self.outgoing, id, job.tx_id) {
                self.outgoing.truncate(before);
                // The transaction, if there is one, is left to the store's own limits.
                return self.finish(job, Err(errno));
            }
            id = id.wrapping_add(1);
        }
        self.active.push(job);
    }

    fn end(&mut self, mut job: Job<Tag>) {
        job.first = self.ids(1);
        job.stage = Stage::Ending;
        let answer: &[u8] = if job.error.is_none() { b"T\0" } else { b"F\0" };
        let kind = MessageKind::TRANSACTION_END;
        match wire::encode(&mut self.outgoing, kind, job.first, job.tx_id, &[answer]) {
            Ok(()) => self.active.push(job),
            Err(errno) => self.finish(job, Err(errno)),
        }
    }

    fn finish(&mut self, job: Job<Tag>, result: Result<Vec<Vec<u8>>, Errno>) {
        self.finished.push(Finished { tag: job.tag, result });
        if job.in_transaction {
            self.start_next();
        }
    }

    /// Takes one message from the store. One that answers nothing is passed over.
    fn reply(&mut self, message: &Message) {
        let expected = |job: &Job<Tag>| match job.stage {
            Stage::Operations => {
                job.first.wrapping_add(u32::try_from(job.replies.len()).unwrap_or(0))
            }
            Stage::Starting | Stage::Ending => job.first,
        };
        let found = self.active.iter().position(|job| expected(job) == message.req_id);
        let (Some(at), true) = (found, message.kind != MessageKind::WATCH_EVENT) else { return };
        let mut job = self.active.swap_remove(at);
        let error = (message.kind == MessageKind::ERROR).then(|| error_of(&message.payload));
        match job.stage {
            Stage::Starting => match (error, transaction_id(&message.payload)) {
                (None, Some(tx_id)) => {
                    job.tx_id = tx_id;
                    self.send_operations(job);
                }
                (error, _) => self.finish(job, Err(error.unwrap_or(Errno::EIO))),
            },
            Stage::Operations => {
                job.error = job.error.or(error);
                job.replies.push(message.payload.clone());
                if job.replies.len() < job.ops.len() {
                    self.active.push(job);
                } else if job.in_transaction {
                    self.end(job);
                } else {
                    self.conclude(job);
                }
            }
            Stage::Ending if job.error.is_none() && error == Some(Errno::EAGAIN) => {
                job.attempts += 1;
                if job.attempts < ATTEMPTS {
                    self.start(job)
                } else {
                    self.finish(job, Err(Errno::EAGAIN))
                }
            }
            Stage::Ending => {
                job.error = job.error.or(error);
                self.conclude(job);
            }
        }
    }

    fn conclude(&mut self, mut job: Job<Tag>) {
        let result = match job.error {
            Some(errno) => Err(errno),
            None => Ok(core::mem::take(&mut job.replies)),
        };
        self.finish(job, result);
    }
}

/// The number behind an error's name.
fn error_of(payload: &[u8]) -> Errno {
    let name = payload.split(|byte| *byte == 0).next().unwrap_or(&[]);
    core::str::from_utf8(name).ok().and_then(Errno::from_name).unwrap_or(Errno::EIO)
}

fn transaction_id(payload: &[u8]) -> Option<u32> {
    let text = payload.split(|byte| *byte == 0).next()?;
    wire::parse_decimal(core::str::from_utf8(text).ok()?).filter(|id| *id != 0)
}
