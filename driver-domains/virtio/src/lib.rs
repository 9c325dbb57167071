//! What drivers of virtio devices share: bringing a device up, and its queues.
//!
//! The transport, that is, everything behind the device's registers, is that of the `virtio-drivers`
//! crate. Its queues and drivers are not used, for three reasons. They take Rust slices of the
//! memory that is lent to the device, and granted pages are memory that others write at any time,
//! into which no Rust reference may exist. They allocate for each request. And they
//! suppress notifications by a comparison that does not wrap, so that a device can be left
//! waiting. [`Queue`] works on pages with bus addresses, in safe code, and publishes in batches.
//!
//! Source: Virtual I/O Device (VIRTIO) 1.1; sections are its.

#![cfg_attr(not(any(test, feature = "model")), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

#[cfg(any(test, feature = "model"))]
pub mod model;
mod queue;

#[cfg(test)]
mod tests;

use core::fmt;
use domain_api::{Clock, Errno};

pub use queue::{Part, Queue};
pub use virtio_drivers::Error as ConfigError;
pub use virtio_drivers::transport::{DeviceStatus, DeviceType, Transport};

/// §6: the device follows version 1.0 or later.
pub const VERSION_1: u64 = 1 << 32;
/// §6: the device reaches memory as other devices do, through an IOMMU if there is one.
pub const ACCESS_PLATFORM: u64 = 1 << 33;
/// §6: each side says at which index it wants to be told.
pub const EVENT_IDX: u64 = 1 << 29;

/// How long a reset may take. The specification has no bound; devices in the field take far
/// less.
const RESET_NS: u64 = 1_000_000_000;

/// Why a device could not be started.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StartError {
    /// It is of another type.
    Type(DeviceType),
    /// The reset did not end.
    ResetStuck,
    /// It has the interface before version 1.0 only.
    Legacy,
    /// It does not accept a set of features that it offered.
    Features(u64),
    /// It has no such queue, or it is too small.
    Queue(u16),
    /// Its interrupt cannot be routed.
    Interrupt,
    /// Its configuration is too short, or says what cannot be.
    Config(&'static str),
    /// No memory for queues and buffers.
    Memory(Errno),
    /// Bus mastering could not be turned on.
    BusMaster(Errno),
}

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Type(kind) => write!(f, "the device is a {kind:?} device"),
            Self::ResetStuck => f.write_str("the device's reset did not end"),
            Self::Legacy => f.write_str("the device does not know version 1.0 of virtio"),
            Self::Features(bits) => write!(f, "the device refuses its own features {bits:#x}"),
            Self::Queue(queue) => write!(f, "queue {queue} of the device is missing or too small"),
            Self::Interrupt => f.write_str("the device's interrupt cannot be routed"),
            Self::Config(what) => write!(f, "the device's configuration is wrong: {what}"),
            Self::Memory(errno) => write!(f, "no memory for queues and buffers: {errno:?}"),
            Self::BusMaster(errno) => write!(f, "bus mastering cannot be turned on: {errno:?}"),
        }
    }
}

impl core::error::Error for StartError {}

/// The device does not work any more. The remedy is a restart of the driver.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Hang {
    /// It asks to be reset.
    NeedsReset,
    /// It returned a buffer that it did not have.
    Broken,
    /// It has not answered for so many seconds.
    Stuck(u64),
}

impl fmt::Display for Hang {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NeedsReset => f.write_str("the device asks to be reset"),
            Self::Broken => f.write_str("the device returned a buffer that it did not have"),
            Self::Stuck(seconds) => write!(f, "the device has not answered for {seconds} s"),
        }
    }
}

impl core::error::Error for Hang {}

/// What has a message of its own.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cause {
    /// A queue.
    Queue(u16),
    /// The device's configuration.
    Config,
}

/// Resets a device of type `kind`: it uses no memory and sends no messages afterwards (§2.1.1,
/// §4.1.4.3.1). To be called with bus mastering off.
///
/// # Errors
/// It is another device, or does not end its reset.
pub fn reset<T: Transport>(
    transport: &mut T,
    kind: DeviceType,
    clock: &impl Clock,
) -> Result<(), StartError> {
    if transport.device_type() != kind {
        return Err(StartError::Type(transport.device_type()));
    }
    transport.set_status(DeviceStatus::empty());
    let begin = clock.now_ns();
    while transport.get_status() != DeviceStatus::empty() {
        if clock.now_ns().saturating_sub(begin) > RESET_NS {
            return Err(StartError::ResetStuck);
        }
        core::hint::spin_loop();
    }
    Ok(())
}

/// Agrees with a device that was reset on what is offered of `wanted`, and returns it (§3.1.1,
/// steps 2 to 6).
///
/// # Errors
/// The device is too old, or refuses.
pub fn negotiate<T: Transport>(transport: &mut T, wanted: u64) -> Result<u64, StartError> {
    negotiate_by(transport, |_| wanted)
}

/// The same for features some of which are worthless without others: `choose` is told what the
/// device offers, and returns what is wanted.
///
/// # Errors
/// As above.
pub fn negotiate_by<T: Transport>(
    transport: &mut T,
    choose: impl FnOnce(u64) -> u64,
) -> Result<u64, StartError> {
    let mut status = DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER;
    transport.set_status(DeviceStatus::ACKNOWLEDGE);
    transport.set_status(status);
    let offered = transport.read_device_features();
    if offered & VERSION_1 == 0 {
        return Err(StartError::Legacy);
    }
    // Bus addresses are what a device behind an IOMMU wants, and what any other wants too.
    let features = offered & (choose(offered) | VERSION_1 | ACCESS_PLATFORM);
    transport.write_driver_features(features);
    status |= DeviceStatus::FEATURES_OK;
    transport.set_status(status);
    if transport.get_status().contains(DeviceStatus::FEATURES_OK) {
        Ok(features)
    } else {
        Err(StartError::Features(features))
    }
}

/// Whether the device, which was started, asks to be reset (§2.1.1).
pub fn needs_reset(transport: &impl Transport) -> bool {
    let status = transport.get_status();
    status.contains(DeviceStatus::DEVICE_NEEDS_RESET) || !status.contains(DeviceStatus::DRIVER_OK)
}
