//! A core in memory, and bundles for it: for tests of the control domain and of whoever talks
//! to it.
//!
//! The fake keeps the core's rules as far as a builder can break them: memory is populated once
//! and within the limit, images are loaded only into memory and only while a domain is being
//! built, a domain starts only with registers. It panics when one is broken, as the control
//! domain must never do.

use crate::Hypervisor;
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;
use axolotl_abi::control::{
    CONSOLE_OF_CORE, Create, DEATH_CRASHED, DEATH_FAULT, DEATH_RESTARTED, DEATH_SHUTDOWN,
    DeathRecord, DomainInfo, ExitCounts, INFO_DMA_TRUSTED, POPULATE_MISSING, PciFunction, PhysInfo,
    Populate, STATE_BLOCKED, STATE_BUILDING, STATE_DEAD, STATE_PAUSED, STATE_RUNNING, SetStart,
};
use axolotl_abi::image::{
    BUNDLE_MAGIC, BundleHeader, BundleImage, IMAGE_MAGIC, ImageHeader, Segment,
};
use axolotl_abi::protocol::crc32;
use axolotl_abi::system::System;
use core::mem::size_of;
use xen_abi::{DomainId, Errno, EventPort, GrantRef};
use zerocopy::{FromZeros, IntoBytes};

/// A domain of the fake.
#[derive(Clone, Debug)]
pub struct FakeDomain {
    /// Name.
    pub name: String,
    /// `STATE_*`.
    pub state: u8,
    /// Which life.
    pub incarnation: u32,
    /// Pages of memory.
    pub pages: BTreeSet<u64>,
    /// Bytes loaded, by address.
    pub loaded: BTreeMap<u64, Vec<u8>>,
    /// Ports allocated in it.
    pub ports: u32,
    /// Devices.
    pub devices: Vec<u32>,
    /// All that it ever wrote to its console.
    pub console: Vec<u8>,
    /// The last death.
    pub death: DeathRecord,
    max_pages: u32,
    started_ns: u64,
    has_start: bool,
    has_ring: bool,
    trusted: bool,
}

/// The core. Time stands still but when a test moves it.
#[derive(Debug, Default)]
pub struct FakeCore {
    /// Its domains.
    pub domains: BTreeMap<u16, FakeDomain>,
    /// System time.
    pub now_ns: u64,
    /// What was written to the machine's console.
    pub output: Vec<u8>,
    /// Names of the operations that changed something, in order.
    pub log: Vec<String>,
    /// How often `EAGAIN` is answered before an operation that may answer so is done.
    pub again: u32,
    /// What the next operation of this name answers instead of being done.
    pub fail: Option<(&'static str, Errno)>,
    /// The PCI functions of the machine.
    pub functions: Vec<PciFunction>,
    /// Whose console rings are mapped.
    pub consoles: BTreeSet<u16>,
    again_left: u32,
}

impl FakeCore {
    /// A core with the control domain in it.
    #[must_use]
    pub fn new() -> Self {
        let mut core = Self { now_ns: 1_000_000, ..Self::default() };
        core.insert(0, "control", 2048);
        let own = core.domains.get_mut(&0).expect("just made");
        own.state = STATE_RUNNING;
        core
    }

    fn insert(&mut self, domid: u16, name: &str, max_pages: u32) {
        let domain = FakeDomain {
            name: name.to_string(),
            state: STATE_BUILDING,
            incarnation: 1,
            pages: BTreeSet::new(),
            loaded: BTreeMap::new(),
            ports: 0,
            devices: Vec::new(),
            console: Vec::new(),
            death: DeathRecord::new_zeroed(),
            max_pages,
            started_ns: 0,
            has_start: false,
            has_ring: false,
            trusted: false,
        };
        self.domains.insert(domid, domain);
    }

    /// The domain named `name`.
    ///
    /// # Panics
    /// When there is none.
    pub fn named(&mut self, name: &str) -> &mut FakeDomain {
        self.domains.values_mut().find(|domain| domain.name == name).expect("such a domain")
    }

    /// Ends a domain by a page fault (or, with a `reason`, by its own shutdown), `lived_ns`
    /// after its start.
    pub fn kill(&mut self, name: &str, reason: Option<u32>, lived_ns: u64) {
        self.now_ns += lived_ns;
        let now = self.now_ns;
        let domain = self.named(name);
        let (cause, detail) = reason.map_or((DEATH_FAULT, 0), |reason| (DEATH_SHUTDOWN, reason));
        domain.die(cause, detail, now);
    }

    fn find(&mut self, domid: DomainId) -> Result<&mut FakeDomain, Errno> {
        self.domains.get_mut(&domid.0).ok_or(Errno::ESRCH)
    }

    fn building(&mut self, domid: DomainId) -> Result<&mut FakeDomain, Errno> {
        let domain = self.find(domid)?;
        assert_eq!(domain.state, STATE_BUILDING, "{} is not being built", domain.name);
        Ok(domain)
    }

    /// Notes an operation; answers the error that a test wants.
    fn note(&mut self, operation: &'static str, domid: DomainId) -> Result<(), Errno> {
        self.log.push(format!("{operation} {domid}"));
        match self.fail {
            Some((name, errno)) if name == operation => {
                self.fail = None;
                Err(errno)
            }
            _ => Ok(()),
        }
    }

    fn step(&mut self) -> Result<(), Errno> {
        if self.again_left == 0 {
            self.again_left = self.again;
            return Ok(());
        }
        self.again_left -= 1;
        Err(Errno::EAGAIN)
    }
}

impl FakeDomain {
    fn die(&mut self, cause: u32, detail: u32, now: u64) {
        self.state = STATE_DEAD;
        self.death.incarnation = self.incarnation;
        self.death.cause = cause;
        self.death.detail = detail;
        self.death.vector = 14;
        self.death.address = 0xdead_b000;
        self.death.rip = 0x20_1234;
        self.death.backtrace[0] = 0x20_1234;
        self.death.backtrace[1] = 0x20_5678;
        self.death.time_ns = now;
        self.death.lived_ns = now - self.started_ns;
        self.death.restarted_ns = 0;
    }
}

impl Hypervisor for FakeCore {
    fn create(&mut self, domain: &Create) -> Result<DomainId, Errno> {
        self.note("create", domain.domid)?;
        if self.domains.contains_key(&domain.domid.0) {
            return Err(Errno::EEXIST);
        }
        assert_eq!((domain.rights, domain.name[31]), (0, 0));
        let name = String::from_utf8_lossy(&domain.name).trim_end_matches('\0').to_string();
        self.insert(domain.domid.0, &name, domain.max_pages);
        Ok(domain.domid)
    }

    fn populate(&mut self, range: &mut Populate) -> Result<(), Errno> {
        self.step()?;
        self.note("populate", range.domid)?;
        let domain = self.building(range.domid)?;
        assert_ne!(range.count, 0);
        for gfn in range.gfn..range.gfn + u64::from(range.count) {
            let is_new = domain.pages.insert(gfn);
            let may_be_there = range.flags & POPULATE_MISSING != 0;
            assert!(is_new || may_be_there, "page {gfn:#x} is populated twice");
        }
        assert!(domain.pages.len() < domain.max_pages as usize, "more memory than allowed");
        Ok(())
    }

    fn load(&mut self, domid: DomainId, gpa: u64, bytes: &[u8]) -> Result<(), Errno> {
        self.note("load", domid)?;
        let domain = self.building(domid)?;
        assert!(bytes.len() <= 65_536, "a load is too long");
        for gfn in gpa / 4096..(gpa + bytes.len() as u64).div_ceil(4096) {
            assert!(domain.pages.contains(&gfn), "a load into nothing at {gfn:#x}");
        }
        domain.loaded.insert(gpa, bytes.to_vec());
        Ok(())
    }

    fn set_start(&mut self, start: &SetStart) -> Result<(), Errno> {
        self.note("set_start", start.domid)?;
        let domain = self.building(start.domid)?;
        assert!(domain.pages.contains(&(start.entry / 4096)));
        assert!(domain.pages.contains(&(start.stack / 4096)));
        assert!(domain.loaded.contains_key(&start.argument));
        domain.has_start = true;
        Ok(())
    }

    fn console_ring(&mut self, of: DomainId, _: EventPort, _: &mut [u8]) -> Result<usize, Errno> {
        self.consoles.insert(of.0);
        Ok(0)
    }

    fn exits(&mut self, _: DomainId) -> Result<ExitCounts, Errno> {
        Err(Errno::EINVAL)
    }

    fn console_type(&mut self, _: DomainId, _: EventPort, _: &[u8]) -> Result<bool, Errno> {
        Ok(false)
    }

    fn leave_console(&mut self, domid: DomainId) {
        self.consoles.remove(&domid.0);
    }

    fn set_hvm_param(&mut self, domid: DomainId, _index: u32, _value: u64) -> Result<(), Errno> {
        self.note("set_hvm_param", domid)
    }

    fn set_grant(
        &mut self,
        domid: DomainId,
        grantee: DomainId,
        gref: GrantRef,
        gfn: u64,
    ) -> Result<(), Errno> {
        self.note("set_grant", domid)?;
        let domain = self.building(domid)?;
        assert!(domain.pages.contains(&gfn));
        match (grantee, gref) {
            (DomainId(1), GrantRef(1)) => domain.has_ring = true,
            (DomainId(0), GrantRef(0)) => {}
            other => panic!("a grant for nobody: {other:?}"),
        }
        Ok(())
    }

    fn unpause(&mut self, domid: DomainId) -> Result<(), Errno> {
        self.note("unpause", domid)?;
        let now = self.now_ns;
        let domain = self.find(domid)?;
        match domain.state {
            STATE_BUILDING => {
                assert!(domain.has_start && (domain.has_ring || domid.0 == 1));
                domain.started_ns = now;
                domain.death.restarted_ns = if domain.incarnation > 1 { now } else { 0 };
            }
            STATE_PAUSED => {}
            _ => return Err(Errno::EINVAL),
        }
        domain.state = STATE_BLOCKED;
        Ok(())
    }

    fn pause(&mut self, domid: DomainId) -> Result<(), Errno> {
        self.step()?;
        self.note("pause", domid)?;
        let domain = self.find(domid)?;
        match domain.state {
            STATE_RUNNING | STATE_BLOCKED => domain.state = STATE_PAUSED,
            _ => return Err(Errno::EINVAL),
        }
        Ok(())
    }

    fn destroy(&mut self, domid: DomainId) -> Result<(), Errno> {
        self.step()?;
        self.note("destroy", domid)?;
        self.domains.remove(&domid.0).map(drop).ok_or(Errno::ESRCH)
    }

    fn restart(&mut self, domid: DomainId) -> Result<(), Errno> {
        self.step()?;
        self.note("restart", domid)?;
        let now = self.now_ns;
        let domain = self.find(domid)?;
        match domain.state {
            STATE_BUILDING => return Err(Errno::EINVAL),
            STATE_DEAD => {}
            _ => domain.die(DEATH_RESTARTED, 0, now),
        }
        domain.state = STATE_BUILDING;
        domain.incarnation += 1;
        domain.loaded.clear();
        domain.has_start = false;
        domain.has_ring = false;
        Ok(())
    }

    fn crash(&mut self, domid: DomainId) -> Result<(), Errno> {
        self.note("crash", domid)?;
        let now = self.now_ns;
        self.find(domid)?.die(DEATH_CRASHED, 0, now);
        Ok(())
    }

    fn info(&mut self, from: DomainId) -> Result<DomainInfo, Errno> {
        let (id, domain) = self.domains.range(from.0..).next().ok_or(Errno::ESRCH)?;
        let mut info = DomainInfo::new_zeroed();
        info.domid = DomainId(*id);
        info.state = domain.state;
        info.incarnation = domain.incarnation;
        info.pages = domain.max_pages;
        info.max_pages = domain.max_pages;
        info.started_ns = domain.started_ns;
        info.flags = if domain.trusted { INFO_DMA_TRUSTED } else { 0 };
        Ok(info)
    }

    fn death(&mut self, domid: DomainId) -> Result<DeathRecord, Errno> {
        Ok(self.find(domid)?.death)
    }

    fn pci_function(&mut self, bdf: u32) -> Result<PciFunction, Errno> {
        let mut functions = self.functions.iter();
        functions.find(|function| function.bdf == bdf).copied().ok_or(Errno::ENODEV)
    }

    fn assign_device(
        &mut self,
        domid: DomainId,
        bdf: u32,
        trusted: bool,
        gpa: u64,
    ) -> Result<u64, Errno> {
        self.note("assign_device", domid)?;
        let domain = self.building(domid)?;
        domain.devices.push(bdf);
        domain.trusted = trusted;
        Ok(gpa + 0x2_0000)
    }

    fn console_read(
        &mut self,
        domid: DomainId,
        position: &mut u64,
        buffer: &mut [u8],
    ) -> Result<usize, Errno> {
        let core = b"booting\nrunning\n".to_vec();
        let console = match domid {
            CONSOLE_OF_CORE => core,
            _ => self.find(domid)?.console.clone(),
        };
        // The core keeps the last 4096 bytes.
        let oldest = console.len().saturating_sub(4096);
        let start = usize::try_from(*position).unwrap_or(usize::MAX).clamp(oldest, console.len());
        let bytes = &console[start..];
        let len = bytes.len().min(buffer.len());
        buffer[..len].copy_from_slice(&bytes[..len]);
        *position = (start + len) as u64;
        Ok(len)
    }

    fn physical(&mut self) -> Result<PhysInfo, Errno> {
        let mut info = PhysInfo::new_zeroed();
        info.version = 1;
        info.cpus = 2;
        info.total_pages = 65_536;
        info.free_pages = 50_000;
        Ok(info)
    }

    fn alloc_unbound(&mut self, domid: DomainId, remote: DomainId) -> Result<EventPort, Errno> {
        self.note("alloc_unbound", domid)?;
        assert!(remote.0 <= 1, "a port for the store or for us");
        let domain = self.building(domid)?;
        domain.ports += 1;
        Ok(EventPort(domain.ports))
    }

    fn console_write(&mut self, text: &[u8]) {
        self.output.extend_from_slice(text);
    }

    fn now_ns(&self) -> u64 {
        self.now_ns
    }
}

/// A flat image with a segment of code and one of data.
#[must_use]
pub fn image(code_bytes: usize) -> Vec<u8> {
    let header = ImageHeader { magic: IMAGE_MAGIC, entry: 0x20_0010, segments: 2, reserved: 0 };
    let code_pages = code_bytes.div_ceil(4096);
    let pages = u32::try_from(code_pages).expect("a small image");
    let code =
        Segment { gfn: 0x200, pages, access: 5, file_offset: 4096, file_bytes: code_bytes as u64 };
    let data = Segment {
        gfn: 0x200 + u64::from(pages),
        pages: 4,
        access: 3,
        file_offset: 4096 * (1 + code_pages as u64),
        file_bytes: 100,
    };
    let mut image = [header.as_bytes(), code.as_bytes(), data.as_bytes()].concat();
    image.resize(4096 * (1 + code_pages), 0x90);
    image.extend_from_slice(&[0xda; 100]);
    image
}

/// A flat image of a ramdisk.
#[must_use]
pub fn ramdisk(bytes: usize) -> Vec<u8> {
    let header = ImageHeader { magic: IMAGE_MAGIC, entry: 0, segments: 1, reserved: 0 };
    let pages = u32::try_from(bytes.div_ceil(4096)).expect("a small ramdisk");
    let segment = Segment { gfn: 0, pages, access: 1, file_offset: 4096, file_bytes: bytes as u64 };
    let mut image = [header.as_bytes(), segment.as_bytes()].concat();
    image.resize(4096 + bytes, 0x55);
    image
}

/// A bundle as the host tool makes it.
#[must_use]
pub fn bundle(system: &System, images: &[Vec<u8>]) -> Vec<u8> {
    let description = postcard::to_allocvec(system).expect("a description can be encoded");
    let table_end = size_of::<BundleHeader>() + images.len() * size_of::<BundleImage>();
    let mut bytes = vec![0; table_end];
    bytes.extend_from_slice(&description);
    let mut table = Vec::new();
    for image in images {
        bytes.resize(bytes.len().next_multiple_of(4096), 0);
        let entry =
            BundleImage { offset: bytes.len() as u64, bytes: image.len() as u64, name: [0; 32] };
        table.extend_from_slice(entry.as_bytes());
        bytes.extend_from_slice(image);
    }
    let header = BundleHeader {
        magic: BUNDLE_MAGIC,
        bundle_bytes: bytes.len() as u64,
        description_offset: table_end as u64,
        description_bytes: u32::try_from(description.len()).expect("a short description"),
        images: u32::try_from(images.len()).expect("few images"),
        control_pages: 2048,
        crc32: crc32(&bytes[table_end..]),
    };
    bytes[..size_of::<BundleHeader>()].copy_from_slice(header.as_bytes());
    bytes[size_of::<BundleHeader>()..table_end].copy_from_slice(&table);
    bytes
}

/// The description of a store, a driver `net0` and a guest `demo` behind it.
#[must_use]
pub fn system() -> System {
    use axolotl_abi::system::{Device, Dma, Domain, OnEnd, RestartLimits, Role, VERSION, Vif};
    let domain = |name: &str, role, image| Domain {
        name: name.into(),
        role,
        image,
        memory_pages: 1024,
        preserved_pages: if role == Role::Driver { 16 } else { 0 },
        vcpus: 1,
        on_crash: if role == Role::Store { OnEnd::Preserve } else { OnEnd::Restart },
        on_poweroff: OnEnd::Destroy,
        on_reboot: OnEnd::Restart,
        restart: RestartLimits { min_runtime_ms: 500, max_quick_deaths: 3, max_per_minute: 10 },
        budget_us: 0,
        period_us: 0,
        devices: Vec::new(),
        disks: vec![],
        vifs: Vec::new(),
        extra: String::new(),
        kernel: None,
    };
    let mut net0 = domain("net0", Role::Driver, 2);
    net0.devices.push(Device { bdf: 0x10, dma: Dma::Trusted });
    let mut demo = domain("demo", Role::Guest, 3);
    demo.vifs.push(Vif { backend: "net0".into(), mac: [0, 0x16, 0x3e, 0, 0, 1] });
    demo.extra = "ip=dhcp".into();
    let store = domain("store", Role::Store, 1);
    System {
        version: VERSION,
        name: "fake".into(),
        domains: vec![store, net0, demo],
        drivers: vec![],
    }
}

/// [`system`] with a disk domain `disk0` (d4) and two disks of the guest's on it.
///
/// # Panics
/// Never: [`system`] has these domains.
#[must_use]
pub fn disk_system() -> System {
    use axolotl_abi::system::Disk;
    let mut system = system();
    let mut disk0 = system.domains[1].clone();
    disk0.name = "disk0".into();
    disk0.devices[0].bdf = 0x18;
    let disk = |dev: &str, volume: &str| Disk {
        backend: "disk0".into(),
        dev: dev.into(),
        volume: volume.into(),
        writable: true,
        cow: false,
        backing: None,
    };
    let cow = Disk {
        writable: false,
        cow: true,
        backing: Some("gpt:base".into()),
        ..disk("xvdb", "gpt:top")
    };
    system.domains[2].disks = vec![disk("xvda", "2/range:0+1048576"), cow];
    system.domains.push(disk0);
    system
}

/// A bundle with [`system`].
#[must_use]
pub fn default_bundle() -> Vec<u8> {
    bundle(&system(), &[image(5000), image(9000), image(150_000), image(20_000)])
}
