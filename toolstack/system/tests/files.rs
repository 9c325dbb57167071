//! Every system file of the project: the good ones compile, the bad ones earn their message.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use axolotl_abi::system::{Dma, Role};
use std::path::{Path, PathBuf};

fn systems() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../systems")
}

fn toml_files(directory: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    entries.filter(|path| path.extension().is_some_and(|end| end == "toml")).collect()
}

#[test]
fn every_good_file_compiles_and_can_be_explained() {
    let files = toml_files(&systems());
    assert!(files.len() >= 4);
    for path in files {
        let compiled = system::load(&path).unwrap_or_else(|error| panic!("{}", error.one_line()));
        assert!(system::explain(&compiled).contains(&compiled.system.name));
    }
}

#[test]
fn every_bad_file_earns_its_message_with_a_line_and_a_hint() {
    let files = toml_files(&systems().join("bad"));
    assert!(files.len() >= 100);
    let mut wrong = String::new();
    for path in files {
        let text = std::fs::read_to_string(&path).unwrap();
        let message = text.lines().next().unwrap().strip_prefix("# ").unwrap();
        let error = system::load(&path).expect_err(&path.display().to_string());
        if error.message() != message {
            wrong +=
                &format!("\n{}\n  wants {message}\n  earns {}", path.display(), error.message());
        }
        assert!(error.line().is_some(), "{}", path.display());
        assert!(error.hint().is_some(), "{}", path.display());
        assert!(error.path().ends_with(".toml"));
    }
    assert!(wrong.is_empty(), "{wrong}");
}

/// The line is the culprit's, and the drawn report shows file, line, message and hint.
#[test]
fn a_report_shows_the_culprit() {
    let error = system::load(&systems().join("bad/mac-multicast.toml")).unwrap_err();
    let line = error.line().unwrap();
    let text = std::fs::read_to_string(systems().join("bad/mac-multicast.toml")).unwrap();
    assert!(text.lines().nth(line - 1).unwrap().contains("01:16:3e"), "line {line}");
    let mut report = String::new();
    let handler = miette::GraphicalReportHandler::new_themed(miette::GraphicalTheme::none());
    handler.render_report(&mut report, error.as_ref()).unwrap();
    for part in ["mac-multicast.toml", "multicast address", "first byte", "01:16:3e:00:00:01"] {
        assert!(report.contains(part), "{part} is missing in\n{report}");
    }
}

#[test]
fn a_missing_file_is_an_error_without_a_line() {
    let error = system::load(Path::new("/nonexistent/file.toml")).unwrap_err();
    assert!(error.message().contains("cannot read"));
    assert_eq!(error.line(), None);
}

#[test]
fn the_default_system_is_what_the_readme_says() {
    let compiled = system::load(&systems().join("default.toml")).unwrap();
    let images = ["control-domain", "store-domain", "net-domain", "nvme-domain", "demo-guest"];
    assert_eq!(compiled.images, images);
    assert_eq!(compiled.system.name, "default");
    let [store, net0, disk0, demo] = &compiled.system.domains[..] else { panic!("four domains") };
    assert_eq!((store.role, net0.role, demo.role), (Role::Store, Role::Driver, Role::Guest));
    assert_eq!((disk0.role, disk0.devices[0].bdf), (Role::Driver, 0x18));
    let disk = &demo.disks[0];
    assert_eq!((disk.backend.as_str(), disk.dev.as_str(), disk.writable), ("disk0", "xvda", false));
    assert_eq!((net0.devices[0].bdf, net0.devices[0].dma), (0x10, Dma::Trusted));
    assert_eq!((net0.memory_pages, net0.preserved_pages), (1024, 16));
    assert_eq!(demo.vifs[0].backend, "net0");
    assert_eq!(demo.vifs[0].mac, [0, 0x16, 0x3e, 0, 0, 1]);
    assert_eq!((compiled.machine.memory_mib, compiled.machine.cpus), (256, 2));
    let system::NicNet::User { host_forward } = &compiled.machine.nics[0].net else { panic!() };
    assert_eq!(host_forward[0].to_string(), "tcp:127.0.0.1:8080-:80");
}

const DISKS: &str = r#"
name = "disks"
[machine]
memory = 256
cpus = 2
[[machine.disk]]
model = "nvme"
bdf = "00:03.0"
file = "first.raw"
partitions = [{ name = "root", size = "16M" }, { name = "cow", size = "8M", cow = "1G" }]
[[machine.disk]]
model = "nvme"
bdf = "00:03.0"
file = "files.raw"
content = "demo-files"
[[domain]]
name = "store"
role = "store"
memory = 4
[[domain]]
name = "disk0"
role = "driver"
memory = 4
pci = [{ bdf = "00:03.0", dma = "trusted" }]
[[domain]]
name = "demo"
image = "demo-guest"
memory = 8
disk = [
    { backend = "disk0", volume = "gpt:cow", cow = true, backing = "gpt:root" },
    { backend = "disk0", volume = "2/whole", mode = "ro" },
    { backend = "disk0", volume = "gpt:root", mode = "ro", dev = "xvdp" },
]
"#;

/// The device decides the driver; disks of one address are those of one controller.
#[test]
fn disks_are_compiled_as_the_page_says() {
    let compiled = system::compile("disks.toml", DISKS).unwrap();
    let [first, files] = &compiled.machine.disks[..] else { panic!("two disks") };
    assert_eq!(
        (first.bytes(), first.readonly, first.serial.as_str()),
        (Some(26 << 20), false, "axolotl-0")
    );
    assert_eq!((&files.content, files.readonly), (&system::DiskContent::DemoFiles, true));
    assert_eq!(compiled.images, ["control-domain", "store-domain", "nvme-domain", "demo-guest"]);
    let [_, disk0, demo] = &compiled.system.domains[..] else { panic!("three domains") };
    assert!(disk0.preserved_pages > 32, "bounce pages and tables");
    let disks = demo.disks.iter().map(|disk| {
        let flags = (disk.writable, disk.cow, disk.backing.as_deref());
        (disk.dev.as_str(), disk.volume.as_str(), flags)
    });
    let wanted = [
        ("xvda", "gpt:cow", (true, true, Some("gpt:root"))),
        ("xvdb", "2/whole", (false, false, None)),
        ("xvdp", "gpt:root", (false, false, None)),
    ];
    assert_eq!(disks.collect::<Vec<_>>(), wanted);
    let text = system::explain(&compiled);
    assert!(
        text.contains("demo ↔ disk0, by disk xvda (gpt:cow, copy-on-write over gpt:root)"),
        "{text}"
    );
}

/// A device that is not emulated may be there on another machine: its driver is found at boot.
#[test]
fn a_driver_is_found_later_when_nobody_knows_the_device() {
    let text = DISKS.replacen("bdf = \"00:03.0\", dma", "bdf = \"03:00.0\", dma", 1);
    let compiled = system::compile("disks.toml", &text).unwrap();
    let disk0 = &compiled.system.domains[1];
    assert_eq!(disk0.image, axolotl_abi::system::FIND_DRIVER);
    let drivers = compiled.system.drivers.iter();
    for (driver, known) in drivers.zip(axolotl_abi::drivers::DRIVERS) {
        assert_eq!(driver.driver, known.name);
        assert_eq!(compiled.images[driver.image as usize], known.package);
    }
    assert_eq!(compiled.system.drivers.len(), axolotl_abi::drivers::DRIVERS.len());
    let warning = "the emulated machine has no device at 03:00.0";
    assert!(compiled.warnings.iter().any(|text| text == warning), "{:?}", compiled.warnings);
}

/// An image that is larger than was assumed is refused where the memory is set.
#[test]
fn an_image_that_does_not_fit_is_refused() {
    use axolotl_abi::image::{IMAGE_MAGIC, ImageHeader, Segment};
    use zerocopy::IntoBytes;
    let compiled = system::load(&systems().join("default.toml")).unwrap();
    let flat = |pages| {
        let header = ImageHeader { magic: IMAGE_MAGIC, entry: 0x20_0000, segments: 1, reserved: 0 };
        let segment = Segment { gfn: 0x200, pages, access: 5, file_offset: 0, file_bytes: 0 };
        [header.as_bytes(), segment.as_bytes()].concat()
    };
    compiled.check_image(2, &flat(128)).unwrap();
    let error = compiled.check_image(2, &flat(1024)).unwrap_err();
    assert!(error.message().starts_with("`net0` has too little memory"), "{}", error.message());
    assert!(error.line().is_some());
    assert!(compiled.check_image(2, b"no image").is_err());
    assert!(compiled.check_image(0, &flat(2048)).unwrap_err().message().contains("`control`"));
}
