//! A reliable stream of messages over frames that may be lost, doubled or late, but never
//! changed: what TCP is to the real guests. Whoever takes a frame knows what must be in it.

use crate::random::scramble;

/// Length of the head: addresses, type, kind, number, number of the first missing message.
const HEAD: usize = 14 + 1 + 4 + 4;
/// Messages under way.
const WINDOW: u32 = 6;
/// When a message is sent again.
const RETRY_NS: u64 = 4_000_000;
/// An ethertype for experiments.
const TYPE: [u8; 2] = [0x88, 0xb5];

/// An Ethernet address.
pub type Mac = [u8; 6];

/// One end.
#[derive(Clone, Debug)]
pub struct Link {
    own: Mac,
    peer: Mac,
    /// Messages to send, in all.
    total: u32,
    /// Messages that the peer has not confirmed start here.
    unconfirmed: u32,
    /// The next one to send.
    next: u32,
    /// Messages that were ever sent.
    sent: u32,
    /// Messages to receive, in all.
    expected: u32,
    /// Messages received in order.
    received: u32,
    /// The peer is to be told.
    confirm: bool,
    retry_ns: u64,
}

/// The frame with a message. Its length and content follow from its ends and its number.
fn frame(from: Mac, to: Mac, number: Option<u32>, confirmed: u32) -> Vec<u8> {
    let mut bytes: Vec<u8> = to.into_iter().chain(from).chain(TYPE).collect();
    bytes.push(u8::from(number.is_some()));
    bytes.extend(number.unwrap_or(0).to_be_bytes());
    bytes.extend(confirmed.to_be_bytes());
    let Some(number) = number else {
        bytes.resize(60, 0);
        return bytes;
    };
    let ends = u64::from(from[5]) << 8 | u64::from(to[5]);
    let mut state = scramble(ends << 32 | u64::from(number));
    let len = match state % 4 {
        0 => 60,
        1 => 1514,
        _ => 60 + usize::try_from(state >> 8).unwrap_or(0) % 1400,
    };
    while bytes.len() < len {
        state = scramble(state);
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

impl Link {
    /// An end that sends so many messages and expects so many.
    #[must_use]
    pub const fn new(own: Mac, peer: Mac, total: u32, expected: u32) -> Self {
        Self {
            own,
            peer,
            total,
            unconfirmed: 0,
            next: 0,
            sent: 0,
            expected,
            received: 0,
            confirm: false,
            retry_ns: 0,
        }
    }

    /// Whether all was sent, confirmed and received.
    #[must_use]
    pub const fn is_done(&self) -> bool {
        self.unconfirmed == self.total && self.received == self.expected
    }

    /// Takes a frame. False: it is not of this link.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn take(&mut self, bytes: &[u8]) -> Result<bool, String> {
        if bytes.len() < HEAD || bytes[..6] != self.own || bytes[6..12] != self.peer {
            return Ok(false);
        }
        let word = |at: usize| u32::from_be_bytes([0, 1, 2, 3].map(|n| bytes[at + n]));
        let number = (bytes[14] == 1).then(|| word(15));
        let confirmed = word(19);
        if bytes != frame(self.peer, self.own, number, confirmed) {
            return Err(format!("a frame from {:x?} was changed: {bytes:x?}", self.peer));
        }
        if number.is_some_and(|number| number >= self.expected) || confirmed > self.sent {
            return Err(format!("a frame from {:x?} was never sent: {number:?}", self.peer));
        }
        if confirmed > self.unconfirmed {
            self.unconfirmed = confirmed;
            self.next = self.next.max(confirmed);
        }
        if let Some(number) = number {
            self.received += u32::from(number == self.received);
            self.confirm = true;
        }
        Ok(true)
    }

    /// The next frame to send now, if there is one.
    pub fn next(&mut self, now_ns: u64) -> Option<Vec<u8>> {
        if self.next > self.unconfirmed && now_ns >= self.retry_ns {
            self.next = self.unconfirmed;
        }
        let may_send = self.next < self.total && self.next < self.unconfirmed + WINDOW;
        if !may_send && !std::mem::take(&mut self.confirm) {
            return None;
        }
        self.confirm = false;
        let number = may_send.then_some(self.next);
        self.next += u32::from(may_send);
        self.sent = self.sent.max(self.next);
        if self.next > self.unconfirmed {
            self.retry_ns = now_ns + RETRY_NS;
        }
        Some(frame(self.own, self.peer, number, self.received))
    }

    /// When a message is to be sent again.
    #[must_use]
    pub const fn deadline_ns(&self) -> Option<u64> {
        if self.unconfirmed < self.total && self.next > self.unconfirmed {
            Some(self.retry_ns)
        } else {
            None
        }
    }
}
