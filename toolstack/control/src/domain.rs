//! One domain: how it is built, and built again.

use crate::console::Console;
use crate::hypervisor::{Hypervisor, until_done};
use crate::plan::{Plan, config_bytes};
use crate::pvh::{CONSOLE_GPA, Layout, XENSTORE_GPA, acpi_gpa, charged_pages};
use crate::supervision::History;
use crate::tree::Split;
use alloc::format;
use alloc::rc::Rc;
use alloc::string::String;
use alloc::vec::Vec;
use axolotl_abi::control::{
    CLASS_DRIVER, CLASS_GUEST, Create, KIND_PVH, KIND_UNIKERNEL, POPULATE_MISSING, PciFunction,
    Populate, SetStart,
};
use axolotl_abi::drivers::{self, Driver};
use axolotl_abi::image::{ACCESS_EXECUTE, ACCESS_READ, ACCESS_WRITE};
use axolotl_abi::start::{
    MMIO_GPA, STACK_TOP_GPA, START_INFO_GPA, START_MAGIC, StartInfo, XENSTORE_RING_GPA,
};
use axolotl_abi::system::{Dma, Domain, Role};
use core::mem::size_of;
use xen_abi::hvm::params;
use xen_abi::xenstore::{CONNECTION, RECONNECT};
use xen_abi::{DomainId, Errno, EventPort, Gfn, GrantRef};
use zerocopy::IntoBytes;

/// The store domain's id, fixed.
pub(crate) const STORE: DomainId = DomainId(1);
/// The control domain itself, to which consoles go.
const CONTROL: DomainId = DomainId(0);
/// The reserved grant of the console ring.
const CONSOLE_GRANT: GrantRef = GrantRef(0);
/// The reserved grant of the xenstore ring.
const XENSTORE_GRANT: GrantRef = GrantRef(1);

/// What the supervisor does with a domain.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Phase {
    /// Waits for its nodes in the store, then starts.
    Starting,
    /// Runs, or is paused.
    Live,
    /// Died; starts again at this time.
    Delayed(u64),
    /// Not started before somebody asks, for this reason.
    Held(String),
    /// Died, and stays for inspection.
    Ended,
    /// Its nodes are being removed from the store.
    Removing,
    /// The core frees what it has.
    Destroying,
    /// Destroyed.
    Gone,
}

/// How far the filling of a domain with a kernel of its own has come. It is large: filled in one
/// go, it would keep a driver that dies meanwhile waiting.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Filling {
    /// The core ends the last incarnation.
    Restart,
    /// It gets memory: this region, of which so many pages are there.
    Memory(usize, u32),
    /// It gets its images: this load is next.
    Images(usize),
}

/// Pages of memory in one step.
const STEP_PAGES: u32 = 1024;
/// Loads in one step, each of at most 64 KiB.
const STEP_LOADS: usize = 8;

/// What building a domain came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Built {
    /// It is filled and can start; its xenstore port, if it has one.
    Whole(Option<EventPort>),
    /// [`Managed::fill_step`] goes on.
    InPart,
}

/// What went wrong while a domain was built.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct BuildError {
    pub(crate) what: String,
    pub(crate) errno: Errno,
}

/// Names the step that failed.
fn at(step: &'static str) -> impl FnOnce(Errno) -> BuildError {
    move |errno| BuildError { what: format!("{step}: {errno}"), errno }
}

/// A domain under supervision.
#[derive(Debug)]
pub(crate) struct Managed<'b> {
    pub(crate) domain: Domain,
    pub(crate) domid: DomainId,
    pub(crate) phase: Phase,
    /// What it uses of other domains.
    pub(crate) splits: Vec<Split>,
    pub(crate) history: History,
    pub(crate) restarts: u32,
    pub(crate) console: Console,
    pub(crate) tail_at_death: Vec<u8>,
    /// What is under way towards the next start.
    pub(crate) filling: Option<Filling>,
    /// Steps towards it that are done.
    pub(crate) is_built: bool,
    pub(crate) has_nodes: bool,
    /// The driver that was found for it, if one had to be.
    pub(crate) found: Option<&'static Driver>,
    program: Program<'b>,
    /// What it runs, once it was built.
    image: &'b [u8],
    plan: Option<Plan>,
    /// The ramdisk of a domain with a kernel of its own.
    ramdisk: Option<&'b [u8]>,
    layout: Option<Layout>,
    /// Its console ring's port, as it has it.
    pub(crate) console_port: Option<EventPort>,
}

/// What a domain runs.
#[derive(Clone, Debug)]
pub(crate) enum Program<'b> {
    /// This flat image.
    Image(&'b [u8]),
    /// The one of these that serves its first device.
    ToFind(Rc<[DriverProgram<'b>]>),
}

/// A driver's name and flat image.
#[derive(Clone, Debug)]
pub(crate) struct DriverProgram<'b> {
    pub(crate) driver: &'static Driver,
    pub(crate) image: &'b [u8],
}

impl<'b> Managed<'b> {
    pub(crate) fn new(
        domain: Domain,
        domid: DomainId,
        program: Program<'b>,
        ramdisk: Option<&'b [u8]>,
        splits: Vec<Split>,
    ) -> Self {
        Self {
            domain,
            domid,
            phase: Phase::Starting,
            splits,
            history: History::default(),
            restarts: 0,
            filling: None,
            console: Console::default(),
            tail_at_death: Vec::new(),
            is_built: false,
            has_nodes: false,
            found: None,
            program,
            image: &[],
            plan: None,
            ramdisk,
            layout: None,
            console_port: None,
        }
    }

    pub(crate) fn is_store(&self) -> bool {
        self.domain.role == Role::Store
    }

    /// Creates the domain and fills it, so that it can be started.
    pub(crate) fn build<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        store_port: EventPort,
    ) -> Result<Built, BuildError> {
        self.image = self.choose(hv)?;
        if self.domain.kernel.is_some() {
            return self.build_pvh(hv);
        }
        let config = config_bytes(&self.domain).max(4);
        let (memory, preserved) = (self.domain.memory_pages, self.domain.preserved_pages);
        let plan = Plan::new(self.image, memory, preserved, config)
            .map_err(|error| BuildError { what: format!("{error}"), errno: Errno::EINVAL })?;
        self.create(hv)?;
        for region in &plan.regions {
            let mut populate = Populate {
                domid: self.domid,
                pad: 0,
                access: region.access,
                flags: region.flags,
                count: region.pages,
                gfn: region.gfn,
                done: 0,
            };
            until_done(|| hv.populate(&mut populate)).map_err(at("memory"))?;
        }
        let mut gpa = MMIO_GPA;
        for device in &self.domain.devices {
            let trusted = device.dma == Dma::Trusted;
            gpa =
                hv.assign_device(self.domid, device.bdf, trusted, gpa).map_err(at("its device"))?;
        }
        self.plan = Some(plan);
        self.fill(hv, store_port)
    }

    /// The flat image to run: its own, or that of the driver for its first device.
    fn choose<H: Hypervisor>(&mut self, hv: &mut H) -> Result<&'b [u8], BuildError> {
        let drivers = match &self.program {
            Program::Image(image) => return Ok(image),
            Program::ToFind(drivers) => drivers,
        };
        let bdf = self.domain.devices.first().map_or(u32::MAX, |device| device.bdf);
        let refuse = |why: String, errno| BuildError { what: format!("its driver: {why}"), errno };
        let function = hv.pci_function(bdf).map_err(|errno| {
            refuse(format!("there is no device at {} ({errno})", bdf_text(bdf)), errno)
        })?;
        let PciFunction { vendor, device, class, .. } = function;
        let wanted = drivers::for_function(vendor, device, class);
        let found = drivers.iter().find(|program| Some(program.driver) == wanted);
        let Some(found) = found else {
            let place = bdf_text(bdf);
            let what = format!("{place} ({vendor:04x}:{device:04x}, class {class:06x})");
            return Err(refuse(format!("none here serves {what}"), Errno::ENODEV));
        };
        self.found = Some(found.driver);
        Ok(found.image)
    }

    fn create<H: Hypervisor>(&self, hv: &mut H) -> Result<(), BuildError> {
        let class = if self.domain.role == Role::Guest { CLASS_GUEST } else { CLASS_DRIVER };
        let (is_pvh, memory) = (self.domain.kernel.is_some(), self.domain.memory_pages);
        let create = Create {
            name: padded(&self.domain.name),
            domid: self.domid,
            kind: if is_pvh { KIND_PVH } else { KIND_UNIKERNEL },
            class,
            rights: 0,
            max_pages: if is_pvh { charged_pages(memory) } else { memory },
            budget_us: self.domain.budget_us,
            period_us: self.domain.period_us,
            vcpus: if is_pvh { self.domain.vcpus } else { 1 },
        };
        hv.create(&create).map(drop).map_err(|errno| match errno {
            Errno::ENODEV if is_pvh => BuildError {
                what: "this machine cannot run kernels: the core's messages say why".into(),
                errno,
            },
            _ => at("creating it")(errno),
        })
    }

    /// The same as [`Self::build`] for a domain with a kernel of its own.
    fn build_pvh<H: Hypervisor>(&mut self, hv: &mut H) -> Result<Built, BuildError> {
        let Domain { memory_pages, vcpus, kernel, .. } = &self.domain;
        let cmdline = kernel.as_ref().map_or("", |kernel| kernel.cmdline.as_str());
        let layout = Layout::new(self.image, self.ramdisk, cmdline, *memory_pages, *vcpus)
            .map_err(|error| BuildError { what: format!("{error}"), errno: Errno::EINVAL })?;
        self.create(hv)?;
        self.layout = Some(layout);
        self.filling = Some(Filling::Memory(0, 0));
        Ok(Built::InPart)
    }

    /// The next step of filling a domain with a kernel of its own.
    pub(crate) fn fill_step<H: Hypervisor>(&mut self, hv: &mut H) -> Result<Built, BuildError> {
        let Some(layout) = &self.layout else { return Err(at("its layout")(Errno::EINVAL)) };
        let domid = self.domid;
        let next = match self.filling {
            Some(Filling::Restart) => match hv.restart(domid) {
                Ok(()) => Filling::Memory(0, 0),
                Err(Errno::EAGAIN) => Filling::Restart,
                Err(errno) => return Err(at("restart")(errno)),
            },
            Some(Filling::Memory(region, done)) => match layout.regions.get(region) {
                Some(&(_, count)) if count == done => Filling::Memory(region + 1, 0),
                Some(&(gfn, count)) => {
                    let count = (count - done).min(STEP_PAGES);
                    populate_for_kernel(hv, domid, gfn + u64::from(done), count)?;
                    Filling::Memory(region, done + count)
                }
                None => Filling::Images(0),
            },
            Some(Filling::Images(first)) if first < layout.loads.len() => {
                for load in layout.loads.iter().skip(first).take(STEP_LOADS) {
                    let from =
                        if load.of_ramdisk { self.ramdisk.unwrap_or(&[]) } else { self.image };
                    let bytes = from.get(load.bytes.clone()).unwrap_or(&[]);
                    hv.load(domid, load.gpa, bytes).map_err(at("its image"))?;
                }
                Filling::Images(first + STEP_LOADS)
            }
            _ => {
                self.filling = None;
                return self.fill_rest(hv).map(|port| Built::Whole(Some(port)));
            }
        };
        self.filling = Some(next);
        Ok(Built::InPart)
    }

    /// Tables, rings and registers of a domain with a kernel of its own. Returns its xenstore port.
    fn fill_rest<H: Hypervisor>(&mut self, hv: &mut H) -> Result<EventPort, BuildError> {
        let Some(layout) = &self.layout else { return Err(at("its layout")(Errno::EINVAL)) };
        let domid = self.domid;
        hv.load(domid, layout.start_info, &layout.block).map_err(at("its start info"))?;
        hv.load(domid, acpi_gpa(), &layout.acpi).map_err(at("its tables"))?;
        let rings = [
            (STORE, XENSTORE_GRANT, XENSTORE_GPA, params::STORE_PFN, params::STORE_EVTCHN),
            (CONTROL, CONSOLE_GRANT, CONSOLE_GPA, params::CONSOLE_PFN, params::CONSOLE_EVTCHN),
        ];
        let mut ports = [EventPort(0); 2];
        for ((with, gref, gpa, page, event), port) in rings.into_iter().zip(&mut ports) {
            *port = hv.alloc_unbound(domid, with).map_err(at("a ring's port"))?;
            hv.set_grant(domid, with, gref, gpa / 4096).map_err(at("a ring"))?;
            hv.set_hvm_param(domid, page, gpa / 4096).map_err(at("a ring's place"))?;
            hv.set_hvm_param(domid, event, port.0.into()).map_err(at("a ring's port"))?;
        }
        let (entry, argument) = (layout.entry, layout.start_info);
        let start = SetStart { domid, pad: [0; 3], entry, stack: 0, argument };
        hv.set_start(&start).map_err(at("its registers"))?;
        self.console_port = Some(ports[1]);
        self.is_built = true;
        Ok(ports[0])
    }

    /// Restarts it in the core and fills it again, so that it can be started. Its memory stays.
    pub(crate) fn rebuild<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        store_port: EventPort,
    ) -> Result<Built, BuildError> {
        if self.layout.is_some() {
            self.filling = Some(Filling::Restart);
            return self.fill_step(hv);
        }
        until_done(|| hv.restart(self.domid)).map_err(at("restart"))?;
        self.fill(hv, store_port)
    }

    /// Image, start info, store connection and registers.
    fn fill<H: Hypervisor>(
        &mut self,
        hv: &mut H,
        store_port: EventPort,
    ) -> Result<Built, BuildError> {
        let Some(plan) = &self.plan else { return Err(at("its plan")(Errno::EINVAL)) };
        for step in &plan.loads {
            let bytes = self.image.get(step.bytes.clone()).unwrap_or(&[]);
            hv.load(self.domid, step.gpa, bytes).map_err(at("its image"))?;
        }
        let port = if self.is_store() {
            None
        } else {
            let port = hv.alloc_unbound(self.domid, STORE).map_err(at("its store port"))?;
            // What the store has under way for an earlier life must not meet the next one.
            let connection = XENSTORE_RING_GPA + CONNECTION as u64;
            let reconnect = RECONNECT.to_le_bytes();
            hv.load(self.domid, connection, &reconnect).map_err(at("its ring"))?;
            let ring = Gfn::containing(XENSTORE_RING_GPA).0;
            hv.set_grant(self.domid, STORE, XENSTORE_GRANT, ring).map_err(at("its ring"))?;
            Some(port)
        };
        let incarnation = hv.info(self.domid).map_err(at("its state"))?.incarnation;
        let start = self.start_info(plan, incarnation, port, store_port);
        hv.load(self.domid, START_INFO_GPA, &start).map_err(at("its start info"))?;
        let start = SetStart {
            domid: self.domid,
            pad: [0; 3],
            entry: plan.entry,
            stack: STACK_TOP_GPA - 8,
            argument: START_INFO_GPA,
        };
        hv.set_start(&start).map_err(at("its registers"))?;
        self.is_built = true;
        Ok(Built::Whole(port))
    }

    fn start_info(
        &self,
        plan: &Plan,
        incarnation: u32,
        port: Option<EventPort>,
        store_port: EventPort,
    ) -> Vec<u8> {
        let store_config = store_port.0.to_le_bytes();
        let config: &[u8] =
            if self.is_store() { &store_config } else { self.domain.extra.as_bytes() };
        let info = StartInfo {
            magic: START_MAGIC,
            domid: self.domid,
            store_domid: STORE,
            incarnation,
            heap_bytes: u64::from(plan.heap_pages) * 4096,
            preserved_pages: self.domain.preserved_pages,
            xenstore_port: port.unwrap_or(EventPort(0)),
            config_bytes: u32::try_from(config.len()).unwrap_or(0),
            devices: u32::try_from(self.domain.devices.len()).unwrap_or(0),
            bundle_bytes: 0,
            name: padded(&self.domain.name),
        };
        let mut bytes = Vec::with_capacity(size_of::<StartInfo>() + config.len());
        bytes.extend_from_slice(info.as_bytes());
        bytes.extend_from_slice(config);
        bytes
    }
}

/// Gives a domain with a kernel of its own memory where it has none yet.
fn populate_for_kernel<H: Hypervisor>(
    hv: &mut H,
    domid: DomainId,
    gfn: u64,
    count: u32,
) -> Result<(), BuildError> {
    let access = ACCESS_READ | ACCESS_WRITE | ACCESS_EXECUTE;
    let flags = POPULATE_MISSING;
    let mut populate = Populate { domid, pad: 0, access, flags, count, gfn, done: 0 };
    until_done(|| hv.populate(&mut populate)).map_err(at("memory"))
}

/// A PCI function's place as people write it.
pub(crate) fn bdf_text(bdf: u32) -> String {
    let tail = format!("{:02x}:{:02x}.{}", bdf >> 8 & 0xff, bdf >> 3 & 0x1f, bdf & 7);
    if bdf >> 16 == 0 { tail } else { format!("{:04x}:{tail}", bdf >> 16) }
}

/// A name as the core wants it: the last byte stays NUL.
fn padded(name: &str) -> [u8; 32] {
    let mut padded = [0; 32];
    let len = name.len().min(31);
    padded[..len].copy_from_slice(&name.as_bytes()[..len]);
    padded
}
