//! PCI functions: which there are, whose they are, and how their interrupts become events.
//!
//! The core alone writes configuration space, apart from the few bits that [`Pci::write`] lets an
//! owner change. A function belongs to at most one domain. Its interrupts are messages (MSI-X,
//! else MSI) whose address and data the core writes, so that a driver cannot aim them; the pages
//! that hold an MSI-X table are never writable for the owner.
//!
//! What an owner must not do is whatever could make the function decode addresses or send
//! messages that the core did not choose: BARs, capability structures, power states (a return
//! from D3hot may clear the BARs) and function-level reset stay with the core.
//!
//! Sources: PCI Local Bus 3.0 §6.1 (header), §6.2.5 (BARs), §6.8 (MSI, MSI-X); PCI Express Base
//! 3.0 §6.6.2 (function-level reset), §7.8 (capability).

use crate::boot::EcamRange;
use crate::platform::{Bdf, CpuId, DEVICE_VECTORS, Platform};
use core::ops::Range;
use heapless::Vec;
use xen_abi::{DomainId, Errno, EventPort};

/// Most functions that the core keeps; further ones are not offered to domains.
pub const MAX_FUNCTIONS: usize = 64;
/// BARs of a function.
pub const BARS: usize = 6;

const VENDOR: u16 = 0x00;
const DEVICE: u16 = 0x02;
const COMMAND: u16 = 0x04;
const STATUS: u16 = 0x06;
const CLASS: u16 = 0x08;
const HEADER_TYPE: u16 = 0x0e;
const BAR0: u16 = 0x10;
const CAPABILITIES: u16 = 0x34;

const COMMAND_IO: u32 = 1;
const COMMAND_MEMORY: u32 = 1 << 1;
const COMMAND_BUS_MASTER: u32 = 1 << 2;
const COMMAND_INTX_OFF: u32 = 1 << 10;
/// What an owner may change in the command register.
const COMMAND_OWNERS: u32 = COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_INTX_OFF;
const STATUS_CAPABILITIES: u32 = 1 << 4;

const CAP_MSI: u32 = 0x05;
const CAP_EXPRESS: u32 = 0x10;
const CAP_MSIX: u32 = 0x11;

const MSI_ENABLE: u32 = 1;
const MSI_64: u32 = 1 << 7;
const MSIX_ENABLE: u32 = 1 << 15;
const MSIX_MASK_ALL: u32 = 1 << 14;
const ENTRY_MASKED: u32 = 1;

const EXPRESS_CAPABILITIES: u16 = 4;
const EXPRESS_CONTROL: u16 = 8;
const EXPRESS_STATUS: u16 = 10;
const EXPRESS_HAS_FLR: u32 = 1 << 28;
const EXPRESS_DO_FLR: u32 = 1 << 15;
const EXPRESS_PENDING: u32 = 1 << 5;

/// How long a function may take for its function-level reset (§6.6.2: 100 ms).
const FLR_NS: u64 = 100_000_000;
/// How long the core waits for a function's own requests to be completed once bus mastering is
/// off. Longer waits are left to the reset by the driver.
const DRAIN_US: u32 = 100;

/// A memory BAR; without size when there is none, or one that the core keeps to itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Bar {
    /// Physical address.
    pub address: u64,
    /// Size in bytes, a power of two.
    pub bytes: u64,
}

impl Bar {
    /// Physical addresses that the BAR decodes.
    #[must_use]
    pub const fn range(&self) -> Range<u64> {
        self.address..self.address + self.bytes
    }

    /// The same, in whole pages.
    const fn pages(&self) -> Range<u64> {
        self.address & !0xfff..(self.address + self.bytes + 0xfff) & !0xfff
    }
}

/// MSI-X of a function.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct MsiX {
    capability: u16,
    vectors: u16,
    /// Physical address of the table.
    table: u64,
}

/// MSI of a function; we use one message of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Msi {
    capability: u16,
    wide: bool,
}

/// A PCI function with an ordinary header.
#[derive(Clone, Debug)]
pub struct Function {
    /// Where.
    pub bdf: Bdf,
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Class << 16 | subclass << 8 | programming interface.
    pub class: u32,
    /// Its memory BARs.
    pub bars: [Bar; BARS],
    /// To whom it belongs.
    pub owner: Option<DomainId>,
    /// Its owner is trusted with all memory.
    pub trusted: bool,
    /// Where its owner has the BARs, 0: nowhere.
    pub places: [u64; BARS],
    msix: Option<MsiX>,
    msi: Option<Msi>,
    express: Option<u16>,
    can_reset: bool,
    /// Under reset until then, ns.
    ready_at: u64,
}

impl Function {
    /// Number of MSI-X vectors.
    #[must_use]
    pub fn msix_vectors(&self) -> u16 {
        self.msix.map_or(0, |msix| msix.vectors)
    }

    /// Number of MSI vectors that can be used.
    #[must_use]
    pub fn msi_vectors(&self) -> u16 {
        self.msi.is_some().into()
    }

    /// Whether the page at a physical address holds registers of the function.
    #[must_use]
    pub fn has_registers_at(&self, address: u64) -> bool {
        self.bars.iter().any(|bar| bar.bytes != 0 && bar.pages().contains(&address))
    }

    /// Whether the page at a physical address holds part of the MSI-X table.
    #[must_use]
    pub fn is_table_page(&self, address: u64) -> bool {
        self.msix.is_some_and(|msix| {
            let end = msix.table + u64::from(msix.vectors) * 16;
            address < end && msix.table < address + 4096
        })
    }
}

/// Where a device interrupt goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Route {
    bdf: Bdf,
    entry: u16,
    owner: DomainId,
    port: EventPort,
}

/// All functions, and the routes of their interrupts.
pub struct Pci {
    functions: Vec<Function, MAX_FUNCTIONS>,
    routes: [Option<Route>; ROUTES],
}

const ROUTES: usize = (DEVICE_VECTORS.end - DEVICE_VECTORS.start) as usize;

impl Default for Pci {
    fn default() -> Self {
        Self::new()
    }
}

impl Pci {
    /// No functions.
    #[must_use]
    pub const fn new() -> Self {
        Self { functions: Vec::new(), routes: [None; ROUTES] }
    }

    /// Finds the functions on all buses of `ranges`, and stops whatever the firmware left running.
    /// A BAR that claims some of `reserved` counts as none. Returns how many did not fit.
    pub fn enumerate<P: Platform>(
        &mut self,
        p: &mut P,
        ranges: &[EcamRange],
        reserved: &[Range<u64>],
    ) -> usize {
        let mut left_out = 0;
        for range in ranges {
            for bus in range.first_bus..=range.last_bus {
                for device in 0..32 {
                    left_out += self.enumerate_device(p, (range.segment, bus, device), reserved);
                }
            }
        }
        left_out
    }

    fn enumerate_device<P: Platform>(
        &mut self,
        p: &mut P,
        (segment, bus, device): (u16, u8, u32),
        reserved: &[Range<u64>],
    ) -> usize {
        let mut left_out = 0;
        for number in 0..8 {
            let bdf = Bdf(u32::from(segment) << 16 | u32::from(bus) << 8 | device << 3 | number);
            if p.config_read(bdf, VENDOR, 2) == 0xffff {
                if number == 0 {
                    break;
                }
                continue;
            }
            let header = p.config_read(bdf, HEADER_TYPE, 1);
            // Bridges are the core's; a bridge decodes for all behind it.
            if header & 0x7f == 0 {
                let function = probe(p, bdf, reserved);
                left_out += usize::from(self.functions.push(function).is_err());
            }
            if number == 0 && header & 0x80 == 0 {
                break;
            }
        }
        left_out
    }

    /// All functions, in the order of their addresses.
    #[must_use]
    pub fn functions(&self) -> &[Function] {
        &self.functions
    }

    /// The function at an address.
    #[must_use]
    pub fn find(&self, bdf: Bdf) -> Option<&Function> {
        self.functions.iter().find(|function| function.bdf == bdf)
    }

    fn find_mut(&mut self, bdf: Bdf) -> Option<&mut Function> {
        self.functions.iter_mut().find(|function| function.bdf == bdf)
    }

    /// Whether BAR `index` of a function can be mapped for its owner: it is there, and no other
    /// function has registers in the same pages.
    #[must_use]
    pub fn is_mappable(&self, bdf: Bdf, index: usize) -> bool {
        let Some(bar) = self.find(bdf).map(|function| function.bars[index]) else { return false };
        if bar.bytes == 0 || bar.address == 0 {
            return false;
        }
        let pages = bar.pages();
        self.functions.iter().filter(|other| other.bdf != bdf).all(|other| {
            other.bars.iter().all(|taken| {
                let taken = taken.range();
                taken.is_empty() || taken.start >= pages.end || pages.start >= taken.end
            })
        })
    }

    /// Gives a function to a domain. Its memory decoding is on afterwards, nothing else.
    ///
    /// # Errors
    /// `ENODEV`: no such function. `EBUSY`: it has an owner. `EAGAIN`: it is still being reset.
    pub fn assign<P: Platform>(
        &mut self,
        p: &mut P,
        bdf: Bdf,
        owner: DomainId,
        trusted: bool,
    ) -> Result<(), Errno> {
        let function = self.find_mut(bdf).ok_or(Errno::ENODEV)?;
        if function.owner.is_some() {
            return Err(Errno::EBUSY);
        }
        if p.now_ns() < function.ready_at {
            return Err(Errno::EAGAIN);
        }
        if function.ready_at != 0 {
            // The reset cleared the BARs.
            function.ready_at = 0;
            restore_bars(p, function);
            silence(p, function);
        }
        function.owner = Some(owner);
        function.trusted = trusted;
        command(p, bdf, 0, COMMAND_MEMORY);
        Ok(())
    }

    /// Notes where its owner has a BAR.
    pub fn place_bar(&mut self, bdf: Bdf, index: usize, gpa: u64) {
        if let Some(function) = self.find_mut(bdf) {
            function.places[index] = gpa;
        }
    }

    /// Stops a function: no more DMA, no more interrupts, and its routes are gone. It answers to
    /// register accesses and keeps its owner.
    pub fn quiesce<P: Platform>(&mut self, p: &mut P, bdf: Bdf) {
        for index in 0..ROUTES {
            if self.routes[index].is_some_and(|route| route.bdf == bdf) {
                self.routes[index] = None;
            }
        }
        if let Some(function) = self.find(bdf) {
            silence(p, function);
        }
    }

    /// Takes a function from its owner, stops it, and begins its reset where it can do one by
    /// itself, so that the next owner finds nothing of the last.
    pub fn release<P: Platform>(&mut self, p: &mut P, bdf: Bdf) {
        self.quiesce(p, bdf);
        let now = p.now_ns();
        let Some(function) = self.find_mut(bdf) else { return };
        function.owner = None;
        function.trusted = false;
        function.places = [0; BARS];
        if let (true, Some(express)) = (function.can_reset, function.express) {
            let control = p.config_read(bdf, express + EXPRESS_CONTROL, 2);
            p.config_write(bdf, express + EXPRESS_CONTROL, 2, control | EXPRESS_DO_FLR);
            function.ready_at = now + FLR_NS;
        }
    }

    /// Makes vector `entry` of a function raise an event of its owner.
    ///
    /// # Errors
    /// `ENODEV`: no such function, or not its owner. `EINVAL`: it has no such vector. `EEXIST`:
    /// bound already. `ENOSPC`: no processor vector is left.
    pub fn bind<P: Platform>(
        &mut self,
        p: &mut P,
        bdf: Bdf,
        entry: u32,
        owner: DomainId,
        port: EventPort,
    ) -> Result<(), Errno> {
        let function = self.find(bdf).filter(|f| f.owner == Some(owner)).ok_or(Errno::ENODEV)?;
        let (msix, msi) = (function.msix, function.msi);
        let vectors = msix.map_or(function.msi_vectors(), |msix| msix.vectors);
        let entry = u16::try_from(entry).ok().filter(|&e| e < vectors).ok_or(Errno::EINVAL)?;
        if self.routes.iter().flatten().any(|route| route.bdf == bdf && route.entry == entry) {
            return Err(Errno::EEXIST);
        }
        let free = self.routes.iter().position(Option::is_none).ok_or(Errno::ENOSPC)?;
        self.routes[free] = Some(Route { bdf, entry, owner, port });
        let vector = DEVICE_VECTORS.start + u8::try_from(free).expect("fewer than 256 routes");
        match (msix, msi) {
            (Some(msix), _) => aim_msix(p, bdf, msix, entry, vector),
            (None, Some(msi)) => aim_msi(p, bdf, msi, vector),
            (None, None) => unreachable!("a function without messages has no vectors"),
        }
        Ok(())
    }

    /// Whose event a processor vector is.
    #[must_use]
    pub fn route(&self, vector: u8) -> Option<(DomainId, EventPort)> {
        let index = vector.checked_sub(DEVICE_VECTORS.start)?;
        let route = self.routes.get(usize::from(index)).copied().flatten()?;
        Some((route.owner, route.port))
    }

    /// Masks the vector behind a port that its owner closes.
    pub fn unbind<P: Platform>(&mut self, p: &mut P, owner: DomainId, port: EventPort) {
        let found = self.routes.iter().position(|route| {
            route.is_some_and(|route| route.owner == owner && route.port == port)
        });
        let Some(route) = found.and_then(|index| self.routes[index].take()) else { return };
        let Some(function) = self.find(route.bdf) else { return };
        match (function.msix, function.msi) {
            (Some(msix), _) => {
                // Its owner may have turned decoding off to keep the vector alive.
                command(p, route.bdf, 0, COMMAND_MEMORY);
                p.mmio_write32(msix.table + u64::from(route.entry) * 16 + 12, ENTRY_MASKED);
            }
            (None, Some(msi)) => change(p, route.bdf, msi.capability + 2, MSI_ENABLE, 0),
            (None, None) => {}
        }
    }

    /// Reads configuration space of a function for its owner.
    ///
    /// # Errors
    /// `EINVAL`: outside, or not aligned to its width.
    pub fn read<P: Platform>(p: &P, bdf: Bdf, offset: u16, width: u16) -> Result<u32, Errno> {
        check_access(offset, width)?;
        Ok(p.config_read(bdf, offset, width))
    }

    /// Writes configuration space of a function for its owner: three bits of the command
    /// register, and the error bits of the status register.
    ///
    /// # Errors
    /// `EINVAL`: outside, or not aligned to its width. `EPERM`: not for owners.
    pub fn write<P: Platform>(
        p: &mut P,
        bdf: Bdf,
        offset: u16,
        width: u16,
        value: u32,
    ) -> Result<(), Errno> {
        check_access(offset, width)?;
        match (offset, width) {
            (COMMAND, 2) => {
                let kept = p.config_read(bdf, COMMAND, 2) & !COMMAND_OWNERS;
                p.config_write(bdf, COMMAND, 2, kept | (value & COMMAND_OWNERS));
                Ok(())
            }
            (STATUS, 2) => {
                p.config_write(bdf, STATUS, 2, value);
                Ok(())
            }
            _ => Err(Errno::EPERM),
        }
    }
}

fn check_access(offset: u16, width: u16) -> Result<(), Errno> {
    if matches!(width, 1 | 2 | 4) && offset.is_multiple_of(width) && offset < 4096 {
        Ok(())
    } else {
        Err(Errno::EINVAL)
    }
}

/// Replaces `clear` by `set` in a 16-bit register.
fn change<P: Platform>(p: &mut P, bdf: Bdf, offset: u16, clear: u32, set: u32) {
    let value = p.config_read(bdf, offset, 2) & !clear;
    p.config_write(bdf, offset, 2, value | set);
}

fn command<P: Platform>(p: &mut P, bdf: Bdf, clear: u32, set: u32) {
    change(p, bdf, COMMAND, clear, set);
}

/// No more requests from the function, and no more messages.
fn silence<P: Platform>(p: &mut P, function: &Function) {
    let bdf = function.bdf;
    command(p, bdf, COMMAND_BUS_MASTER, COMMAND_INTX_OFF);
    if let Some(msix) = function.msix {
        // It stays enabled, which keeps the function from INTx; some emulations also stop the
        // whole machine when a message falls due while it is disabled.
        change(p, bdf, msix.capability + 2, 0, MSIX_ENABLE | MSIX_MASK_ALL);
    }
    if let Some(msi) = function.msi {
        change(p, bdf, msi.capability + 2, MSI_ENABLE, 0);
    }
    // Requests that it has sent may still be answered: let them.
    if let Some(express) = function.express {
        let mut waited = 0;
        while waited < DRAIN_US
            && p.config_read(bdf, express + EXPRESS_STATUS, 2) & EXPRESS_PENDING != 0
        {
            p.delay_us(10);
            waited += 10;
        }
    }
}

fn aim_msix<P: Platform>(p: &mut P, bdf: Bdf, msix: MsiX, entry: u16, vector: u8) {
    let message = p.msi_message(CpuId(0), vector);
    command(p, bdf, 0, COMMAND_MEMORY);
    let control = p.config_read(bdf, msix.capability + 2, 2);
    if control & (MSIX_ENABLE | MSIX_MASK_ALL) != MSIX_ENABLE {
        // Enabled and masked as a whole first: entries keep what a predecessor left.
        change(p, bdf, msix.capability + 2, 0, MSIX_ENABLE | MSIX_MASK_ALL);
        for other in 0..u64::from(msix.vectors) {
            p.mmio_write32(msix.table + other * 16 + 12, ENTRY_MASKED);
        }
    }
    let at = msix.table + u64::from(entry) * 16;
    p.mmio_write32(at + 12, ENTRY_MASKED);
    p.mmio_write32(at, low(message.address));
    p.mmio_write32(at + 4, low(message.address >> 32));
    p.mmio_write32(at + 8, message.data);
    p.mmio_write32(at + 12, 0);
    change(p, bdf, msix.capability + 2, MSIX_MASK_ALL, MSIX_ENABLE);
}

fn aim_msi<P: Platform>(p: &mut P, bdf: Bdf, msi: Msi, vector: u8) {
    let message = p.msi_message(CpuId(0), vector);
    p.config_write(bdf, msi.capability + 4, 4, low(message.address));
    let mut data = msi.capability + 8;
    if msi.wide {
        p.config_write(bdf, data, 4, low(message.address >> 32));
        data += 4;
    }
    p.config_write(bdf, data, 2, message.data & 0xffff);
    // One message: the multiple-message field stays 0.
    change(p, bdf, msi.capability + 2, 0x70, MSI_ENABLE);
}

#[expect(clippy::cast_possible_truncation, reason = "the low half is what is asked for")]
const fn low(value: u64) -> u32 {
    value as u32
}

#[expect(clippy::cast_possible_truncation, reason = "16-bit registers")]
const fn half(value: u32) -> u16 {
    value as u16
}

fn probe<P: Platform>(p: &mut P, bdf: Bdf, reserved: &[Range<u64>]) -> Function {
    let mut bars = size_bars(p, bdf);
    for bar in &mut bars {
        let pages = bar.pages();
        if reserved.iter().any(|taken| taken.start < pages.end && pages.start < taken.end) {
            *bar = Bar::default();
        }
    }
    let mut function = Function {
        bdf,
        vendor: half(p.config_read(bdf, VENDOR, 2)),
        device: half(p.config_read(bdf, DEVICE, 2)),
        class: p.config_read(bdf, CLASS, 4) >> 8,
        bars,
        owner: None,
        trusted: false,
        places: [0; BARS],
        msix: None,
        msi: None,
        express: None,
        can_reset: false,
        ready_at: 0,
    };
    find_capabilities(p, &mut function);
    silence(p, &function);
    function
}

/// Address and size of each memory BAR. Decoding is off meanwhile, since the test pattern would
/// make the function answer at addresses of others.
fn size_bars<P: Platform>(p: &mut P, bdf: Bdf) -> [Bar; BARS] {
    let before = p.config_read(bdf, COMMAND, 2);
    command(p, bdf, COMMAND_IO | COMMAND_MEMORY, 0);
    let mut bars = [Bar::default(); BARS];
    let mut index = 0;
    while index < BARS {
        let at = BAR0 + 4 * u16::try_from(index).expect("six BARs");
        let (first, mask) = test_bar(p, bdf, at);
        let is_memory = first & 1 == 0;
        let wide = is_memory && first & 6 == 4 && index + 1 < BARS;
        let mut address = u64::from(first & !0xf);
        let mut size_mask = u64::from(mask & !0xf) | 0xffff_ffff << 32;
        if wide {
            let (high, high_mask) = test_bar(p, bdf, at + 4);
            address |= u64::from(high) << 32;
            size_mask = u64::from(mask & !0xf) | u64::from(high_mask) << 32;
        }
        if is_memory && mask & !0xf != 0 {
            let bytes = (!size_mask).wrapping_add(1);
            // A device may return any mask: only a naturally aligned power of two is a BAR.
            if bytes.is_power_of_two()
                && address % bytes == 0
                && address.checked_add(bytes).is_some_and(|end| end <= 1 << 46)
            {
                bars[index] = Bar { address, bytes };
            }
        }
        index += if wide { 2 } else { 1 };
    }
    p.config_write(bdf, COMMAND, 2, before);
    bars
}

/// The content of a BAR register, and which of its bits can be written.
fn test_bar<P: Platform>(p: &mut P, bdf: Bdf, at: u16) -> (u32, u32) {
    let value = p.config_read(bdf, at, 4);
    p.config_write(bdf, at, 4, u32::MAX);
    let mask = p.config_read(bdf, at, 4);
    p.config_write(bdf, at, 4, value);
    (value, mask)
}

fn restore_bars<P: Platform>(p: &mut P, function: &Function) {
    for (index, bar) in (0_u16..).zip(&function.bars) {
        if bar.bytes == 0 {
            continue;
        }
        let at = BAR0 + 4 * index;
        let wide = p.config_read(function.bdf, at, 4) & 6 == 4;
        p.config_write(function.bdf, at, 4, low(bar.address));
        if wide {
            p.config_write(function.bdf, at + 4, 4, low(bar.address >> 32));
        }
    }
}

/// Walks the capability list. It has at most 48 members; a device that closes it to a circle is
/// not followed further.
fn find_capabilities<P: Platform>(p: &P, function: &mut Function) {
    let bdf = function.bdf;
    if p.config_read(bdf, STATUS, 2) & STATUS_CAPABILITIES == 0 {
        return;
    }
    let mut at = half(p.config_read(bdf, CAPABILITIES, 1)) & 0xfc;
    for _ in 0..48 {
        if at < 0x40 {
            return;
        }
        let head = p.config_read(bdf, at, 4);
        match head & 0xff {
            CAP_MSI => function.msi = Some(Msi { capability: at, wide: head >> 16 & MSI_64 != 0 }),
            CAP_MSIX => function.msix = read_msix(p, function, at, head),
            CAP_EXPRESS => {
                function.express = Some(at);
                let able = p.config_read(bdf, at + EXPRESS_CAPABILITIES, 4);
                function.can_reset = able & EXPRESS_HAS_FLR != 0;
            }
            _ => {}
        }
        at = half(head >> 8) & 0xfc;
    }
}

/// MSI-X, if its table lies where it says.
fn read_msix<P: Platform>(p: &P, function: &Function, at: u16, head: u32) -> Option<MsiX> {
    let vectors = half((head >> 16 & 0x7ff) + 1);
    let table = p.config_read(function.bdf, at + 4, 4);
    let bar = function.bars.get((table & 7) as usize)?;
    let offset = u64::from(table & !7);
    if bar.address == 0 || offset + u64::from(vectors) * 16 > bar.bytes {
        return None;
    }
    Some(MsiX { capability: at, vectors, table: bar.address + offset })
}
