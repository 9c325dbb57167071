//! The connections of the server on `smoltcp` sockets.
//!
//! One socket per connection that can be served at once; each listens again when its connection is
//! over. A socket that waits out `TIME-WAIT` is taken early when few others listen.

use crate::connection::{Connection, Facts};
use alloc::vec;
use alloc::vec::Vec;
use smoltcp::iface::{SocketHandle, SocketSet};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time::Duration;
use smoltcp::wire::IpEndpoint;

/// Bytes that may be on their way to a client, per connection.
pub const SEND_BUFFER: usize = 128 * 1024;
/// Receive window, per connection.
pub const RECEIVE_BUFFER: usize = 64 * 1024;
/// Sockets that shall listen, if possible.
const RESERVE: usize = 4;
/// A connection on which nothing moved for so long is cut.
const IDLE_NS: u64 = 60_000_000_000;
/// A peer that does not acknowledge for so long is gone. Far above any restart of a driver.
const UNANSWERED: Duration = Duration::from_secs(60);

#[derive(Debug)]
struct Slot {
    handle: SocketHandle,
    connection: Connection,
    /// When bytes last moved.
    moved_ns: u64,
    /// No connection of its was seen yet.
    is_new: bool,
    /// Requests of the connections before this one.
    requests: u64,
}

/// The server.
#[derive(Debug)]
pub struct Server {
    port: u16,
    slots: Vec<Slot>,
}

impl Server {
    /// A server on `port` for up to `connections` clients at once. It allocates all buffers now.
    ///
    /// # Panics
    /// If `port` is 0.
    pub fn new(sockets: &mut SocketSet<'_>, port: u16, connections: u16) -> Self {
        assert!(port != 0, "port 0 cannot be listened on");
        let slots = (0..connections).map(|_| Slot {
            handle: sockets.add(socket()),
            connection: Connection::new(),
            moved_ns: 0,
            is_new: true,
            requests: 0,
        });
        let mut server = Self { port, slots: slots.collect() };
        for slot in &mut server.slots {
            slot.listen(sockets, port, 0);
        }
        server
    }

    /// Requests answered.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.slots.iter().map(|slot| slot.requests + slot.connection.requests).sum()
    }

    /// Connections that are open.
    #[must_use]
    pub fn connections(&self, sockets: &SocketSet<'_>) -> usize {
        let open = |slot: &&Slot| sockets.get::<Socket>(slot.handle).is_active();
        self.slots.iter().filter(open).count()
    }

    /// The far ends of connections that a client may believe to be asking for still.
    pub fn open<'a>(&'a self, sockets: &'a SocketSet<'_>) -> impl Iterator<Item = IpEndpoint> {
        let sockets = self.slots.iter().map(|slot| sockets.get::<Socket>(slot.handle));
        let open = sockets.filter(|socket| socket.is_active() && socket.state() != State::TimeWait);
        open.filter_map(Socket::remote_endpoint)
    }

    /// Moves bytes wherever they can move. Returns whether any did.
    pub fn serve(&mut self, sockets: &mut SocketSet<'_>, now_ns: u64, facts: &impl Facts) -> bool {
        let mut moved = false;
        for slot in &mut self.slots {
            let socket = sockets.get_mut::<Socket>(slot.handle);
            // A socket that was cut still has its peer until the reset has left.
            if socket.state() == State::Closed && socket.remote_endpoint().is_none() {
                slot.listen(sockets, self.port, now_ns);
                continue;
            }
            let any = slot.transfer(socket, facts);
            // A connection is as old as its first sight, however long nobody came before it.
            if any || slot.is_new {
                slot.moved_ns = now_ns;
            }
            slot.is_new = socket.state() == State::Listen;
            moved |= slot.finish(socket, now_ns) || any;
        }
        self.keep_some_listening(sockets, now_ns);
        moved
    }

    /// Takes sockets out of `TIME-WAIT` while few others listen: several clients may knock before
    /// the next round. (RFC 9293, section 3.6.1: the state keeps late segments of an old connection
    /// from a new one between the same two ports, which is rarer than being full.)
    fn keep_some_listening(&mut self, sockets: &mut SocketSet<'_>, now_ns: u64) {
        let state =
            |sockets: &SocketSet<'_>, slot: &Slot| sockets.get::<Socket>(slot.handle).state();
        let listening = |slot: &&Slot| state(sockets, slot) == State::Listen;
        let missing = RESERVE.saturating_sub(self.slots.iter().filter(listening).count());
        for _ in 0..missing {
            let waiting =
                self.slots.iter_mut().filter(|slot| state(sockets, slot) == State::TimeWait);
            let Some(slot) = waiting.min_by_key(|slot| slot.moved_ns) else { return };
            // A fresh socket rather than an aborted one, which would still send a reset.
            *sockets.get_mut::<Socket>(slot.handle) = socket();
            slot.listen(sockets, self.port, now_ns);
        }
    }

    /// When [`Self::serve`] must be called at the latest to cut idle connections.
    #[must_use]
    pub fn deadline_ns(&self, sockets: &SocketSet<'_>) -> Option<u64> {
        let active =
            self.slots.iter().filter(|slot| sockets.get::<Socket>(slot.handle).is_active());
        active.map(|slot| slot.moved_ns + IDLE_NS).min()
    }
}

fn socket() -> Socket<'static> {
    let buffer = |len| SocketBuffer::new(vec![0; len]);
    let mut socket = Socket::new(buffer(RECEIVE_BUFFER), buffer(SEND_BUFFER));
    socket.set_timeout(Some(UNANSWERED));
    // Answers are written in large pieces; the last, short one shall not wait for acknowledgements.
    socket.set_nagle_enabled(false);
    socket
}

impl Slot {
    fn listen(&mut self, sockets: &mut SocketSet<'_>, port: u16, now_ns: u64) {
        self.requests += self.connection.requests;
        self.connection = Connection::new();
        self.moved_ns = now_ns;
        self.is_new = true;
        let listening = sockets.get_mut::<Socket>(self.handle).listen(port);
        assert!(listening.is_ok(), "a closed socket can listen, and the port is not 0");
    }

    fn transfer(&mut self, socket: &mut Socket<'_>, facts: &impl Facts) -> bool {
        let connection = &mut self.connection;
        let mut any = false;
        loop {
            let mut round = 0;
            if socket.can_recv() {
                let taken = |bytes: &mut [u8]| {
                    let taken = connection.input(bytes, facts);
                    (taken, taken)
                };
                round += socket.recv(taken).unwrap_or(0);
            }
            if socket.can_send() {
                let written = |buffer: &mut [u8]| {
                    let written = connection.output(buffer);
                    (written, written)
                };
                round += socket.send(written).unwrap_or(0);
            }
            any |= round != 0;
            if round == 0 {
                return any;
            }
        }
    }

    /// Ends what is over; returns whether it was cut.
    fn finish(&self, socket: &mut Socket<'_>, now_ns: u64) -> bool {
        if !socket.is_active() {
            return false;
        }
        let half_closed = socket.state() == State::CloseWait && socket.recv_queue() == 0;
        if self.connection.is_closing() || (half_closed && !self.connection.has_answer()) {
            socket.close();
        }
        let idle = now_ns.saturating_sub(self.moved_ns) > IDLE_NS;
        let cut = idle || self.connection.is_broken();
        if cut {
            socket.abort();
        }
        cut
    }
}
