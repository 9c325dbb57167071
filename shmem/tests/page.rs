//! Copies into a page and out of it.
#![cfg(not(loom))]

use shmem::Page;
use xen_abi::PAGE_SIZE;

fn numbered(len: usize, first: u8) -> Vec<u8> {
    (first..=255).chain(0..first).cycle().take(len).collect()
}

/// At every place in a word, of every length around those of words, exactly these bytes.
#[test]
fn copies_have_the_right_bytes_at_every_offset() {
    let starts = if cfg!(miri) { vec![0, 3, 4, 8] } else { (0..17).collect() };
    for offset in starts.into_iter().chain([PAGE_SIZE - 41, PAGE_SIZE - 48]) {
        for len in 0..=41 {
            let page = Page::new_zeroed();
            page.write(0, &[0xee; PAGE_SIZE]);
            let bytes = numbered(len, 7);
            page.write(offset, &bytes);
            let mut read = vec![0; len];
            page.read(offset, &mut read);
            assert_eq!(read, bytes, "{len} at {offset}");
            let mut all = vec![0; PAGE_SIZE];
            page.read(0, &mut all);
            assert_eq!(all[offset..offset + len], bytes);
            let others = all[..offset].iter().chain(&all[offset + len..]);
            assert!(others.copied().all(|byte| byte == 0xee), "{len} at {offset}");
        }
    }
}

#[test]
fn a_whole_page_is_copied() {
    let page = Page::new_zeroed();
    let bytes = numbered(PAGE_SIZE, 1);
    page.write(0, &bytes);
    let mut read = vec![0; PAGE_SIZE];
    page.read(0, &mut read);
    assert_eq!(read, bytes);
}

#[test]
#[should_panic(expected = "assertion")]
fn no_copy_leaves_the_page() {
    Page::new_zeroed().read(PAGE_SIZE - 8, &mut [0; 9]);
}
