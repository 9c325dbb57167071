//! System time from the processor's time-stamp counter, without a hypercall.
#![expect(unsafe_code, reason = "rdtsc")]

use core::sync::atomic::Ordering::{Acquire, Relaxed};
use core::sync::atomic::fence;
use shmem::Page;
use xen_abi::shared_info::{VCPU_TIME, WC_NSEC, WC_SEC, WC_SEC_HI, WC_VERSION, time};

/// The processor's time-stamp counter.
#[must_use]
pub(crate) fn tsc() -> u64 {
    // SAFETY: reads a register; the core leaves CR4.TSD clear.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// What the shared-info page says about time (`xen-abi.md` §4.3).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Parameters {
    tsc: u64,
    system_ns: u64,
    mul: u32,
    shift: i8,
}

impl Parameters {
    fn read(shared: &Page) -> Self {
        let at = |field: usize| VCPU_TIME + field;
        let [shift, ..] = shared.u16(at(time::SHIFT)).load(Relaxed).to_le_bytes();
        Self {
            tsc: shared.u64(at(time::TSC_TIMESTAMP)).load(Relaxed),
            system_ns: shared.u64(at(time::SYSTEM_TIME)).load(Relaxed),
            mul: shared.u32(at(time::MUL)).load(Relaxed),
            shift: shift.cast_signed(),
        }
    }

    fn to_ns(self, tsc: u64) -> u64 {
        let passed = tsc.saturating_sub(self.tsc);
        let by = u32::from(self.shift.unsigned_abs());
        let scaled = if self.shift >= 0 { passed << by } else { passed >> by };
        let ns = (u128::from(scaled) * u128::from(self.mul)) >> 32;
        #[expect(clippy::cast_possible_truncation, reason = "ns of centuries fit")]
        self.system_ns.wrapping_add(ns as u64)
    }
}

/// Reads while nobody writes: the version is even, and the same before and after.
fn consistently<T>(shared: &Page, version: usize, read: impl Fn(&Page) -> T) -> T {
    loop {
        let before = shared.u32(version).load(Acquire);
        let value = read(shared);
        fence(Acquire);
        if before.is_multiple_of(2) && shared.u32(version).load(Relaxed) == before {
            return value;
        }
        core::hint::spin_loop();
    }
}

/// System time in ns.
pub(crate) fn now_ns(shared: &Page) -> u64 {
    consistently(shared, VCPU_TIME + time::VERSION, Parameters::read).to_ns(tsc())
}

/// Unix time in ns at system time 0; `None` when the core does not know it.
pub(crate) fn unix_at_zero_ns(shared: &Page) -> Option<u64> {
    let (seconds, ns) = consistently(shared, WC_VERSION, |shared| {
        let low = shared.u32(WC_SEC).load(Relaxed);
        let high = shared.u32(WC_SEC_HI).load(Relaxed);
        (u64::from(high) << 32 | u64::from(low), shared.u32(WC_NSEC).load(Relaxed))
    });
    if seconds == 0 { None } else { seconds.checked_mul(1_000_000_000)?.checked_add(ns.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2.5 GHz: 0.4 ns per tick is mul 0.8 · 2^32 at shift -1.
    #[test]
    fn ticks_become_nanoseconds() {
        let p = Parameters { tsc: 1000, system_ns: 7, mul: 0xcccc_cccd, shift: -1 };
        assert_eq!(p.to_ns(1000), 7);
        assert_eq!(p.to_ns(1000 + 2_500_000_000), 7 + 1_000_000_000);
        assert_eq!(p.to_ns(900), 7, "a TSC that lags a little is not centuries ahead");
        let slow = Parameters { tsc: 0, system_ns: 0, mul: 1 << 31, shift: 2 };
        assert_eq!(slow.to_ns(50), 100);
        let hours = Parameters { mul: u32::MAX, shift: 0, ..slow };
        assert!(hours.to_ns(1 << 60) > 1 << 59, "the product has more than 64 bits");
    }

    #[test]
    fn wall_clock_of_zero_is_unknown() {
        let page = Page::new_zeroed();
        assert_eq!(unix_at_zero_ns(&page), None);
        page.u32(WC_SEC).store(3, Relaxed);
        page.u32(WC_NSEC).store(9, Relaxed);
        assert_eq!(unix_at_zero_ns(&page), Some(3_000_000_009));
    }
}
