//! The server: connections and the tree they share.

use crate::change::{Change, Notice};
use crate::connection::Connection;
use crate::path::Path;
use crate::perms::{Caller, PRIVILEGED};
use crate::quota::Quotas;
use crate::transaction::{Look, Open, Transaction};
use crate::tree::Tree;
use crate::watch::Special;
use alloc::collections::BTreeMap;
use core::fmt;
use xen_abi::{DomainId, Errno, EventPort, Gfn};
use xenbus::wire::Message;

/// Who connects domains for a server.
pub trait Host {
    /// Connects `domid`, or its next incarnation if it is connected: its ring is at `gfn`, `port`
    /// is its end of the event channel. The server starts with a new connection.
    ///
    /// # Errors
    /// Goes back to who asked for it. The domain is then not connected, whatever it was before.
    fn introduce(&mut self, domid: DomainId, gfn: Gfn, port: EventPort) -> Result<(), Errno>;

    /// Disconnects `domid`.
    fn release(&mut self, domid: DomainId);
}

/// Nothing to connect: for tests.
impl Host for () {
    fn introduce(&mut self, _: DomainId, _: Gfn, _: EventPort) -> Result<(), Errno> {
        Ok(())
    }

    fn release(&mut self, _: DomainId) {}
}

/// The server does not read what the domain sends: it is not connected, or it announced a
/// message longer than any may be, after which no next message can be found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Refused;

/// The store.
pub struct Server {
    pub(crate) tree: Tree,
    pub(crate) quotas: Quotas,
    pub(crate) connections: BTreeMap<DomainId, Connection>,
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server")
            .field("generation", &self.generation())
            .field("connections", &self.connections.keys())
            .finish_non_exhaustive()
    }
}

impl Default for Server {
    fn default() -> Self {
        Self::new(Quotas::default())
    }
}

impl Server {
    /// A store with nothing but the root node, which only the control domain can read.
    #[must_use]
    pub fn new(quotas: Quotas) -> Self {
        Self { tree: Tree::new(PRIVILEGED), quotas, connections: BTreeMap::new() }
    }

    /// Connects a domain, or its next incarnation: watches, transactions, half a request and all
    /// output of an earlier connection are dropped.
    pub fn connect(&mut self, domid: DomainId) {
        self.connections.insert(domid, Connection::default());
    }

    /// Drops a domain's connection. Its nodes stay.
    pub fn disconnect(&mut self, domid: DomainId) {
        self.connections.remove(&domid);
        for connection in self.connections.values_mut() {
            connection.target = connection.target.filter(|&target| target != domid);
        }
    }

    /// The connected domains.
    pub fn connected(&self) -> impl Iterator<Item = DomainId> {
        self.connections.keys().copied()
    }

    /// Takes bytes from the front of what `domid` sent, and answers the requests in them. Returns
    /// how many bytes were taken. All, unless too many replies wait to be taken with
    /// [`Self::output`]; the rest must then be offered again.
    ///
    /// # Errors
    /// [`Refused`]; until the domain is connected anew.
    pub fn input(
        &mut self,
        domid: DomainId,
        bytes: &[u8],
        host: &mut dyn Host,
    ) -> Result<usize, Refused> {
        let mut rest = bytes;
        while !rest.is_empty() {
            let connection = self.connections.get_mut(&domid).filter(|known| !known.broken);
            let connection = connection.ok_or(Refused)?;
            if !connection.has_room() {
                break;
            }
            match connection.decoder.feed(&mut rest) {
                Ok(Some(request)) => self.answer(domid, &request, host),
                Ok(None) => {}
                Err(_) => {
                    self.refuse(domid);
                    return Err(Refused);
                }
            }
        }
        Ok(bytes.len() - rest.len())
    }

    /// How many bytes of `domid` [`Self::input`] takes for certain: none while too many replies
    /// wait, else up to the end of the current header or message.
    #[must_use]
    pub fn wanted(&self, domid: DomainId) -> usize {
        self.connections
            .get(&domid)
            .filter(|known| !known.broken && known.has_room())
            .map_or(0, |known| known.decoder.wanted())
    }

    /// Stops serving a domain whose transport makes no sense any more, until it is connected
    /// anew. What its connection held is dropped.
    pub fn refuse(&mut self, domid: DomainId) {
        if let Some(connection) = self.connections.get_mut(&domid) {
            *connection = Connection::default();
            connection.broken = true;
        }
    }

    /// Moves bytes of replies and events for `domid` to `buffer`, and returns how many.
    pub fn output(&mut self, domid: DomainId, buffer: &mut [u8]) -> usize {
        self.connections.get_mut(&domid).map_or(0, |known| known.take_output(buffer))
    }

    /// Whether there is output for `domid`.
    #[must_use]
    pub fn has_output(&self, domid: DomainId) -> bool {
        self.connections.get(&domid).is_some_and(Connection::has_output)
    }

    /// A number that grows with every change of a node.
    #[must_use]
    pub const fn generation(&self) -> u64 {
        self.tree.generation()
    }

    fn answer(&mut self, domid: DomainId, request: &Message, host: &mut dyn Host) {
        let Some(connection) = self.connections.get_mut(&domid) else { return };
        // One event per request, so that a domain that always asks also listens.
        connection.encode_event();
        let target = connection.target;
        let result = self.execute(Caller { domid, target }, request, host);
        if let Some(connection) = self.connections.get_mut(&domid) {
            connection.reply(request, result);
        }
    }

    pub(crate) fn connection(&mut self, domid: DomainId) -> Result<&mut Connection, Errno> {
        self.connections.get_mut(&domid).ok_or(Errno::ENOENT)
    }

    /// The tree that a request of `caller` in transaction `tx_id` sees.
    pub(crate) fn look(
        &mut self,
        caller: Caller,
        tx_id: u32,
        path: &Path,
        look: Look,
    ) -> Result<&Tree, Errno> {
        if tx_id == 0 {
            return Ok(&self.tree);
        }
        Ok(self.transaction(caller, tx_id)?.look(path, look))
    }

    /// An open transaction of `caller`, which may hold more than it does.
    fn transaction(&mut self, caller: Caller, tx_id: u32) -> Result<&mut Open, Errno> {
        let limit = self.quotas.transaction_bytes;
        let transactions = &mut self.connection(caller.domid)?.transactions;
        let held: usize = transactions.values().map(Transaction::held).sum();
        let open = transactions.get_mut(&tx_id).ok_or(Errno::ENOENT)?.open()?;
        if held >= limit && !caller.is_privileged() { Err(Errno::ENOSPC) } else { Ok(open) }
    }

    /// Makes a change for `caller` in transaction `tx_id`, or at once.
    pub(crate) fn change(
        &mut self,
        caller: Caller,
        tx_id: u32,
        change: Change,
    ) -> Result<(), Errno> {
        let quotas = self.quotas;
        if tx_id == 0 {
            let notice = change.apply(&mut self.tree, caller, &quotas)?;
            self.changed(notice.as_slice());
            return Ok(());
        }
        self.transaction(caller, tx_id)?.change(caller, &quotas, change)
    }

    /// Ends a transaction.
    pub(crate) fn end(&mut self, caller: Caller, tx_id: u32, commit: bool) -> Result<(), Errno> {
        let quotas = self.quotas;
        let transactions = &mut self.connection(caller.domid)?.transactions;
        let transaction = transactions.remove(&tx_id).ok_or(Errno::ENOENT)?;
        if commit {
            let notices = transaction.commit(&mut self.tree, caller, &quotas)?;
            self.changed(&notices);
        }
        Ok(())
    }

    /// Tells watchers what changed, and transactions what is kept for them.
    fn changed(&mut self, notices: &[Notice]) {
        let copied = self.tree.take_copied();
        for (&domid, connection) in &mut self.connections {
            if copied > 0 && domid != PRIVILEGED {
                for transaction in connection.transactions.values_mut() {
                    transaction.keep_history(copied, self.quotas.history_bytes);
                }
            }
            let reader = Caller { domid, target: connection.target };
            for notice in notices {
                connection.notify(notice, reader, self.quotas.event_bytes);
            }
        }
    }

    /// Tells watchers of `special`.
    pub(crate) fn fire(&mut self, special: Special) {
        for connection in self.connections.values_mut() {
            let watches: alloc::vec::Vec<_> = connection
                .watches()
                .iter()
                .filter(|watch| watch.is_for(special))
                .cloned()
                .collect();
            for watch in watches {
                connection.queue_event(&watch, watch.path(), self.quotas.event_bytes);
            }
        }
    }
}

#[cfg(test)]
mod model_tests;
#[cfg(test)]
mod protocol_tests;
