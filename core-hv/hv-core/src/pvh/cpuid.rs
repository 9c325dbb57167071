//! What a PVH domain's processor says of itself: the machine's, filtered (`xen-abi.md` §2).
//!
//! A feature is shown when it needs no state that the core would have to switch and does not, and
//! no MSR that it does not answer. Lists name what is shown, so that a new processor's new
//! features stay hidden.

use super::msr::low;
use crate::platform::Platform;
use xen_abi::DomainId;

/// What an answer depends on beside the machine.
#[derive(Clone, Copy, Debug)]
pub struct Asker {
    /// Which vCPU.
    pub vcpu: u8,
    /// Its APIC id.
    pub apic_id: u32,
    /// Of which domain.
    pub domain: DomainId,
    /// In which life.
    pub incarnation: u32,
    /// Frequency of the TSC.
    pub tsc_khz: u32,
    /// What it may have in XCR0; 0: there is no XSAVE.
    pub extended: u64,
    /// What it has there.
    pub xcr0: u64,
    /// It has turned XSAVE on.
    pub os_xsave: bool,
}

/// First leaf of the hypervisor.
pub const BASE: u32 = 0x4000_0000;
/// Last leaf of it.
const LAST: u32 = BASE + 5;
/// The MSR that fills a hypercall page.
pub const HYPERCALL_PAGE_MSR: u32 = 0x4000_0000;

/// A mask of the bits named.
const fn bits(list: &[u32]) -> u32 {
    let mut mask = 0;
    let mut at = 0;
    while at < list.len() {
        mask |= 1 << list[at];
        at += 1;
    }
    mask
}

/// SSE3, PCLMULQDQ, SSSE3, CMPXCHG16B, SSE4.1, SSE4.2, MOVBE, POPCNT, AES, RDRAND.
const FEATURES_ECX: u32 = bits(&[0, 1, 9, 13, 19, 20, 22, 23, 25, 30]);
/// FPU, VME, DE, PSE, TSC, MSR, PAE, CX8, APIC, SEP, MTRR, PGE, CMOV, PAT, PSE36, CLFLUSH, MMX,
/// FXSR, SSE, SSE2.
const FEATURES_EDX: u32 =
    bits(&[0, 1, 2, 3, 4, 5, 6, 8, 9, 11, 12, 13, 15, 16, 17, 19, 23, 24, 25, 26]);
const APIC: u32 = 1 << 9;
const XSAVE: u32 = 1 << 26;
const OSXSAVE: u32 = 1 << 27;
/// FMA, AVX, F16C.
const AVX_ECX: u32 = bits(&[12, 28, 29]);
/// AVX2.
const STRUCTURED_AVX_EBX: u32 = bits(&[5]);
/// VAES, VPCLMULQDQ.
const STRUCTURED_AVX_ECX: u32 = bits(&[9, 10]);
/// AVX512F, DQ, IFMA, CD, BW, VL.
const STRUCTURED_AVX512_EBX: u32 = bits(&[16, 17, 21, 28, 30, 31]);
/// AVX512-VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ.
const STRUCTURED_AVX512_ECX: u32 = bits(&[1, 6, 11, 12, 14]);
const X2APIC: u32 = 1 << 21;
const HYPERVISOR: u32 = 1 << 31;
/// FSGSBASE, BMI1, SMEP, BMI2, ERMS, RDSEED, ADX, SMAP, CLFLUSHOPT, CLWB, SHA.
const STRUCTURED_EBX: u32 = bits(&[0, 3, 7, 8, 9, 18, 19, 20, 23, 24, 29]);
/// UMIP, RDPID.
const STRUCTURED_ECX: u32 = bits(&[2, 22]);
/// Fast short REP MOV.
const STRUCTURED_EDX: u32 = bits(&[4]);
/// LAHF in long mode, ABM, SSE4A, misaligned SSE, PREFETCH.
const EXTENDED_ECX: u32 = bits(&[0, 5, 6, 7, 8]);
const RDTSCP: u32 = 1 << 27;
/// Those that AMD repeats, SYSCALL, NX, MMXEXT, FFXSR, 1-GiB pages, RDTSCP, long mode.
const EXTENDED_EDX: u32 =
    FEATURES_EDX & !bits(&[11, 19, 25, 26]) | bits(&[11, 20, 22, 25, 26, 29]) | RDTSCP;
/// Timer of the APIC runs always.
const ALWAYS_RUNNING_TIMER: u32 = 1 << 2;
const INVARIANT_TSC: u32 = 1 << 8;
/// CLZERO, and that LFENCE needs no help.
const CAPACITY_EBX: u32 = bits(&[0]);
/// All vCPUs are cores of one package, of which an APIC id of four bits names 16: a kernel then
/// calibrates its delay loop on the first one only.
const ONE_PACKAGE: u32 = 4 << 12 | 15;
/// Physical address bits: what an address space can hold.
const PHYSICAL_BITS_MAX: u32 = 46;

/// XCR0: x87, SSE, AVX, the three parts of AVX-512.
pub(super) const XCR0_SSE: u64 = 3;
const XCR0_AVX: u64 = 7;
const XCR0_AVX512: u64 = 0xe7;

/// Whether `value` is one that XCR0 takes, where it can have `known`: the state of each kind of
/// register needs that of the ones that they extend.
#[must_use]
pub fn is_xcr0(value: u64, known: u64) -> bool {
    value & !known == 0 && matches!(value, 1 | XCR0_SSE | XCR0_AVX | XCR0_AVX512)
}

/// Whether the processor has RDTSCP, and so the MSR that it reads.
pub(super) fn has_rdtscp<P: Platform>(p: &P) -> bool {
    p.cpuid(0x8000_0001, 0)[3] & RDTSCP != 0
}

/// The answer to `leaf`, `subleaf`.
#[must_use]
pub fn answer(
    leaf: u32,
    subleaf: u32,
    asker: &Asker,
    host: impl Fn(u32, u32) -> [u32; 4],
) -> [u32; 4] {
    match leaf {
        BASE..=LAST => hypervisor(leaf - BASE, subleaf, asker),
        0 => {
            let [last, vendor @ ..] = host(0, 0);
            [last.min(0xd), vendor[0], vendor[1], vendor[2]]
        }
        1 => {
            let [signature, ebx, ecx, edx] = host(1, 0);
            let own = ebx & 0xffff | 1 << 16 | asker.apic_id << 24;
            let xsave = if asker.extended == 0 { 0 } else { XSAVE | AVX_ECX & asker.avx() };
            let own_ecx = ecx & (FEATURES_ECX | xsave) | X2APIC | HYPERVISOR;
            let ecx = own_ecx | if asker.os_xsave { OSXSAVE } else { 0 };
            [signature, own, ecx, edx & FEATURES_EDX | APIC]
        }
        // Caches: as they are. Sharing is between processors that the guest does not see.
        2 => host(2, 0),
        4 => {
            let [eax, ebx, ecx, edx] = host(4, subleaf);
            [eax & 0x3fff, ebx, ecx, edx]
        }
        6 => [ALWAYS_RUNNING_TIMER, 0, 0, 0],
        7 if subleaf == 0 => {
            let [_, ebx, ecx, edx] = host(7, 0);
            let (avx, avx512) = (asker.avx(), asker.avx512());
            let known_ebx =
                STRUCTURED_EBX | STRUCTURED_AVX_EBX & avx | STRUCTURED_AVX512_EBX & avx512;
            let known_ecx =
                STRUCTURED_ECX | STRUCTURED_AVX_ECX & avx | STRUCTURED_AVX512_ECX & avx512;
            [0, ebx & known_ebx, ecx & known_ecx, edx & STRUCTURED_EDX]
        }
        0xd if asker.extended != 0 => extended_state(subleaf, asker, host),
        0x8000_0000 => {
            let [last, vendor @ ..] = host(leaf, 0);
            [last.clamp(leaf, 0x8000_001e), vendor[0], vendor[1], vendor[2]]
        }
        0x8000_0001 => {
            let [signature, ebx, ecx, edx] = host(leaf, 0);
            [signature, ebx, ecx & EXTENDED_ECX, edx & EXTENDED_EDX | extended_apic(edx)]
        }
        0x8000_0002..=0x8000_0006 => host(leaf, 0),
        // The core's own clock needs a TSC that runs evenly, and it has seen that all agree.
        0x8000_0007 => [0, 0, 0, INVARIANT_TSC],
        0x8000_0008 => {
            let [eax, ebx, ..] = host(leaf, 0);
            let physical = (eax & 0xff).min(PHYSICAL_BITS_MAX);
            [eax & 0xff00 | physical, ebx & CAPACITY_EBX, ONE_PACKAGE, 0]
        }
        _ => [0; 4],
    }
}

impl Asker {
    /// All bits, if it may have AVX.
    const fn avx(&self) -> u32 {
        if self.extended & XCR0_AVX == XCR0_AVX { u32::MAX } else { 0 }
    }

    /// All bits, if it may have AVX-512.
    const fn avx512(&self) -> u32 {
        if self.extended & XCR0_AVX512 == XCR0_AVX512 { u32::MAX } else { 0 }
    }
}

/// Leaf 0xd: what XSAVE saves, and where. Of its variants XSAVEOPT is shown, which needs no more.
fn extended_state(subleaf: u32, asker: &Asker, host: impl Fn(u32, u32) -> [u32; 4]) -> [u32; 4] {
    let has = |mask: u64, n: u32| n < 32 && mask >> n & 1 != 0;
    let end = |mask: u64| {
        let parts = (2..32).filter(|&n| has(mask, n)).map(|n| host(0xd, n));
        parts.map(|[size, offset, ..]| size.saturating_add(offset)).max().unwrap_or(0).max(576)
    };
    match subleaf {
        0 => [low(asker.extended), end(asker.xcr0), end(asker.extended), 0],
        1 => [host(0xd, 1)[0] & 1, 0, 0, 0],
        n if n > 1 && has(asker.extended, n) => {
            let [size, offset, ..] = host(0xd, n);
            [size, offset, 0, 0]
        }
        _ => [0; 4],
    }
}

/// AMD repeats the APIC bit; others have nothing there.
const fn extended_apic(edx: u32) -> u32 {
    edx & APIC
}

/// The hypervisor's own leaves (§2.1).
fn hypervisor(leaf: u32, subleaf: u32, asker: &Asker) -> [u32; 4] {
    /// vCPU id in EBX, domain id in ECX.
    const IDS: u32 = 1 << 3 | 1 << 4;
    /// The host's TSC is reliable.
    const RELIABLE: u32 = 1 << 1;
    match (leaf, subleaf) {
        (0, _) => [LAST, 0x566e_6558, 0x6558_4d4d, 0x4d4d_566e],
        (1, _) => [xen_version(), 0, 0, 0],
        (2, _) => [1, HYPERCALL_PAGE_MSR, 0, 0],
        (3, 0) => [RELIABLE, 2, asker.tsc_khz, asker.incarnation],
        (3, 2) => [asker.tsc_khz, 0, 0, 0],
        (4, _) => [IDS, asker.vcpu.into(), asker.domain.0.into(), 0],
        _ => [0; 4],
    }
}

#[expect(clippy::cast_possible_truncation, reason = "32 bits by its format")]
const fn xen_version() -> u32 {
    xen_abi::hypercall::version::ANSWER as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    const ASKER: Asker = Asker {
        vcpu: 3,
        apic_id: 6,
        domain: DomainId(5),
        incarnation: 2,
        tsc_khz: 2_000_000,
        extended: 0,
        xcr0: 1,
        os_xsave: false,
    };

    fn all_ones(leaf: u32, subleaf: u32) -> [u32; 4] {
        answer(leaf, subleaf, &ASKER, |_, _| [u32::MAX; 4])
    }

    #[test]
    fn a_kernel_finds_the_hypervisor_and_itself() {
        let [last, b, c, d] = all_ones(BASE, 0);
        let name: Vec<u8> = [b, c, d].into_iter().flat_map(u32::to_le_bytes).collect();
        assert_eq!(name, b"XenVMMXenVMM");
        assert!(last - BASE >= 4);
        assert_eq!(all_ones(BASE + 1, 0)[0], 0x4_0011);
        assert_eq!(all_ones(BASE + 2, 0)[1], 0x4000_0000);
        assert_eq!(all_ones(BASE + 4, 0), [0x18, 3, 5, 0]);
    }

    /// §2.2: what the core does not switch or answer must not be seen, whatever the machine has.
    #[test]
    fn nothing_is_shown_that_is_not_there() {
        let [_, _, ecx, edx] = all_ones(1, 0);
        for hidden in [3, 5, 12, 15, 17, 24, 26, 27, 28, 29] {
            assert_eq!(ecx >> hidden & 1, 0, "1.ecx.{hidden}");
        }
        for hidden in [7, 14, 21, 22, 28, 29] {
            assert_eq!(edx >> hidden & 1, 0, "1.edx.{hidden}");
        }
        let [_, _, ecx, _] = all_ones(0x8000_0001, 0);
        for hidden in [2, 10, 15, 22, 23, 24, 28] {
            assert_eq!(ecx >> hidden & 1, 0, "80000001.ecx.{hidden}");
        }
        let [_, ebx, ecx, edx] = all_ones(7, 0);
        for hidden in [1, 2, 5, 6, 10, 11, 16] {
            assert_eq!(ebx >> hidden & 1, 0, "7.ebx.{hidden}");
        }
        assert_eq!(ecx, 1 << 2 | 1 << 22);
        assert_eq!(edx, 1 << 4);
        for leaf in [5, 9, 0xa, 0xb, 0xd, 0xf, 0x10, 0x14, 0x8000_000a, 0x8000_001f] {
            assert_eq!(all_ones(leaf, 0), [0; 4], "{leaf:#x}");
        }
    }

    /// AMD64 APM volume 3, appendix E.3.9.
    #[test]
    fn extended_state_is_as_large_as_what_is_turned_on() {
        let host = |leaf, subleaf| match (leaf, subleaf) {
            (0xd, 1) => [0xf; 4],
            (0xd, 2) => [256, 576, 0, 0],
            (0xd, n) => [64, 1024 + 64 * n, 0, 0],
            _ => [u32::MAX; 4],
        };
        let asker = Asker { extended: 7, os_xsave: true, ..ASKER };
        assert_eq!(answer(0xd, 0, &asker, host), [7, 576, 832, 0]);
        let all = Asker { xcr0: 7, ..asker };
        assert_eq!(answer(0xd, 0, &all, host), [7, 832, 832, 0]);
        assert_eq!(answer(0xd, 1, &all, host), [1, 0, 0, 0], "no XSAVES");
        assert_eq!(answer(0xd, 2, &all, host), [256, 576, 0, 0]);
        assert_eq!(answer(0xd, 5, &all, host), [0; 4], "no AVX-512");
        assert_eq!(answer(1, 0, &all, host)[2] >> 26 & 7, 7, "XSAVE, OSXSAVE, AVX");
        assert_eq!(answer(7, 0, &all, host)[1] >> 16 & 1, 0, "no AVX-512");
        let [_, ebx, ..] = answer(7, 0, &Asker { extended: 0xe7, ..all }, host);
        assert_eq!((ebx >> 5 & 1, ebx >> 16 & 1), (1, 1), "AVX2 and AVX-512");
    }

    #[test]
    fn xcr0_takes_what_belongs_together() {
        for value in [1, 3, 7, 0xe7] {
            assert!(is_xcr0(value, 0xe7) && is_xcr0(value, 7) == (value < 8));
        }
        for value in [0, 2, 4, 5, 6, 0x27, 0xe3, 0x207, 1 << 63 | 7] {
            assert!(!is_xcr0(value, 0xe7), "{value:#x}");
        }
    }

    #[test]
    fn what_linux_needs_is_there() {
        let [_, ebx, ecx, edx] = all_ones(1, 0);
        assert_eq!(ebx >> 24, 6);
        assert_ne!(ecx & X2APIC, 0);
        assert_ne!(ecx & HYPERVISOR, 0);
        assert_ne!(edx & APIC, 0);
        assert_ne!(all_ones(0x8000_0007, 0)[3] & INVARIANT_TSC, 0);
        assert_eq!(all_ones(0x8000_0008, 0)[0] & 0xff, 46);
    }
}
