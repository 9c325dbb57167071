//! Reading the bundle: the one input that decides what runs.

use alloc::string::String;
use alloc::vec::Vec;
use axolotl_abi::image::{BundleHeader, BundleImage, ImageError};
use axolotl_abi::protocol::crc32;
use axolotl_abi::system::{self, Domain, FIND_DRIVER, Role, System};
use axolotl_abi::volume::Volume;
use core::fmt;
use core::mem::size_of;
use xen_abi::blkif::device_number;

/// A bundle whose headers, checksum and description are sound. Images are checked when they are
/// laid out, so that a damaged image costs its domain and no other.
#[derive(Debug)]
pub struct Bundle<'b> {
    /// What to build.
    pub system: System,
    /// Flat images, by the index in [`Domain::image`] and in [`System::drivers`].
    pub images: Vec<&'b [u8]>,
}

/// Why a bundle cannot be used.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum BundleError {
    /// The headers are damaged.
    Header(ImageError),
    /// The bytes behind the image table are not what the host tool wrote.
    Checksum,
    /// The description is no system description.
    Description,
    /// The description has another version.
    Version(u32),
    /// The description contradicts itself.
    Inconsistent(String, &'static str),
}

impl fmt::Display for BundleError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Header(error) => write!(f, "the bundle's headers are damaged: {error:?}"),
            Self::Checksum => f.write_str("the bundle's checksum does not match"),
            Self::Description => f.write_str("the bundle's system description cannot be read"),
            Self::Version(version) => write!(f, "the system description has version {version}"),
            Self::Inconsistent(name, what) => write!(f, "domain {name:?}: {what}"),
        }
    }
}

impl<'b> Bundle<'b> {
    /// Reads a bundle.
    ///
    /// # Errors
    /// The first thing that is wrong with it.
    pub fn read(bytes: &'b [u8]) -> Result<Self, BundleError> {
        let (header, table) = BundleHeader::check(bytes).map_err(BundleError::Header)?;
        let truncated = BundleError::Header(ImageError::Truncated);
        let part = |offset: u64, len: u64| -> Option<&'b [u8]> {
            let start = usize::try_from(offset).ok()?;
            bytes.get(start..start.checked_add(usize::try_from(len).ok()?)?)
        };
        let covered = (size_of::<BundleHeader>() + size_of_val(table)) as u64;
        let len = header.bundle_bytes.checked_sub(covered).ok_or(truncated.clone())?;
        let rest = part(covered, len).ok_or(truncated.clone())?;
        if crc32(rest) != header.crc32 {
            return Err(BundleError::Checksum);
        }
        let description = part(header.description_offset, header.description_bytes.into());
        let system = read_description(description.ok_or(truncated.clone())?)?;
        let image = |image: &BundleImage| part(image.offset, image.bytes);
        let images: Option<Vec<_>> = table.iter().map(image).collect();
        let images = images.ok_or(truncated)?;
        check(&system, images.len())?;
        Ok(Self { system, images })
    }
}

fn read_description(bytes: &[u8]) -> Result<System, BundleError> {
    // The version is the first field, so that it can be read when the rest has changed.
    match postcard::take_from_bytes::<u32>(bytes) {
        Ok((system::VERSION, _)) => {}
        Ok((version, _)) => return Err(BundleError::Version(version)),
        Err(_) => return Err(BundleError::Description),
    }
    match postcard::take_from_bytes(bytes) {
        Ok((system, [])) => Ok(system),
        _ => Err(BundleError::Description),
    }
}

/// The rules that the builder relies on. The host tool has checked all of the schema's.
fn check(system: &System, images: usize) -> Result<(), BundleError> {
    let System { domains, drivers, .. } = system;
    if drivers.iter().any(|driver| driver.image as usize >= images) {
        let name = "driver".into();
        return Err(BundleError::Inconsistent(name, "there is no image of a driver"));
    }
    let inconsistent = |domain: &Domain, what| {
        Err(BundleError::Inconsistent(domain.name.chars().take(31).collect(), what))
    };
    for (at, domain) in domains.iter().enumerate() {
        let is_driver = |name: &str| {
            domains.iter().any(|other| other.name == name && other.role == Role::Driver)
        };
        let before = &domains[..at];
        let text = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        let what = if domain.name.is_empty() || domain.name.len() > 31 {
            "the name is too long, or empty"
        } else if !domain.name.chars().all(text) {
            "the name has characters that no name has"
        } else if domain.name == "control" || before.iter().any(|d| d.name == domain.name) {
            "the name is taken"
        } else if domain.role == Role::Control {
            "a second control domain"
        } else if domain.role == Role::Store && before.iter().any(|d| d.role == Role::Store) {
            "a second store domain"
        } else if domain.image == FIND_DRIVER && (domain.devices.is_empty() || drivers.is_empty()) {
            "there is no driver to find"
        } else if domain.image != FIND_DRIVER && domain.image as usize >= images {
            "there is no such image"
        } else if ramdisk(domain).is_some_and(|index| index as usize >= images) {
            "there is no such ramdisk"
        } else if domain.kernel.is_some() && domain.role != Role::Guest {
            "only a guest has a kernel of its own"
        } else if !backends(domain).all(is_driver) {
            "its backend is not a driver domain"
        } else if !disks_are_sound(domain) {
            "a disk has no usable name, or one that is taken, or no volume"
        } else if at >= 128 {
            "too many domains"
        } else {
            continue;
        };
        return inconsistent(domain, what);
    }
    Ok(())
}

/// Whom a guest's devices come from.
fn backends(domain: &Domain) -> impl Iterator<Item = &str> {
    let vifs = domain.vifs.iter().map(|vif| vif.backend.as_str());
    vifs.chain(domain.disks.iter().map(|disk| disk.backend.as_str()))
}

fn disks_are_sound(domain: &Domain) -> bool {
    let is_volume = |text: &str| Volume::parse(text).is_ok();
    domain.disks.iter().enumerate().all(|(at, disk)| {
        device_number(&disk.dev).is_some()
            && domain.disks[..at].iter().all(|other| other.dev != disk.dev)
            && is_volume(&disk.volume)
            && disk.backing.as_deref().is_none_or(is_volume)
    })
}

/// The image of a domain's ramdisk.
fn ramdisk(domain: &Domain) -> Option<u32> {
    domain.kernel.as_ref()?.ramdisk
}
