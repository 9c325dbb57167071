//! QEMU's command line for a system.

use crate::setup::QEMU;
use miette::{IntoDiagnostic, miette};
use std::io::ErrorKind;
use std::net::{SocketAddr, SocketAddrV4, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};
use system::{Machine, NicNet, Protocol};

/// The processor model under emulation. Without XSAVE and what needs it: QEMU 7.2's emulation of it is suspect (corrupt
/// data was measured with it, none without), and neither core nor unikernels use it.
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
    /// A CD to boot from by the firmware, instead of core and bundle from QEMU.
    pub cd: Option<PathBuf>,
    /// Added at the end of the command line.
    pub extra: Vec<String>,
}

/// A guest's port that the host can reach.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Forward {
    /// At the host.
    pub host: SocketAddrV4,
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

/// Makes the command line. `com2` is a socket at which somebody listens.
///
/// # Errors
/// A host port is taken.
pub fn plan(
    machine: &Machine,
    options: &Options,
    core: &Path,
    bundle: &Path,
    com2: &Path,
) -> miette::Result<Plan> {
    let mut command = killed_with_us();
    let accel = resolve(options.accel);
    accelerate(&mut command, accel, machine);
    let cpus = options.cpus.unwrap_or(machine.cpus).to_string();
    let memory = format!("{}M", machine.memory_mib);
    command
        .args(["-machine", "q35", "-nodefaults", "-no-user-config", "-no-reboot"])
        .args(["-display", "none", "-vga", "none", "-monitor", "none"])
        .args(["-smp", &cpus, "-m", &memory]);
    match &options.cd {
        Some(cd) => command.arg("-cdrom").arg(cd),
        None => command.arg("-kernel").arg(core).arg("-initrd").arg(bundle),
    };
    command
        .args(["-chardev", "stdio,id=com1,signal=off", "-serial", "chardev:com1"])
        .arg("-chardev")
        .arg(format!("socket,id=com2,path={}", com2.display()))
        .args(["-serial", "chardev:com2"]);
    let forwards = network(&mut command, machine, options.ports)?;
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
        let (slot, function) = (nic.bdf >> 3 & 31, nic.bdf & 7);
        let mut device = format!("{},netdev=net{index},addr={slot:#x}.{function}", nic.model);
        if let Some(mac) = nic.mac {
            device += ",mac=";
            device += &mac.map(|byte| format!("{byte:02x}")).join(":");
        }
        command.args(["-netdev", &net, "-device", &device]);
    }
    Ok(forwards)
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
    let resolved = Forward { host: forward.host, guest_port: forward.guest_port, tcp, nic };
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
    use std::net::Ipv4Addr;

    #[test]
    fn a_taken_port_is_noticed_and_a_free_one_found() {
        let taken = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = taken.local_addr().expect("bound").port();
        let error = probe_port(SocketAddrV4::new(Ipv4Addr::LOCALHOST, port), true);
        assert_eq!(error.expect_err("taken").kind(), ErrorKind::AddrInUse);
        let free = probe_port(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0), true).expect("some");
        assert_ne!(free.port(), 0);
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
