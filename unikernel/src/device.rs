//! Devices of the domain: registers, interrupts, configuration space, memory for DMA.
#![expect(unsafe_code, reason = "memory-mapped registers")]

use crate::hypercall;
use axolotl_abi::DEVICE_OP;
use axolotl_abi::device::{
    BIND_INTERRUPT, Bar, BindInterrupt, CONFIG_READ, CONFIG_WRITE, Config, DeviceInfo, GET_DEVICE,
    TRANSLATE, Translate,
};
use domain_api::{Dma, DmaPage, Registers};
use shmem::Page;
use xen_abi::{Errno, EventPort};

/// A PCI function that the domain owns.
#[derive(Clone, Debug)]
pub struct Device {
    info: DeviceInfo,
}

impl Device {
    pub(crate) fn open(index: u32) -> Result<Self, Errno> {
        let mut info = DeviceInfo {
            index,
            bdf: 0,
            vendor: 0,
            device: 0,
            class: 0,
            msix_vectors: 0,
            msi_vectors: 0,
            dma_translated: 0,
            bars: [Bar { gpa: 0, bytes: 0 }; 6],
        };
        // SAFETY: 1. the structure is that of the operation. 2. It names no memory.
        unsafe { hypercall::typed(DEVICE_OP, GET_DEVICE, &mut info)? };
        Ok(Self { info })
    }

    /// What the core says about it.
    #[must_use]
    pub fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// The registers behind a BAR; `None` when it has none there.
    #[must_use]
    pub fn bar(&self, number: usize) -> Option<Mmio> {
        let bar = self.info.bars.get(number)?;
        let bytes = u32::try_from(bar.bytes).ok()?;
        (bar.gpa != 0 && bytes >= 4).then_some(Mmio { base: bar.gpa as *mut u32, bytes })
    }

    /// Routes one of its MSI-X (or MSI) vectors to a new port.
    ///
    /// # Errors
    /// `EINVAL` when it has no such vector, `EBUSY` when that is routed already.
    pub fn bind_interrupt(&self, vector: u32) -> Result<EventPort, Errno> {
        let mut bind = BindInterrupt { index: self.info.index, vector, port: EventPort(0) };
        // SAFETY: 1. the structure is that of the operation. 2. It names no memory.
        unsafe { hypercall::typed(DEVICE_OP, BIND_INTERRUPT, &mut bind)? };
        Ok(bind.port)
    }

    /// Reads `width` (1, 2 or 4) bytes of configuration space.
    ///
    /// # Errors
    /// `EINVAL` for an offset or width that does not fit.
    pub fn config_read(&self, offset: u16, width: u16) -> Result<u32, Errno> {
        let mut config = Config { index: self.info.index, offset, width, value: 0 };
        // SAFETY: 1. the structure is that of the operation. 2. It names no memory.
        unsafe { hypercall::typed(DEVICE_OP, CONFIG_READ, &mut config)? };
        Ok(config.value)
    }

    /// Writes configuration space, as far as the core lets us.
    ///
    /// # Errors
    /// `EPERM` for what could redirect memory or interrupts, `EINVAL` for an offset or width that
    /// does not fit.
    pub fn config_write(&self, offset: u16, width: u16, value: u32) -> Result<(), Errno> {
        let mut config = Config { index: self.info.index, offset, width, value };
        // SAFETY: 1. the structure is that of the operation. 2. It names no memory.
        unsafe { hypercall::typed(DEVICE_OP, CONFIG_WRITE, &mut config) }.map(drop)
    }

    /// Allocates memory that this device can reach.
    #[must_use]
    pub fn dma(&self) -> DeviceDma {
        DeviceDma { index: self.info.index, translated: self.info.dma_translated != 0 }
    }
}

/// Memory for one device.
#[derive(Clone, Debug)]
pub struct DeviceDma {
    index: u32,
    translated: bool,
}

impl DeviceDma {
    /// The address at which the device finds a page.
    ///
    /// # Errors
    /// What the core answered: the page is not memory of ours.
    pub fn bus_address(&self, page: &Page) -> Result<u64, Errno> {
        if !self.translated {
            return Ok(page.gfn().address());
        }
        let mut address = 0_u64;
        let mut translate = Translate {
            index: self.index,
            count: 1,
            gfn: page.gfn().0,
            addresses: core::ptr::from_mut(&mut address) as u64,
        };
        // SAFETY: 1. the structure is that of the operation. 2. The core writes one number, into
        // `address`.
        unsafe { hypercall::typed(DEVICE_OP, TRANSLATE, &mut translate)? };
        // SAFETY: `address` lives here; the core wrote it behind the compiler's back.
        Ok(unsafe { core::ptr::read_volatile(&raw const address) })
    }
}

impl Dma for DeviceDma {
    fn alloc(&mut self) -> Result<DmaPage, Errno> {
        let page = Page::new_zeroed();
        let bus_address = self.bus_address(&page)?;
        Ok(DmaPage { page, bus_address })
    }
}

/// The registers behind a BAR. Clones are the same registers.
#[derive(Clone, Debug)]
pub struct Mmio {
    base: *mut u32,
    bytes: u32,
}

impl Mmio {
    /// Size in bytes.
    #[must_use]
    pub fn bytes(&self) -> u32 {
        self.bytes
    }

    fn register(&self, offset: u32) -> *mut u32 {
        assert!(
            offset.is_multiple_of(4) && offset <= self.bytes - 4,
            "register {offset:#x} is outside"
        );
        // SAFETY: inside the BAR, by the line above.
        unsafe { self.base.byte_add(offset as usize) }
    }

    fn half_register(&self, offset: u32) -> *mut u16 {
        assert!(
            offset.is_multiple_of(2) && offset <= self.bytes - 2,
            "register {offset:#x} is outside"
        );
        // SAFETY: inside the BAR, by the line above.
        unsafe { self.base.byte_add(offset as usize) }.cast()
    }

    /// Reads the 16-bit register at byte `offset`.
    #[must_use]
    pub fn read_u16(&self, offset: u32) -> u16 {
        let register = self.half_register(offset);
        // SAFETY: as for `read`.
        unsafe { register.read_volatile() }
    }

    /// Writes it.
    pub fn write_u16(&mut self, offset: u32, value: u16) {
        let register = self.half_register(offset);
        // SAFETY: as for `write`.
        unsafe { register.write_volatile(value) };
    }
}

impl Registers for Mmio {
    fn read(&self, offset: u32) -> u32 {
        let register = self.register(offset);
        // SAFETY: the core keeps the BAR mapped as long as we live; it is no Rust memory.
        unsafe { register.read_volatile() }
    }

    fn write(&mut self, offset: u32, value: u32) {
        let register = self.register(offset);
        // SAFETY: as for `read`. What a device does then, by DMA, its driver answers for.
        unsafe { register.write_volatile(value) };
    }
}
