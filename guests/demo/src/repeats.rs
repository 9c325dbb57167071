//! A device that keeps repeated connection requests from the stack.
//!
//! `smoltcp` gives a SYN to the first socket that would take it. When the answer to a SYN was lost,
//! as it may be while a driver restarts, the client sends the SYN again; a socket that has begun
//! to listen meanwhile, and stands before the one that is waiting for the client's
//! acknowledgement, would open a second connection between the same two ends, and the two would
//! reset each other. A connection that waits sends its own answer again, so the repeated SYN can
//! be left out (RFC 9293, section 3.8.1: the answer is what is repeated).

use smoltcp::phy::{Device, DeviceCapabilities, RxToken};
use smoltcp::time::Instant;
use smoltcp::wire::{
    EthernetFrame, EthernetProtocol, IpEndpoint, IpProtocol, Ipv4Packet, TcpPacket,
};

/// `device` without the SYNs of those who have a connection already.
pub struct WithoutRepeats<'a, D> {
    /// Where frames come from and go to.
    pub device: &'a mut D,
    /// The far ends of all connections.
    pub open: &'a [IpEndpoint],
}

/// A received frame.
pub struct Received<'a, T> {
    frame: T,
    open: &'a [IpEndpoint],
}

impl<D: Device> Device for WithoutRepeats<'_, D> {
    type RxToken<'b>
        = Received<'b, D::RxToken<'b>>
    where
        Self: 'b;
    type TxToken<'b>
        = D::TxToken<'b>
    where
        Self: 'b;

    fn receive(&mut self, now: Instant) -> Option<(Self::RxToken<'_>, Self::TxToken<'_>)> {
        let (frame, answer) = self.device.receive(now)?;
        Some((Received { frame, open: self.open }, answer))
    }

    fn transmit(&mut self, now: Instant) -> Option<Self::TxToken<'_>> {
        self.device.transmit(now)
    }

    fn capabilities(&self) -> DeviceCapabilities {
        self.device.capabilities()
    }
}

impl<T: RxToken> RxToken for Received<'_, T> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, work: F) -> R {
        let open = self.open;
        self.frame.consume(|frame| {
            let repeated = asks_for(frame).is_some_and(|client| open.contains(&client));
            // An empty frame is dropped by the stack as malformed.
            work(if repeated { &[] } else { frame })
        })
    }
}

/// Who asks for a connection by this frame, if that is what it is.
fn asks_for(frame: &[u8]) -> Option<IpEndpoint> {
    let frame = EthernetFrame::new_checked(frame).ok()?;
    if frame.ethertype() != EthernetProtocol::Ipv4 {
        return None;
    }
    let packet = Ipv4Packet::new_checked(frame.payload()).ok()?;
    if packet.next_header() != IpProtocol::Tcp || packet.frag_offset() != 0 {
        return None;
    }
    let segment = TcpPacket::new_checked(packet.payload()).ok()?;
    let asks = segment.syn() && !segment.ack() && !segment.rst();
    asks.then(|| IpEndpoint::new(packet.src_addr().into(), segment.src_port()))
}
