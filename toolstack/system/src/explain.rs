//! What a system file means, in words: who owns what, and who may talk to whom.

use crate::{Compiled, NicNet, bdf_text, mac_text};
use axolotl_abi::system::{Disk, Dma, Domain, FIND_DRIVER, OnEnd, Role};
use std::fmt::Write as _;

/// The text of `axl check FILE`.
#[must_use]
pub fn explain(compiled: &Compiled) -> String {
    let mut text = String::new();
    // Writing into a string cannot fail.
    let _ = write(&mut text, compiled);
    text
}

fn write(text: &mut String, compiled: &Compiled) -> std::fmt::Result {
    let Compiled { machine, system, .. } = compiled;
    writeln!(
        text,
        "system `{}`: {} MiB, {}, {}, {}, {} and the control domain\n",
        system.name,
        machine.memory_mib,
        count(machine.cpus as usize, "CPU"),
        count(machine.nics.len(), "network card"),
        count(machine.disks.len(), "disk"),
        count(system.domains.len(), "domain")
    )?;
    writeln!(text, "who owns what")?;
    let mib = compiled.control_pages / 256;
    writeln!(
        text,
        "  control (control-domain): {mib} MiB; may build domains, give devices, read consoles"
    )?;
    for domain in &system.domains {
        owns(text, compiled, domain)?;
    }
    writeln!(text, "\nwho may talk to whom")?;
    writeln!(text, "  every domain ↔ store, by its xenstore ring; nobody else by default")?;
    for domain in &system.domains {
        for vif in &domain.vifs {
            let mac = mac_text(vif.mac);
            writeln!(text, "  {} ↔ {}, by a network interface ({mac})", domain.name, vif.backend)?;
        }
        for disk in &domain.disks {
            writeln!(text, "  {} ↔ {}, by {}", domain.name, disk.backend, disk_words(disk))?;
        }
    }
    outside(text, compiled)?;
    for warning in &compiled.warnings {
        writeln!(text, "\nwarning: {warning}")?;
    }
    Ok(())
}

/// `disk xvda (gpt:root, copy-on-write over gpt:base, read-only)`.
fn disk_words(disk: &Disk) -> String {
    let mut words = format!("disk {} ({}", disk.dev, disk.volume);
    if disk.cow {
        words += ", copy-on-write";
    }
    if let Some(backing) = &disk.backing {
        words += &format!(" over {backing}");
    }
    words + if disk.writable { ")" } else { ", read-only)" }
}

fn count(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

fn owns(text: &mut String, compiled: &Compiled, domain: &Domain) -> std::fmt::Result {
    let image = match domain.image {
        FIND_DRIVER => "the driver that its device needs",
        image => compiled.images.get(image as usize).map_or("?", String::as_str),
    };
    let role = match domain.role {
        Role::Control => "control",
        Role::Store => "store",
        Role::Driver => "driver",
        Role::Guest => "guest",
    };
    let end = match domain.on_crash {
        OnEnd::Restart => "restarts",
        OnEnd::Preserve => "stays dead",
        OnEnd::Destroy => "is destroyed",
    };
    let mib = domain.memory_pages / 256;
    write!(text, "  {} ({role}, {image}): {mib} MiB", domain.name)?;
    if domain.preserved_pages > 0 {
        write!(text, ", {} preserved pages", domain.preserved_pages)?;
    }
    for device in &domain.devices {
        let dma = match device.dma {
            Dma::Iommu => "behind the IOMMU",
            Dma::Trusted => "trusted with all memory",
        };
        write!(text, ", device {} ({dma})", bdf_text(device.bdf))?;
    }
    writeln!(text, "; after a crash it {end}")
}

fn outside(text: &mut String, compiled: &Compiled) -> std::fmt::Result {
    for nic in &compiled.machine.nics {
        let mut domains = compiled.system.domains.iter();
        let owner = domains.find(|d| d.devices.iter().any(|device| device.bdf == nic.bdf));
        let Some(owner) = owner else { continue };
        match &nic.net {
            NicNet::User { host_forward } if host_forward.is_empty() => {
                writeln!(text, "  {} → outside, by QEMU's user network", owner.name)?;
            }
            NicNet::User { host_forward } => {
                for forward in host_forward {
                    let port = forward.guest_port;
                    writeln!(
                        text,
                        "  host {} → {}, port {port} behind it",
                        forward.host, owner.name
                    )?;
                }
            }
            NicNet::Socket { .. } => writeln!(text, "  {} ↔ a socket of the host", owner.name)?,
        }
    }
    for disk in &compiled.machine.disks {
        let mut domains = compiled.system.domains.iter();
        let owner = domains.find(|d| d.devices.iter().any(|device| device.bdf == disk.bdf));
        let Some(owner) = owner else { continue };
        let how = if disk.readonly { " (read-only)" } else { "" };
        writeln!(text, "  {} ↔ the host's file {}{how}", owner.name, disk.file)?;
    }
    Ok(())
}
