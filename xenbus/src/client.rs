//! The client's end of a connection to the store.

use crate::store::{Event, Nodes, Store, TRANSACTION_ATTEMPTS};
use crate::wire::{self, Decoder, Message, Permission, strings};
use alloc::collections::VecDeque;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use xen_abi::xenstore::MessageKind;
use xen_abi::{DomainId, Errno, EventPort, Gfn};

/// Events that a client keeps before it merges further ones into one event per watch.
const EVENTS_KEPT: usize = 1024;

/// Two streams of bytes, to the store and back.
///
/// Neither [`send`](Self::send) nor [`receive`](Self::receive) waits: a client must go on
/// receiving while it waits for room to send, because a store whose replies are not taken stops
/// taking requests.
pub trait Transport {
    /// Sends bytes from the front of `bytes`, as many as there is room for, and returns how many
    /// that are. Tells the other end when it may be asleep.
    fn send(&mut self, bytes: &[u8]) -> usize;

    /// Receives bytes, at most `buffer.len()`, and returns how many. Tells the other end when it
    /// may be waiting for room.
    fn receive(&mut self, buffer: &mut [u8]) -> usize;

    /// Waits until bytes may be sent or received. May return early.
    ///
    /// # Errors
    /// The connection is lost for good.
    fn wait(&mut self) -> Result<(), Errno>;
}

impl<T: Transport + ?Sized> Transport for &mut T {
    fn send(&mut self, bytes: &[u8]) -> usize {
        (**self).send(bytes)
    }

    fn receive(&mut self, buffer: &mut [u8]) -> usize {
        (**self).receive(buffer)
    }

    fn wait(&mut self) -> Result<(), Errno> {
        (**self).wait()
    }
}

/// A connection to the store.
///
/// One request is outstanding at a time. Events that arrive meanwhile are kept, equal ones only
/// once; should very many pile up, further ones are merged into one per watch, with the watched
/// path as their path, so that the memory they take is bounded whatever others write to the store.
#[derive(Debug)]
pub struct Client<T> {
    transport: T,
    decoder: Decoder,
    last_request: u32,
    watches: Vec<Event>,
    events: VecDeque<Event>,
    lost: bool,
}

impl<T: Transport> Client<T> {
    /// A client at the start of a connection.
    pub const fn new(transport: T) -> Self {
        Self {
            transport,
            decoder: Decoder::new(),
            last_request: 0,
            watches: Vec::new(),
            events: VecDeque::new(),
            lost: false,
        }
    }

    /// The transport.
    pub const fn transport(&mut self) -> &mut T {
        &mut self.transport
    }

    /// Whether the connection is lost: every request answers `EIO`.
    #[must_use]
    pub const fn is_lost(&self) -> bool {
        self.lost
    }

    /// Sends any request, and returns the payload of the reply.
    ///
    /// # Errors
    /// The store's answer; `E2BIG` when the request is too long; `EIO` when the connection is lost.
    pub fn request(
        &mut self,
        tx_id: u32,
        kind: MessageKind,
        parts: &[&[u8]],
    ) -> Result<Vec<u8>, Errno> {
        if self.lost {
            return Err(Errno::EIO);
        }
        self.last_request = self.last_request.wrapping_add(1);
        let mut bytes = Vec::new();
        wire::encode(&mut bytes, kind, self.last_request, tx_id, parts)?;
        let reply = self.exchange(&bytes)?;
        match reply.kind {
            MessageKind::ERROR => Err(error_of(&reply.payload)),
            answered if answered == kind => Ok(reply.payload),
            _ => Err(self.lose()),
        }
    }

    fn exchange(&mut self, mut bytes: &[u8]) -> Result<Message, Errno> {
        loop {
            let sent = self.transport.send(bytes);
            bytes = bytes.get(sent..).ok_or_else(|| self.lose())?;
            let (received, reply) = self.receive()?;
            match reply {
                Some(reply) if bytes.is_empty() => return Ok(reply),
                // An answer to half a request.
                Some(_) => return Err(self.lose()),
                None if sent == 0 && received == 0 => {
                    self.transport.wait().inspect_err(|_| self.lost = true)?;
                }
                None => {}
            }
        }
    }

    /// Takes what is there. The count of bytes, and the reply to the last request if it came.
    fn receive(&mut self) -> Result<(usize, Option<Message>), Errno> {
        let mut buffer = [0; 512];
        let received = self.transport.receive(&mut buffer);
        let mut input = buffer.get(..received).ok_or_else(|| self.lose())?;
        let mut reply = None;
        loop {
            match self.decoder.feed(&mut input) {
                Err(_) => return Err(self.lose()),
                Ok(None) => return Ok((received, reply)),
                Ok(Some(message)) if message.kind == MessageKind::WATCH_EVENT => {
                    self.keep_event(&message.payload);
                }
                Ok(Some(message)) if message.req_id == self.last_request => reply = Some(message),
                // A late answer to a request of an earlier incarnation.
                Ok(Some(_)) => {}
            }
        }
    }

    fn lose(&mut self) -> Errno {
        self.lost = true;
        Errno::EIO
    }

    fn keep_event(&mut self, payload: &[u8]) {
        let Some([path, token]) =
            strings(payload).and_then(|list| <[&str; 2]>::try_from(list).ok())
        else {
            return;
        };
        let Some(watched) = self.watches.iter().find(|watch| {
            watch.token == token && (covers(&watch.path, path) || watch.path.starts_with('@'))
        }) else {
            return;
        };
        let merged = self.events.len() >= EVENTS_KEPT;
        let path = if merged { watched.path.as_str() } else { path };
        if !self.events.iter().any(|event| event.path == path && event.token == token) {
            self.events.push_back(Event { path: path.to_string(), token: token.to_string() });
        }
    }

    fn start_transaction(&mut self) -> Result<u32, Errno> {
        let reply = self.request(0, MessageKind::TRANSACTION_START, &[b"\0"])?;
        decimal(&reply).filter(|&id| id != 0).ok_or(Errno::EIO)
    }

    fn end_transaction(&mut self, id: u32, commit: bool) -> Result<(), Errno> {
        let verdict: &[u8] = if commit { b"T\0" } else { b"F\0" };
        self.request(id, MessageKind::TRANSACTION_END, &[verdict]).map(drop)
    }

    fn domain_request(&mut self, kind: MessageKind, domid: DomainId) -> Result<Vec<u8>, Errno> {
        self.request(0, kind, &[format!("{}\0", domid.0).as_bytes()])
    }

    /// Lists a directory whose names do not fit into one message, part by part, and again from
    /// the start when it changes meanwhile.
    fn long_directory(&mut self, tx_id: u32, path: &str) -> Result<Vec<String>, Errno> {
        let mut generation = None;
        let mut names: Vec<u8> = Vec::new();
        for _ in 0..TRANSACTION_ATTEMPTS * 64 {
            let offset = format!("{}\0", names.len());
            let parts: [&[u8]; 3] = [path.as_bytes(), b"\0", offset.as_bytes()];
            let reply = self.request(tx_id, MessageKind::DIRECTORY_PART, &parts)?;
            let end = reply.iter().position(|&byte| byte == 0).ok_or(Errno::EIO)?;
            let (current, part) = (&reply[..end], &reply[end + 1..]);
            if generation.as_deref().is_some_and(|seen| seen != current) {
                generation = None;
                names.clear();
                continue;
            }
            generation = Some(current.to_vec());
            // The last part ends with an empty name.
            if part == [0] || part.ends_with(b"\0\0") {
                names.extend_from_slice(&part[..part.len() - 1]);
                return owned_strings(&names);
            }
            if part.is_empty() {
                return Err(Errno::EIO);
            }
            names.extend_from_slice(part);
        }
        Err(Errno::EAGAIN)
    }

    fn nodes(&mut self, tx_id: u32) -> View<'_, T> {
        View { client: self, tx_id }
    }
}

/// Whether an event at `path` may come from a watch on `watched`.
fn covers(watched: &str, path: &str) -> bool {
    watched == "/"
        || path.strip_prefix(watched).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

fn error_of(payload: &[u8]) -> Errno {
    strings(payload)
        .and_then(|names| names.first().copied().and_then(Errno::from_name))
        .unwrap_or(Errno::EIO)
}

fn decimal(payload: &[u8]) -> Option<u32> {
    wire::parse_decimal(strings(payload)?.first()?)
}

fn owned_strings(payload: &[u8]) -> Result<Vec<String>, Errno> {
    Ok(strings(payload).ok_or(Errno::EIO)?.into_iter().map(String::from).collect())
}

/// The nodes as one transaction sees them, or outside of any.
struct View<'a, T> {
    client: &'a mut Client<T>,
    tx_id: u32,
}

impl<T: Transport> View<'_, T> {
    fn on_path(&mut self, kind: MessageKind, path: &str, rest: &[u8]) -> Result<Vec<u8>, Errno> {
        if path.contains('\0') {
            return Err(Errno::EINVAL);
        }
        self.client.request(self.tx_id, kind, &[path.as_bytes(), b"\0", rest])
    }
}

impl<T: Transport> Nodes for View<'_, T> {
    fn read(&mut self, path: &str) -> Result<Vec<u8>, Errno> {
        self.on_path(MessageKind::READ, path, b"")
    }

    fn write(&mut self, path: &str, value: &[u8]) -> Result<(), Errno> {
        self.on_path(MessageKind::WRITE, path, value).map(drop)
    }

    fn mkdir(&mut self, path: &str) -> Result<(), Errno> {
        self.on_path(MessageKind::MKDIR, path, b"").map(drop)
    }

    fn rm(&mut self, path: &str) -> Result<(), Errno> {
        self.on_path(MessageKind::RM, path, b"").map(drop)
    }

    fn directory(&mut self, path: &str) -> Result<Vec<String>, Errno> {
        match self.on_path(MessageKind::DIRECTORY, path, b"") {
            Ok(names) => owned_strings(&names),
            Err(Errno::E2BIG) => self.client.long_directory(self.tx_id, path),
            Err(errno) => Err(errno),
        }
    }

    fn get_perms(&mut self, path: &str) -> Result<Vec<Permission>, Errno> {
        let reply = self.on_path(MessageKind::GET_PERMS, path, b"")?;
        let entries = strings(&reply).ok_or(Errno::EIO)?;
        entries.into_iter().map(|entry| Permission::parse(entry).ok_or(Errno::EIO)).collect()
    }

    fn set_perms(&mut self, path: &str, perms: &[Permission]) -> Result<(), Errno> {
        let list: String = perms.iter().map(|perm| format!("{perm}\0")).collect();
        self.on_path(MessageKind::SET_PERMS, path, list.as_bytes()).map(drop)
    }
}

impl<T: Transport> Nodes for Client<T> {
    fn read(&mut self, path: &str) -> Result<Vec<u8>, Errno> {
        self.nodes(0).read(path)
    }

    fn write(&mut self, path: &str, value: &[u8]) -> Result<(), Errno> {
        self.nodes(0).write(path, value)
    }

    fn mkdir(&mut self, path: &str) -> Result<(), Errno> {
        self.nodes(0).mkdir(path)
    }

    fn rm(&mut self, path: &str) -> Result<(), Errno> {
        self.nodes(0).rm(path)
    }

    fn directory(&mut self, path: &str) -> Result<Vec<String>, Errno> {
        self.nodes(0).directory(path)
    }

    fn get_perms(&mut self, path: &str) -> Result<Vec<Permission>, Errno> {
        self.nodes(0).get_perms(path)
    }

    fn set_perms(&mut self, path: &str, perms: &[Permission]) -> Result<(), Errno> {
        self.nodes(0).set_perms(path, perms)
    }
}

impl<T: Transport> Store for Client<T> {
    fn watch(&mut self, path: &str, token: &str) -> Result<(), Errno> {
        if path.contains('\0') || token.contains('\0') {
            return Err(Errno::EINVAL);
        }
        let watch = Event { path: path.to_string(), token: token.to_string() };
        // Known before the request is sent: the first event may come with the reply.
        let is_new = !self.watches.contains(&watch);
        if is_new {
            self.watches.push(watch);
        }
        let parts: [&[u8]; 4] = [path.as_bytes(), b"\0", token.as_bytes(), b"\0"];
        let answer = self.request(0, MessageKind::WATCH, &parts).map(drop);
        if answer.is_err() && is_new {
            self.watches.pop();
        }
        answer
    }

    fn unwatch(&mut self, path: &str, token: &str) -> Result<(), Errno> {
        if path.contains('\0') || token.contains('\0') {
            return Err(Errno::EINVAL);
        }
        let parts: [&[u8]; 4] = [path.as_bytes(), b"\0", token.as_bytes(), b"\0"];
        self.request(0, MessageKind::UNWATCH, &parts)?;
        self.watches.retain(|watch| !(watch.path == path && watch.token == token));
        let watches = &self.watches;
        self.events.retain(|event| {
            watches.iter().any(|watch| {
                watch.token == event.token
                    && (covers(&watch.path, &event.path) || watch.path.starts_with('@'))
            })
        });
        Ok(())
    }

    fn reset_watches(&mut self) -> Result<(), Errno> {
        self.request(0, MessageKind::RESET_WATCHES, &[b"\0"])?;
        self.watches.clear();
        self.events.clear();
        Ok(())
    }

    fn next_event(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Some(event);
            }
            if self.lost || !matches!(self.receive(), Ok((1.., _))) {
                return None;
            }
        }
    }

    fn transaction<R>(
        &mut self,
        mut body: impl FnMut(&mut dyn Nodes) -> Result<R, Errno>,
    ) -> Result<R, Errno> {
        for _ in 0..TRANSACTION_ATTEMPTS {
            let id = self.start_transaction()?;
            let result = match body(&mut self.nodes(id)) {
                Ok(result) => result,
                Err(errno) => {
                    // The error of `body` says more than one of the abort could.
                    let _ = self.end_transaction(id, false);
                    return Err(errno);
                }
            };
            match self.end_transaction(id, true) {
                Ok(()) => return Ok(result),
                Err(Errno::EAGAIN) => {}
                Err(errno) => return Err(errno),
            }
        }
        Err(Errno::EAGAIN)
    }

    fn introduce(&mut self, domid: DomainId, gfn: Gfn, port: EventPort) -> Result<(), Errno> {
        let arguments = format!("{}\0{}\0{}\0", domid.0, gfn.0, port.0);
        self.request(0, MessageKind::INTRODUCE, &[arguments.as_bytes()]).map(drop)
    }

    fn release(&mut self, domid: DomainId) -> Result<(), Errno> {
        self.domain_request(MessageKind::RELEASE, domid).map(drop)
    }

    fn is_introduced(&mut self, domid: DomainId) -> Result<bool, Errno> {
        let reply = self.domain_request(MessageKind::IS_DOMAIN_INTRODUCED, domid)?;
        match &reply[..] {
            b"T\0" => Ok(true),
            b"F\0" => Ok(false),
            _ => Err(Errno::EIO),
        }
    }

    fn get_domain_path(&mut self, domid: DomainId) -> Result<String, Errno> {
        let reply = self.domain_request(MessageKind::GET_DOMAIN_PATH, domid)?;
        owned_strings(&reply)?.pop().ok_or(Errno::EIO)
    }
}

#[cfg(test)]
mod tests;
