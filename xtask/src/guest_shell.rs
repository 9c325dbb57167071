//! A shell in a guest, over TCP: how tests and measurements have a whole guest do things.
//!
//! The guest's command line starts it, with [`SERVE`]: busybox's `nc`, which hands each connection
//! to a shell. Commands run one after the other; what starts in the background goes on.

use std::io::{BufRead, BufReader, Error, ErrorKind, Result, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

/// The guest's port.
pub const PORT: u16 = 23;
/// For the guest's command line.
pub const SERVE: &str = "init.run=nc,-ll,-p,23,-e,sh,&";
/// Ends the output of a command; the exit status follows.
const END: &str = "--end-of-command-- ";
/// How long an attempt to reach a guest may take that may not be there yet.
const ATTEMPT: Duration = Duration::from_secs(15);

/// A connection to a shell.
#[derive(Debug)]
pub struct Shell {
    writer: TcpStream,
    reader: BufReader<TcpStream>,
}

/// What a command printed, and how it ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Done {
    /// Both its outputs.
    pub text: String,
    /// Its exit status.
    pub status: i32,
}

impl Shell {
    /// Connects to the guest behind `address`, and waits until it answers.
    ///
    /// # Errors
    /// It did not within `limit`.
    pub fn connect(address: SocketAddr, limit: Duration) -> Result<Self> {
        let deadline = Instant::now() + limit;
        loop {
            // QEMU accepts at once for a guest that is not there yet: only an answer counts.
            let answer = Self::open(address).and_then(|mut shell| {
                shell.run("true", ATTEMPT)?;
                Ok(shell)
            });
            match answer {
                Err(_) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(200));
                }
                answer => return answer,
            }
        }
    }

    fn open(address: SocketAddr) -> Result<Self> {
        let writer = TcpStream::connect_timeout(&address, ATTEMPT)?;
        let reader = BufReader::new(writer.try_clone()?);
        Ok(Self { writer, reader })
    }

    /// Runs a command; it may be several lines.
    ///
    /// # Errors
    /// The connection broke, or the command took longer than `limit`.
    pub fn run(&mut self, command: &str, limit: Duration) -> Result<Done> {
        // The marker is not in what is sent as it is in what comes back.
        let script = format!(
            "{{ {command}\n}} </dev/null 2>&1; set -- $?; echo; echo '--end-of''-command--' $1\n"
        );
        self.writer.write_all(script.as_bytes())?;
        let deadline = Instant::now() + limit;
        let mut text = String::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(timed_out(command, &text));
            }
            self.reader.get_ref().set_read_timeout(Some(left))?;
            let mut line = Vec::new();
            match self.reader.read_until(b'\n', &mut line) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(_) => {}
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) =>
                {
                    return Err(timed_out(command, &text));
                }
                Err(error) => return Err(error),
            }
            let line = String::from_utf8_lossy(&line);
            if let Some(status) = line.strip_prefix(END) {
                let status = status.trim().parse().unwrap_or(-1);
                return Ok(Done { text: text.trim_end().to_owned(), status });
            }
            text += &line;
        }
    }

    /// Runs a command that must succeed, and returns what it printed.
    ///
    /// # Errors
    /// As [`Self::run`], and when it fails.
    pub fn must(&mut self, command: &str, limit: Duration) -> Result<String> {
        let Done { text, status } = self.run(command, limit)?;
        match status {
            0 => Ok(text),
            _ => Err(Error::other(format!("`{command}` ended with {status}: {text}"))),
        }
    }
}

fn timed_out(command: &str, text: &str) -> Error {
    Error::new(ErrorKind::TimedOut, format!("`{command}` has not ended; so far: {text}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;
    use std::process::{Command, Stdio};

    /// A shell of the host behind a socket, as the guest's `nc` makes it.
    fn shell() -> Shell {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("bound");
        std::thread::spawn(move || {
            let (stream, _) = listener.accept().expect("a client");
            let input = std::os::fd::OwnedFd::from(stream.try_clone().expect("a copy"));
            let output = std::os::fd::OwnedFd::from(stream);
            let mut command = Command::new("sh");
            let _ = command.stdin(Stdio::from(input)).stdout(Stdio::from(output)).status();
        });
        Shell::connect(address, Duration::from_secs(10)).expect("an answer")
    }

    #[test]
    fn a_command_says_what_it_prints_and_how_it_ended() {
        let mut shell = shell();
        let second = Duration::from_secs(10);
        let done = shell.run("echo one; echo two >&2; cat; (exit 3)", second).expect("it ends");
        assert_eq!((done.text.as_str(), done.status), ("one\ntwo", 3));
        assert_eq!(shell.must("printf 'no newline'", second).expect("well"), "no newline");
        shell.must("value=5", second).expect("well");
        assert_eq!(shell.must("echo $value", second).expect("well"), "5");
        assert!(shell.must("false", second).is_err());
    }

    #[test]
    fn a_command_that_does_not_end_is_an_error() {
        let error = shell().run("echo begun; sleep 5", Duration::from_millis(300));
        let error = error.expect_err("it sleeps");
        assert_eq!(error.kind(), ErrorKind::TimedOut);
    }
}
