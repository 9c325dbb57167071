//! The machine's console: one serial line on which every domain's lines arrive as `NAME| text`.

use std::io::{IsTerminal, Read, Write};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

/// Longest line that is kept whole; a longer one is broken.
const MAX_LINE: usize = 4096;

/// A line of the console.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Line {
    /// Who wrote it: a domain, or `core`. Empty when the line has no name in front.
    pub from: String,
    /// What it says, without control characters.
    pub text: String,
    /// When it arrived, since the machine was started.
    pub at: Duration,
}

impl Line {
    /// Takes a raw line apart. What a guest writes may hold anything, terminal escape sequences
    /// included; only printable characters and tabs are kept.
    #[must_use]
    pub fn parse(raw: &[u8], at: Duration) -> Self {
        let clean: String = String::from_utf8_lossy(raw)
            .chars()
            .filter(|c| *c == '\t' || !c.is_control())
            .collect();
        let named = clean.split_once('|').filter(|(name, _)| is_name(name));
        match named {
            Some((name, text)) => {
                let text = text.strip_prefix(' ').unwrap_or(text);
                Self { from: name.into(), text: text.into(), at }
            }
            None => Self { from: String::new(), text: clean, at },
        }
    }

    /// Whether the core says that it has stopped.
    #[must_use]
    pub fn is_core_panic(&self) -> bool {
        let from_core = self.from == "core" || self.from.is_empty();
        from_core && self.text.to_ascii_lowercase().contains("panic")
    }

    /// The measurement that this line reports as `bench: name value unit`.
    #[must_use]
    pub fn measurement(&self) -> Option<(&str, u64, &str)> {
        let mut words = self.text.split("bench: ").nth(1)?.split_whitespace();
        let name = words.next()?;
        let value = words.next()?.parse().ok()?;
        Some((name, value, words.next().unwrap_or("")))
    }
}

fn is_name(name: &str) -> bool {
    let good = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    !name.is_empty() && name.len() < 32 && name.chars().all(good)
}

/// Splits bytes into lines.
#[derive(Default, Debug)]
struct Splitter(Vec<u8>);

impl Splitter {
    /// Takes bytes; `line` gets every line that they complete.
    fn push(&mut self, bytes: &[u8], mut line: impl FnMut(&[u8])) {
        for byte in bytes {
            if *byte != b'\n' {
                self.0.push(*byte);
            }
            if *byte == b'\n' || self.0.len() == MAX_LINE {
                line(&self.0);
                self.0.clear();
            }
        }
    }
}

/// Reads `source` on a thread of its own until it ends; `sink` sees every line first, on that
/// thread.
pub fn follow(
    mut source: impl Read + Send + 'static,
    mut sink: impl FnMut(&Line) + Send + 'static,
) -> Receiver<Line> {
    let (sender, receiver) = channel();
    let start = Instant::now();
    std::thread::spawn(move || {
        let mut splitter = Splitter::default();
        let mut buffer = [0; 4096];
        let mut pass = |raw: &[u8]| deliver(Line::parse(raw, start.elapsed()), &mut sink, &sender);
        while let Ok(count @ 1..) = source.read(&mut buffer) {
            splitter.push(&buffer[..count], &mut pass);
        }
        if !splitter.0.is_empty() {
            pass(&splitter.0);
        }
    });
    receiver
}

fn deliver(line: Line, sink: &mut impl FnMut(&Line), sender: &Sender<Line>) {
    sink(&line);
    // Nobody may be left to listen; the sink still wants the rest.
    let _ = sender.send(line);
}

/// Waits for the next line; `None` at the deadline, an error when no more will come.
///
/// # Errors
/// The machine's console has ended.
pub fn next(lines: &Receiver<Line>, deadline: Instant) -> Result<Option<Line>, Ended> {
    let left = deadline.saturating_duration_since(Instant::now());
    match lines.recv_timeout(left) {
        Ok(line) => Ok(Some(line)),
        Err(RecvTimeoutError::Timeout) => Ok(None),
        Err(RecvTimeoutError::Disconnected) => Err(Ended),
    }
}

/// The console has ended, because the machine has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ended;

/// How lines are shown.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Colour {
    /// With escape sequences.
    On,
    /// Without.
    Off,
}

impl Colour {
    /// Colour on a terminal, unless `NO_COLOR` is set (see no-color.org).
    #[must_use]
    pub fn for_stdout() -> Self {
        let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        if std::io::stdout().is_terminal() && !refused { Self::On } else { Self::Off }
    }
}

/// Writes a line with its name in front, in the name's colour.
///
/// # Errors
/// Whatever `out` answers.
pub fn show(line: &Line, colour: Colour, out: &mut impl Write) -> std::io::Result<()> {
    let name = if line.from.is_empty() { "-" } else { &line.from };
    match colour {
        Colour::On => {
            let code = colour_of(name);
            writeln!(out, "\x1b[{code}m{name:>8}\x1b[0m {}", line.text)
        }
        Colour::Off => writeln!(out, "{name:>8} {}", line.text),
    }
}

/// The colour of a name: the same in every run. Red is left to errors.
fn colour_of(name: &str) -> u8 {
    const COLOURS: [u8; 11] = [32, 33, 34, 35, 36, 92, 93, 94, 95, 96, 37];
    match name {
        "core" => 97,
        "control" => 36,
        "store" => 35,
        _ => {
            let sum = axolotl_abi::protocol::crc32(name.as_bytes()) as usize;
            COLOURS[sum % COLOURS.len()]
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(raw: &str) -> Line {
        Line::parse(raw.as_bytes(), Duration::ZERO)
    }

    #[test]
    fn names_are_taken_off() {
        assert_eq!(line("net0| link up\r").from, "net0");
        assert_eq!(line("net0| link up\r").text, "link up");
        assert_eq!(line("net0| a | b").text, "a | b");
        assert_eq!(line("SeaBIOS (version 1)").from, "");
        assert_eq!(line("a b| c").from, "", "no domain has such a name");
    }

    #[test]
    fn a_guest_cannot_command_the_terminal() {
        assert_eq!(line("demo| \x1b[2Jhello\x07").text, "[2Jhello");
    }

    #[test]
    fn only_the_core_can_report_its_own_panic() {
        assert!(line("core| PANIC at x").is_core_panic());
        assert!(!line("net0| panicked at main.rs").is_core_panic());
    }

    #[test]
    fn measurements_are_found_behind_any_log_prefix() {
        let line = line("pingpong| INFO bench: null_hypercall 143 ns");
        assert_eq!(line.measurement(), Some(("null_hypercall", 143, "ns")));
        assert_eq!(Line::parse(b"x| bench: a b c", Duration::ZERO).measurement(), None);
    }

    #[test]
    fn lines_are_whole_whatever_the_pieces() {
        let text = b"core| one\r\nnet0| two\npart";
        for size in 1..text.len() {
            let mut seen = Vec::new();
            let mut splitter = Splitter::default();
            for piece in text.chunks(size) {
                splitter.push(piece, |raw| seen.push(raw.to_vec()));
            }
            assert_eq!(seen, [b"core| one\r".to_vec(), b"net0| two".to_vec()]);
            assert_eq!(splitter.0, b"part");
        }
    }

    #[test]
    fn colour_is_only_added_when_wanted() {
        let mut plain = Vec::new();
        show(&line("net0| up"), Colour::Off, &mut plain).expect("a vector");
        assert_eq!(plain, b"    net0 up\n");
        let mut coloured = Vec::new();
        show(&line("net0| up"), Colour::On, &mut coloured).expect("a vector");
        assert!(String::from_utf8(coloured).expect("text").contains("\x1b[0m up"));
    }
}
