//! Rules of driver domains: their driver, their devices, what they preserve.

use super::guests::Once;
use super::{Checked, Chosen, Rules, schema};
use crate::machine::Machine;
use crate::names::bdf_text;
use axolotl_abi::drivers::{self, DRIVERS, Service};
use axolotl_abi::system::{Device, Dma, Role};
use toml::Spanned;

/// Least preserved pages that a network driver gets when the file does not say a number.
const USUAL_PAGES: u32 = 16;
/// Most preserved pages: the room in the address space is far larger, the use is not.
const MAX_PRESERVED_PAGES: u32 = 1024;

/// What guests want of a backend.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Served {
    vifs: u32,
    disks: u32,
    /// Those of the disks that are copy-on-write images.
    images: u32,
}

impl Served {
    /// What all guests of `file` want of the domain `name`.
    pub(super) fn by(name: &str, file: &schema::File) -> Self {
        let domains = || file.domain.iter().map(Spanned::get_ref);
        let vifs = domains().flat_map(|d| &d.vif).map(Spanned::get_ref);
        let disks = domains().flat_map(|d| &d.disk).map(Spanned::get_ref);
        let disks = disks.filter(|disk| disk.backend.get_ref() == name);
        let is_image = |disk: &&schema::Disk| disk.cow.as_ref().is_some_and(|cow| *cow.get_ref());
        let number = |count| u32::try_from(count).unwrap_or(u32::MAX);
        Self {
            vifs: number(vifs.filter(|vif| vif.backend.get_ref() == name).count()),
            images: number(disks.clone().filter(is_image).count()),
            disks: number(disks.count()),
        }
    }

    /// Preserved pages that a backend of these needs, and those that are of use to it: a vif with
    /// fewer has fewer queues.
    fn pages(self, service: Service) -> (u32, u32) {
        let number = |pages| u32::try_from(pages).unwrap_or(u32::MAX);
        match service {
            Service::Network => {
                let (least, all) = netback::preserved::pages_for(self.vifs as usize);
                (number(least), number(all))
            }
            Service::Block => {
                let (disks, images) = (self.disks as usize, self.images as usize);
                let pages = number(blkback::preserved::pages_for(disks, images));
                (pages, pages)
            }
        }
    }

    /// What needs them, in words.
    fn words(self) -> String {
        let words = [(self.vifs, "vifs"), (self.disks, "disks")];
        let some = words.iter().filter(|(count, _)| *count > 0);
        let words: Vec<_> = some.map(|(count, what)| format!("{count} {what}")).collect();
        if words.is_empty() { "its backend".to_owned() } else { words.join(" and ") }
    }
}

impl Rules<'_> {
    /// The drivers of all driver domains, which other rules refer to.
    pub(super) fn drivers(
        &self,
        file: &schema::File,
        roles: &[Role],
        machine: &Machine,
    ) -> Checked<Vec<Option<Chosen>>> {
        let one = |(domain, role): (&Spanned<schema::Domain>, &Role)| {
            let d = domain.get_ref();
            self.belongs(d, *role, domain.span())?;
            if *role == Role::Driver { self.driver(d, machine).map(Some) } else { Ok(None) }
        };
        file.domain.iter().zip(roles).map(one).collect()
    }

    /// The driver that the file says, else the one of the device that the machine emulates.
    fn driver(&self, d: &schema::Domain, machine: &Machine) -> Checked<Chosen> {
        if let Some(image) = &d.image {
            let message = "`image` on a driver domain";
            return self.refuse(image.span(), message, "its driver already says it");
        }
        if let Some(driver) = &d.driver {
            let known: Vec<_> = DRIVERS.iter().map(|driver| (driver.name, driver)).collect();
            return Ok(Chosen::Known(self.word("driver", driver, &known)?));
        }
        let Some(first) = d.pci.first() else { return Ok(Chosen::Found) };
        let model = machine.model_at(self.bdf(&first.get_ref().bdf)?);
        let serves = |driver: &&drivers::Driver| driver.models.iter().any(|m| Some(*m) == model);
        Ok(DRIVERS.iter().find(serves).map_or(Chosen::Found, Chosen::Known))
    }

    /// How many preserved pages the domain has.
    pub(super) fn preserved(
        &self,
        d: &schema::Domain,
        driver: Option<Chosen>,
        served: Served,
    ) -> Checked<u32> {
        let (network, queues) = served.pages(Service::Network);
        let (block, _) = served.pages(Service::Block);
        let queues = queues.clamp(network, MAX_PRESERVED_PAGES.max(network));
        let (least, usual) = match driver {
            None => (0, 0),
            Some(Chosen::Known(driver)) if driver.service == Service::Block => (block, block),
            Some(Chosen::Known(_)) => (network, queues.max(USUAL_PAGES)),
            // What is found out later can be of either kind.
            Some(Chosen::Found) if served.disks > 0 => (block, block),
            Some(Chosen::Found) => (network, queues.max(block)),
        };
        let Some(pages) = &d.preserved_pages else { return Ok(usual) };
        let (name, number) = (d.name.get_ref(), *pages.get_ref());
        if number < least {
            let what = served.words();
            let message =
                format!("`{name}` has too few preserved pages: {number}, but {what} need {least}");
            let hint = "they keep the requests in flight over a restart: remove the line";
            return self.refuse(pages.span(), message, hint);
        }
        if number > MAX_PRESERVED_PAGES {
            let message = format!("`{name}` has {number} preserved pages");
            return self.refuse(pages.span(), message, format!("at most {MAX_PRESERVED_PAGES}"));
        }
        Ok(number)
    }

    /// The PCI functions of a driver domain. One that the machine does not emulate may be there
    /// on another machine.
    pub(super) fn devices(
        &self,
        d: &schema::Domain,
        driver: Option<Chosen>,
        machine: &Machine,
        claimed: &mut Once<u32>,
    ) -> Checked<Vec<Device>> {
        let device = |pci: &Spanned<schema::Pci>| {
            let pci = pci.get_ref();
            let (bdf, span) = (self.bdf(&pci.bdf)?, pci.bdf.span());
            if let (Some(Chosen::Known(driver)), Some(model)) = (driver, machine.model_at(bdf))
                && !driver.models.contains(&model)
            {
                let message = format!("the driver cannot drive the {model} at {}", bdf_text(bdf));
                return self.refuse(span, message, "remove `driver`: it is found by the device");
            }
            if let Some(other) = claimed.taken(bdf, d.name.get_ref()) {
                let message = format!("device {} belongs to `{other}` already", bdf_text(bdf));
                return self.refuse(span, message, "a device has one owner");
            }
            Ok(Device { bdf, dma: self.dma(pci)? })
        };
        d.pci.iter().map(device).collect()
    }

    fn dma(&self, pci: &schema::Pci) -> Checked<Dma> {
        let trusted = "`dma = \"trusted\"` lets the driver's device reach all memory";
        let Some(dma) = &pci.dma else {
            let message = format!("device {} has no `dma` choice", pci.bdf.get_ref());
            return self.refuse(pci.bdf.span(), message, trusted);
        };
        match self.word("dma", dma, &[("trusted", Dma::Trusted), ("iommu", Dma::Iommu)])? {
            Dma::Trusted => Ok(Dma::Trusted),
            Dma::Iommu => self.refuse(dma.span(), "the machine has no IOMMU", trusted),
        }
    }
}
