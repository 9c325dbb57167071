//! From the machine layer's facts to a running control domain.

use crate::control::Plan;
use crate::domain::MAX_DOMAINS;
use crate::frame::{FrameInfo, Mfn};
use crate::p2m::{GFN_LIMIT, Kind, Page};
use crate::platform::{MAX_CPUS, Platform};
use crate::state::Core;
use crate::vcpu::VcpuId;
use axolotl_abi::control::{CLASS_CONTROL, KIND_UNIKERNEL, Rights};
use axolotl_abi::image::{
    ACCESS_READ, ACCESS_WRITE, BundleHeader, ImageError, ImageHeader, Segment,
};
use axolotl_abi::start::{
    BUNDLE_GPA, HEAP_GPA, STACK_PAGES, STACK_TOP_GPA, START_INFO_GPA, START_MAGIC, StartInfo,
    XENSTORE_RING_GPA,
};
use core::ops::Range;
use xen_abi::grant::RESERVED_XENSTORE;
use xen_abi::{DomainId, Errno, EventPort, Gfn};
use zerocopy::IntoBytes;

/// The control domain's id.
pub const CONTROL: DomainId = DomainId(0);
/// The store domain's id.
pub const STORE: DomainId = DomainId(1);
/// Most pages of the control domain.
const CONTROL_PAGES_MAX: u32 = 65_536;
/// Pages that are kept for page tables, event ports, grant table and the like, beside one for
/// every 512 pages of heap.
const OVERHEAD_PAGES: u32 = 48;

/// Buses of one PCI segment that configuration space can be reached for.
#[derive(Clone, Debug)]
pub struct EcamRange {
    /// Segment group number.
    pub segment: u16,
    /// First bus.
    pub first_bus: u8,
    /// Last bus, included.
    pub last_bus: u8,
}

/// What the machine layer found out.
pub struct Boot<'a> {
    /// One entry per frame from 0 to the highest usable one, all zero.
    pub frames: &'static mut [FrameInfo],
    /// Physical addresses of memory that nothing uses. May contain the bundle, which is left out.
    pub usable: &'a [Range<u64>],
    /// The boot module, as the core sees it; its last page holds nothing else of value.
    pub bundle: &'static [u8],
    /// Its physical address, page-aligned.
    pub bundle_address: u64,
    /// Processors, this one included.
    pub cpus: usize,
    /// Those of them that may run hardware-virtualized vCPUs, a bit for each.
    pub guest_cpus: u64,
    /// Frames that the core itself occupies: image, stacks, frame table.
    pub core_pages: u64,
    /// Where PCI functions can be.
    pub ecam: &'a [EcamRange],
    /// Physical addresses where no function can have registers, whatever it says: all memory,
    /// interrupt controllers, configuration space.
    pub reserved: &'a [Range<u64>],
}

/// Why the control domain could not be started.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StartError {
    /// The bundle or its image 0 is malformed.
    Image(ImageError),
    /// Not enough memory, or `control_pages` is too small or too large.
    Memory,
    /// A segment lies where the start layout has something else.
    Layout,
}

impl From<ImageError> for StartError {
    fn from(error: ImageError) -> Self {
        Self::Image(error)
    }
}

impl From<Errno> for StartError {
    fn from(errno: Errno) -> Self {
        if errno == Errno::ENOMEM { Self::Memory } else { Self::Layout }
    }
}

impl<P: Platform> Core<P> {
    /// Takes over memory and devices. Called once, by the first processor, before
    /// [`Self::start_control`].
    ///
    /// # Panics
    /// There are no processors, or too many.
    pub fn init(&mut self, p: &mut P, boot: Boot<'_>) {
        assert!((1..=MAX_CPUS).contains(&boot.cpus), "the machine layer counts processors");
        self.sched.count = boot.cpus;
        self.sched.guests = boot.guest_cpus;
        self.core_pages = boot.core_pages;
        self.bundle = boot.bundle;
        self.bundle_mfn = Mfn(boot.bundle_address >> 12);
        self.frames.set_memory(boot.frames);
        let bundle_end = boot.bundle_address + boot.bundle.len() as u64;
        let bundle_end = bundle_end.next_multiple_of(4096);
        for range in boot.usable {
            // Before the bundle, and behind it.
            let before = range.start..range.end.min(boot.bundle_address);
            let behind = range.start.max(bundle_end)..range.end;
            for part in [before, behind] {
                if !part.is_empty() {
                    self.frames.add(&part);
                }
            }
        }
        let left_out = self.pci.enumerate(p, boot.ecam, boot.reserved);
        let (total, _) = self.frames.counts();
        let functions = self.pci.functions().len();
        self.print(
            p,
            format_args!(
                "{} MiB for domains, {} processors, {functions} PCI functions",
                total / 256,
                boot.cpus
            ),
        );
        if let Err(why) = p.virtualization() {
            self.print(p, format_args!("no domains with kernels of their own: {}", why.text()));
        } else if self.sched.guests & 1 == 0 {
            self.print(p, format_args!("domains with kernels of their own: not on processor 0"));
        }
        if left_out > 0 {
            self.print(p, format_args!("{left_out} further PCI functions are not offered"));
        }
    }

    /// Builds the control domain from image 0 of the bundle and makes it runnable.
    ///
    /// # Errors
    /// The bundle is malformed, or there is too little memory.
    pub fn start_control(&mut self, p: &mut P) -> Result<(), StartError> {
        let bundle = self.bundle;
        let (header, images) = BundleHeader::check(bundle)?;
        if header.control_pages > CONTROL_PAGES_MAX {
            return Err(StartError::Memory);
        }
        let first = images[0];
        let start = usize::try_from(first.offset).map_err(|_| ImageError::Truncated)?;
        let len = usize::try_from(first.bytes).map_err(|_| ImageError::Truncated)?;
        let image = bundle.get(start..).and_then(|rest| rest.get(..len));
        let image = image.ok_or(ImageError::Truncated)?;
        let (image_header, segments) = ImageHeader::check(image)?;
        if image_header.entry >> 12 >= GFN_LIMIT {
            return Err(StartError::Layout);
        }

        let mut name = [0; 32];
        name[..7].copy_from_slice(b"control");
        self.create(
            p,
            &Plan {
                id: CONTROL,
                name,
                class: CLASS_CONTROL,
                rights: Rights::all(),
                builder: None,
                kind: KIND_UNIKERNEL,
                vcpus: 1,
                max_pages: header.control_pages,
                budget_ns: 0,
                period_ns: 0,
            },
        )?;
        for segment in segments {
            self.load_segment(p, image, segment)?;
        }
        let heap_pages = self.fill_control(p)?;
        let port = self.connect_control(p)?;
        self.map_bundle(p)?;
        let info = StartInfo {
            magic: START_MAGIC,
            domid: CONTROL,
            store_domid: STORE,
            incarnation: 1,
            heap_bytes: u64::from(heap_pages) * 4096,
            preserved_pages: 0,
            xenstore_port: port,
            config_bytes: 0,
            devices: 0,
            bundle_bytes: bundle.len() as u64,
            name,
        };
        let page =
            self.populate(p, CONTROL, Gfn::containing(START_INFO_GPA), ACCESS_READ, false)?;
        p.write(page, 0, info.as_bytes());
        if let Some(state) = &mut self.me_mut(CONTROL).vcpu_mut().state {
            let registers = P::registers_mut(state);
            registers.rip = image_header.entry;
            registers.rsp = STACK_TOP_GPA - 8;
            registers.rdi = START_INFO_GPA;
        }
        self.begin(p, CONTROL);
        self.control_started_ns = p.now_ns();
        self.make_ready(p, VcpuId::first(CONTROL));
        Ok(())
    }

    fn load_segment(
        &mut self,
        p: &mut P,
        image: &[u8],
        segment: &Segment,
    ) -> Result<(), StartError> {
        let start = usize::try_from(segment.file_offset).map_err(|_| ImageError::BadExtent)?;
        let len = usize::try_from(segment.file_bytes).map_err(|_| ImageError::BadExtent)?;
        let mut bytes = image.get(start..start + len).ok_or(ImageError::BadExtent)?;
        for gfn in (segment.gfn..).take(segment.pages as usize) {
            let mfn = self.populate(p, CONTROL, Gfn(gfn), segment.access, false)?;
            let (page, rest) = bytes.split_at(bytes.len().min(4096));
            p.write(mfn, 0, page);
            bytes = rest;
        }
        Ok(())
    }

    /// Stack, xenstore ring, and all the rest as heap; answers its pages.
    fn fill_control(&mut self, p: &mut P) -> Result<u32, StartError> {
        let data = ACCESS_READ | ACCESS_WRITE;
        let stack = STACK_TOP_GPA / 4096 - STACK_PAGES;
        for gfn in (stack..STACK_TOP_GPA / 4096).chain([XENSTORE_RING_GPA / 4096]) {
            self.populate(p, CONTROL, Gfn(gfn), data, false)?;
        }
        let account = self.me(CONTROL).account;
        let left = account.max - account.pages;
        let bundle_tables = u32::try_from(self.bundle.len() >> 21).unwrap_or(u32::MAX);
        let heap = left
            .checked_sub(OVERHEAD_PAGES)
            .and_then(|left| left.checked_sub(bundle_tables))
            .map(|left| left - left / 512)
            .filter(|&heap| heap > 0)
            .ok_or(StartError::Memory)?;
        for gfn in (HEAP_GPA / 4096..).take(heap as usize) {
            self.populate(p, CONTROL, Gfn(gfn), data, false)?;
        }
        Ok(heap)
    }

    /// The control domain's connection to the store domain, which is not there yet: it builds it.
    fn connect_control(&mut self, p: &mut P) -> Result<EventPort, StartError> {
        let ring = Gfn::containing(XENSTORE_RING_GPA);
        self.set_grant(p, CONTROL, STORE, RESERVED_XENSTORE, ring)?;
        Ok(self.unbound_port(p, CONTROL, STORE)?)
    }

    fn map_bundle(&mut self, p: &mut P) -> Result<(), StartError> {
        let first = self.bundle_mfn.0;
        let pages = self.bundle.len().div_ceil(4096) as u64;
        for index in 0..pages {
            let page = Page::new(Mfn(first + index), Kind::Bundle);
            let gfn = Gfn(BUNDLE_GPA / 4096 + index);
            let (domain, frames) = self.with_frames(CONTROL);
            domain.p2m.insert(p, frames, &mut domain.account, gfn, page)?;
        }
        Ok(())
    }
}

const _: () = assert!(MAX_DOMAINS > STORE.0 as usize);
