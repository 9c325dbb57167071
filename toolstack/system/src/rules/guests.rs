//! Rules of what guests use: their network interfaces and disks.

use super::{Checked, Chosen, Places, Rules, schema};
use crate::machine::{DiskContent, MachineDisk};
use axolotl_abi::drivers::Service;
use axolotl_abi::system::{Disk, Role, Vif};
use axolotl_abi::volume::{Extent, Volume};
use std::collections::HashMap;
use std::hash::Hash;
use std::ops::Range;
use toml::Spanned;

/// Most vifs of one guest.
const MAX_VIFS: usize = 8;
/// The last letters of the names of a guest's disks.
const LETTERS: &str = "abcdefghijklmnop";
/// Most disks of one guest.
const MAX_DISKS: usize = LETTERS.len();

/// Finds things that may occur once.
pub(super) struct Once<K> {
    seen: HashMap<K, String>,
}

impl<K: Hash + Eq> Once<K> {
    pub(super) fn new() -> Self {
        Self { seen: HashMap::new() }
    }

    /// Who had `key` before `owner`, if anybody.
    pub(super) fn taken(&mut self, key: K, owner: &str) -> Option<String> {
        self.seen.insert(key, owner.to_owned())
    }
}

/// Who uses which volumes.
#[derive(Default)]
pub(super) struct Users(Vec<User>);

/// A domain that uses a volume.
struct User {
    domain: String,
    backend: String,
    volume: Volume,
    writes: bool,
}

impl User {
    /// Whether the two, one of whom writes, share sectors as far as the text tells.
    fn disturbs(&self, other: &Self) -> bool {
        let same_disk = self.backend == other.backend && self.volume.disk == other.volume.disk;
        let writes = self.writes || other.writes;
        same_disk && writes && overlap(&self.volume.extent, &other.volume.extent)
    }
}

/// Whether two parts of a disk surely have sectors in common. Where the partitions are is not
/// known here.
fn overlap(one: &Extent, other: &Extent) -> bool {
    match (one, other) {
        (Extent::Whole, _) | (_, Extent::Whole) => true,
        (Extent::Range { offset, bytes }, Extent::Range { offset: from, bytes: count }) => {
            *offset < from.saturating_add(*count) && *from < offset.saturating_add(*bytes)
        }
        (one, other) => one == other,
    }
}

impl Rules<'_> {
    /// Checks that `backend` names a driver domain that serves `service`.
    fn backend(
        &self,
        backend: &Spanned<String>,
        service: Service,
        places: &Places<'_>,
    ) -> Checked<()> {
        let name = backend.get_ref();
        let all = places.file.domain.iter().map(|d| d.get_ref().name.get_ref().as_str());
        let mut all = all.zip(places.roles).zip(places.drivers);
        let serves = |driver: &Option<Chosen>| match driver {
            Some(Chosen::Known(driver)) => driver.service == service,
            Some(Chosen::Found) => true,
            None => false,
        };
        let what = match service {
            Service::Network => "network interfaces",
            Service::Block => "disks",
        };
        let able = all.clone().filter(|(_, driver)| serves(driver));
        let able: Vec<_> = able.map(|((name, _), _)| name).collect();
        let hint = match able.as_slice() {
            [] => format!("the system has no driver domain that serves {what}"),
            able => format!("driver domains that serve {what}: {}", able.join(", ")),
        };
        let message = match all.find(|((known, _), _)| known == name) {
            Some((_, driver)) if serves(driver) => return Ok(()),
            None => format!("backend `{name}` does not exist"),
            Some(((_, Role::Driver), _)) => format!("backend `{name}` does not serve {what}"),
            Some(_) => format!("backend `{name}` is not a driver domain"),
        };
        self.refuse(backend.span(), message, hint)
    }

    pub(super) fn vifs(
        &self,
        d: &schema::Domain,
        places: &Places<'_>,
        macs: &mut Once<[u8; 6]>,
    ) -> Checked<Vec<Vif>> {
        if let Some(vif) = d.vif.get(MAX_VIFS) {
            let message = format!("`{}` has too many vifs", d.name.get_ref());
            return self.refuse(vif.span(), message, format!("at most {MAX_VIFS}"));
        }
        let mut vif = |vif: &schema::Vif| {
            self.backend(&vif.backend, Service::Network, places)?;
            let mac = self.mac(&vif.mac)?;
            if let Some(other) = macs.taken(mac, d.name.get_ref()) {
                let message = format!("`{other}` has the mac {} already", vif.mac.get_ref());
                return self.refuse(vif.mac.span(), message, "each vif has its own");
            }
            Ok(Vif { backend: vif.backend.get_ref().clone(), mac })
        };
        d.vif.iter().map(|spanned| vif(spanned.get_ref())).collect()
    }

    pub(super) fn disks(
        &self,
        d: &schema::Domain,
        places: &Places<'_>,
        users: &mut Users,
    ) -> Checked<Vec<Disk>> {
        if let Some(disk) = d.disk.get(MAX_DISKS) {
            let message = format!("`{}` has too many disks", d.name.get_ref());
            return self.refuse(disk.span(), message, format!("at most {MAX_DISKS}"));
        }
        let mut devs = Once::new();
        let mut disks: Vec<Disk> = Vec::new();
        for spanned in &d.disk {
            let disk = spanned.get_ref();
            let dev = self.dev(disk, disks.len(), spanned.span())?;
            if devs.taken(dev.clone(), "").is_some() {
                let span = disk.dev.as_ref().map_or(spanned.span(), Spanned::span);
                let message = format!("`{}` has two disks `{dev}`", d.name.get_ref());
                return self.refuse(span, message, "give each its own `dev`");
            }
            disks.push(self.disk(d, disk, dev, places, users)?);
        }
        Ok(disks)
    }

    /// The disk's name in the guest: as written, or by its place in the list.
    fn dev(&self, disk: &schema::Disk, index: usize, span: Range<usize>) -> Checked<String> {
        let Some(dev) = &disk.dev else {
            return match LETTERS.chars().nth(index) {
                Some(letter) => Ok(format!("xvd{letter}")),
                None => self.refuse(span, "too many disks", format!("at most {MAX_DISKS}")),
            };
        };
        let letter = dev.get_ref().strip_prefix("xvd").filter(|letter| letter.len() == 1);
        if letter.is_some_and(|letter| LETTERS.contains(letter)) {
            return Ok(dev.get_ref().clone());
        }
        let message = format!("`{}` cannot name a disk", dev.get_ref());
        self.refuse(dev.span(), message, "use xvda to xvdp")
    }

    fn disk(
        &self,
        d: &schema::Domain,
        disk: &schema::Disk,
        dev: String,
        places: &Places<'_>,
        users: &mut Users,
    ) -> Checked<Disk> {
        self.backend(&disk.backend, Service::Block, places)?;
        let writable = match &disk.mode {
            Some(mode) => self.word("mode", mode, &[("rw", true), ("ro", false)])?,
            None => true,
        };
        let cow = disk.cow.as_ref().is_some_and(|cow| *cow.get_ref());
        if let Some(backing) = disk.backing.as_ref().filter(|_| !cow) {
            let message = "`backing` of a disk that is not copy-on-write";
            return self.refuse(backing.span(), message, "add `cow = true`, or remove it");
        }
        let backend = disk.backend.get_ref();
        let mut used = |text: &Spanned<String>, writes| {
            let volume = self.volume(text, backend, writes, places)?;
            let (shown, domain) = (volume.to_string(), d.name.get_ref().clone());
            let user = User { domain, backend: backend.clone(), volume, writes };
            if let Some(other) = users.0.iter().find(|other| other.disturbs(&user)) {
                let message = format!(
                    "`{}` and `{}` share {shown} of `{backend}`, and one of them writes it",
                    other.domain, user.domain
                );
                let hint = "only volumes that nobody writes can be shared";
                return self.refuse(text.span(), message, hint);
            }
            users.0.push(user);
            Ok(shown)
        };
        let volume = used(&disk.volume, writable)?;
        let backing = disk.backing.as_ref().map(|text| used(text, false)).transpose()?;
        Ok(Disk { backend: backend.clone(), dev, volume, writable, cow, backing })
    }

    /// Reads a volume, and checks it against the disks that the machine emulates for `backend`.
    fn volume(
        &self,
        text: &Spanned<String>,
        backend: &str,
        writes: bool,
        places: &Places<'_>,
    ) -> Checked<Volume> {
        let volume = match Volume::parse(text.get_ref()) {
            Ok(volume) => volume,
            Err(error) => {
                let message = format!("`{}` is not a volume", text.get_ref());
                return self.refuse(text.span(), message, error.to_string());
            }
        };
        let mut domains = places.file.domain.iter().map(Spanned::get_ref);
        let owner = domains.find(|domain| domain.name.get_ref() == backend);
        let Some(pci) = owner.and_then(|owner| owner.pci.first()) else { return Ok(volume) };
        let bdf = self.bdf(&pci.get_ref().bdf)?;
        let disks: Vec<_> = places.machine.disks_at(bdf).collect();
        if disks.is_empty() {
            return Ok(volume);
        }
        let index = usize::try_from(volume.disk - 1).unwrap_or(usize::MAX);
        let Some(disk) = disks.get(index) else {
            let message = format!("`{backend}` has no disk {}", volume.disk);
            let hint = format!("it has {}, counted from 1", disks.len());
            return self.refuse(text.span(), message, hint);
        };
        if writes && disk.readonly {
            let message = format!("disk {} of `{backend}` is read-only", volume.disk);
            return self.refuse(text.span(), message, "add `mode = \"ro\"`");
        }
        self.is_on(&volume, disk, text)?;
        Ok(volume)
    }

    /// Checks that the volume is on the disk, as far as the file decides that.
    fn is_on(&self, volume: &Volume, disk: &MachineDisk, text: &Spanned<String>) -> Checked<()> {
        if let (Extent::PartitionName(name), DiskContent::Partitions { partitions, .. }) =
            (&volume.extent, &disk.content)
            && !partitions.iter().any(|partition| partition.name == *name)
        {
            let message = format!("the disk has no partition `{name}`");
            let names: Vec<_> = partitions.iter().map(|known| known.name.as_str()).collect();
            return self.refuse(text.span(), message, format!("it has: {}", names.join(", ")));
        }
        if let (Extent::Range { offset, bytes }, Some(size)) = (&volume.extent, disk.bytes())
            && offset.checked_add(*bytes).is_none_or(|end| end > size)
        {
            let message = format!("`{}` leaves the disk", text.get_ref());
            return self.refuse(text.span(), message, format!("it has {size} bytes"));
        }
        Ok(())
    }
}
