//! The store inside one process, for tests of everything that uses it.

use crate::change::Change;
use crate::path::{Path, home};
use crate::perms::{Caller, PRIVILEGED};
use crate::server::{Host, Server};
use alloc::collections::BTreeMap;
use alloc::rc::Rc;
use alloc::vec;
use core::cell::RefCell;
use xen_abi::{DomainId, Errno, EventPort, Gfn};
use xenbus::{Client, Permission, Transport};

/// A store in this process. Clones are the same store.
///
/// ```
/// use xenbus::{DomainId, Nodes};
/// let store = xenstore::LocalStore::new();
/// store.add_home(DomainId(3));
/// let mut control = store.client(DomainId(0));
/// control.write("/local/domain/3/name", b"web")?;
/// let mut guest = store.client(DomainId(3));
/// assert_eq!(guest.read_string("name")?, "web");
/// # Ok::<(), xenbus::Errno>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct LocalStore(Rc<RefCell<Shared>>);

#[derive(Debug, Default)]
struct Shared {
    server: Server,
    lives: Lives,
}

/// Which connection of each domain is the current one.
#[derive(Debug, Default)]
struct Lives(BTreeMap<DomainId, u64>);

impl Lives {
    fn next(&mut self, domid: DomainId) -> u64 {
        let life = self.0.entry(domid).or_default();
        *life += 1;
        *life
    }
}

impl Host for Lives {
    fn introduce(&mut self, domid: DomainId, _: Gfn, _: EventPort) -> Result<(), Errno> {
        self.next(domid);
        Ok(())
    }

    fn release(&mut self, domid: DomainId) {
        self.next(domid);
    }
}

impl LocalStore {
    /// An empty store with the usual quotas.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A store around `server`.
    #[must_use]
    pub fn with_server(server: Server) -> Self {
        Self(Rc::new(RefCell::new(Shared { server, lives: Lives::default() })))
    }

    /// Connects a domain, as the first or the next incarnation: the watches and transactions of an
    /// earlier client of the same domain are gone, and its requests answer `EIO`.
    #[must_use]
    pub fn client(&self, domid: DomainId) -> Client<LocalTransport> {
        Client::new(LocalTransport { store: self.clone(), domid, life: self.restart(domid) })
    }

    /// What the store does when the next incarnation of a domain is introduced; without a client.
    pub fn restart(&self, domid: DomainId) -> u64 {
        let mut shared = self.0.borrow_mut();
        shared.server.connect(domid);
        shared.lives.next(domid)
    }

    /// Creates the home of a domain, for the domain to read, as the toolstack does.
    ///
    /// # Panics
    /// When `domid` is not the id of a domain.
    pub fn add_home(&self, domid: DomainId) {
        let path = Path::parse(&home(domid), domid).expect("a home is a valid path");
        let perms = vec![Permission::owner(PRIVILEGED), Permission::reader(domid)];
        let control = Caller { domid: PRIVILEGED, target: None };
        let mut shared = self.0.borrow_mut();
        for change in [Change::Mkdir { path: path.clone() }, Change::SetPerms { path, perms }] {
            shared.server.change(control, 0, change).expect("the control domain may do this");
        }
    }

    /// A number that grows with every change of a node.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.0.borrow().server.generation()
    }
}

/// One domain's end of a connection to a [`LocalStore`].
#[derive(Debug)]
pub struct LocalTransport {
    store: LocalStore,
    domid: DomainId,
    life: u64,
}

impl LocalTransport {
    fn is_current(&self) -> bool {
        self.store.0.borrow().lives.0.get(&self.domid) == Some(&self.life)
    }
}

impl Transport for LocalTransport {
    fn send(&mut self, bytes: &[u8]) -> usize {
        if !self.is_current() {
            return 0;
        }
        let Shared { server, lives } = &mut *self.store.0.borrow_mut();
        server.input(self.domid, bytes, lives).unwrap_or(0)
    }

    fn receive(&mut self, buffer: &mut [u8]) -> usize {
        if !self.is_current() {
            return 0;
        }
        self.store.0.borrow_mut().server.output(self.domid, buffer)
    }

    /// The server answers at once: there is never anything to wait for.
    fn wait(&mut self) -> Result<(), Errno> {
        Err(Errno::EIO)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use xenbus::{Nodes, Store};

    #[test]
    fn a_new_client_replaces_the_old_one() {
        let store = LocalStore::new();
        store.add_home(DomainId(3));
        let mut first = store.client(DomainId(3));
        first.watch("name", "t").unwrap();
        let mut second = store.client(DomainId(3));
        assert_eq!(first.read("name"), Err(Errno::EIO));
        assert!(first.is_lost());
        assert_eq!(second.next_event(), None);
        assert_eq!(second.read("name"), Err(Errno::ENOENT));
    }

    #[test]
    fn introducing_and_releasing_ends_a_client() {
        let store = LocalStore::new();
        let mut control = store.client(DomainId(0));
        let mut guest = store.client(DomainId(3));
        assert_eq!(control.is_introduced(DomainId(3)), Ok(true));
        control.introduce(DomainId(3), Gfn(1), EventPort(2)).unwrap();
        assert_eq!(guest.read("x"), Err(Errno::EIO));
        control.release(DomainId(3)).unwrap();
        assert_eq!(control.is_introduced(DomainId(3)), Ok(false));
    }

    /// More children than fit into one message, read by the real client.
    #[test]
    fn long_directories_come_in_parts() {
        let store = LocalStore::new();
        let mut control = store.client(DomainId(0));
        let mut expected: Vec<String> =
            (0..1500).map(|n| format!("a-rather-long-name-{n}")).collect();
        for name in &expected {
            control.mkdir(&format!("/many/{name}")).unwrap();
        }
        expected.sort();
        assert_eq!(control.directory("/many").unwrap(), expected);
        assert_eq!(control.transaction(|nodes| nodes.directory("/many")).unwrap(), expected);
        assert_eq!(control.directory("/").unwrap(), ["many"]);
        control.mkdir("/empty").unwrap();
        assert!(control.directory("/empty").unwrap().is_empty());
    }

    /// The second of two clients that change what both have read tries again, and both succeed.
    #[test]
    fn transactions_of_two_clients_are_serialised() {
        let store = LocalStore::new();
        let mut one = store.client(DomainId(0));
        one.write("/n", b"0").unwrap();
        one.set_perms("/n", &[Permission { access: xenbus::NodeAccess::Both, domid: PRIVILEGED }])
            .unwrap();
        let mut two = store.client(DomainId(3));
        let mut attempts = 0;
        one.transaction(|nodes| {
            attempts += 1;
            let n: u32 = nodes.read_string("/n")?.parse().unwrap();
            if attempts == 1 {
                two.transaction(|nodes| {
                    let n: u32 = nodes.read_string("/n")?.parse().unwrap();
                    nodes.write("/n", (n + 1).to_string().as_bytes())
                })?;
            }
            nodes.write("/n", (n + 1).to_string().as_bytes())
        })
        .unwrap();
        assert_eq!(attempts, 2);
        assert_eq!(one.read_string("/n").unwrap(), "2");
    }
}
