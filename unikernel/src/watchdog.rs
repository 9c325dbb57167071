//! A heartbeat: the core ends the domain when it stops.
#![expect(unsafe_code, reason = "a hypercall")]

use crate::hypercall;
use xen_abi::Errno;
use xen_abi::sched::{WATCHDOG, Watchdog as Argument};

/// An armed watchdog. Dropping it disarms it.
#[derive(Debug)]
#[must_use = "dropping a watchdog disarms it"]
pub struct Watchdog {
    id: u32,
    seconds: u32,
}

impl Watchdog {
    /// The domain ends unless [`Self::poke`] is called at least every `seconds`.
    ///
    /// # Errors
    /// `EINVAL` for a time of 0, `ENOSPC` when all are in use.
    pub fn arm(seconds: u32) -> Result<Self, Errno> {
        if seconds == 0 {
            return Err(Errno::EINVAL);
        }
        let id = call(0, seconds)?;
        Ok(Self { id: u32::try_from(id).map_err(|_| Errno::EIO)?, seconds })
    }

    /// Says that all is well.
    pub fn poke(&mut self) {
        let _ = call(self.id, self.seconds);
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        let _ = call(self.id, 0);
    }
}

fn call(id: u32, timeout: u32) -> Result<u64, Errno> {
    // SAFETY: 1. the structure is that of the operation. 2. It names no memory.
    unsafe { hypercall::sched(WATCHDOG, &mut Argument { id, timeout }) }
}
