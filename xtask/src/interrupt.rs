//! Ctrl-C, and the signals that mean the same.

use miette::IntoDiagnostic;
use std::sync::atomic::{AtomicBool, Ordering};

static ASKED: AtomicBool = AtomicBool::new(false);

/// From now on SIGINT, SIGTERM and SIGHUP do not end the process, but make [`asked`] true. A
/// second one ends it at once.
///
/// # Errors
/// The handler cannot be installed.
pub fn catch() -> miette::Result<()> {
    ctrlc::set_handler(|| {
        if ASKED.swap(true, Ordering::SeqCst) {
            std::process::exit(130);
        }
    })
    .into_diagnostic()
}

/// Whether somebody asked us to end.
#[must_use]
pub fn asked() -> bool {
    ASKED.load(Ordering::SeqCst)
}
