//! The harness itself, with a core of a few instructions: what fails here is no fault of Axolotl's.

use qemu_tests::Platform;
use std::time::Duration;
use xtask::build::{self, Built};
use xtask::project;
use xtask::qemu::Options;

/// Writes a text to the first serial port and halts. 32-bit code, entered by PVH at 1 MiB.
fn tiny_core(text: &str) -> Vec<u8> {
    const LOAD: u32 = 0x10_0000;
    const CODE: [u8; 22] = [
        0xbe, 22, 0, 0x10, 0, // mov esi, LOAD + 22
        0x8a, 0x06, // next: mov al, [esi]
        0x84, 0xc0, // test al, al
        0x74, 0x08, // jz stop
        0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0xee, // out dx, al
        0x46, // inc esi
        0xeb, 0xf2, // jmp next
        0xf4, // stop: hlt
        0xeb, 0xfd, // jmp stop
    ];
    let mut body = CODE.to_vec();
    body.extend_from_slice(text.as_bytes());
    body.push(0);
    // ELF note: name size, descriptor size, XEN_ELFNOTE_PHYS32_ENTRY, "Xen", entry.
    let mut note = Vec::new();
    for word in [4_u32, 4, 18] {
        note.extend_from_slice(&word.to_le_bytes());
    }
    note.extend_from_slice(b"Xen\0");
    note.extend_from_slice(&LOAD.to_le_bytes());
    elf([(1, 5, u64::from(LOAD), body), (4, 4, 0, note)])
}

/// An ELF executable with these program headers: kind, flags, address, bytes.
fn elf(parts: [(u32, u32, u64, Vec<u8>); 2]) -> Vec<u8> {
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    for word in [0x10_0000_u64, 64, 0] {
        file.extend_from_slice(&word.to_le_bytes());
    }
    file.extend_from_slice(&[0; 4]);
    for half in [64_u16, 56, 2, 64, 0, 0] {
        file.extend_from_slice(&half.to_le_bytes());
    }
    let mut offset = 64 + 2 * 56;
    for (kind, flags, address, bytes) in &parts {
        file.extend_from_slice(&kind.to_le_bytes());
        file.extend_from_slice(&flags.to_le_bytes());
        let length = bytes.len() as u64;
        for word in [offset, *address, *address, length, length, 4] {
            file.extend_from_slice(&word.to_le_bytes());
        }
        offset += length;
    }
    parts.into_iter().for_each(|(_, _, _, bytes)| file.extend(bytes));
    file
}

fn built(name: &str, text: &str) -> Built {
    let directory = project::target_dir().join("qemu-tests");
    std::fs::create_dir_all(&directory).expect("target is writable");
    let (core, bundle) = (directory.join(name), directory.join("no-bundle"));
    std::fs::write(&core, tiny_core(text)).expect("target is writable");
    std::fs::write(&bundle, [0; 4096]).expect("target is writable");
    let file = project::root().join("systems/default.toml");
    let compiled = build::load(&file).expect("a valid system");
    Built { compiled, file, core, bundle, images: Vec::new() }
}

#[test]
#[ignore = "boots QEMU: run it by `cargo xtask test`"]
fn console_lines_arrive_with_their_names() {
    let built = built("tiny", "core| hello\ndemo| a\x1b[31mb\n");
    let platform = Platform::boot_built(&built, |options| options);
    let lines = platform.wait_for("two lines", Duration::from_secs(30), || {
        Some(platform.lines()).filter(|lines| lines.len() >= 2)
    });
    assert_eq!((lines[0].from.as_str(), lines[0].text.as_str()), ("core", "hello"));
    assert_eq!((lines[1].from.as_str(), lines[1].text.as_str()), ("demo", "a[31mb"));
}

#[test]
#[ignore = "boots QEMU: run it by `cargo xtask test`"]
#[should_panic(expected = "the core stopped")]
fn a_panic_of_the_core_ends_every_wait() {
    let built = built("tiny-panic", "core| PANIC at the disco\n");
    let platform = Platform::boot_built(&built, |options| options);
    platform.wait_for("nothing", Duration::from_secs(30), || None::<()>);
}

#[test]
#[ignore = "boots QEMU: run it by `cargo xtask test`"]
#[should_panic(expected = "QEMU ended at once")]
fn what_qemu_says_when_it_dies_is_shown() {
    let built = built("tiny-args", "");
    let extra = vec!["-machine".into(), "no-such-machine".into()];
    let _ = Platform::boot_built(&built, |options| Options { extra, ..options });
}
