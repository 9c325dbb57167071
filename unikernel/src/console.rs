//! The domain's console: a ring in the core, drained by the control domain, that survives the
//! domain's death. `log` writes here too.
#![expect(unsafe_code, reason = "the core reads memory by address")]

use core::fmt::{self, Write};
use log::{Level, LevelFilter, Log, Metadata, Record};
use xen_abi::hypercall::{CONSOLE_IO, CONSOLEIO_WRITE};

/// Writes bytes to the domain's console; in the control domain, to the machine's.
pub fn write(bytes: &[u8]) {
    let (pointer, len) = (bytes.as_ptr() as u64, bytes.len() as u64);
    // SAFETY: the core only reads, and only `bytes`.
    let _ = unsafe { crate::hypercall::raw(CONSOLE_IO, [CONSOLEIO_WRITE, len, pointer, 0, 0]) };
}

/// Collects a line, so that it reaches the console in one piece.
pub struct Line {
    bytes: [u8; 240],
    len: usize,
}

impl Line {
    /// An empty line.
    #[must_use]
    pub const fn new() -> Self {
        Self { bytes: [0; 240], len: 0 }
    }

    fn flush(&mut self) {
        if self.len > 0 {
            write(&self.bytes[..self.len]);
            self.len = 0;
        }
    }
}

impl Default for Line {
    fn default() -> Self {
        Self::new()
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if self.len == self.bytes.len() {
                self.flush();
            }
            self.bytes[self.len] = byte;
            self.len += 1;
        }
        Ok(())
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.flush();
    }
}

/// Prints a line to the domain's console, whatever the log level.
#[macro_export]
macro_rules! println {
    ($($argument:tt)*) => {{
        let mut line = $crate::console::Line::new();
        let _ = ::core::fmt::Write::write_fmt(&mut line, ::core::format_args!($($argument)*));
        let _ = ::core::fmt::Write::write_str(&mut line, "\n");
    }};
}

struct Console;

impl Log for Console {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let prefix = match record.level() {
            Level::Error => "error: ",
            Level::Warn => "warning: ",
            Level::Info => "",
            Level::Debug => "debug: ",
            Level::Trace => "trace: ",
        };
        println!("{prefix}{}", record.args());
    }

    fn flush(&self) {}
}

/// Makes `log`'s macros print here, from level "info" up.
pub(crate) fn init_log() {
    static CONSOLE: Console = Console;
    // An error says that there is a logger already: ours.
    if log::set_logger(&CONSOLE).is_ok() {
        log::set_max_level(LevelFilter::Info);
    }
}
