//! A network frontend as a device of smoltcp's.

use super::{Checksum, Env, MAX_FRAME, Netfront};
use smoltcp::phy::{self, DeviceCapabilities, Medium};
use smoltcp::time::Instant;

/// A frontend and the domain that it is in, for one call of smoltcp's `Interface::poll`. Call
/// [`Netfront::flush`] after it.
pub struct Phy<'a, E> {
    /// The frontend.
    pub front: &'a mut Netfront,
    /// The domain.
    pub env: &'a mut E,
}

/// A received frame.
pub struct RxFrame<'a>(&'a [u8]);

/// Room for a frame to send.
pub struct TxSlot<'a, E> {
    channel: Option<&'a mut super::Channel>,
    stats: &'a mut super::Stats,
    fault: &'a mut Option<super::Fault>,
    env: &'a mut E,
}

impl<E: Env> phy::Device for Phy<'_, E> {
    type RxToken<'a>
        = RxFrame<'a>
    where
        Self: 'a;
    type TxToken<'a>
        = TxSlot<'a, E>
    where
        Self: 'a;

    fn receive(&mut self, _: Instant) -> Option<(RxFrame<'_>, TxSlot<'_, E>)> {
        // A frame that is taken may have to be answered at once.
        if !self.front.can_transmit(self.env) {
            return None;
        }
        self.front.received_len = self.front.receive_frame(self.env).ok()??.len;
        let Netfront { received, received_len, channels, stats, fault, .. } = &mut *self.front;
        let slot = TxSlot { channel: channels.first_mut(), stats, fault, env: self.env };
        Some((RxFrame(&received[..*received_len]), slot))
    }

    fn transmit(&mut self, _: Instant) -> Option<TxSlot<'_, E>> {
        if !self.front.can_transmit(self.env) {
            return None;
        }
        let Netfront { channels, stats, fault, .. } = &mut *self.front;
        Some(TxSlot { channel: channels.first_mut(), stats, fault, env: self.env })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1514;
        capabilities
    }
}

impl phy::RxToken for RxFrame<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, work: F) -> R {
        work(self.0)
    }
}

impl<E: Env> phy::TxToken for TxSlot<'_, E> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, work: F) -> R {
        let mut frame = [0; MAX_FRAME];
        // smoltcp keeps to the unit in `capabilities`.
        let frame = &mut frame[..len.min(MAX_FRAME)];
        let result = work(frame);
        if let Some(channel) = self.channel
            && let Err(super::Error::Broken(found)) =
                channel.transmit(self.env, frame, Checksum::Complete, None, self.stats)
        {
            self.fault.get_or_insert(found);
        }
        result
    }
}
