//! What is counted.

use crate::registers as reg;
use domain_api::Registers;

/// What the driver counts.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counters {
    /// Frames passed up.
    pub received: u64,
    /// Frames queued for sending.
    pub queued: u64,
    /// Frames dropped because the device reported an error in them.
    pub bad_frames: u64,
    /// Frames dropped because of an impossible length.
    pub bad_lengths: u64,
    /// Frames dropped because they filled more than one buffer.
    pub bad_pieces: u64,
    /// Frames to send that were too short or too long.
    pub refused: u64,
    /// Buffers that came back without having been lent.
    pub bad_buffers: u64,
    /// Times that the device reported an overrun of its receive buffer.
    pub overruns: u64,
    /// Changes of the link's state.
    pub link_changes: u64,
}

/// What the driver and the device count.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Statistics {
    /// The driver's own.
    pub counters: Counters,
    /// Good frames received.
    pub rx_frames: u64,
    /// Bytes of them, with frame check sequences.
    pub rx_bytes: u64,
    /// Good frames sent.
    pub tx_frames: u64,
    /// Bytes of them, with frame check sequences.
    pub tx_bytes: u64,
    /// Frames lost in the device for want of room or descriptors.
    pub rx_missed: u64,
    /// Frames with a bad check sequence, symbol errors or too many bytes.
    pub rx_errors: u64,
}

impl Statistics {
    /// Adds what the device counted since the last call. Its counters are cleared by reading and
    /// stop at their maximum, so this is called more often than 2^32 frames can arrive.
    pub(crate) fn collect(&mut self, registers: &impl Registers) {
        let read = |offset| u64::from(registers.read(offset));
        // The low half first: reading the high half clears both.
        let wide = |low, high| read(low) | read(high) << 32;
        self.rx_frames += read(reg::GPRC);
        self.tx_frames += read(reg::GPTC);
        self.rx_bytes = self.rx_bytes.wrapping_add(wide(reg::GORCL, reg::GORCH));
        self.tx_bytes = self.tx_bytes.wrapping_add(wide(reg::GOTCL, reg::GOTCH));
        self.rx_missed += read(reg::MPC) + read(reg::RNBC);
        self.rx_errors += read(reg::CRCERRS) + read(reg::RXERRC) + read(reg::ROC);
    }
}
