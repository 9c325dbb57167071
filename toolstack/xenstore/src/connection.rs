//! One domain's connection: partial request, replies and events on their way out, watches and
//! transactions.

use crate::change::Notice;
use crate::perms::Caller;
use crate::quota::Quotas;
use crate::transaction::Transaction;
use crate::watch::Watch;
use alloc::boxed::Box;
use alloc::collections::{BTreeMap, VecDeque};
use alloc::rc::Rc;
use alloc::vec::Vec;
use xen_abi::xenstore::MessageKind;
use xen_abi::{DomainId, Errno};
use xenbus::wire::{self, Decoder, Message};

/// No request is taken while so many bytes wait to be received by the domain.
const REPLY_BYTES: usize = 2048;
/// What an event costs besides its path.
const EVENT_COST: usize = 64;

/// An event on its way out.
#[derive(Debug)]
struct Pending {
    watch: Rc<Watch>,
    path: Box<str>,
}

/// A connection.
#[derive(Default, Debug)]
pub(crate) struct Connection {
    pub(crate) decoder: Decoder,
    /// The domain whose rights this one has as well.
    pub(crate) target: Option<DomainId>,
    /// The stream of requests made no sense; nothing is read any more.
    pub(crate) broken: bool,
    pub(crate) transactions: BTreeMap<u32, Transaction>,
    last_transaction: u32,
    watches: Vec<Rc<Watch>>,
    watch_bytes: usize,
    events: VecDeque<Pending>,
    event_bytes: usize,
    out: Vec<u8>,
    sent: usize,
}

impl Connection {
    /// Whether the next request may be taken.
    pub(crate) fn has_room(&self) -> bool {
        self.out.len() - self.sent < REPLY_BYTES
    }

    pub(crate) fn has_output(&self) -> bool {
        self.sent < self.out.len() || !self.events.is_empty()
    }

    /// Moves bytes for the domain to `buffer`, and returns how many.
    pub(crate) fn take_output(&mut self, buffer: &mut [u8]) -> usize {
        let mut taken = 0;
        while taken < buffer.len() {
            if self.sent == self.out.len() {
                self.out.clear();
                self.sent = 0;
                self.encode_event();
            }
            let waiting = &self.out[self.sent..];
            let len = waiting.len().min(buffer.len() - taken);
            if len == 0 {
                break;
            }
            buffer[taken..taken + len].copy_from_slice(&waiting[..len]);
            self.sent += len;
            taken += len;
        }
        taken
    }

    /// Answers `request`.
    pub(crate) fn reply(&mut self, request: &Message, result: Result<Vec<u8>, Errno>) {
        let Message { kind, req_id, tx_id, .. } = *request;
        let errno = match result {
            Ok(payload) => match wire::encode(&mut self.out, kind, req_id, tx_id, &[&payload]) {
                Ok(()) => return,
                Err(errno) => errno,
            },
            Err(errno) => errno,
        };
        let parts = [errno.name().as_bytes(), b"\0"];
        // An errno's name is shorter than any limit.
        let _ = wire::encode(&mut self.out, MessageKind::ERROR, req_id, tx_id, &parts);
    }

    /// Moves the oldest event to the output.
    pub(crate) fn encode_event(&mut self) {
        let Some(event) = self.events.pop_front() else { return };
        self.event_bytes -= event.path.len() + EVENT_COST;
        let parts = [event.path.as_bytes(), b"\0", event.watch.token.as_bytes(), b"\0"];
        // Paths and tokens are short enough together: `Connection::watch`.
        let _ = wire::encode(&mut self.out, MessageKind::WATCH_EVENT, 0, 0, &parts);
    }

    /// Queues an event, unless the same is queued already. When too many wait, it becomes one for
    /// the watched path itself: something at or below it changed.
    pub(crate) fn queue_event(&mut self, watch: &Rc<Watch>, path: &str, limit: usize) {
        let merged = self.event_bytes + path.len() + EVENT_COST > limit;
        let path = if merged { watch.path() } else { path };
        let queued = |event: &Pending| Rc::ptr_eq(&event.watch, watch) && *event.path == *path;
        if self.events.iter().any(queued) {
            return;
        }
        self.event_bytes += path.len() + EVENT_COST;
        self.events.push_back(Pending { watch: watch.clone(), path: path.into() });
    }

    /// Queues the events that `notice` is to the domain, `reader`.
    pub(crate) fn notify(&mut self, notice: &Notice, reader: Caller, limit: usize) {
        for at in 0..self.watches.len() {
            if let Some(path) = self.watches[at].event(notice, reader) {
                let watch = self.watches[at].clone();
                self.queue_event(&watch, &path, limit);
            }
        }
    }

    pub(crate) fn watches(&self) -> &[Rc<Watch>] {
        &self.watches
    }

    /// Adds a watch and queues its first event.
    ///
    /// # Errors
    /// `EEXIST`, or `E2BIG` over a quota, if there are any for this domain.
    pub(crate) fn watch(
        &mut self,
        watch: Watch,
        quotas: &Quotas,
        limited: bool,
    ) -> Result<(), Errno> {
        if self.watches.iter().any(|known| **known == watch) {
            return Err(Errno::EEXIST);
        }
        let bytes = self.watch_bytes + watch.cost();
        if limited && (self.watches.len() >= quotas.watches || bytes > quotas.watch_bytes) {
            return Err(Errno::E2BIG);
        }
        let watch = Rc::new(watch);
        self.watch_bytes = bytes;
        self.watches.push(watch.clone());
        self.queue_event(&watch, watch.path(), quotas.event_bytes);
        Ok(())
    }

    /// Removes a watch and its events.
    ///
    /// # Errors
    /// `ENOENT`: there is no such watch.
    pub(crate) fn unwatch(&mut self, watch: &Watch) -> Result<(), Errno> {
        let at = self.watches.iter().position(|known| **known == *watch).ok_or(Errno::ENOENT)?;
        let removed = self.watches.remove(at);
        self.watch_bytes -= removed.cost();
        self.events.retain(|event| !Rc::ptr_eq(&event.watch, &removed));
        self.event_bytes = self.events.iter().map(|event| event.path.len() + EVENT_COST).sum();
        Ok(())
    }

    /// Drops all watches, their events, and all transactions.
    pub(crate) fn reset(&mut self) {
        self.watches.clear();
        self.watch_bytes = 0;
        self.events.clear();
        self.event_bytes = 0;
        self.transactions.clear();
    }

    /// Adds a transaction and returns its number.
    pub(crate) fn add_transaction(&mut self, transaction: Transaction) -> u32 {
        loop {
            self.last_transaction = self.last_transaction.wrapping_add(1);
            let id = self.last_transaction;
            if id != 0 && !self.transactions.contains_key(&id) {
                self.transactions.insert(id, transaction);
                return id;
            }
        }
    }

    /// Bytes held for the domain's input and output.
    #[cfg(test)]
    pub(crate) fn buffered(&self) -> usize {
        self.decoder.held() + self.out.len() - self.sent + self.event_bytes
    }
}
