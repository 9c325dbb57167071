//! The real `axl` against the real request handler of the control domain, through a real `Mux`;
//! only the core is a fake.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use axl::mux::Mux;
use axl::{Client, ClientError, rundir};
use axolotl_abi::protocol::{self, Failure, FromControl, Request, Response};
use control::fake::{self, FakeCore, default_bundle};
use control::{Control, Setup, Wake};
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};
use xen_abi::{DomainId, EventPort};
use xenbus::Nodes;

/// A run directory of its own for each test.
struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("axl-test-{}-{name}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn socket(&self, system: &str) -> PathBuf {
        // As `rundir::socket_path`, with our directory for XDG_RUNTIME_DIR.
        let base = rundir::base();
        self.0.join(base.file_name().unwrap()).join(system).join("axl.sock")
    }

    fn axl(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_axl"));
        command.args(arguments).env("XDG_RUNTIME_DIR", &self.0).output().unwrap()
    }

    /// Runs a command that must fail with one line and exit code 1.
    fn refused(&self, arguments: &[&str]) -> String {
        let output = self.axl(arguments);
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {text}");
        assert_eq!(text.lines().count(), 1, "{text}");
        assert!(output.stdout.is_empty());
        text
    }

    fn done(&self, arguments: &[&str]) -> String {
        let output = self.axl(arguments);
        let errors = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {errors}");
        String::from_utf8(output.stdout).unwrap()
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The control domain at the end of `stream`, until the stream ends.
fn control_domain(mut stream: UnixStream, bundle: &[u8]) {
    let store = xenstore::LocalStore::new();
    let mut line = store.client(DomainId(0));
    let mut core = FakeCore::new();
    core.now_ns = 5_000_000_000;
    let setup =
        Setup { bundle, hypervisor: core, store: line.transport(), store_port: EventPort(1) };
    let mut control = Control::start(setup).unwrap();
    for _ in 0..8 {
        control.work(Wake::ALL);
    }
    // As a frontend of several queues would.
    let mut guest = store.client(DomainId(3));
    for (key, value) in [
        ("multi-queue-num-queues", "2"),
        ("queue-0/ring-ref", "8"),
        ("queue-0/event-channel", "5"),
        ("queue-1/ring-ref0", "12"),
        ("queue-1/event-channel", "6"),
        ("state", "3"),
    ] {
        let _ = guest.write(&format!("device/vbd/51712/{key}"), value.as_bytes());
    }
    control.hypervisor().named("net0").console = b"link is up\n".to_vec();
    let mut buffer = [0; 512];
    while let Ok(len @ 1..) = stream.read(&mut buffer) {
        for byte in &buffer[..len] {
            control.serial_input(*byte);
        }
        control.hypervisor().now_ns += 1_000_000;
        for _ in 0..8 {
            control.work(Wake::ALL);
        }
        let bytes: Vec<u8> = control.serial_output().drain(..).collect();
        if stream.write_all(&bytes).is_err() {
            break;
        }
    }
}

/// A running system; the second end shuts the platform down.
fn platform(socket: &Path) -> (Mux, UnixStream) {
    platform_of(socket, default_bundle())
}

fn platform_of(socket: &Path, bundle: Vec<u8>) -> (Mux, UnixStream) {
    let (host, machine) = UnixStream::pair().unwrap();
    let end = machine.try_clone().unwrap();
    std::thread::spawn(move || control_domain(machine, &bundle));
    (Mux::start(host, socket).unwrap(), end)
}

#[test]
fn every_command_works() {
    let directory = Directory::new("commands");
    let (mux, _end) = platform(&directory.socket("fake"));
    let json: serde_json::Value =
        serde_json::from_str(&directory.done(&["list", "--json"])).unwrap();
    let names: Vec<_> =
        json.as_array().unwrap().iter().map(|d| d["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["control", "store", "net0", "demo"]);
    for key in ["name", "domid", "incarnation", "state", "role", "memory_bytes", "uptime_ms"] {
        assert!(json[2].get(key).is_some_and(|value| !value.is_null()), "{key}");
    }
    assert_eq!(json[2]["role"], "driver");
    assert_eq!(json[2]["incarnation"], 1);
    assert_eq!(directory.done(&["crash", "net0"]), "net0 crashed\n");
    let json: serde_json::Value =
        serde_json::from_str(&directory.done(&["--json", "list"])).unwrap();
    assert_eq!((&json[2]["incarnation"], &json[2]["state"]), (&2.into(), &"blocked".into()));
    let why = directory.done(&["why", "net0"]);
    for part in
        ["incarnation 1: crashed on request", "page fault (vector 14", "0x205678", "link is up"]
    {
        assert!(why.contains(part), "{part} is missing in\n{why}");
    }
    assert!(directory.done(&["list"]).contains("net0"));
    assert!(directory.done(&["info"]).contains("00:02.0 of net0 can reach all memory"));
    assert_eq!(directory.done(&["console", "net0", "--no-follow"]), "link is up\n");
    assert_eq!(directory.done(&["dmesg"]), "booting\nrunning\n");
    let tree = directory.done(&["xenstore-ls", "/local/domain/3"]);
    assert!(tree.contains("name = \"demo\"") && tree.contains("state = \"1\""), "{tree}");
    assert!(directory.done(&["xenstore-ls", "-p"]).contains("(n3,r2)"));
    assert_eq!(directory.done(&["pause", "demo"]), "demo paused\n");
    assert_eq!(directory.done(&["unpause", "demo"]), "demo continues\n");
    assert_eq!(directory.done(&["restart", "demo"]), "demo restarted\n");
    assert_eq!(directory.done(&["destroy", "demo"]), "demo destroyed\n");
    for command in ["info", "dmesg", "xenstore-ls"] {
        let text = directory.done(&[command, "--json"]);
        serde_json::from_str::<serde_json::Value>(&text).unwrap();
    }
    let text = directory.done(&["why", "net0", "--json"]);
    let why: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!((&why["vector"], &why["address"]), (&14.into(), &"0xdeadb000".into()));
    assert!(directory.refused(&["crash", "net1"]).contains("did you mean `net0`?"));
    assert!(directory.refused(&["xenstore-ls", "/none"]).contains("no such node"));
    assert!(directory.refused(&["list", "--system", "other"]).contains("`other` is not running"));
    drop(mux);
    assert!(!directory.socket("fake").exists());
    assert!(directory.refused(&["list"]).contains("no system is running"));
}

#[test]
fn disks_are_listed_with_their_rings_and_volumes() {
    let directory = Directory::new("disks");
    let images = [1, 1, 1, 1].map(fake::image);
    let (_mux, _end) =
        platform_of(&directory.socket("fake"), fake::bundle(&fake::disk_system(), &images));
    let text = directory.done(&["vbd-list", "demo", "--json"]);
    let vbds: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(vbds.as_array().unwrap().len(), 2);
    for (key, value) in [
        ("domain", "demo".into()),
        ("vdev", 51712.into()),
        ("dev", "xvda".into()),
        ("backend_id", 4.into()),
        ("state", 3.into()),
        ("backend_state", 1.into()),
        ("backend_path", "/local/domain/4/backend/vbd/3/51712".into()),
        ("volume", "2/range:0+1048576".into()),
        ("mode", "w".into()),
        ("format", "raw".into()),
        ("backing", serde_json::Value::Null),
        ("sectors", serde_json::Value::Null),
        (
            "queues",
            serde_json::json!([{"event_channel": 5, "ring_ref": 8}, {"event_channel": 6, "ring_ref": 12}]),
        ),
    ] {
        assert_eq!(vbds[0][key], value, "{key}");
    }
    assert_eq!((&vbds[1]["mode"], &vbds[1]["backing"]), (&"r".into(), &"gpt:base".into()));
    let all = directory.done(&["block-list"]);
    assert_eq!(all.lines().count(), 3, "{all}");
    assert!(all.contains("gpt:top (cow)"), "{all}");
    assert_eq!(directory.done(&["vbd-list", "net0"]).lines().count(), 1);
    assert!(directory.refused(&["vbd-list", "dema"]).contains("did you mean `demo`?"));
    assert_eq!(directory.done(&["shutdown", "demo"]), "demo is asked to end\n");
    assert!(directory.refused(&["shutdown", "disk0"]).contains("no guest"));
}

#[test]
fn no_platform_a_dead_socket_and_two_platforms_are_one_line_each() {
    let directory = Directory::new("none");
    assert!(directory.refused(&["list"]).contains("no system is running"));
    let dead = directory.socket("dead");
    rundir::create_for(&dead).unwrap();
    drop(UnixListener::bind(&dead).unwrap());
    assert!(directory.refused(&["list"]).contains("nobody answers"));
    let missing = directory.0.join("none.sock");
    assert!(
        directory.refused(&["list", "--socket", missing.to_str().unwrap()]).contains("none.sock")
    );
    let one = platform(&directory.socket("one"));
    assert!(directory.done(&["list"]).contains("demo"), "the dead one is passed over");
    let two = platform(&directory.socket("two"));
    assert!(directory.refused(&["list"]).contains("(one, two)"));
    assert!(directory.done(&["list", "--system", "two"]).contains("demo"));
    drop((one, two));
}

/// A platform that is stuck costs a client its patience, not its life.
#[test]
fn a_silent_platform_is_a_timeout_and_another_version_is_named() {
    let (client, silent) = UnixStream::pair().unwrap();
    let started = Instant::now();
    let error = Client::with_patience(client, Duration::from_millis(200)).unwrap_err();
    assert!(matches!(error, ClientError::Timeout), "{error}");
    assert!(started.elapsed() < Duration::from_secs(2));
    drop(silent);
    let (client, mut other) = UnixStream::pair().unwrap();
    let response = Response::Hello { version: 7, system: "x".into() };
    other.write_all(&protocol::encode(&FromControl { id: 1, response }).unwrap()).unwrap();
    let error = Client::over(client).unwrap_err();
    assert!(matches!(error, ClientError::Version { theirs: 7 }), "{error}");
    let (client, other) = UnixStream::pair().unwrap();
    drop(other);
    assert!(matches!(Client::over(client).unwrap_err(), ClientError::Gone));
}

#[test]
fn many_clients_get_their_own_answers() {
    let directory = Directory::new("many");
    let socket = directory.socket("fake");
    let (mux, _end) = platform(&socket);
    // Clients that end in the middle, and one that sends garbage, disturb nobody.
    for _ in 0..5 {
        let mut rude = UnixStream::connect(&socket).unwrap();
        rude.write_all(&[1, 2, 3, 0, 9]).unwrap();
    }
    let ask = |path: PathBuf, name: &'static str| {
        std::thread::spawn(move || {
            let mut client = Client::connect(&path).unwrap();
            for _ in 0..50 {
                let refused = client.request(Request::Why(name.into())).unwrap_err();
                assert!(refused.to_string().contains(name), "{refused}");
            }
        })
    };
    let threads: Vec<_> =
        ["aaaaa", "bbbbb", "ccccc", "ddddd"].map(|name| ask(socket.clone(), name)).into();
    assert!(matches!(mux.request(Request::List), Ok(Response::List(_))));
    for thread in threads {
        thread.join().unwrap();
    }
}

#[test]
fn clients_are_told_when_the_platform_is_gone() {
    let directory = Directory::new("gone");
    let socket = directory.socket("fake");
    let (host, machine) = UnixStream::pair().unwrap();
    let mux = Mux::start(host, &socket).unwrap();
    let waiting = std::thread::spawn(move || Client::connect(&socket).unwrap_err());
    std::thread::sleep(Duration::from_millis(200));
    drop(machine);
    let error = waiting.join().unwrap();
    assert!(matches!(error, ClientError::Gone | ClientError::Refused(Failure::Gone)), "{error}");
    assert!(mux.is_gone());
    assert!(mux.request(Request::List).is_err());
}

#[test]
fn check_explains_a_good_file_and_refuses_a_bad_one() {
    let directory = Directory::new("check");
    let systems = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../systems");
    let good = directory.done(&["check", systems.join("two-nics.toml").to_str().unwrap()]);
    assert!(good.contains("demo1 ↔ net1"), "{good}");
    let bad = systems.join("bad/device-twice.toml");
    let output = directory.axl(&["check", bad.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(
        text.contains("belongs to `net0` already") && text.contains("device-twice.toml"),
        "{text}"
    );
}
