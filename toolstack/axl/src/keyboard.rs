//! The terminal's keyboard, key by key, for a guest's console.

use std::io::{IsTerminal, Read};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

/// Ctrl-], which detaches.
const DETACH: u8 = 0x1d;
/// How long a look at the keyboard takes when nothing is typed.
const PATIENCE: Duration = Duration::from_millis(50);

/// What was typed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Typed {
    /// Nothing, for a while.
    Nothing,
    /// The key that ends it.
    Detach,
    /// Something for the guest.
    Bytes(Vec<u8>),
}

/// A terminal that passes on each key as it is typed. It is as before when this is dropped.
#[derive(Debug)]
pub struct Keyboard {
    keys: Receiver<Vec<u8>>,
    before: String,
}

impl Keyboard {
    /// The keyboard of the terminal that this program runs at, if there is one.
    #[must_use]
    pub fn open() -> Option<Self> {
        if !std::io::stdin().is_terminal() {
            return None;
        }
        let before = stty(&["-g"])?.trim().to_owned();
        stty(&["-icanon", "-echo", "-isig", "-icrnl", "min", "1"])?;
        let (sender, keys) = channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 256];
            while let Ok(len @ 1..) = std::io::stdin().read(&mut buffer) {
                if sender.send(buffer[..len].to_vec()).is_err() {
                    break;
                }
            }
        });
        Some(Self { keys, before })
    }

    /// What is typed next, if it is soon.
    #[must_use]
    pub fn typed(&self) -> Typed {
        match self.keys.recv_timeout(PATIENCE) {
            Ok(bytes) if bytes.contains(&DETACH) => Typed::Detach,
            Ok(bytes) => Typed::Bytes(bytes),
            Err(RecvTimeoutError::Timeout) => Typed::Nothing,
            Err(RecvTimeoutError::Disconnected) => Typed::Detach,
        }
    }
}

impl Drop for Keyboard {
    fn drop(&mut self) {
        let _ = stty(&[&self.before]);
    }
}

/// Runs `stty` on our terminal; what it prints.
fn stty(arguments: &[&str]) -> Option<String> {
    let output = Command::new("stty").args(arguments).stdin(Stdio::inherit()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}
