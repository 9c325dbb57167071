//! Many clients on one stream to the control domain.
//!
//! Whoever runs the machine owns its second serial port. A [`Mux`] takes that stream and a path
//! for a socket, and lets any number of clients ask at the same time: each request gets an id
//! that is unique on the stream, and its response goes back to the one who asked under the id
//! that it chose. A client that does not read, or sends garbage, is dropped; the others notice
//! nothing. When the stream ends, every open request is answered with [`Failure::Gone`].

use crate::rundir;
use axolotl_abi::protocol::{
    self, Failure, FrameError, Framer, FromControl, Request, Response, ToControl,
};
use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, mpsc};
use std::thread;
use std::time::{Duration, Instant};

/// A client that does not take its answer within this time is dropped.
const WRITE_PATIENCE: Duration = Duration::from_millis(500);
/// A request that has no answer by then is forgotten; its client has long given up.
const ANSWER_PATIENCE: Duration = Duration::from_secs(30);
/// Most clients at a time.
const MAX_CLIENTS: usize = 64;
/// Most open requests.
const MAX_PENDING: usize = 1024;

/// The number of a client.
type ClientId = u64;

/// Where answers go.
#[derive(Debug)]
enum Sink {
    Socket(UnixStream),
    Here(mpsc::Sender<Response>),
}

#[derive(Debug)]
struct Pending {
    client: ClientId,
    id: u32,
    since: Instant,
}

#[derive(Debug)]
struct State {
    stream: UnixStream,
    clients: HashMap<ClientId, Sink>,
    pending: HashMap<u32, Pending>,
    next_client: ClientId,
    next_id: u32,
    gone: bool,
}

type Shared = Arc<Mutex<State>>;

/// See the module's description. Dropping it disconnects all clients and removes the socket.
#[derive(Debug)]
pub struct Mux {
    shared: Shared,
    socket: PathBuf,
}

impl Mux {
    /// Serves clients at `socket` over `stream`, which leads to the control domain. Creates the
    /// socket's directory, and replaces a socket that nobody listens on.
    ///
    /// # Errors
    /// When the socket cannot be made; `AddrInUse` when somebody serves there already.
    pub fn start(stream: UnixStream, socket: &Path) -> io::Result<Self> {
        let listener = listen(socket)?;
        stream.set_write_timeout(Some(Duration::from_secs(5)))?;
        let mut reader = stream.try_clone()?;
        let shared = Arc::new(Mutex::new(State {
            stream,
            clients: HashMap::new(),
            pending: HashMap::new(),
            next_client: 0,
            next_id: 0,
            gone: false,
        }));
        let state = Arc::clone(&shared);
        thread::Builder::new().name("axl answers".into()).spawn(move || {
            forward_answers(&mut reader, &state);
            lock(&state).end();
        })?;
        let state = Arc::clone(&shared);
        thread::Builder::new()
            .name("axl clients".into())
            .spawn(move || accept(&listener, &state))?;
        // Whatever half a frame stands in the other end's memory ends here.
        let _ = lock(&shared).stream.write_all(&[0]);
        Ok(Self { shared, socket: socket.into() })
    }

    /// Asks over the same stream.
    ///
    /// # Errors
    /// `TimedOut` without an answer within five seconds, `BrokenPipe` when the platform is gone.
    pub fn request(&self, request: Request) -> io::Result<Response> {
        let (sender, receiver) = mpsc::channel();
        let client = {
            let mut state = lock(&self.shared);
            let client = state.add(Sink::Here(sender));
            state.forward(client, ToControl { id: 0, request });
            client
        };
        let answer = receiver.recv_timeout(Duration::from_secs(5));
        lock(&self.shared).remove(client);
        match answer {
            Ok(Response::Failed(Failure::Gone)) => Err(io::ErrorKind::BrokenPipe.into()),
            Ok(response) => Ok(response),
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    }

    /// Whether the stream to the control domain has ended.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        lock(&self.shared).gone
    }
}

impl Drop for Mux {
    fn drop(&mut self) {
        {
            let mut state = lock(&self.shared);
            state.end();
            let _ = state.stream.shutdown(Shutdown::Both);
        }
        // Wakes the thread that accepts, which then sees that it is over.
        let _ = UnixStream::connect(&self.socket);
        let _ = std::fs::remove_file(&self.socket);
        if let Some(directory) = self.socket.parent() {
            // Stays when something else is in it.
            let _ = std::fs::remove_dir(directory);
        }
    }
}

fn lock(shared: &Shared) -> MutexGuard<'_, State> {
    // A thread that panicked leaves nothing half done that the others could not go on with.
    shared.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn listen(socket: &Path) -> io::Result<UnixListener> {
    rundir::create_for(socket)?;
    match UnixListener::bind(socket) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            if UnixStream::connect(socket).is_ok() {
                return Err(error);
            }
            std::fs::remove_file(socket)?;
            UnixListener::bind(socket)
        }
        result => result,
    }
}

fn forward_answers(reader: &mut UnixStream, shared: &Shared) {
    let mut framer = Framer::new();
    let mut buffer = [0; 4096];
    loop {
        let len = match reader.read(&mut buffer) {
            Ok(0) => return,
            Ok(len) => len,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        for byte in &buffer[..len] {
            match framer.push::<FromControl>(*byte) {
                Some(Ok(answer)) => lock(shared).answer(answer),
                Some(Err(FrameError::NotUnderstood { id: Some(id) })) => {
                    let response = Response::Failed(Failure::NotUnderstood);
                    lock(shared).answer(FromControl { id, response });
                }
                _ => {}
            }
        }
    }
}

fn accept(listener: &UnixListener, shared: &Shared) {
    for stream in listener.incoming() {
        if lock(shared).gone {
            return;
        }
        let Ok(stream) = stream else {
            // Out of file descriptors, perhaps: not for ever, and not in a busy loop.
            thread::sleep(Duration::from_millis(100));
            continue;
        };
        let shared = Arc::clone(shared);
        // Without a thread for it, the client is disconnected.
        let _ = thread::Builder::new().name("axl client".into()).spawn(move || {
            serve(stream, &shared);
        });
    }
}

/// Takes requests from one client until it ends, or sends what is no request.
fn serve(mut stream: UnixStream, shared: &Shared) {
    let Ok(writer) = stream.try_clone() else { return };
    if writer.set_write_timeout(Some(WRITE_PATIENCE)).is_err() {
        return;
    }
    let client = {
        let mut state = lock(shared);
        if state.clients.len() >= MAX_CLIENTS || state.gone {
            return;
        }
        state.add(Sink::Socket(writer))
    };
    let mut framer = Framer::new();
    let mut buffer = [0; 4096];
    'client: while let Ok(len @ 1..) = stream.read(&mut buffer) {
        for byte in &buffer[..len] {
            let mut state = lock(shared);
            match framer.push(*byte) {
                None => {}
                Some(Ok(request)) => state.forward(client, request),
                Some(Err(FrameError::NotUnderstood { id: Some(id) })) => {
                    let response = Response::Failed(Failure::NotUnderstood);
                    state.send(client, &FromControl { id, response });
                }
                Some(Err(_)) => break 'client,
            }
            if !state.clients.contains_key(&client) {
                break 'client;
            }
        }
    }
    lock(shared).remove(client);
}

impl State {
    fn add(&mut self, sink: Sink) -> ClientId {
        self.next_client += 1;
        self.clients.insert(self.next_client, sink);
        self.next_client
    }

    fn remove(&mut self, client: ClientId) {
        if let Some(Sink::Socket(stream)) = self.clients.remove(&client) {
            let _ = stream.shutdown(Shutdown::Both);
        }
        self.pending.retain(|_, pending| pending.client != client);
    }

    /// Sends a client's request on, under an id of our own.
    fn forward(&mut self, client: ClientId, message: ToControl) {
        self.pending.retain(|_, pending| pending.since.elapsed() < ANSWER_PATIENCE);
        let refuse = |failure| FromControl { id: message.id, response: Response::Failed(failure) };
        if self.gone {
            return self.send(client, &refuse(Failure::Gone));
        }
        if self.pending.len() >= MAX_PENDING {
            return self.send(client, &refuse(Failure::Busy));
        }
        self.next_id = self.next_id.wrapping_add(1);
        while self.pending.contains_key(&self.next_id) {
            self.next_id = self.next_id.wrapping_add(1);
        }
        let id = self.next_id;
        let Ok(frame) = protocol::encode(&ToControl { id, request: message.request }) else {
            let response = Response::Failed(Failure::TooLong);
            return self.send(client, &FromControl { id: message.id, response });
        };
        self.pending.insert(id, Pending { client, id: message.id, since: Instant::now() });
        if self.stream.write_all(&frame).is_err() {
            self.end();
        }
    }

    /// Gives an answer to the client that asked. One that nobody waits for is dropped.
    fn answer(&mut self, answer: FromControl) {
        if let Some(pending) = self.pending.remove(&answer.id) {
            let answer = FromControl { id: pending.id, response: answer.response };
            self.send(pending.client, &answer);
        }
    }

    fn send(&mut self, client: ClientId, answer: &FromControl) {
        let sent = match self.clients.get_mut(&client) {
            None => return,
            Some(Sink::Here(sender)) => sender.send(answer.response.clone()).is_ok(),
            Some(Sink::Socket(stream)) => {
                protocol::encode(answer).is_ok_and(|frame| stream.write_all(&frame).is_ok())
            }
        };
        if !sent {
            self.remove(client);
        }
    }

    /// The platform is gone: says so to all who wait, and disconnects everybody.
    fn end(&mut self) {
        self.gone = true;
        for (_, pending) in std::mem::take(&mut self.pending) {
            let response = Response::Failed(Failure::Gone);
            self.send(pending.client, &FromControl { id: pending.id, response });
        }
        let clients: Vec<_> = self.clients.keys().copied().collect();
        for client in clients {
            self.remove(client);
        }
    }
}
