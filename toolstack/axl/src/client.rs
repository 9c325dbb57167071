//! A client of one running system.

use crate::rundir;
use axolotl_abi::protocol::{
    self, Failure, FrameError, Framer, FromControl, Request, Response, ToControl,
};
use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use thiserror::Error;

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// Why there is no answer. Each is one line for the user.
#[derive(Debug, Error)]
pub enum ClientError {
    /// No run directory has a socket.
    #[error("no system is running: start one with `cargo xtask run`")]
    NoneRunning,
    /// There is more than one, and none was named.
    #[error("several systems are running ({}): choose one with --system", .0.join(", "))]
    SeveralRunning(Vec<String>),
    /// The one that was named is not there.
    #[error("system `{0}` is not running")]
    NotRunning(String),
    /// Nobody listens.
    #[error("nobody answers at {}: the platform is not running ({why})", .path.display())]
    Dead {
        /// The socket.
        path: PathBuf,
        /// The system's reason.
        why: std::io::Error,
    },
    /// The platform ended while it was asked.
    #[error("the platform is gone")]
    Gone,
    /// No answer came in time.
    #[error("no answer within {} seconds: the control domain is busy or dead", PATIENCE.as_secs())]
    Timeout,
    /// The other end speaks another version.
    #[error(
        "the control domain speaks version {theirs} of the protocol, this program {}: use the `axl` of the same build",
        protocol::VERSION
    )]
    Version {
        /// The control domain's version.
        theirs: u32,
    },
    /// The control domain answered, with a refusal.
    #[error("{}", describe(.0))]
    Refused(Failure),
    /// The answer makes no sense.
    #[error("the control domain's answer is not understood: use the `axl` of the same build")]
    NotUnderstood,
}

/// A refusal as a sentence.
fn describe(failure: &Failure) -> String {
    match failure {
        Failure::UnknownName { name, nearest: Some(nearest) } => {
            format!("there is no domain `{name}`: did you mean `{nearest}`?")
        }
        Failure::UnknownName { name, nearest: None } => {
            format!("there is no domain `{name}`: `axl list` shows all")
        }
        Failure::BadState { message } => message.clone(),
        Failure::Core { errno, name } => format!("the core refused: {name} ({errno})"),
        Failure::Store { name } => match name.as_str() {
            "ENOENT" => "there is no such node".into(),
            "EINVAL" => "that is no path: paths are absolute, such as /local/domain".into(),
            "EIO" => "the store is dead".into(),
            other => format!("the store refused: {other}"),
        },
        Failure::TooLong => "the name is too long".into(),
        Failure::TooLarge => "the answer is too large".into(),
        Failure::Busy => "the control domain has too much to do: try again".into(),
        Failure::NotUnderstood => {
            "the control domain does not know this command: use the `axl` of the same build".into()
        }
        Failure::Gone => "the platform is gone".into(),
    }
}

/// A connection to the control domain of a running system.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    framer: Framer,
    /// Bytes received behind the last answer.
    received: VecDeque<u8>,
    last_id: u32,
    system: String,
    patience: Duration,
}

impl Client {
    /// Connects to the system named `system`, or to the only one that runs.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn find(system: Option<&str>) -> Result<Self, ClientError> {
        let sockets = rundir::sockets();
        if let Some(name) = system {
            let found = sockets.iter().find(|(known, _)| known == name);
            let (_, path) = found.ok_or_else(|| ClientError::NotRunning(name.into()))?;
            return Self::connect(path);
        }
        // A socket that nobody listens on is what a killed process leaves behind.
        let mut alive: Vec<_> = sockets
            .iter()
            .filter_map(|(name, path)| UnixStream::connect(path).ok().map(|stream| (name, stream)))
            .collect();
        match (alive.pop(), alive.as_slice()) {
            (Some((_, stream)), []) => Self::over(stream),
            (Some((last, _)), others) => {
                let mut names: Vec<_> = others.iter().map(|(name, _)| (*name).clone()).collect();
                names.push(last.clone());
                Err(ClientError::SeveralRunning(names))
            }
            (None, _) => match sockets.first() {
                Some((_, path)) if sockets.len() == 1 => Self::connect(path),
                _ => Err(ClientError::NoneRunning),
            },
        }
    }

    /// Connects to the socket at `path`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let dead = |why| ClientError::Dead { path: path.into(), why };
        Self::over(UnixStream::connect(path).map_err(dead)?)
    }

    /// Speaks over a stream that is connected already.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn over(stream: UnixStream) -> Result<Self, ClientError> {
        Self::with_patience(stream, PATIENCE)
    }

    /// As [`Self::over`], with another limit for each answer.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn with_patience(stream: UnixStream, patience: Duration) -> Result<Self, ClientError> {
        stream.set_write_timeout(Some(patience)).map_err(|_| ClientError::Gone)?;
        let mut client = Self {
            stream,
            framer: Framer::new(),
            received: VecDeque::new(),
            last_id: 0,
            system: String::new(),
            patience,
        };
        match client.request(Request::Hello { version: protocol::VERSION })? {
            Response::Hello { version: protocol::VERSION, system } => client.system = system,
            Response::Hello { version, .. } => {
                return Err(ClientError::Version { theirs: version });
            }
            _ => return Err(ClientError::NotUnderstood),
        }
        Ok(client)
    }

    /// The name of the system.
    #[must_use]
    pub fn system(&self) -> &str {
        &self.system
    }

    /// Asks, and waits for the answer, at most five seconds.
    ///
    /// # Errors
    /// See [`ClientError`]; a refusal is one of them, never an `Ok`.
    pub fn request(&mut self, request: Request) -> Result<Response, ClientError> {
        self.last_id = self.last_id.wrapping_add(1);
        let id = self.last_id;
        let frame = protocol::encode(&ToControl { id, request })
            .map_err(|_| ClientError::Refused(Failure::TooLong))?;
        self.stream.write_all(&frame).map_err(|error| lost(&error))?;
        let deadline = Instant::now() + self.patience;
        loop {
            match self.receive(deadline)? {
                Ok(answer) if answer.id == id => {
                    return match answer.response {
                        Response::Failed(Failure::Gone) => Err(ClientError::Gone),
                        Response::Failed(failure) => Err(ClientError::Refused(failure)),
                        response => Ok(response),
                    };
                }
                // An answer to a question that was given up.
                Ok(_) | Err(FrameError::Damaged | FrameError::TooLong) => {}
                Err(FrameError::NotUnderstood { id: theirs }) => {
                    if theirs == Some(id) {
                        return Err(ClientError::NotUnderstood);
                    }
                }
            }
        }
    }

    fn receive(
        &mut self,
        deadline: Instant,
    ) -> Result<Result<FromControl, FrameError>, ClientError> {
        let mut buffer = [0; 4096];
        loop {
            while let Some(byte) = self.received.pop_front() {
                if let Some(frame) = self.framer.push(byte) {
                    return Ok(frame);
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ClientError::Timeout);
            }
            self.stream.set_read_timeout(Some(left)).map_err(|_| ClientError::Gone)?;
            match self.stream.read(&mut buffer) {
                Ok(0) => return Err(ClientError::Gone),
                Ok(len) => self.received.extend(&buffer[..len]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(lost(&error)),
            }
        }
    }
}

fn lost(error: &std::io::Error) -> ClientError {
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => ClientError::Timeout,
        _ => ClientError::Gone,
    }
}
