//! QEMU's command line for a system.

use crate::disks::Place;
use crate::setup::QEMU;
use miette::{IntoDiagnostic, miette};
use std::ffi::OsString;
use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};
use system::{FileFormat, Machine, MachineDisk, NicNet, Protocol};

/// The processor model under emulation. Without XSAVE and what needs it: QEMU 7.2 lets guests of a hypervisor execute
/// XSETBV without asking it (corrupt data was measured with XSAVE under one that trusts to be asked, none without).
/// Ours does not trust it; tests that shall not depend on that run without.
const EMULATED_CPU: &str = "EPYC,-xsave,-xsaveopt,-xgetbv1,-avx,-avx2,-fma,-f16c";

/// How instructions are executed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, clap::ValueEnum)]
pub enum Accel {
    /// The processor's own virtualization when it works here, else emulation.
    #[default]
    Auto,
    /// The processor's own virtualization.
    Kvm,
    /// Emulation.
    Tcg,
    /// Emulation that counts instructions: one nanosecond each, no waiting while idle.
    Icount,
    /// The same, but while the machine is idle its clock is the host's: for what waits for the
    /// host's network.
    IcountIdle,
}

/// Which host ports a guest's ports appear at.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Ports {
    /// Those of the system file.
    #[default]
    AsWritten,
    /// Any free ones.
    Free,
}

/// What may differ between two boots of a system.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// How instructions are executed.
    pub accel: Accel,
    /// Processors; the system file's number when `None`.
    pub cpus: Option<u32>,
    /// Host ports.
    pub ports: Ports,
    /// Where the files of disks are.
    pub disks: Place,
    /// A CD to boot from by the firmware, instead of core and bundle from QEMU.
    pub cd: Option<PathBuf>,
    /// A kernel to boot from QEMU instead of core and bundle: the machine without us.
    pub bare: Option<BareKernel>,
    /// Added at the end of the command line.
    pub extra: Vec<String>,
}

/// A kernel that has the whole machine.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BareKernel {
    /// The kernel.
    pub kernel: PathBuf,
    /// Its initial ramdisk.
    pub ramdisk: PathBuf,
    /// Its command line.
    pub cmdline: String,
}

/// A guest's port that the host can reach.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Forward {
    /// At the host.
    pub host: SocketAddrV4,
    /// The guest's address, when the system file names it.
    pub guest: Option<Ipv4Addr>,
    /// At the guest.
    pub guest_port: u16,
    /// TCP, not UDP.
    pub tcp: bool,
    /// Index of the network card.
    pub nic: usize,
}

/// What is resolved before QEMU starts.
#[derive(Debug)]
pub struct Plan {
    /// The command, without the serial ports.
    pub command: Command,
    /// Host ports, in the order of the system file.
    pub forwards: Vec<Forward>,
}

/// What is there when QEMU starts.
#[derive(Clone, Copy, Debug)]
pub struct Files<'a> {
    /// The core's ELF file.
    pub core: &'a Path,
    /// The bundle.
    pub bundle: &'a Path,
    /// A socket at which somebody listens.
    pub com2: &'a Path,
    /// The files of the machine's disks, in order.
    pub disks: &'a [PathBuf],
}

/// Makes the command line.
///
/// # Errors
/// A host port is taken.
pub fn plan(machine: &Machine, options: &Options, files: Files<'_>) -> miette::Result<Plan> {
    let mut command = killed_with_us();
    let accel = resolve(options.accel);
    accelerate(&mut command, accel, machine);
    let cpus = options.cpus.unwrap_or(machine.cpus).to_string();
    let memory = format!("{}M", machine.memory_mib);
    command
        .args(["-machine", "q35", "-nodefaults", "-no-user-config", "-no-reboot"])
        .args(["-display", "none", "-vga", "none", "-monitor", "none"])
        .args(["-smp", &cpus, "-m", &memory]);
    match (&options.bare, &options.cd) {
        (Some(BareKernel { kernel, ramdisk, cmdline }), _) => {
            command.arg("-kernel").arg(kernel).arg("-initrd").arg(ramdisk);
            command.args(["-append", cmdline])
        }
        // Disks come first otherwise, and none of them need be one to boot from.
        (None, Some(cd)) => command.args(["-boot", "order=d"]).arg("-cdrom").arg(cd),
        (None, None) => command.arg("-kernel").arg(files.core).arg("-initrd").arg(files.bundle),
    };
    command
        .args(["-chardev", "stdio,id=com1,signal=off", "-serial", "chardev:com1"])
        .arg("-chardev")
        .arg(format!("socket,id=com2,path={}", files.com2.display()))
        .args(["-serial", "chardev:com2"]);
    let forwards = network(&mut command, machine, options.ports)?;
    storage(&mut command, machine, files.disks, &options.disks);
    command.args(&options.extra);
    Ok(Plan { command, forwards })
}

/// A command for QEMU that the system ends when we die without a chance to do it.
fn killed_with_us() -> Command {
    if crate::project::has_program("setpriv") {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", QEMU]);
        command
    } else {
        Command::new(QEMU)
    }
}

fn accelerate(command: &mut Command, accel: Accel, machine: &Machine) {
    let (accelerator, cpu) = match accel {
        Accel::Kvm => ("kvm", "host"),
        Accel::Icount | Accel::IcountIdle => ("tcg,thread=single", EMULATED_CPU),
        Accel::Tcg | Accel::Auto => ("tcg,thread=multi", EMULATED_CPU),
    };
    let cpu = machine.cpu_model.as_deref().unwrap_or(cpu);
    command.args(["-accel", accelerator, "-cpu", cpu]);
    match accel {
        Accel::Icount => _ = command.args(["-icount", "shift=0,sleep=off"]),
        Accel::IcountIdle => _ = command.args(["-icount", "shift=0,sleep=on"]),
        Accel::Kvm | Accel::Tcg | Accel::Auto => {}
    }
}

fn network(command: &mut Command, machine: &Machine, ports: Ports) -> miette::Result<Vec<Forward>> {
    let mut forwards = Vec::new();
    for (index, nic) in machine.nics.iter().enumerate() {
        let mut net = match &nic.net {
            NicNet::User { host_forward } => {
                let mut net = String::from("user");
                for forward in host_forward {
                    let (text, resolved) = forwarding(forward, index, ports)?;
                    net += &format!(",hostfwd={text}");
                    forwards.push(resolved);
                }
                net
            }
            NicNet::Socket { listen: Some(address), .. } => format!("socket,listen={address}"),
            NicNet::Socket { connect: Some(address), .. } => format!("socket,connect={address}"),
            NicNet::Socket { listen: None, connect: None } => "socket".into(),
        };
        net += &format!(",id=net{index}");
        let mut device = format!("{},netdev=net{index}{}", device(&nic.model), address(nic.bdf));
        if let Some(mac) = nic.mac {
            device += ",mac=";
            device += &mac.map(|byte| format!("{byte:02x}")).join(":");
        }
        command.args(["-netdev", &net, "-device", &device]);
    }
    Ok(forwards)
}

/// QEMU's words for a model: virtio devices as version 1.0 has them, without the older interface.
fn device(model: &str) -> String {
    let legacy = if model.starts_with("virtio-") { ",disable-legacy=on" } else { "" };
    format!("{model}{legacy}")
}

/// QEMU's words for a place on the first bus.
fn address(bdf: u32) -> String {
    format!(",addr={:#x}.{}", bdf >> 3 & 31, bdf & 7)
}

/// Adds the disks: a controller where the first disk of its address is, and the disks on it.
fn storage(command: &mut Command, machine: &Machine, files: &[PathBuf], place: &Place) {
    let mut controllers: Vec<(u32, usize)> = Vec::new();
    for (index, (disk, file)) in machine.disks.iter().zip(files).enumerate() {
        command.arg("-drive").arg(drive(index, disk, file, place));
        let known = controllers.iter().position(|(bdf, _)| *bdf == disk.bdf);
        let controller = known.unwrap_or(controllers.len());
        if known.is_none() {
            controllers.push((disk.bdf, 0));
            if let Some(device) = controller_of(controller, disk) {
                command.args(["-device", &device]);
            }
        }
        let number = controllers[controller].1;
        controllers[controller].1 += 1;
        command.args(["-device", &disk_device(index, controller, number, disk)]);
    }
}

/// The host's side of a disk.
fn drive(index: usize, disk: &MachineDisk, file: &Path, place: &Place) -> OsString {
    // Nobody wants to find a fresh one again after the host's own crash.
    let cache = if *place == Place::AsWritten { "writeback" } else { "unsafe" };
    let format = match disk.format {
        FileFormat::Raw => "raw",
        FileFormat::Qcow2 => "qcow2",
    };
    let mut drive = OsString::from(format!(
        "if=none,id=drive{index},format={format},cache={cache},discard=unmap,file="
    ));
    // QEMU takes two commas for one that is part of a value.
    drive.push(file.to_string_lossy().replace(',', ",,"));
    match (disk.readonly, disk.model.as_str()) {
        (false, _) => {}
        // It has no disks that refuse writes: they are taken, and lost in the end.
        (true, "ahci") => drive.push(",snapshot=on"),
        (true, _) => drive.push(",readonly=on"),
    }
    drive
}

/// A controller, unless a disk is its own.
fn controller_of(controller: usize, disk: &MachineDisk) -> Option<String> {
    let place = address(disk.bdf);
    match disk.model.as_str() {
        "nvme" => Some(format!("nvme,id=disks{controller},serial={}{place}", disk.serial)),
        "ahci" => Some(format!("ahci,id=disks{controller}{place}")),
        _ => None,
    }
}

/// A disk, `number` of its controller from 0.
fn disk_device(index: usize, controller: usize, number: usize, disk: &MachineDisk) -> String {
    let sector = disk.sector_size;
    let blocks = format!("logical_block_size={sector},physical_block_size={sector}");
    let serial = &disk.serial;
    match disk.model.as_str() {
        "nvme" => {
            let namespace = number + 1;
            format!("nvme-ns,bus=disks{controller},drive=drive{index},nsid={namespace},{blocks}")
        }
        "ahci" => {
            format!("ide-hd,bus=disks{controller}.{number},drive=drive{index},serial={serial}")
        }
        model => {
            let (model, place) = (device(model), address(disk.bdf));
            format!("{model},drive=drive{index},serial={serial},{blocks}{place}")
        }
    }
}

/// QEMU's words for a forwarding, once its host port is known to be free.
fn forwarding(
    forward: &system::HostForward,
    nic: usize,
    ports: Ports,
) -> miette::Result<(String, Forward)> {
    let mut forward = *forward;
    if ports == Ports::Free {
        forward.host.set_port(0);
    }
    let tcp = matches!(forward.protocol, Protocol::Tcp);
    forward.host = probe_port(forward.host, tcp).map_err(|error| {
        let why = match error.kind() {
            ErrorKind::AddrInUse => "is taken by another program".into(),
            _ => format!("cannot be used: {error}"),
        };
        miette!(
            help = "stop that program, give `--any-port`, or change the port in the system file",
            "port {} of {} {why}",
            forward.host.port(),
            forward.host.ip()
        )
    })?;
    let system::HostForward { host, guest, guest_port, .. } = forward;
    let resolved = Forward { host, guest, guest_port, tcp, nic };
    Ok((forward.to_string(), resolved))
}

/// Whether the port is free; with port 0, one that is.
fn probe_port(host: SocketAddrV4, tcp: bool) -> std::io::Result<SocketAddrV4> {
    let found = if tcp {
        TcpListener::bind(host)?.local_addr()?
    } else {
        UdpSocket::bind(host)?.local_addr()?
    };
    Ok(match found {
        SocketAddr::V4(found) => found,
        SocketAddr::V6(_) => host,
    })
}

/// What `accel` means on this machine. `AXOLOTL_ACCEL` decides for [`Accel::Auto`].
#[must_use]
pub fn resolve(accel: Accel) -> Accel {
    static AUTO: OnceLock<Accel> = OnceLock::new();
    if accel != Accel::Auto {
        return accel;
    }
    *AUTO.get_or_init(|| match std::env::var("AXOLOTL_ACCEL").as_deref() {
        Ok("kvm") => Accel::Kvm,
        Ok("tcg") => Accel::Tcg,
        _ if kvm_works() => Accel::Kvm,
        _ => Accel::Tcg,
    })
}

/// Runs a few instructions under KVM. A `/dev/kvm` that opens proves nothing: nested inside some
/// clouds it makes machines that die at their first instruction.
fn kvm_works() -> bool {
    if !Path::new("/dev/kvm").exists() {
        return false;
    }
    let firmware = std::env::temp_dir().join(format!("axolotl-probe-{}", std::process::id()));
    let works = std::fs::write(&firmware, probe_firmware())
        .into_diagnostic()
        .and_then(|()| run_probe(&firmware))
        .unwrap_or(false);
    let _ = std::fs::remove_file(&firmware);
    works
}

/// Firmware that jumps once and then writes 0x10 to the exit device.
fn probe_firmware() -> Vec<u8> {
    let mut rom = vec![0x90; 0x1_0000];
    // mov al, 0x10; out 0xf4, al; hlt; jmp -3
    rom[0xff00..0xff07].copy_from_slice(&[0xb0, 0x10, 0xe6, 0xf4, 0xf4, 0xeb, 0xfd]);
    // At the reset vector: jmp 0xff00 (relative to the instruction's end at 0xfff3).
    rom[0xfff0..0xfff3].copy_from_slice(&[0xe9, 0x0d, 0xff]);
    rom
}

/// The exit device ends QEMU with twice the value plus one.
const PROBE_PASSED: i32 = 0x10 * 2 + 1;

fn run_probe(firmware: &Path) -> miette::Result<bool> {
    let mut child = killed_with_us()
        .args(["-accel", "kvm", "-machine", "pc", "-cpu", "host", "-m", "16M", "-nodefaults"])
        .args(["-display", "none", "-no-reboot", "-device", "isa-debug-exit,iobase=0xf4,iosize=4"])
        .arg("-bios")
        .arg(firmware)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .into_diagnostic()?;
    let deadline = Instant::now() + Duration::from_secs(5);
    while Instant::now() < deadline {
        if let Some(status) = child.try_wait().into_diagnostic()? {
            return Ok(status.code() == Some(PROBE_PASSED));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    child.kill().into_diagnostic()?;
    child.wait().into_diagnostic()?;
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_taken_port_is_noticed_and_a_free_one_found() {
        let taken = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = taken.local_addr().expect("bound").port();
        let error = probe_port(SocketAddrV4::new(Ipv4Addr::LOCALHOST, port), true);
        assert_eq!(error.expect_err("taken").kind(), ErrorKind::AddrInUse);
        let free = probe_port(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0), true).expect("some");
        assert_ne!(free.port(), 0);
    }

    /// Several guests behind one card have the same port; their addresses tell them apart.
    #[test]
    fn a_forward_keeps_the_guest_that_it_leads_to() {
        let host = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 2321);
        for last in [21, 22] {
            let guest = Some(Ipv4Addr::new(10, 0, 2, last));
            let protocol = Protocol::Tcp;
            let forward = system::HostForward { protocol, host, guest, guest_port: 23 };
            let (text, resolved) = forwarding(&forward, 0, Ports::Free).expect("a free port");
            assert!(text.ends_with(&format!("-10.0.2.{last}:23")), "{text}");
            assert_eq!((resolved.guest, resolved.guest_port), (guest, 23));
        }
    }

    /// Two disks on one controller, a third one that is its own; no file's name is an option.
    #[test]
    fn disks_hang_on_the_controller_at_their_address() {
        let disk = |model: &str, bdf, readonly| MachineDisk {
            model: model.into(),
            bdf,
            file: String::new(),
            format: FileFormat::Raw,
            readonly,
            content: system::DiskContent::Existing,
            serial: "s".into(),
            sector_size: 4096,
        };
        let disks = vec![
            disk("nvme", 0x18, false),
            disk("virtio-blk-pci", 0x20, true),
            disk("nvme", 0x18, true),
        ];
        let machine =
            Machine { memory_mib: 256, cpus: 1, cpu_model: None, nics: Vec::new(), disks };
        let mut command = Command::new("qemu");
        storage(
            &mut command,
            &machine,
            &["a,readonly=on".into(), "b".into(), "c".into()],
            &Place::AsWritten,
        );
        let words: Vec<_> = command.get_args().map(|word| word.to_string_lossy()).collect();
        let drive = "if=none,id=drive";
        let rest = "format=raw,cache=writeback,discard=unmap,file=";
        let blocks = "logical_block_size=4096,physical_block_size=4096";
        let wanted = [
            format!("-drive {drive}0,{rest}a,,readonly=on"),
            "-device nvme,id=disks0,serial=s,addr=0x3.0".to_owned(),
            format!("-device nvme-ns,bus=disks0,drive=drive0,nsid=1,{blocks}"),
            format!("-drive {drive}1,{rest}b,readonly=on"),
            format!(
                "-device virtio-blk-pci,disable-legacy=on,drive=drive1,serial=s,{blocks},addr=0x4.0"
            ),
            format!("-drive {drive}2,{rest}c,readonly=on"),
            format!("-device nvme-ns,bus=disks0,drive=drive2,nsid=2,{blocks}"),
        ];
        assert_eq!(words.join(" "), wanted.join(" "));
    }

    #[test]
    fn the_probe_jumps_from_the_reset_vector_to_its_code() {
        let rom = probe_firmware();
        assert_eq!(rom.len(), 0x1_0000);
        let offset = i16::from_le_bytes([rom[0xfff1], rom[0xfff2]]);
        let target = 0xfff3_u16.wrapping_add_signed(offset);
        assert_eq!(rom[usize::from(target)], 0xb0);
    }
}
