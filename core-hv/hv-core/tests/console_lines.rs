//! The machine's console has two writers: the core, and the domain with the right to it. Neither
//! tears the other's lines.

use hv_core::fake::{D0, SCRATCH, System};
use xen_abi::hypercall::{CONSOLE_IO, CONSOLEIO_WRITE};

/// Makes the control domain write `text`; all of it, or what one call gets done.
fn write(system: &mut System, text: &str) {
    system.write(D0, SCRATCH, text.as_bytes());
    let len = text.len() as u64;
    assert_eq!(system.call(D0, CONSOLE_IO, [CONSOLEIO_WRITE, len, SCRATCH, 0, 0]), 0);
}

fn shown(system: &System, from: usize) -> String {
    String::from_utf8(system.p.machine().console[from..].to_vec()).expect("text")
}

fn say(system: &mut System, text: &str) {
    let System { core, p, .. } = system;
    core.lock().print(p, format_args!("{text}"));
}

#[test]
fn a_message_of_the_core_waits_for_the_end_of_a_line() {
    let mut system = System::new();
    let from = system.p.machine().console.len();
    write(&mut system, "demo| one\ndemo| tw");
    say(&mut system, "first");
    say(&mut system, "second");
    assert_eq!(shown(&system, from), "demo| one\ndemo| tw");
    write(&mut system, "o\n");
    assert_eq!(shown(&system, from), "demo| one\ndemo| two\ncore| first\ncore| second\n");
    say(&mut system, "third");
    assert!(shown(&system, from).ends_with("second\ncore| third\n"));
}

#[test]
fn a_message_of_the_core_does_not_wait_forever() {
    let mut system = System::new();
    let from = system.p.machine().console.len();
    write(&mut system, "demo| never ended");
    for number in 0..1000 {
        say(&mut system, &format!("message {number}"));
    }
    let text = shown(&system, from);
    assert!(text.starts_with("demo| never ended\ncore| message 0\ncore| message 1\n"), "{text}");
    assert!(text.ends_with("core| message 999\n"));
    assert_eq!(text.lines().count(), 1001, "each once, in one piece");
}
