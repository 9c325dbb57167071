//! The machine that the host emulates.

use std::fmt;
use std::net::{Ipv4Addr, SocketAddrV4};

/// What QEMU is asked for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Machine {
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Processors.
    pub cpus: u32,
    /// QEMU's name of the processor model; `None` leaves the choice to the one who starts it.
    pub cpu_model: Option<String>,
    /// Network cards.
    pub nics: Vec<MachineNic>,
}

/// An emulated network card.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MachineNic {
    /// QEMU's name of the device.
    pub model: String,
    /// PCI address, as in [`axolotl_abi::control::PciFunction`].
    pub bdf: u32,
    /// Its own Ethernet address; `None`: QEMU's choice.
    pub mac: Option<[u8; 6]>,
    /// What it is plugged into.
    pub net: NicNet,
}

/// What an emulated network card is plugged into.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NicNet {
    /// QEMU's user-mode network.
    User {
        /// Ports of the host that lead to a guest.
        host_forward: Vec<HostForward>,
    },
    /// A socket that carries the frames, for instance to another QEMU.
    Socket {
        /// Waits for a peer at this `HOST:PORT`.
        listen: Option<String>,
        /// Connects to this `HOST:PORT`.
        connect: Option<String>,
    },
}

/// A port of the host that leads to a guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HostForward {
    /// TCP or UDP.
    pub protocol: Protocol,
    /// Where the host listens.
    pub host: SocketAddrV4,
    /// The guest's address; `None`: the first one that the user network gives out.
    pub guest: Option<Ipv4Addr>,
    /// The guest's port.
    pub guest_port: u16,
}

/// What a port forward carries.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// QEMU's `hostfwd=` form.
impl fmt::Display for HostForward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let guest = self.guest.map_or(String::new(), |address| address.to_string());
        write!(f, "{}:{}-{guest}:{}", self.protocol, self.host, self.guest_port)
    }
}

impl HostForward {
    /// Parses `[tcp:|udp:]HOST:PORT-[GUEST]:PORT`.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (protocol, rest) = match text.split_once(':') {
            Some(("tcp", rest)) => (Protocol::Tcp, rest),
            Some(("udp", rest)) => (Protocol::Udp, rest),
            _ => (Protocol::Tcp, text),
        };
        let (host, guest) = rest.split_once('-')?;
        let (address, port) = guest.rsplit_once(':')?;
        let guest = if address.is_empty() { None } else { Some(address.parse().ok()?) };
        let host: SocketAddrV4 = host.parse().ok()?;
        let guest_port: u16 = port.parse().ok()?;
        (host.port() != 0 && guest_port != 0).then_some(Self { protocol, host, guest, guest_port })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forwards_are_printed_as_qemu_wants_them() {
        for (text, shown) in [
            ("127.0.0.1:8080-:80", Some("tcp:127.0.0.1:8080-:80")),
            ("udp:0.0.0.0:53-10.0.2.15:53", Some("udp:0.0.0.0:53-10.0.2.15:53")),
            ("127.0.0.1:8080", None),
            ("127.0.0.1:8080-80", None),
            ("127.0.0.1:0-:80", None),
            ("sctp:127.0.0.1:1-:1", None),
        ] {
            let parsed = HostForward::parse(text).map(|forward| forward.to_string());
            assert_eq!(parsed.as_deref(), shown, "{text}");
        }
    }
}
