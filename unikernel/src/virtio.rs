//! The registers of a virtio device on PCI, for the `virtio-drivers` crate.
//!
//! The crate finds the device's registers by its capabilities and its BARs, and sizes BARs by
//! writing to them. A domain may do no such thing, and has them at other addresses: so the crate
//! sees configuration space through [`Config`], where BARs say where the domain has them, and
//! where their sizing is played. Its queues are not used (see the `virtio` package), so that
//! [`Registers`] has no memory for devices.
//!
//! What the crate has no word for is the routing of a device's causes to MSI-X vectors:
//! [`Vectors`].
//!
//! Source: Virtual I/O Device (VIRTIO) 1.1, §4.1.4.
#![expect(unsafe_code, reason = "the crate's traits promise valid memory")]

use crate::{Device, Mmio};
use core::fmt;
use core::ptr::NonNull;
use virtio_drivers::transport::pci::bus::{ConfigurationAccess, DeviceFunction, PciRoot};
use virtio_drivers::transport::pci::{VIRTIO_PCI_CAP_COMMON_CFG, VirtioPciError};
use virtio_drivers::{BufferDirection, Hal, PhysAddr};

pub use virtio_drivers::transport::pci::PciTransport;

/// Registers of configuration space.
const STATUS: u16 = 0x06;
const STATUS_CAPABILITIES: u32 = 1 << 4;
const BAR0: u8 = 0x10;
const BARS_END: u8 = 0x28;
const CAPABILITIES: u16 = 0x34;
const CAPABILITY_VENDOR: u32 = 0x09;
/// Most capabilities: more do not fit.
const MOST_CAPABILITIES: usize = 48;

/// Of a BAR: it decodes I/O ports; it is 64 bits wide.
const BAR_IO: u32 = 1;
const BAR_WIDE: u32 = 1 << 2;
const BAR_FLAGS: u32 = 0xf;

/// Common configuration (§4.1.4.3): vector of configuration changes, queue, vector of the queue.
const MSIX_CONFIG: u32 = 0x10;
const QUEUE_SELECT: u32 = 0x16;
const QUEUE_MSIX_VECTOR: u32 = 0x1a;
const COMMON_BYTES: u32 = 0x38;

/// Why a device cannot be used.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum OpenError {
    /// The crate says so.
    Transport(VirtioPciError),
    /// A capability describes registers that are not there.
    Capability,
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Transport(error) => write!(f, "no virtio device: {error}"),
            Self::Capability => f.write_str("the device describes registers that are not there"),
        }
    }
}

impl core::error::Error for OpenError {}

/// Opens the registers of a virtio device. To be called once for a device.
///
/// # Errors
/// It is no virtio device with the interface of version 1.0.
pub fn open(device: &Device) -> Result<(PciTransport, Vectors), OpenError> {
    let vectors = find_common(device)?;
    let mut root = PciRoot::new(Config { device: device.clone(), sizing: [false; 6] });
    let here = DeviceFunction { bus: 0, device: 0, function: 0 };
    let transport = PciTransport::new::<Registers, _>(&mut root, here);
    Ok((transport.map_err(OpenError::Transport)?, vectors))
}

/// The routing of a device's causes to its MSI-X vectors.
#[derive(Debug)]
pub struct Vectors {
    registers: Mmio,
    common: u32,
}

impl Vectors {
    /// Gives changes of the configuration a vector. `false`: the device has no room for it.
    #[must_use]
    pub fn route_config(&mut self, vector: u16) -> bool {
        self.registers.write_u16(self.common + MSIX_CONFIG, vector);
        self.registers.read_u16(self.common + MSIX_CONFIG) == vector
    }

    /// Gives a queue a vector. `false`: the device has no room for it.
    #[must_use]
    pub fn route_queue(&mut self, queue: u16, vector: u16) -> bool {
        self.registers.write_u16(self.common + QUEUE_SELECT, queue);
        self.registers.write_u16(self.common + QUEUE_MSIX_VECTOR, vector);
        self.registers.read_u16(self.common + QUEUE_MSIX_VECTOR) == vector
    }
}

/// Finds the common configuration, and checks that all registers that the device describes are
/// inside of BARs.
fn find_common(device: &Device) -> Result<Vectors, OpenError> {
    let read = |offset, width| device.config_read(offset, width).unwrap_or(0);
    let mut common = None;
    let mut at = match read(STATUS, 2) & STATUS_CAPABILITIES {
        0 => 0,
        _ => read(CAPABILITIES, 1) & 0xfc,
    };
    for _ in 0..MOST_CAPABILITIES {
        let Some(offset) = u16::try_from(at).ok().filter(|at| *at >= 0x40) else { break };
        let head = read(offset, 4);
        if head & 0xff == CAPABILITY_VENDOR {
            let found = check_capability(device, offset)?;
            if head >> 24 == u32::from(VIRTIO_PCI_CAP_COMMON_CFG) && common.is_none() {
                common = found;
            }
        }
        at = head >> 8 & 0xfc;
    }
    let missing = OpenError::Transport(VirtioPciError::MissingCommonConfig);
    common.filter(|vectors| vectors.registers.bytes() >= COMMON_BYTES).ok_or(missing)
}

/// The registers that a capability describes; `None` when they are behind no memory BAR of ours.
fn check_capability(device: &Device, at: u16) -> Result<Option<Vectors>, OpenError> {
    let read = |offset| device.config_read(at + offset, 4).unwrap_or(u32::MAX);
    let (bar, offset, len) = (read(4) & 0xff, read(8), read(12));
    let Some(registers) = usize::try_from(bar).ok().and_then(|bar| device.bar(bar)) else {
        return Ok(None);
    };
    match offset.checked_add(len) {
        Some(end) if end <= registers.bytes() => Ok(Some(Vectors { registers, common: offset })),
        _ => Err(OpenError::Capability),
    }
}

/// Configuration space as the crate is to see it.
struct Config {
    device: Device,
    /// BARs whose size is being asked for.
    sizing: [bool; 6],
}

impl Config {
    fn real(&self, offset: u8) -> u32 {
        self.device.config_read(u16::from(offset) & 0xfc, 4).unwrap_or(u32::MAX)
    }

    fn bar(&self, index: usize) -> u32 {
        let flags = self.real(bar_offset(index));
        if let Some(below) = index.checked_sub(1) {
            let lower = self.real(bar_offset(below));
            if lower & (BAR_IO | BAR_WIDE) == BAR_WIDE {
                return upper(self.place(below, self.sizing[index]));
            }
        }
        if flags & BAR_IO != 0 {
            return BAR_IO;
        }
        let place = self.place(index, self.sizing[index]);
        if flags & BAR_WIDE == 0 && !self.sizing[index] && upper(place) != 0 {
            return 0; // Ours is too far up for what it is: as good as none.
        }
        (lower(place) & !BAR_FLAGS) | flags & BAR_FLAGS
    }

    /// Where we have a BAR, or its size as a mask.
    fn place(&self, index: usize, sizing: bool) -> u64 {
        let bar = self.device.info().bars[index];
        if bar.gpa == 0 || !bar.bytes.is_power_of_two() {
            return 0;
        }
        if sizing { !(bar.bytes - 1) } else { bar.gpa }
    }
}

fn bar_offset(index: usize) -> u8 {
    u8::try_from(index).map_or(BAR0, |index| BAR0 + 4 * index)
}

fn bar_index(offset: u8) -> Option<usize> {
    (BAR0..BARS_END).contains(&offset).then(|| usize::from((offset - BAR0) / 4))
}

#[expect(clippy::cast_possible_truncation, reason = "the low half is what is asked for")]
const fn lower(value: u64) -> u32 {
    value as u32
}

const fn upper(value: u64) -> u32 {
    lower(value >> 32)
}

impl ConfigurationAccess for Config {
    fn read_word(&self, _: DeviceFunction, offset: u8) -> u32 {
        match bar_index(offset) {
            Some(index) => self.bar(index),
            None => self.real(offset),
        }
    }

    fn write_word(&mut self, _: DeviceFunction, offset: u8, data: u32) {
        // Nothing is written: of the command register the crate only clears what it sets again.
        if let Some(index) = bar_index(offset) {
            self.sizing[index] = data == u32::MAX;
        }
    }

    unsafe fn unsafe_clone(&self) -> Self {
        Self { device: self.device.clone(), sizing: self.sizing }
    }
}

/// Registers of devices, where the domain has them.
struct Registers;

// SAFETY: `dma_alloc` returns no memory, which is what address 0 means. `mmio_phys_to_virt`
// returns memory that stays mapped for the domain's life, and no Rust reference is made to it.
unsafe impl Hal for Registers {
    fn dma_alloc(_: usize, _: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        (0, NonNull::dangling())
    }

    unsafe fn dma_dealloc(_: PhysAddr, _: NonNull<u8>, _: usize) -> i32 {
        -1
    }

    unsafe fn mmio_phys_to_virt(place: PhysAddr, _: usize) -> NonNull<u8> {
        // A place inside of a BAR, as `Config` told it and `find_common` checked it.
        NonNull::new(place as *mut u8).expect("no BAR is at address 0")
    }

    unsafe fn share(_: NonNull<[u8]>, _: BufferDirection) -> PhysAddr {
        unreachable!("without memory for devices there is no queue that could share some")
    }

    unsafe fn unshare(_: PhysAddr, _: NonNull<[u8]>, _: BufferDirection) {
        unreachable!("nothing was shared")
    }
}
