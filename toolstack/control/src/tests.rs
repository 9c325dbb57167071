//! The control domain on the fake core and the real store.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use crate::bundle::{Bundle, BundleError};
use crate::fake::{FakeCore, bundle, default_bundle, disk_system, image, ramdisk, system};
use crate::{Control, Setup, StartError, Wake};
use axolotl_abi::control::{PciFunction, STATE_BLOCKED, STATE_BUILDING, STATE_DEAD, STATE_PAUSED};
use axolotl_abi::protocol::{
    self, DomainState, Failure, FromControl, Request, Response, ToControl,
};
use axolotl_abi::start::{PRESERVED_GPA, START_INFO_GPA, StartInfo};
use axolotl_abi::system::{DriverImage, FIND_DRIVER, Kernel, OnEnd, System};
use proptest::prelude::*;
use xen_abi::{DomainId, Errno, EventPort};
use xenbus::{Nodes, Transport};
use xenstore::LocalStore;
use zerocopy::{FromBytes, FromZeros};

const MS: u64 = 1_000_000;

/// A transport that hangs while the flag is set.
struct Line {
    inner: xenbus::Client<xenstore::LocalTransport>,
    hangs: std::rc::Rc<std::cell::Cell<bool>>,
}

impl Transport for Line {
    fn send(&mut self, bytes: &[u8]) -> usize {
        if self.hangs.get() { 0 } else { self.inner.transport().send(bytes) }
    }
    fn receive(&mut self, buffer: &mut [u8]) -> usize {
        if self.hangs.get() { 0 } else { self.inner.transport().receive(buffer) }
    }
    fn wait(&mut self) -> Result<(), Errno> {
        Err(Errno::EIO)
    }
}

type Fixture = Control<'static, FakeCore, Line>;

struct Rig {
    control: Fixture,
    store: LocalStore,
    hangs: std::rc::Rc<std::cell::Cell<bool>>,
    last_id: u32,
}

fn rig_of(bytes: Vec<u8>, core: FakeCore) -> Result<Rig, StartError> {
    let store = LocalStore::new();
    let hangs = std::rc::Rc::new(std::cell::Cell::new(false));
    let line = Line { inner: store.client(DomainId(0)), hangs: hangs.clone() };
    let setup = Setup {
        bundle: Box::leak(bytes.into_boxed_slice()),
        hypervisor: core,
        store: line,
        store_port: EventPort(77),
    };
    Ok(Rig { control: Control::start(setup)?, store, hangs, last_id: 0 })
}

fn rig() -> Rig {
    let mut rig = rig_of(default_bundle(), FakeCore::new()).unwrap();
    rig.settle();
    rig
}

impl Rig {
    fn settle(&mut self) {
        for _ in 0..8 {
            self.control.work(Wake::ALL);
        }
        while self.fills("demo") {
            self.control.work(Wake::ALL);
        }
    }

    /// Whether a domain is being filled.
    fn fills(&self, name: &str) -> bool {
        let mut domains = self.control.domains.iter();
        domains.any(|managed| managed.domain.name == name && managed.filling.is_some())
    }

    fn core(&mut self) -> &mut FakeCore {
        self.control.hypervisor()
    }

    fn output(&mut self) -> String {
        String::from_utf8(std::mem::take(&mut self.core().output)).unwrap()
    }

    fn ask(&mut self, request: Request) -> Response {
        self.send(request, true)
    }

    /// What is answered before anything else is done.
    fn ask_at_once(&mut self, request: Request) -> Response {
        self.send(request, false)
    }

    fn send(&mut self, request: Request, patient: bool) -> Response {
        self.last_id += 1;
        let frame = protocol::encode(&ToControl { id: self.last_id, request }).unwrap();
        for byte in frame {
            self.control.serial_input(byte);
        }
        if patient {
            self.settle();
        }
        let bytes: Vec<u8> = self.control.serial_output().drain(..).collect();
        let mut framer = protocol::Framer::new();
        let mut answers = bytes.iter().filter_map(|byte| framer.push::<FromControl>(*byte));
        let answer = answers.next().expect("an answer").unwrap();
        assert_eq!(answer.id, self.last_id);
        answer.response
    }

    fn node(&mut self, path: &str) -> Response {
        self.ask(Request::XenstoreLs(path.into()))
    }

    fn value(&mut self, path: &str) -> Option<String> {
        match self.node(path) {
            Response::Node { value, .. } => Some(String::from_utf8(value).unwrap()),
            _ => None,
        }
    }

    fn list(&mut self) -> Vec<(String, DomainState, u32)> {
        let Response::List(lines) = self.ask(Request::List) else { panic!("a list") };
        lines.into_iter().map(|line| (line.name, line.state, line.incarnation)).collect()
    }
}

#[test]
fn a_system_is_built_and_runs() {
    let mut rig = rig();
    let states: Vec<_> = rig.core().domains.values().map(|d| (d.name.clone(), d.state)).collect();
    assert!(states[1..].iter().all(|(_, state)| *state == STATE_BLOCKED), "{states:?}");
    let names: Vec<_> = states.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["control", "store", "net0", "demo"]);
    assert_eq!(rig.core().named("net0").devices, [0x10]);
    assert!(rig.output().contains("control| system 'fake' running: 4 domains in 1 ms\n"));
    assert_eq!(rig.value("/local/domain/3/name").as_deref(), Some("demo"));
}

#[test]
fn start_info_is_what_a_runtime_expects() {
    let mut rig = rig();
    let pages = |rig: &mut Rig, name: &str| rig.core().named(name).loaded[&START_INFO_GPA].clone();
    let store = pages(&mut rig, "store");
    let (info, config) = StartInfo::read_from_prefix(&store).unwrap();
    assert_eq!((info.domid, info.xenstore_port, info.config_bytes), (DomainId(1), EventPort(0), 4));
    assert_eq!(config, 77_u32.to_le_bytes());
    let demo = pages(&mut rig, "demo");
    let (info, config) = StartInfo::read_from_prefix(&demo).unwrap();
    assert_eq!((info.domid, info.incarnation, info.xenstore_port.0), (DomainId(3), 1, 1));
    assert_eq!((config, &info.name[..5]), (&b"ip=dhcp"[..], &b"demo\0"[..]));
    let net0 = rig.core().named("net0");
    assert!(net0.pages.contains(&(PRESERVED_GPA / 4096 + 15)));
    assert!(!net0.pages.contains(&(PRESERVED_GPA / 4096 + 16)));
}

/// xen-abi.md, appendix C: the keys of a vif, and who may write them.
#[test]
fn a_vif_has_both_its_directories() {
    let mut rig = rig();
    let front = "/local/domain/3/device/vif/0";
    let back = "/local/domain/2/backend/vif/3/0";
    for (path, value) in [
        (format!("{front}/backend"), back),
        (format!("{front}/backend-id"), "2"),
        (format!("{front}/state"), "1"),
        (format!("{front}/handle"), "0"),
        (format!("{front}/mac"), "00:16:3e:00:00:01"),
        (format!("{back}/frontend"), front),
        (format!("{back}/frontend-id"), "3"),
        (format!("{back}/online"), "1"),
        (format!("{back}/state"), "1"),
        (format!("{back}/mac"), "00:16:3e:00:00:01"),
    ] {
        assert_eq!(rig.value(&path).as_deref(), Some(value), "{path}");
    }
    let perms = |rig: &mut Rig, path: &str| match rig.node(path) {
        Response::Node { perms, .. } => perms,
        other => panic!("{path}: {other:?}"),
    };
    assert_eq!(perms(&mut rig, &format!("{front}/state")), ["n3", "r2"]);
    assert_eq!(perms(&mut rig, &format!("{back}/state")), ["n2", "r3"]);
    assert_eq!(perms(&mut rig, "/local/domain/2/backend/vif")[0], "n2");
    assert_eq!(perms(&mut rig, "/local/domain/3"), ["n0", "r3"]);
    // The driver can really work with it.
    let mut driver = rig.store.client(DomainId(2));
    assert_eq!(driver.directory("backend/vif/3").unwrap(), ["0"]);
    driver.write("backend/vif/3/0/state", b"2").unwrap();
    driver.write("backend/vif/3/0/feature-rx-copy", b"1").unwrap();
    assert_eq!(driver.read_string(&format!("{front}/state")).unwrap(), "1");
    let mut guest = rig.store.client(DomainId(3));
    guest.write("device/vif/0/tx-ring-ref", b"8").unwrap();
    assert_eq!(guest.read_string(&format!("{back}/state")).unwrap(), "2");
}

fn rig_with(system: &System, core: FakeCore) -> Rig {
    let images = [image(1), image(1), image(1), image(1), image(2)];
    let mut rig = rig_of(bundle(system, &images), core).unwrap();
    rig.settle();
    rig
}

/// xen-abi.md, §6.6 and appendix C: the keys of a vbd, and who may write them.
#[test]
fn a_vbd_has_both_its_directories() {
    let mut rig = rig_with(&disk_system(), FakeCore::new());
    let (front, back) = ("/local/domain/3/device/vbd", "/local/domain/4/backend/vbd/3");
    for (path, value) in [
        (format!("{front}/51712/backend"), "/local/domain/4/backend/vbd/3/51712"),
        (format!("{front}/51712/backend-id"), "4"),
        (format!("{front}/51712/state"), "1"),
        (format!("{front}/51712/virtual-device"), "51712"),
        (format!("{front}/51712/device-type"), "disk"),
        (format!("{front}/51712/trusted"), "1"),
        (format!("{front}/51728/virtual-device"), "51728"),
        (format!("{back}/51712/frontend"), "/local/domain/3/device/vbd/51712"),
        (format!("{back}/51712/frontend-id"), "3"),
        (format!("{back}/51712/online"), "1"),
        (format!("{back}/51712/state"), "1"),
        (format!("{back}/51712/removable"), "0"),
        (format!("{back}/51712/bootable"), "1"),
        (format!("{back}/51712/dev"), "xvda"),
        (format!("{back}/51712/device-type"), "disk"),
        (format!("{back}/51712/params"), "2/range:0+1048576"),
        (format!("{back}/51712/mode"), "w"),
        (format!("{back}/51712/format"), "raw"),
        (format!("{back}/51728/params"), "gpt:top"),
        (format!("{back}/51728/mode"), "r"),
        (format!("{back}/51728/format"), "qcow2"),
        (format!("{back}/51728/backing"), "gpt:base"),
    ] {
        assert_eq!(rig.value(&path).as_deref(), Some(value), "{path}");
    }
    assert_eq!(rig.value(&format!("{back}/51712/backing")), None);
    let perms = |rig: &mut Rig, path: &str| match rig.node(path) {
        Response::Node { perms, .. } => perms,
        other => panic!("{path}: {other:?}"),
    };
    assert_eq!(perms(&mut rig, &format!("{front}/51712/state")), ["n3", "r4"]);
    assert_eq!(perms(&mut rig, &format!("{back}/51712/state")), ["n4", "r3"]);
    assert_eq!(perms(&mut rig, front)[0], "n0");
    let mut driver = rig.store.client(DomainId(4));
    assert_eq!(driver.directory("backend/vbd/3").unwrap(), ["51712", "51728"]);
    driver.write("backend/vbd/3/51712/sectors", b"2048").unwrap();
    let mut guest = rig.store.client(DomainId(3));
    guest.write("device/vbd/51712/ring-ref", b"8").unwrap();
    assert_eq!(rig.ask(Request::Destroy("demo".into())), Response::Done);
    rig.settle();
    assert_eq!(rig.value(&format!("{back}/51712/params")), None);
    assert_eq!(rig.value(&format!("{back}/51728/params")), None);
}

/// A block driver grows back as a network driver does; the other one lives on.
#[test]
fn a_block_driver_restarts_in_place_and_a_guest_with_fresh_disks() {
    let mut rig = rig_with(&disk_system(), FakeCore::new());
    let before = rig.store.generation();
    rig.core().kill("disk0", None, 600 * MS);
    rig.settle();
    assert_eq!(rig.core().named("disk0").incarnation, 2);
    assert_eq!(rig.core().named("net0").incarnation, 1);
    assert_eq!(rig.store.generation(), before, "a node changed");
    rig.store.client(DomainId(3)).write("device/vbd/51728/ring-ref", b"8").unwrap();
    rig.core().kill("demo", None, 600 * MS);
    rig.settle();
    assert_eq!(rig.core().named("demo").state, STATE_BLOCKED);
    assert_eq!(rig.value("/local/domain/3/device/vbd/51728/ring-ref"), None);
    assert_eq!(rig.value("/local/domain/3/device/vbd/51728/state").as_deref(), Some("1"));
}

fn function(bdf: u32, vendor: u16, device: u16, class: u32) -> PciFunction {
    PciFunction { bdf, vendor, device, class, ..PciFunction::new_zeroed() }
}

/// [`disk_system`], whose disk domain's driver is to be found; image 4 is that of `nvme`.
fn system_to_find() -> System {
    let mut system = disk_system();
    system.domains[3].image = FIND_DRIVER;
    let program = |driver: &str, image| DriverImage { driver: driver.into(), image };
    system.drivers = vec![program("e1000e", 2), program("nvme", 4)];
    system
}

#[test]
fn a_driver_is_found_by_the_class_of_its_device() {
    let mut core = FakeCore::new();
    core.functions = vec![function(0x18, 0x1234, 0x5678, 0x01_08_02)];
    let mut rig = rig_with(&system_to_find(), core);
    assert_eq!(rig.core().named("disk0").state, STATE_BLOCKED);
    let code = |rig: &mut Rig, name: &str| rig.core().named(name).loaded[&0x20_0000].len();
    assert_eq!(code(&mut rig, "disk0"), 2, "the image of the driver for NVMe");
    assert!(rig.output().contains("control| disk0 runs the driver nvme for 00:03.0\n"));
    rig.core().kill("disk0", None, 600 * MS);
    rig.settle();
    assert_eq!(code(&mut rig, "disk0"), 2);
}

#[test]
fn a_device_that_no_driver_serves_costs_its_domain_only() {
    for (functions, why) in [
        (vec![], "its driver: there is no device at 00:03.0 (ENODEV)"),
        (
            vec![function(0x18, 0x1234, 0x5678, 0x03_00_00)],
            "its driver: none here serves 00:03.0 (1234:5678, class 030000)",
        ),
        // There is a driver for it, but not in this bundle.
        (
            vec![function(0x18, 0x1234, 0x5678, 0x01_06_01)],
            "its driver: none here serves 00:03.0 (1234:5678, class 010601)",
        ),
    ] {
        let mut core = FakeCore::new();
        core.functions = functions;
        let mut rig = rig_with(&system_to_find(), core);
        let output = rig.output();
        assert!(output.contains(&format!("disk0 cannot be built: {why}\n")), "{output}");
        assert_eq!(rig.list().last().unwrap().1, DomainState::Held);
        assert_eq!(rig.core().named("demo").state, STATE_BLOCKED);
        let Response::List(lines) = rig.ask(Request::List) else { panic!() };
        assert!(lines.last().unwrap().held.as_ref().unwrap().contains(why));
        // The card is plugged in, and somebody asks again.
        rig.core().functions = vec![function(0x18, 0x1234, 0x5678, 0x01_08_02)];
        assert_eq!(rig.ask(Request::Restart("disk0".into())), Response::Done);
        rig.settle();
        assert_eq!(rig.core().named("disk0").state, STATE_BLOCKED);
    }
}

#[test]
fn a_found_driver_of_the_wrong_kind_is_said() {
    let mut core = FakeCore::new();
    core.functions = vec![function(0x18, 0x8086, 0x10d3, 0x02_00_00)];
    let mut rig = rig_with(&system_to_find(), core);
    let output = rig.output();
    assert!(output.contains("disk0 runs the driver e1000e for 00:03.0\n"), "{output}");
    assert!(output.contains("disk0 cannot serve vbd 51712 of demo: "), "{output}");
    assert!(!output.contains("cannot serve vif"), "{output}");
}

/// architecture.md §6: no xenbus state changes, and memory stays.
#[test]
fn a_driver_restarts_in_place_and_the_tree_does_not_change() {
    let mut rig = rig();
    rig.core().named("net0").console = b"link is up\nlast words".to_vec();
    let before = rig.store.generation();
    let pages = rig.core().named("net0").pages.clone();
    rig.core().log.clear();
    rig.core().kill("net0", None, 600 * MS);
    rig.control.work(Wake { domains: true, consoles: false });
    let net0 = rig.core().named("net0").clone();
    assert_eq!((net0.state, net0.incarnation), (STATE_BLOCKED, 2));
    assert_eq!(net0.pages, pages);
    assert_eq!(rig.store.generation(), before, "a node changed");
    let log = rig.core().log.join(", ");
    // 150,000 bytes of code in three loads, the data, the ring's state, the start info.
    let wanted = "restart d2, load d2, load d2, load d2, load d2, alloc_unbound d2, load d2, \
                  set_grant d2, load d2, set_start d2, unpause d2";
    assert_eq!(log, wanted);
    let (info, _) = StartInfo::read_from_prefix(&net0.loaded[&START_INFO_GPA]).unwrap();
    assert_eq!((info.incarnation, info.xenstore_port), (2, EventPort(2)));
    assert!(rig.output().contains("control| net0 died, incarnation 1: page fault at 0xdeadb000"));
    let Response::Why(why) = rig.ask(Request::Why("net0".into())) else { panic!() };
    assert_eq!((why.incarnation, why.vector, why.address), (1, 14, 0xdead_b000));
    assert_eq!(why.console_tail, b"link is up\nlast words");
    assert_eq!(why.backtrace, [0x20_1234, 0x20_5678]);
}

/// A store that hangs must not keep drivers from growing back.
#[test]
fn a_driver_restarts_while_the_store_hangs() {
    let mut rig = rig();
    rig.hangs.set(true);
    for life in 2..40 {
        rig.core().now_ns += 60_000 * MS;
        rig.core().kill("net0", None, 600 * MS);
        rig.settle();
        assert_eq!(rig.core().named("net0").state, STATE_BLOCKED);
        assert_eq!(rig.core().named("net0").incarnation, life);
    }
    rig.hangs.set(false);
    rig.settle();
    assert_eq!(rig.value("/local/domain/2/name").as_deref(), Some("net0"));
}

#[test]
fn a_guest_restarts_with_fresh_frontends() {
    let mut rig = rig();
    let front = "/local/domain/3/device/vif/0";
    {
        let mut driver = rig.store.client(DomainId(2));
        driver.write("backend/vif/3/0/state", b"4").unwrap();
        let mut guest = rig.store.client(DomainId(3));
        guest.write("device/vif/0/tx-ring-ref", b"8").unwrap();
        guest.write("device/vif/0/state", b"4").unwrap();
    }
    rig.hangs.set(true);
    rig.core().kill("demo", None, 600 * MS);
    rig.settle();
    assert_eq!(
        rig.core().named("demo").state,
        STATE_BUILDING,
        "it starts before its nodes are reset"
    );
    rig.hangs.set(false);
    rig.settle();
    assert_eq!(rig.core().named("demo").state, STATE_BLOCKED);
    assert_eq!(rig.core().named("demo").incarnation, 2);
    assert_eq!(rig.value(&format!("{front}/state")).as_deref(), Some("1"));
    assert_eq!(rig.value(&format!("{front}/tx-ring-ref")), None);
    // The backend's own state is the backend's.
    assert_eq!(rig.value("/local/domain/2/backend/vif/3/0/state").as_deref(), Some("4"));
}

/// The quota of a guest is that of one incarnation, and a word to its last one is not for the next.
#[test]
fn a_guest_restarts_without_what_it_left_in_the_store() {
    let mut rig = rig();
    let mut guest = rig.store.client(DomainId(3));
    let full = (0..3000).find(|n| guest.write(&format!("data/{n}"), b"x").is_err());
    assert!(full.is_some(), "a guest may fill the store");
    drop(guest);
    rig.ask(Request::Shutdown { name: "demo".into(), reboot: false });
    rig.core().kill("demo", None, 600 * MS);
    rig.settle();
    assert_eq!(rig.core().named("demo").incarnation, 2);
    assert_eq!(rig.value("/local/domain/3/data/0"), None);
    assert_eq!(rig.value("/local/domain/3/control/shutdown").as_deref(), Some(""));
    let mut guest = rig.store.client(DomainId(3));
    guest.write("data/again", b"x").unwrap();
    guest.write("control/shutdown", b"").unwrap();
}

#[test]
fn a_crash_loop_ends_in_a_hold_and_a_hand_ends_the_hold() {
    let mut rig = rig();
    for _ in 0..3 {
        rig.core().kill("net0", None, 10 * MS);
        rig.settle();
        assert_eq!(rig.core().named("net0").state, STATE_BLOCKED);
    }
    rig.core().kill("net0", None, 10 * MS);
    rig.settle();
    assert_eq!(rig.core().named("net0").state, STATE_DEAD);
    assert!(rig.output().contains("it died 4 times in a row within 500 ms of its start"));
    assert_eq!(rig.list()[2].1, DomainState::Held);
    assert!(matches!(
        rig.ask(Request::Crash("net0".into())),
        Response::Failed(Failure::BadState { .. })
    ));
    assert_eq!(rig.ask(Request::Restart("net0".into())), Response::Done);
    assert_eq!(rig.list()[2], ("net0".into(), DomainState::Blocked, 5));
}

#[test]
fn a_long_life_forgives_quick_deaths_and_commanded_ones_do_not_count() {
    let mut rig = rig();
    for _ in 0..2 {
        rig.core().kill("net0", None, 10 * MS);
        rig.settle();
    }
    rig.core().kill("net0", None, 600 * MS);
    rig.settle();
    for _ in 0..200 {
        assert_eq!(rig.ask(Request::Crash("net0".into())), Response::Done);
        assert_eq!(rig.core().named("net0").state, STATE_BLOCKED);
    }
    assert_eq!(rig.list()[2].2, 204);
}

#[test]
fn restarts_above_the_rate_wait() {
    let mut rig = rig();
    for _ in 0..10 {
        rig.core().kill("net0", None, 600 * MS);
        rig.settle();
        assert_eq!(rig.core().named("net0").state, STATE_BLOCKED);
    }
    let first = MS + 600 * MS;
    rig.core().kill("net0", None, 600 * MS);
    rig.settle();
    assert_eq!(rig.list()[2].1, DomainState::Restarting);
    assert_eq!(rig.control.deadline(), Some(first + 60_000 * MS));
    rig.core().now_ns = first + 60_000 * MS - 1;
    rig.settle();
    assert_eq!(rig.core().named("net0").state, STATE_DEAD);
    rig.core().now_ns += 1;
    rig.control.work(Wake::default());
    assert_eq!(rig.core().named("net0").state, STATE_BLOCKED);
}

#[test]
fn policies_decide_by_the_way_it_ended() {
    let mut system = system();
    system.domains[1].on_crash = OnEnd::Preserve;
    let images = [image(1), image(1), image(1), image(1)];
    let mut rig = rig_of(bundle(&system, &images), FakeCore::new()).unwrap();
    rig.settle();
    rig.core().kill("net0", Some(1), MS);
    rig.settle();
    assert_eq!(rig.core().named("net0").incarnation, 2, "on_reboot = restart");
    rig.core().kill("net0", Some(3), MS);
    rig.settle();
    assert_eq!(rig.list()[2].1, DomainState::Dead, "a panic is a crash");
    rig.core().kill("demo", Some(0), MS);
    rig.settle();
    assert!(!rig.core().domains.contains_key(&3), "on_poweroff = destroy");
    assert_eq!(rig.value("/local/domain/3/name"), None);
    assert_eq!(rig.value("/local/domain/2/backend/vif/3/0"), None);
    assert_eq!(rig.ask(Request::Restart("demo".into())), Response::Done);
    rig.settle();
    assert_eq!(rig.core().named("demo").state, STATE_BLOCKED, "built anew");
}

/// The default system; its guest has a kernel of its own, and is not filled yet.
fn rig_with_kernel() -> Rig {
    let mut system = system();
    system.domains[2].kernel = Some(Kernel { cmdline: "quiet".into(), ramdisk: Some(4) });
    system.domains[2].memory_pages = 32_768;
    let images = [image(1), image(1), image(1), image(1_500_000), ramdisk(3_000_000)];
    rig_of(bundle(&system, &images), FakeCore::new()).unwrap()
}

/// A guest's kernel and ramdisk may have any size; a driver's outage must not depend on it.
#[test]
fn a_driver_restarts_while_a_large_guest_is_filled() {
    let mut rig = rig_with_kernel();
    // Once while it is built, and once while it starts again.
    for life in 1..=2 {
        for _ in 0..4 {
            rig.control.work(Wake::default());
            assert!(rig.fills("demo"), "it takes many turns");
        }
        assert!(rig.control.deadline().is_some(), "nobody need wake us");
        rig.core().kill("net0", None, MS);
        rig.control.work(Wake { domains: true, consoles: false });
        assert_eq!(rig.core().named("net0").incarnation, 1 + life);
        assert_eq!(rig.core().named("net0").state, STATE_BLOCKED);
        assert!(rig.fills("demo"));
        rig.settle();
        let demo = rig.core().named("demo");
        assert_eq!((demo.state, demo.incarnation), (STATE_BLOCKED, life));
        assert!(demo.loaded.values().map(Vec::len).sum::<usize>() > 4_500_000, "all of both");
        assert_eq!(rig.control.deadline(), None);
        rig.control.work(Wake::ALL);
        assert!(rig.core().consoles.contains(&3), "its console is read");
        rig.core().kill("demo", Some(1), MS);
        rig.control.work(Wake { domains: true, consoles: false });
    }
    assert!(!rig.core().consoles.contains(&3), "the page of an ended life is let go");
    rig.settle();
    assert_eq!(rig.ask(Request::Restart("demo".into())), Response::Done);
    rig.settle();
    assert_eq!(rig.ask_at_once(Request::Destroy("demo".into())), Response::Done);
    assert!(rig.core().consoles.is_empty() && !rig.fills("demo"));
    rig.settle();
    assert!(!rig.core().domains.contains_key(&3));
}

#[test]
fn a_driver_that_was_destroyed_finds_its_guests_again() {
    let mut rig = rig();
    let node = "/local/domain/2/backend/vif/3/0/mac";
    let mac = rig.value(node).expect("the guest's vif");
    assert_eq!(rig.ask(Request::Destroy("net0".into())), Response::Done);
    rig.settle();
    assert_eq!(rig.value(node), None);
    assert_eq!(rig.ask(Request::Restart("net0".into())), Response::Done);
    rig.settle();
    assert_eq!(rig.value(node), Some(mac));
    assert_eq!(rig.core().named("demo").incarnation, 1, "the guest went on");
    // A guest that is gone is not served.
    for name in ["demo", "net0"] {
        assert_eq!(rig.ask(Request::Destroy(name.into())), Response::Done);
        rig.settle();
    }
    assert_eq!(rig.ask(Request::Restart("net0".into())), Response::Done);
    rig.settle();
    assert_eq!(rig.value(node), None);
}

#[test]
fn a_domain_that_cannot_be_built_costs_only_itself() {
    let mut core = FakeCore::new();
    core.fail = Some(("assign_device", Errno::ENODEV));
    let mut rig = rig_of(default_bundle(), core).unwrap();
    rig.settle();
    assert_eq!(rig.list()[2].1, DomainState::Held);
    assert!(rig.output().contains("net0 cannot be built: its device: ENODEV"));
    assert_eq!(rig.core().named("demo").state, STATE_BLOCKED);
    assert_eq!(rig.ask(Request::Restart("net0".into())), Response::Done);
    assert_eq!(rig.list()[2].1, DomainState::Blocked);
}

#[test]
fn operations_that_take_several_calls_are_finished() {
    let mut core = FakeCore::new();
    core.again = 5;
    let mut rig = rig_of(default_bundle(), core).unwrap();
    rig.settle();
    rig.core().kill("net0", None, 600 * MS);
    rig.settle();
    assert_eq!(rig.core().named("net0").incarnation, 2);
    assert_eq!(rig.ask(Request::Destroy("demo".into())), Response::Done);
    for _ in 0..10 {
        rig.core().now_ns += 10 * MS;
        rig.settle();
    }
    assert!(!rig.core().domains.contains_key(&3));
}

#[test]
fn requests_are_answered_or_refused_with_the_reason() {
    let mut rig = rig();
    assert_eq!(
        rig.ask(Request::Hello { version: 99 }),
        Response::Hello { version: protocol::VERSION, system: "fake".into() }
    );
    let unknown = Response::Failed(Failure::UnknownName {
        name: "net1".into(),
        nearest: Some("net0".into()),
    });
    for request in
        [Request::Crash, Request::Restart, Request::Why, Request::Pause, Request::Destroy]
    {
        assert_eq!(rig.ask(request("net1".into())), unknown);
        let refused = rig.ask(request("control".into()));
        assert!(matches!(refused, Response::Failed(Failure::BadState { .. })), "{refused:?}");
    }
    assert_eq!(rig.ask(Request::Pause("demo".into())), Response::Done);
    assert_eq!(rig.core().named("demo").state, STATE_PAUSED);
    assert_eq!(rig.list()[3].1, DomainState::Paused);
    assert_eq!(rig.ask(Request::Unpause("demo".into())), Response::Done);
    let twice = rig.ask(Request::Unpause("demo".into()));
    assert!(matches!(twice, Response::Failed(Failure::BadState { .. })));
    let Response::Info(info) = rig.ask(Request::Info) else { panic!() };
    assert_eq!((info.cpus, info.dma_trusted), (2, vec![(0x10, "net0".to_string())]));
    assert_eq!(
        rig.ask(Request::Dmesg { position: 8 }),
        Response::Console { start: 8, bytes: b"running\n".to_vec() }
    );
    let Response::Console { bytes, .. } =
        rig.ask(Request::ConsoleRead { name: "control".into(), position: 0 })
    else {
        panic!()
    };
    assert!(bytes.ends_with(b"4 domains in 1 ms\n"));
    let invalid = Response::Failed(Failure::Store { name: "EINVAL".into() });
    assert_eq!(rig.node("relative"), invalid);
    assert_eq!(rig.node("/local/domain/\0x"), invalid);
    assert_eq!(rig.node("/nothing"), Response::Failed(Failure::Store { name: "ENOENT".into() }));
    assert_eq!(rig.ask(Request::Crash("x".repeat(4000))), Response::Failed(Failure::TooLong));
}

/// xen-abi.md, §6.3: the word in `control/shutdown`, which the guest takes away itself.
#[test]
fn a_guest_is_asked_to_end() {
    let mut rig = rig();
    let ask = |name: &str, reboot| Request::Shutdown { name: name.into(), reboot };
    let node = "/local/domain/3/control/shutdown";
    assert_eq!(rig.ask(ask("demo", false)), Response::Done);
    assert_eq!(rig.value(node).as_deref(), Some("poweroff"));
    rig.store.client(DomainId(3)).write("control/shutdown", b"").unwrap();
    assert_eq!(rig.ask(ask("demo", true)), Response::Done);
    assert_eq!(rig.value(node).as_deref(), Some("reboot"));
    for name in ["net0", "store", "control", "nobody"] {
        assert!(matches!(rig.ask(ask(name, false)), Response::Failed(_)), "{name}");
    }
    rig.hangs.set(true);
    for id in 1000..1100 {
        let request = ask("demo", false);
        for byte in protocol::encode(&ToControl { id, request }).unwrap() {
            rig.control.serial_input(byte);
        }
    }
    rig.settle();
    let mut framer = protocol::Framer::new();
    let answers = rig.control.serial_output().drain(..).filter_map(|byte| framer.push(byte));
    let answers: Vec<Result<FromControl, _>> = answers.collect();
    assert_eq!(answers.len(), 100 - 32, "the others wait");
    rig.hangs.set(false);
    rig.settle();
    rig.control.serial_output().clear();
    assert_eq!(rig.ask(ask("demo", false)), Response::Done);
}

/// xen-abi.md, appendix C: the balloon of a kernel follows `memory/target`, in KiB.
#[test]
fn a_guest_is_asked_to_use_less_memory() {
    let mut rig = rig_with_kernel();
    rig.settle();
    let node = "/local/domain/3/memory/target";
    assert_eq!(rig.value(node).as_deref(), Some("131072"));
    let ask = |name: &str, mib| Request::SetMemory { name: name.into(), mib };
    assert_eq!(rig.ask(ask("demo", 80)), Response::Done);
    assert_eq!(rig.value(node).as_deref(), Some("81920"));
    for (name, mib) in [("demo", 31), ("demo", 129), ("net0", 4), ("control", 16), ("nobody", 64)] {
        assert!(matches!(rig.ask(ask(name, mib)), Response::Failed(_)), "{name} {mib}");
    }
    assert_eq!(rig.value(node).as_deref(), Some("81920"));
}

#[test]
fn consoles_become_lines_with_names() {
    let mut rig = rig();
    rig.output();
    rig.core().named("net0").console = b"one\r\ntwo \x1b[31mred\npart".to_vec();
    rig.core().named("demo").console = b"hello\n".to_vec();
    rig.control.work(Wake { domains: false, consoles: true });
    assert_eq!(rig.output(), "net0| one\nnet0| two ?[31mred\ndemo| hello\n");
    assert_eq!(rig.control.deadline(), Some(MS + 200 * MS));
    rig.core().now_ns += 200 * MS;
    rig.control.work(Wake::default());
    assert_eq!(rig.output(), "net0| part\n");
    assert_eq!(rig.control.deadline(), None);
}

/// The store's death is a misfortune, not the end: drivers still grow back.
#[test]
fn without_a_store_drivers_still_restart() {
    let mut rig = rig();
    rig.core().kill("store", None, MS);
    rig.settle();
    rig.core().kill("net0", None, 600 * MS);
    rig.settle();
    assert_eq!(rig.core().named("net0").incarnation, 2);
    assert_eq!(rig.node("/"), Response::Failed(Failure::Store { name: "EIO".into() }));
}

#[test]
fn damaged_bundles_are_refused() {
    let good = default_bundle();
    assert!(Bundle::read(&good).is_ok());
    for at in [100, 300, 4096, good.len() - 1] {
        let mut bad = good.clone();
        bad[at] ^= 1;
        assert!(Bundle::read(&bad).is_err(), "byte {at}");
    }
    for len in [0, 39, 40, 200, good.len() - 1] {
        assert!(Bundle::read(&good[..len]).is_err(), "{len} bytes");
    }
    let refused = |change: &dyn Fn(&mut System)| {
        let mut system = system();
        change(&mut system);
        Bundle::read(&bundle(&system, &[image(1), image(1), image(1), image(1)])).unwrap_err()
    };
    assert_eq!(refused(&|s| s.version = 2), BundleError::Version(2));
    let changes: [&dyn Fn(&mut System); 6] = [
        &|s| s.domains[2].name = "net0".into(),
        &|s| s.domains[2].name = "a/b".into(),
        &|s| s.domains[2].name = "x".repeat(32),
        &|s| s.domains[2].image = 4,
        &|s| s.domains[2].vifs[0].backend = "store".into(),
        &|s| s.domains[2].role = axolotl_abi::system::Role::Store,
    ];
    for change in changes {
        assert!(matches!(refused(change), BundleError::Inconsistent(..)));
    }
    let refused = |change: &dyn Fn(&mut System)| {
        let mut system = system_to_find();
        change(&mut system);
        let images = [image(1), image(1), image(1), image(1), image(1)];
        Bundle::read(&bundle(&system, &images)).map(drop)
    };
    assert!(refused(&|_| ()).is_ok());
    let changes: [&dyn Fn(&mut System); 8] = [
        &|s| s.drivers.clear(),
        &|s| s.drivers[1].image = 5,
        &|s| s.domains[3].devices.clear(),
        &|s| s.domains[2].disks[0].backend = "demo".into(),
        &|s| s.domains[2].disks[0].dev = "xvdb".into(),
        &|s| s.domains[2].disks[0].dev = "../x".into(),
        &|s| s.domains[2].disks[0].volume = "gpt:".into(),
        &|s| s.domains[2].disks[1].backing = Some("nothing".into()),
    ];
    for change in changes {
        assert!(matches!(refused(change), Err(BundleError::Inconsistent(..))));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever comes over the serial port, the next good request is answered.
    #[test]
    fn no_garbage_on_the_serial_port_stops_the_answers(
        garbage in prop::collection::vec(any::<u8>(), 0..600),
    ) {
        let mut rig = rig();
        for byte in garbage.into_iter().chain([0]) {
            rig.control.serial_input(byte);
        }
        rig.control.serial_output().clear();
        prop_assert!(matches!(rig.ask(Request::List), Response::List(lines) if lines.len() == 4));
    }

    /// No bundle makes the control domain panic, whatever bytes it holds.
    #[test]
    fn no_bundle_is_trusted(at in 0_usize..8192, bytes in prop::collection::vec(any::<u8>(), 1..64)) {
        let mut bundle = default_bundle();
        let end = (at + bytes.len()).min(bundle.len());
        bundle[at..end].copy_from_slice(&bytes[..end - at]);
        // With a matching checksum, as an attacker would.
        let header = 40 + 4 * 48;
        let sum = protocol::crc32(&bundle[header..]);
        bundle[36..40].copy_from_slice(&sum.to_le_bytes());
        if let Ok(mut rig) = rig_of(bundle, FakeCore::new()) {
            rig.settle();
        }
    }

    /// Nor does any byte that the store sends.
    #[test]
    fn no_reply_of_the_store_is_trusted(bytes in prop::collection::vec(any::<u8>(), 0..4000)) {
        struct Liar(Vec<u8>);
        impl Transport for Liar {
            fn send(&mut self, bytes: &[u8]) -> usize { bytes.len() }
            fn receive(&mut self, buffer: &mut [u8]) -> usize {
                let len = buffer.len().min(self.0.len());
                buffer[..len].copy_from_slice(&self.0[..len]);
                self.0.drain(..len);
                len
            }
            fn wait(&mut self) -> Result<(), Errno> { Ok(()) }
        }
        let image = default_bundle();
        let setup = Setup {
            bundle: &image, hypervisor: FakeCore::new(), store: Liar(bytes), store_port: EventPort(1),
        };
        let mut control = Control::start(setup).unwrap();
        control.work(Wake::ALL);
    }
}
