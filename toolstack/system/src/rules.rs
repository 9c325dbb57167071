//! The rules of a system file, and its compilation.
//!
//! Each rule has a file under `systems/bad/` that breaks it, whose first line is the message it
//! must earn.

mod devices;
mod disks;
mod guests;
mod kernels;

use crate::error::{Source, SystemError};
use crate::machine::{HostForward, Machine, MachineNic, NicNet};
use crate::names::{MAX_NAME, bdf_text, is_name, nearest, parse_bdf, parse_mac};
use crate::{Compiled, schema};
use axolotl_abi::drivers::{DRIVERS, Driver, Service};
use axolotl_abi::system::{
    self, Domain, DriverImage, FIND_DRIVER, OnEnd, RestartLimits, Role, System,
};
use control::plan;
use devices::Served;
use guests::{Once, Users};
use kernels::MAX_VCPUS;
use std::ops::Range;
use toml::Spanned;

type Checked<T> = Result<T, Box<SystemError>>;

/// Version of the schema.
const SCHEMA_VERSION: u32 = 1;
/// Pages in a MiB.
const MIB: u32 = 256;
/// What the core keeps for itself: its image, its tables, the bundle.
const CORE_MIB: u32 = 16;
/// Memory of the control domain unless the file says otherwise.
const CONTROL_MIB: u32 = 8;
/// Least image that is assumed before images are built; the real size is checked when it is
/// known, see [`Compiled::check_image`].
const ASSUMED_IMAGE_PAGES: u32 = 64;
/// Most domains beside the control domain.
const MAX_DOMAINS: usize = 60;
/// Longest `extra`.
const MAX_EXTRA: usize = 16 * 1024;

/// Unikernel packages that a guest can be made of.
const GUEST_IMAGES: &[&str] =
    &["demo-guest", "disktest", "selftest", "ringbreaker", "pingpong", "blockbench"];
/// The store's package.
const STORE_IMAGE: &str = "store-domain";
/// Names that mean something else on the console and to `axl`.
const RESERVED_NAMES: &[&str] = &["control", "core"];

pub(crate) fn compile(source: Source, file: &schema::File) -> Checked<Compiled> {
    let rules = Rules { source: &source };
    if let Some(version) = &file.version {
        rules.version(version)?;
    }
    let name = rules.system_name(file)?;
    let machine = rules.machine(&file.machine)?;
    let mut images = vec!["control-domain".to_owned()];
    let domains = rules.domains(file, &machine, &mut images)?;
    let control_mib = file.control.memory.as_ref();
    let control_pages = rules.memory("control", control_mib, &file.machine, CONTROL_MIB, 0, 0)?;
    rules.total_memory(file, control_pages)?;
    let drivers = found_drivers(&domains, &mut images);
    let warnings = warnings(&machine, &domains);
    let mut memory_spans: Vec<_> = file.domain.iter().map(|d| d.get_ref().memory.span()).collect();
    memory_spans.push(control_mib.map_or_else(|| file.machine.span(), Spanned::span));
    let system = System { version: system::VERSION, name, domains, drivers };
    Ok(Compiled { machine, system, images, control_pages, warnings, memory_spans, source })
}

pub(crate) fn too_little_memory(
    source: &Source,
    span: Range<usize>,
    name: &str,
    pages: u32,
    needed: u32,
) -> Box<SystemError> {
    let message = format!(
        "`{name}` has too little memory: {} KiB, but its image, stack, tables and least heap need {} KiB",
        pages * 4,
        needed * 4,
    );
    let hint = format!("give it `memory = {}` (MiB) or more", needed.div_ceil(MIB));
    SystemError::new(source, span, message, hint)
}

struct Rules<'a> {
    source: &'a Source,
}

impl Rules<'_> {
    fn refuse<T>(
        &self,
        span: Range<usize>,
        message: impl Into<String>,
        hint: impl Into<String>,
    ) -> Checked<T> {
        Err(SystemError::new(self.source, span, message.into(), hint.into()))
    }

    /// One of the words of `known`, which are at the same time the hint.
    fn word<T: Copy>(
        &self,
        what: &str,
        value: &Spanned<String>,
        known: &[(&str, T)],
    ) -> Checked<T> {
        let word = value.get_ref().as_str();
        if let Some((_, meaning)) = known.iter().find(|(name, _)| *name == word) {
            return Ok(*meaning);
        }
        let names: Vec<&str> = known.iter().map(|(name, _)| *name).collect();
        let near = nearest(word, names.iter().copied());
        let mean = near.map_or(String::new(), |near| format!("did you mean `{near}`? "));
        let hint = format!("{mean}known: {}", names.join(", "));
        self.refuse(value.span(), format!("unknown {what} `{word}`"), hint)
    }

    fn within(&self, what: &str, value: &Spanned<u32>, least: u32, most: u32) -> Checked<u32> {
        let number = *value.get_ref();
        if (least..=most).contains(&number) {
            return Ok(number);
        }
        let hint = format!("it must be from {least} to {most}");
        self.refuse(value.span(), format!("`{what}` is {number}"), hint)
    }

    fn version(&self, version: &Spanned<u32>) -> Checked<()> {
        if *version.get_ref() == SCHEMA_VERSION {
            return Ok(());
        }
        self.refuse(
            version.span(),
            format!("version {} of the system file is unknown", version.get_ref()),
            format!("this program reads version {SCHEMA_VERSION}"),
        )
    }

    fn name(&self, what: &str, name: &Spanned<String>) -> Checked<()> {
        let text = name.get_ref();
        if text.len() > MAX_NAME {
            let message = format!("the name of the {what} is {} bytes long", text.len());
            return self.refuse(name.span(), message, format!("at most {MAX_NAME} bytes"));
        }
        if !is_name(text) {
            let message = format!("`{text}` cannot name a {what}");
            let hint = "names start with a-z and go on with a-z, 0-9, - and _";
            return self.refuse(name.span(), message, hint);
        }
        Ok(())
    }

    fn system_name(&self, file: &schema::File) -> Checked<String> {
        if let Some(name) = &file.name {
            self.name("system", name)?;
            return Ok(name.get_ref().clone());
        }
        let stem = std::path::Path::new(&self.source.path).file_stem();
        let stem = stem.and_then(|stem| stem.to_str()).unwrap_or_default();
        if is_name(stem) {
            return Ok(stem.to_owned());
        }
        let message = format!("the file's name `{stem}` cannot name a system");
        self.refuse(0..0, message, "add a line `name = \"…\"` at the top")
    }

    fn machine(&self, machine: &Spanned<schema::Machine>) -> Checked<Machine> {
        let machine = machine.get_ref();
        let memory_mib = self.within("memory", &machine.memory, 64, 65_536)?;
        let cpus = self.within("cpus", &machine.cpus, 1, 64)?;
        let (mut slots, mut ports) = (Once::new(), Once::new());
        let mut nics = Vec::new();
        for nic in &machine.nic {
            nics.push(self.nic(nic.get_ref(), &mut slots, &mut ports)?);
        }
        let disks = self.machine_disks(&machine.disk, &mut slots)?;
        Ok(Machine { memory_mib, cpus, cpu_model: machine.cpu.clone(), nics, disks })
    }

    fn nic(
        &self,
        nic: &schema::Nic,
        slots: &mut Once<u32>,
        ports: &mut Once<(bool, u16)>,
    ) -> Checked<MachineNic> {
        let model = self.word("model", &nic.model, &models(Service::Network))?;
        let bdf = self.slot(&nic.bdf)?;
        if slots.taken(bdf, model).is_some() {
            let message = format!("two cards at {}", bdf_text(bdf));
            return self.refuse(nic.bdf.span(), message, "give each its own `bdf`");
        }
        let mac = nic.mac.as_ref().map(|mac| self.mac(mac)).transpose()?;
        Ok(MachineNic { model: model.to_owned(), bdf, mac, net: self.net(nic, ports)? })
    }

    fn net(&self, nic: &schema::Nic, ports: &mut Once<(bool, u16)>) -> Checked<NicNet> {
        let user = match &nic.net {
            Some(net) => self.word("net", net, &[("user", true), ("socket", false)])?,
            None => true,
        };
        let ends = [&nic.listen, &nic.connect];
        if user {
            if let Some(end) = ends.into_iter().flatten().next() {
                let message = "`listen` and `connect` are for `net = \"socket\"`";
                return self.refuse(end.span(), message, "remove it, or add `net = \"socket\"`");
            }
            let forwards = nic.host_forward.iter().flat_map(|list| list.get_ref());
            let host_forward =
                forwards.map(|text| self.forward(text, ports)).collect::<Checked<_>>()?;
            return Ok(NicNet::User { host_forward });
        }
        if let Some(list) = &nic.host_forward {
            let message = "`host_forward` is for `net = \"user\"`";
            return self.refuse(list.span(), message, "remove one of the two");
        }
        if ends.into_iter().flatten().count() != 1 {
            let span = nic.net.as_ref().map_or(0..0, Spanned::span);
            let message = "a socket has exactly one of `listen` and `connect`";
            return self.refuse(span, message, "for instance `listen = \"127.0.0.1:9000\"`");
        }
        let [listen, connect] = ends.map(|end| end.as_ref().map(|text| text.get_ref().clone()));
        Ok(NicNet::Socket { listen, connect })
    }

    fn forward(
        &self,
        text: &Spanned<String>,
        ports: &mut Once<(bool, u16)>,
    ) -> Checked<HostForward> {
        let Some(forward) = HostForward::parse(text.get_ref()) else {
            let message = format!("`{}` is not a port forward", text.get_ref());
            let hint = "write [tcp:|udp:]HOST:PORT-[GUEST]:PORT, such as 127.0.0.1:8080-:80";
            return self.refuse(text.span(), message, hint);
        };
        let port = forward.host.port();
        let tcp = forward.protocol == crate::Protocol::Tcp;
        if ports.taken((tcp, port), "").is_some() {
            let message = format!("port {port} of the host is forwarded twice");
            return self.refuse(text.span(), message, "choose another port");
        }
        Ok(forward)
    }

    fn bdf(&self, text: &Spanned<String>) -> Checked<u32> {
        match parse_bdf(text.get_ref()) {
            Some(bdf) => Ok(bdf),
            None => self.refuse(
                text.span(),
                format!("`{}` is not a PCI address", text.get_ref()),
                "write bus:device.function in hexadecimal, such as 00:02.0",
            ),
        }
    }

    /// A PCI address at which the emulated machine has room.
    fn slot(&self, text: &Spanned<String>) -> Checked<u32> {
        let bdf = self.bdf(text)?;
        if !(2 << 3..31 << 3).contains(&bdf) || bdf & 7 != 0 {
            let message = format!("a card cannot be at {}", text.get_ref());
            return self.refuse(text.span(), message, "use 00:02.0 to 00:1e.0");
        }
        Ok(bdf)
    }

    fn mac(&self, text: &Spanned<String>) -> Checked<[u8; 6]> {
        let Some(mac) = parse_mac(text.get_ref()) else {
            let message = format!("`{}` is not an Ethernet address", text.get_ref());
            let hint = "write six bytes in hexadecimal, such as 00:16:3e:00:00:01";
            return self.refuse(text.span(), message, hint);
        };
        if mac[0] & 1 == 1 {
            let message = format!("`{}` is a multicast address", text.get_ref());
            let hint = "the first byte of a card's own address is even, such as 00:16:3e:00:00:01";
            return self.refuse(text.span(), message, hint);
        }
        if mac == [0; 6] {
            let message = "an Ethernet address of zeros";
            return self.refuse(text.span(), message, "take one such as 00:16:3e:00:00:01");
        }
        Ok(mac)
    }

    fn domains(
        &self,
        file: &schema::File,
        machine: &Machine,
        images: &mut Vec<String>,
    ) -> Checked<Vec<Domain>> {
        let roles = self.roles(file)?;
        let drivers = self.drivers(file, &roles, machine)?;
        let places = Places { file, machine, roles: &roles, drivers: &drivers };
        let (mut claimed, mut macs) = (Once::new(), Once::new());
        let mut users = Users::default();
        let mut domains = Vec::new();
        for (at, domain) in file.domain.iter().enumerate() {
            let (d, role) = (domain.get_ref(), &roles[at]);
            let image = match drivers[at] {
                Some(Chosen::Found) => FIND_DRIVER,
                Some(Chosen::Known(driver)) => index_of(images, driver.package),
                None => match self.kernel_image(d, *role)? {
                    Some(image) => index_of(images, &image),
                    None => index_of(images, self.package(d, *role, domain.span())?),
                },
            };
            let kernel = self.kernel(d, images)?;
            let name = d.name.get_ref();
            let preserved_pages = self.preserved(d, drivers[at], Served::by(name, file))?;
            let extra = self.extra(d)?;
            let memory = Some(&d.memory);
            let span = domain;
            let memory_pages = match &kernel {
                Some(_) => self.kernel_memory(&d.memory)?,
                None => self.memory(name, memory, span, 0, preserved_pages, extra.len())?,
            };
            let (budget_us, period_us) = self.budget(d, *role)?;
            domains.push(Domain {
                name: name.clone(),
                role: *role,
                image,
                memory_pages,
                preserved_pages,
                vcpus: self.vcpus(d)?,
                on_crash: self.on_crash(d, *role)?,
                on_poweroff: self.on_end("on_poweroff", d.on_poweroff.as_ref(), OnEnd::Destroy)?,
                on_reboot: self.on_end("on_reboot", d.on_reboot.as_ref(), OnEnd::Restart)?,
                restart: self.restart(d)?,
                budget_us,
                period_us,
                devices: self.devices(d, drivers[at], machine, &mut claimed)?,
                vifs: self.vifs(d, &places, &mut macs)?,
                disks: self.disks(d, &places, &mut users)?,
                extra,
                kernel,
            });
        }
        Ok(domains)
    }

    /// Names and roles of all domains, which other rules refer to.
    fn roles(&self, file: &schema::File) -> Checked<Vec<Role>> {
        let known = [("store", Role::Store), ("driver", Role::Driver), ("guest", Role::Guest)];
        let mut names = Once::new();
        let mut roles = Vec::new();
        for domain in &file.domain {
            let name = &domain.get_ref().name;
            self.name("domain", name)?;
            if RESERVED_NAMES.contains(&name.get_ref().as_str()) {
                let message = format!("the name `{}` is taken by the platform", name.get_ref());
                return self.refuse(name.span(), message, "choose another name");
            }
            if names.taken(name.get_ref().as_str(), "").is_some() {
                let message = format!("two domains are named `{}`", name.get_ref());
                return self.refuse(name.span(), message, "names are unique");
            }
            let role = match &domain.get_ref().role {
                Some(role) => self.word("role", role, &known)?,
                None => Role::Guest,
            };
            if role == Role::Store && roles.contains(&Role::Store) {
                let message = "a second store domain";
                return self.refuse(domain.get_ref().name.span(), message, "a system has one");
            }
            roles.push(role);
        }
        if !roles.contains(&Role::Store) {
            let message = "the system has no store domain";
            let hint = "add a [[domain]] with `role = \"store\"`; drivers and guests meet there";
            return self.refuse(0..0, message, hint);
        }
        if roles.len() > MAX_DOMAINS {
            let span = file.domain[MAX_DOMAINS].span();
            return self.refuse(span, "too many domains", format!("at most {MAX_DOMAINS}"));
        }
        Ok(roles)
    }

    /// Refuses keys that do not belong to the domain's role.
    fn belongs(&self, d: &schema::Domain, role: Role, span: Range<usize>) -> Checked<()> {
        let hint_driver = "only `role = \"driver\"` may have it";
        if role != Role::Driver {
            if let Some(driver) = &d.driver {
                return self.refuse(
                    driver.span(),
                    "`driver` on a domain that is none",
                    hint_driver,
                );
            }
            if let (Some(pci), Role::Store) = (d.pci.first(), role) {
                let message = "`pci` on the store";
                return self.refuse(pci.span(), message, "devices are for drivers and guests");
            }
        } else if d.pci.is_empty() {
            let message = format!("driver domain `{}` has no device", d.name.get_ref());
            let hint = "add `pci = [{ bdf = \"00:02.0\", dma = \"trusted\" }]`";
            return self.refuse(span, message, hint);
        }
        if let (Some(vif), true) = (d.vif.first(), role != Role::Guest) {
            let message = "`vif` on a domain that is no guest";
            return self.refuse(vif.span(), message, "network interfaces are for guests");
        }
        if let (Some(disk), true) = (d.disk.first(), role != Role::Guest) {
            let message = "`disk` on a domain that is no guest";
            return self.refuse(disk.span(), message, "disks are for guests");
        }
        Ok(())
    }

    fn package(&self, d: &schema::Domain, role: Role, span: Range<usize>) -> Checked<&'static str> {
        let known: Vec<_> = match role {
            Role::Store => vec![(STORE_IMAGE, STORE_IMAGE)],
            _ => GUEST_IMAGES.iter().map(|name| (*name, *name)).collect(),
        };
        match (&d.image, role) {
            (Some(image), _) => self.word("image", image, &known),
            (None, Role::Store) => Ok(STORE_IMAGE),
            (None, _) => {
                let message = format!("guest `{}` has no image", d.name.get_ref());
                self.refuse(span, message, "add `image = \"demo-guest\"`")
            }
        }
    }

    fn extra(&self, d: &schema::Domain) -> Checked<String> {
        let Some(extra) = &d.extra else { return Ok(String::new()) };
        if extra.get_ref().len() > MAX_EXTRA {
            let message = format!("`extra` is {} bytes long", extra.get_ref().len());
            return self.refuse(extra.span(), message, format!("at most {MAX_EXTRA} bytes"));
        }
        Ok(extra.get_ref().clone())
    }

    fn memory<T>(
        &self,
        name: &str,
        memory: Option<&Spanned<u32>>,
        place: &Spanned<T>,
        default_mib: u32,
        preserved: u32,
        config_bytes: usize,
    ) -> Checked<u32> {
        let span = memory.map_or_else(|| place.span(), Spanned::span);
        let mib = memory.map_or(default_mib, |mib| *mib.get_ref());
        let pages = mib.saturating_mul(MIB);
        let needed = plan::needed_pages(ASSUMED_IMAGE_PAGES, preserved, config_bytes);
        if pages < needed {
            return Err(too_little_memory(self.source, span, name, pages, needed));
        }
        if pages > plan::MAX_PAGES {
            let hint = format!("a unikernel has at most {} MiB", plan::MAX_PAGES / MIB);
            return self.refuse(span, format!("`{name}` has {mib} MiB of memory"), hint);
        }
        Ok(pages)
    }

    fn total_memory(&self, file: &schema::File, control_pages: u32) -> Checked<()> {
        let domains = file.domain.iter().map(|d| u64::from(*d.get_ref().memory.get_ref()));
        let wanted = domains.sum::<u64>() + u64::from(control_pages / MIB) + u64::from(CORE_MIB);
        let memory = &file.machine.get_ref().memory;
        if wanted <= u64::from(*memory.get_ref()) {
            return Ok(());
        }
        let message = format!(
            "the domains, the control domain and the core need {wanted} MiB, the machine has {}",
            memory.get_ref()
        );
        self.refuse(memory.span(), message, format!("give the machine `memory = {wanted}` or more"))
    }

    fn vcpus(&self, d: &schema::Domain) -> Checked<u32> {
        match &d.vcpus {
            Some(vcpus) if d.kernel.is_some() => self.within("vcpus", vcpus, 1, MAX_VCPUS),
            Some(vcpus) if *vcpus.get_ref() != 1 => self.refuse(
                vcpus.span(),
                format!("`{}` has {} vcpus", d.name.get_ref(), vcpus.get_ref()),
                "a unikernel has one: remove the line",
            ),
            _ => Ok(1),
        }
    }

    fn on_crash(&self, d: &schema::Domain, role: Role) -> Checked<OnEnd> {
        let word = d.on_crash.as_ref();
        if role != Role::Store {
            return self.on_end("on_crash", word, OnEnd::Restart);
        }
        let action = self.on_end("on_crash", word, OnEnd::Preserve)?;
        match word {
            Some(word) if action == OnEnd::Restart => {
                let hint = "its tree would be lost: remove the line, it stays for inspection";
                self.refuse(word.span(), "a store cannot be restarted yet", hint)
            }
            _ => Ok(action),
        }
    }

    fn on_end(&self, key: &str, value: Option<&Spanned<String>>, default: OnEnd) -> Checked<OnEnd> {
        let known = [
            ("restart", OnEnd::Restart),
            ("preserve", OnEnd::Preserve),
            ("destroy", OnEnd::Destroy),
        ];
        value.map_or(Ok(default), |value| self.word(&format!("{key} action"), value, &known))
    }

    fn restart(&self, d: &schema::Domain) -> Checked<RestartLimits> {
        let mut limits =
            RestartLimits { min_runtime_ms: 500, max_quick_deaths: 5, max_per_minute: 60 };
        let Some(restart) = &d.restart else { return Ok(limits) };
        let restart = restart.get_ref();
        if let Some(value) = &restart.min_runtime_ms {
            limits.min_runtime_ms = self.within("min_runtime_ms", value, 0, 3_600_000)?;
        }
        if let Some(value) = &restart.max_quick_deaths {
            limits.max_quick_deaths = self.within("max_quick_deaths", value, 0, 1_000_000)?;
        }
        if let Some(value) = &restart.max_per_minute {
            limits.max_per_minute = self.within("max_per_minute", value, 0, 60_000)?;
        }
        Ok(limits)
    }

    fn budget(&self, d: &schema::Domain, role: Role) -> Checked<(u32, u32)> {
        let default = if role == Role::Guest { (0, 0) } else { (8_000, 10_000) };
        let period = match &d.period_us {
            Some(period) => self.within("period_us", period, 1_000, 1_000_000)?,
            None => 10_000,
        };
        match &d.budget_us {
            Some(budget) => Ok((self.within("budget_us", budget, 0, period)?, period)),
            None if d.period_us.is_some() => self.refuse(
                d.period_us.as_ref().map_or(0..0, Spanned::span),
                "`period_us` without `budget_us`",
                "add `budget_us`, the CPU time in each period",
            ),
            None => Ok(default),
        }
    }
}

/// The index of `package` in the list of images, which grows when it is new.
fn index_of(images: &mut Vec<String>, package: &str) -> u32 {
    let at = images.iter().position(|image| image == package).unwrap_or_else(|| {
        images.push(package.to_owned());
        images.len() - 1
    });
    u32::try_from(at).unwrap_or(u32::MAX)
}

/// The driver of a driver domain.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Chosen {
    /// The file says it, or the device that the machine emulates does.
    Known(&'static Driver),
    /// The control domain finds it when it sees the device.
    Found,
}

/// What the rules of a domain's interfaces and disks refer to.
struct Places<'f> {
    file: &'f schema::File,
    machine: &'f Machine,
    roles: &'f [Role],
    drivers: &'f [Option<Chosen>],
}

/// QEMU's models of devices that serve something, as words.
fn models(service: Service) -> Vec<(&'static str, &'static str)> {
    let drivers = DRIVERS.iter().filter(|driver| driver.service == service);
    drivers.flat_map(|driver| driver.models).map(|model| (*model, *model)).collect()
}

/// All drivers, when a domain's driver is to be found.
fn found_drivers(domains: &[Domain], images: &mut Vec<String>) -> Vec<DriverImage> {
    if !domains.iter().any(|domain| domain.image == FIND_DRIVER) {
        return Vec::new();
    }
    let image = |driver: &Driver| DriverImage {
        driver: driver.name.to_owned(),
        image: index_of(images, driver.package),
    };
    DRIVERS.iter().map(image).collect()
}

fn warnings(machine: &Machine, domains: &[Domain]) -> Vec<String> {
    let mut warnings = Vec::new();
    let mut devices = domains.iter().flat_map(|domain| &domain.devices);
    let nics = machine.nics.iter().map(|nic| (nic.bdf, &nic.model));
    let mut emulated: Vec<_> =
        nics.chain(machine.disks.iter().map(|disk| (disk.bdf, &disk.model))).collect();
    emulated.dedup();
    for (bdf, model) in emulated {
        if !devices.clone().any(|device| device.bdf == bdf) {
            warnings.push(format!("no domain drives the {model} at {}", bdf_text(bdf)));
        }
    }
    for device in devices.clone().filter(|device| machine.model_at(device.bdf).is_none()) {
        let place = bdf_text(device.bdf);
        warnings.push(format!("the emulated machine has no device at {place}"));
    }
    for domain in domains.iter().filter(|domain| domain.role == Role::Driver) {
        let used = |guest: &Domain| {
            guest.vifs.iter().any(|vif| vif.backend == domain.name)
                || guest.disks.iter().any(|disk| disk.backend == domain.name)
        };
        if !domains.iter().any(used) {
            warnings.push(format!("nobody uses driver domain `{}`", domain.name));
        }
    }
    if devices.any(|device| device.dma == system::Dma::Trusted) {
        warnings.push("devices with dma = \"trusted\" can reach all memory".to_owned());
    }
    warnings
}
