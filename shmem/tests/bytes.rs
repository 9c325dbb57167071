//! The two byte streams of a page.
#![cfg(not(loom))]

use proptest::collection::vec;
use proptest::prelude::*;
use shmem::Page;
use shmem::bytes::{ByteRing, CONSOLE_IN, CONSOLE_OUT};
use std::sync::atomic::Ordering::Relaxed;
use xen_abi::xenstore::{REQ_PROD, RSP_PROD};

const CASES: u32 = if cfg!(miri) { 2 } else { 256 };

fn pattern(n: usize) -> u8 {
    u8::try_from(n % 251).expect("below 251")
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: CASES, failure_persistence: None, ..ProptestConfig::default()
    })]

    /// Bytes come out as they went in, whatever the sizes of writes and reads, from any counter
    /// on, and also when either side starts again in between.
    #[test]
    fn bytes_arrive_in_order(
        start in any::<u32>(),
        steps in vec((any::<bool>(), any::<bool>(), 0_usize..1500), 0..60),
    ) {
        let page = Page::new_zeroed();
        for offset in [2048, 2052, 2056, 2060] {
            page.u32(offset).store(start, Relaxed);
        }
        let mut client = ByteRing::xenstore_client(page.clone());
        let mut server = ByteRing::xenstore_server(page.clone());
        let (mut sent, mut received) = (0_usize, 0_usize);
        for (write, restart, len) in steps {
            if restart {
                client = ByteRing::xenstore_client(page.clone());
                server = ByteRing::xenstore_server(page.clone());
            }
            if write {
                let bytes: Vec<u8> = (sent..sent + len).map(pattern).collect();
                let room = 1024 - (sent - received);
                prop_assert_eq!(client.write(&bytes).unwrap(), room.min(len));
                sent += room.min(len);
            } else {
                let mut buffer = vec![0; len];
                let count = server.read(&mut buffer).unwrap();
                prop_assert_eq!(count, (sent - received).min(len));
                for (i, byte) in buffer[..count].iter().enumerate() {
                    prop_assert_eq!(*byte, pattern(received + i));
                }
                received += count;
            }
        }
    }

    /// xen-abi §6.1: any index values are survived.
    #[test]
    fn any_counters_are_survived(values in vec((0_usize..4, any::<u32>()), 1..40)) {
        let page = Page::new_zeroed();
        let mut server = ByteRing::xenstore_server(page.clone());
        let mut buffer = [0; 2000];
        for (which, value) in values {
            page.u32(2048 + 4 * which).store(value, Relaxed);
            prop_assert!(server.read(&mut buffer).unwrap_or(0) <= 1024);
            prop_assert!(server.write(&buffer).unwrap_or(0) <= 1024);
        }
    }
}

#[test]
fn more_than_fits_is_an_error() {
    let page = Page::new_zeroed();
    let mut server = ByteRing::xenstore_server(page.clone());
    page.u32(REQ_PROD).store(1025, Relaxed);
    assert!(server.read(&mut [0; 8]).is_err());
    let mut client = ByteRing::xenstore_client(page.clone());
    page.u32(RSP_PROD).store(u32::MAX, Relaxed);
    assert!(client.read(&mut [0; 8]).is_err());
}

#[test]
fn console_directions_do_not_overlap() {
    let page = Page::new_zeroed();
    let mut guest = ByteRing::attach(page.clone(), CONSOLE_OUT, CONSOLE_IN);
    let mut host = ByteRing::attach(page, CONSOLE_IN, CONSOLE_OUT);
    assert_eq!(guest.write(&[1; 3000]).unwrap(), 2048);
    assert_eq!(host.write(&[2; 3000]).unwrap(), 1024);
    let mut read = [0; 3000];
    assert_eq!(host.read(&mut read).unwrap(), 2048);
    assert!(read[..2048].iter().all(|b| *b == 1));
    assert_eq!(guest.read(&mut read).unwrap(), 1024);
    assert!(read[..1024].iter().all(|b| *b == 2));
}
