//! Interface, addresses and server on one `smoltcp` device.

use crate::config::{Addressing, Config};
use crate::connection::Facts;
use crate::page::Status;
use crate::repeats::WithoutRepeats;
use crate::server::Server;
use crate::shelf::Shelf;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::cell::RefCell;
use smoltcp::iface::{self, Interface, PollResult, SocketHandle, SocketSet};
use smoltcp::phy::Device;
use smoltcp::socket::dhcpv4;
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, IpCidr, Ipv4Address, Ipv4Cidr};

/// When a device has no room for frames, it is tried again after this time at the latest.
const FULL_DEVICE_NS: u64 = 10_000_000;

/// The network side of the guest.
pub struct Stack {
    interface: Interface,
    sockets: SocketSet<'static>,
    dhcp: Option<SocketHandle>,
    server: Server,
    address: Option<Ipv4Cidr>,
    gateway: Option<Ipv4Address>,
}

fn instant(now_ns: u64) -> Instant {
    Instant::from_micros(i64::try_from(now_ns / 1000).unwrap_or(i64::MAX))
}

impl Stack {
    /// A stack on `device`, with the server listening. `seed` makes sequence numbers and ports
    /// hard to guess; it should differ from start to start.
    pub fn new(
        config: &Config,
        device: &mut impl Device,
        mac: [u8; 6],
        seed: u64,
        now_ns: u64,
    ) -> Self {
        let mut settings = iface::Config::new(EthernetAddress(mac).into());
        settings.random_seed = seed;
        let interface = Interface::new(settings, device, instant(now_ns));
        let mut sockets = SocketSet::new(Vec::new());
        let server = Server::new(&mut sockets, config.port, config.connections);
        let dhcp =
            (config.addressing == Addressing::Dhcp).then(|| sockets.add(dhcpv4::Socket::new()));
        let mut stack = Self { interface, sockets, dhcp, server, address: None, gateway: None };
        if let Addressing::Static { address, gateway } = config.addressing {
            stack.set_address(Some(address), gateway);
        }
        stack
    }

    /// Own address.
    #[must_use]
    pub fn address(&self) -> String {
        text(self.address)
    }

    /// How the address is found.
    #[must_use]
    pub fn addressing(&self) -> &'static str {
        if self.dhcp.is_some() { "dhcp" } else { "static" }
    }

    /// Requests answered.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.server.requests()
    }

    /// Connections open now.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.server.connections(&self.sockets)
    }

    fn set_address(&mut self, address: Option<Ipv4Cidr>, gateway: Option<Ipv4Address>) {
        self.address = address;
        self.gateway = gateway;
        self.interface.update_ip_addrs(|addresses| {
            addresses.clear();
            // There is room for more than one address, and this is the only one.
            let _ = address.map(|address| addresses.push(IpCidr::Ipv4(address)));
        });
        let routes = self.interface.routes_mut();
        routes.remove_default_ipv4_route();
        if let Some(gateway) = gateway {
            let _ = routes.add_default_ipv4_route(gateway);
        }
    }

    fn follow_dhcp(&mut self) {
        let Some(handle) = self.dhcp else { return };
        let (address, gateway) = match self.sockets.get_mut::<dhcpv4::Socket>(handle).poll() {
            None => return,
            Some(dhcpv4::Event::Deconfigured) => (None, None),
            Some(dhcpv4::Event::Configured(lease)) => (Some(lease.address), lease.router),
        };
        self.set_address(address, gateway);
    }

    /// Handles all received frames and sends what can be sent. Returns the time at which it wants
    /// to be called even if nothing arrives.
    pub fn poll(
        &mut self,
        device: &mut impl Device,
        now_ns: u64,
        facts: &impl Facts,
    ) -> Option<u64> {
        let now = instant(now_ns);
        loop {
            let open: Vec<_> = self.server.open(&self.sockets).collect();
            let mut device = WithoutRepeats { device: &mut *device, open: &open };
            let result = self.interface.poll(now, &mut device, &mut self.sockets);
            self.follow_dhcp();
            let facts = WithNetwork {
                facts,
                ip: self.address,
                gateway: self.gateway,
                addressing: self.addressing(),
                requests: self.requests(),
                connections: self.connections(),
            };
            let moved = self.server.serve(&mut self.sockets, now_ns, &facts);
            if result == PollResult::None && !moved {
                break;
            }
        }
        let next = self.interface.poll_at(now, &self.sockets).map(|at| {
            let at_ns = u64::try_from(at.total_micros()).unwrap_or(0).saturating_mul(1000);
            // Still something to do at once, but nothing moves: the device is full.
            if at_ns <= now_ns { now_ns + FULL_DEVICE_NS } else { at_ns }
        });
        [next, self.server.deadline_ns(&self.sockets)].into_iter().flatten().min()
    }
}

/// Somebody's facts, and what the stack knows.
struct WithNetwork<'a, F> {
    facts: &'a F,
    ip: Option<Ipv4Cidr>,
    gateway: Option<Ipv4Address>,
    addressing: &'static str,
    requests: u64,
    connections: usize,
}

impl<F: Facts> Facts for WithNetwork<'_, F> {
    fn status(&self) -> Status {
        Status {
            ip: text(self.ip),
            gateway: text(self.gateway),
            addressing: self.addressing,
            requests: self.requests,
            connections: self.connections as u64,
            ..self.facts.status()
        }
    }

    fn shelf(&self) -> Option<&RefCell<Shelf>> {
        self.facts.shelf()
    }
}

fn text(value: Option<impl ToString>) -> String {
    value.map_or(String::new(), |value| value.to_string())
}

#[cfg(test)]
mod tests;
