//! The bundle: the one module that boots beside the core. See [`axolotl_abi::image`].

use crate::elf::pad;
use axolotl_abi::image::{BUNDLE_MAGIC, BundleHeader, BundleImage, ImageError, ImageHeader};
use axolotl_abi::protocol::crc32;
use axolotl_abi::system::{self, FIND_DRIVER, System};
use std::fmt;
use zerocopy::IntoBytes;

/// Why a bundle cannot be made or is refused.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum BundleError {
    /// The header or the table of images.
    Header(ImageError),
    /// A flat image.
    Image {
        /// Its name.
        name: String,
        /// The rule that it breaks.
        error: ImageError,
    },
    /// The name of an image is longer than 31 bytes.
    LongName(String),
    /// The checksum differs.
    Checksum,
    /// The system description cannot be decoded, or is of another version.
    Description,
    /// A domain, or the list of drivers, names an image that is not there.
    NoImage {
        /// The domain or the driver.
        domain: String,
    },
    /// More than the format's numbers can say.
    TooLarge,
}

impl fmt::Display for BundleError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Header(error) => write!(f, "the bundle's header is wrong: {error:?}"),
            Self::Image { name, error } => write!(f, "the image `{name}` is wrong: {error:?}"),
            Self::LongName(name) => write!(f, "the name `{name}` is longer than 31 bytes"),
            Self::Checksum => write!(f, "the bundle's checksum differs"),
            Self::Description => write!(f, "the bundle's system description cannot be decoded"),
            Self::NoImage { domain } => write!(f, "the image of `{domain}` is missing"),
            Self::TooLarge => write!(f, "the bundle is larger than its format allows"),
        }
    }
}

impl std::error::Error for BundleError {}

/// A flat image and its name.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NamedImage {
    /// The package that it was built from.
    pub name: String,
    /// The flat image.
    pub bytes: Vec<u8>,
}

/// Writes a bundle. Image 0 is the control domain's.
///
/// # Errors
/// When the result would be one that [`read`] refuses.
pub fn write(
    system: &System,
    images: &[NamedImage],
    control_pages: u32,
) -> Result<Vec<u8>, BundleError> {
    let description = postcard::to_allocvec(system).map_err(|_| BundleError::Description)?;
    let table_end = size_of::<BundleHeader>() + size_of::<BundleImage>() * images.len();
    let mut body = description.clone();
    body.resize((table_end + body.len()).next_multiple_of(4096) - table_end, 0);
    let mut table = Vec::new();
    for image in images {
        table.push(entry(image, table_end + body.len())?);
        body.extend_from_slice(&image.bytes);
        body.resize((table_end + body.len()).next_multiple_of(4096) - table_end, 0);
    }
    let header = BundleHeader {
        magic: BUNDLE_MAGIC,
        bundle_bytes: (table_end + body.len()) as u64,
        description_offset: table_end as u64,
        description_bytes: description.len().try_into().map_err(|_| BundleError::TooLarge)?,
        images: images.len().try_into().map_err(|_| BundleError::TooLarge)?,
        control_pages,
        crc32: crc32(&body),
    };
    let mut bundle = header.as_bytes().to_vec();
    bundle.extend_from_slice(table.as_bytes());
    bundle.extend_from_slice(&body);
    pad(&mut bundle);
    read(&bundle)?;
    Ok(bundle)
}

fn entry(image: &NamedImage, offset: usize) -> Result<BundleImage, BundleError> {
    let mut name = [0; 32];
    let long = || BundleError::LongName(image.name.clone());
    name[..31].get_mut(..image.name.len()).ok_or_else(long)?.copy_from_slice(image.name.as_bytes());
    Ok(BundleImage { offset: offset as u64, bytes: image.bytes.len() as u64, name })
}

/// What a bundle holds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Bundle {
    /// The system description.
    pub system: System,
    /// The images.
    pub images: Vec<NamedImage>,
    /// Pages of memory of the control domain.
    pub control_pages: u32,
}

/// Reads a bundle and checks every rule that its readers inside the machine check.
///
/// # Errors
/// The first rule that it breaks.
pub fn read(bundle: &[u8]) -> Result<Bundle, BundleError> {
    let (header, table) = BundleHeader::check(bundle).map_err(BundleError::Header)?;
    let table_end = size_of::<BundleHeader>() + size_of_val(table);
    // `check` bounds the lengths by the slice's.
    let end = usize::try_from(header.bundle_bytes).map_err(|_| BundleError::TooLarge)?;
    let body = bundle.get(table_end..end).ok_or(BundleError::Header(ImageError::Truncated))?;
    if crc32(body) != header.crc32 {
        return Err(BundleError::Checksum);
    }
    let description = part(bundle, header.description_offset, header.description_bytes.into());
    let system: System = match postcard::take_from_bytes(description) {
        Ok((system, [])) => system,
        _ => return Err(BundleError::Description),
    };
    if system.version != system::VERSION {
        return Err(BundleError::Description);
    }
    let images = table.iter().map(|image| named(bundle, image)).collect::<Result<Vec<_>, _>>()?;
    let missing = |image: u32| image as usize >= images.len();
    let to_find = |image: u32| image == FIND_DRIVER && !system.drivers.is_empty();
    let mut domains = system.domains.iter();
    if let Some(domain) = domains.find(|domain| missing(domain.image) && !to_find(domain.image)) {
        return Err(BundleError::NoImage { domain: domain.name.clone() });
    }
    if let Some(driver) = system.drivers.iter().find(|driver| missing(driver.image)) {
        return Err(BundleError::NoImage { domain: driver.driver.clone() });
    }
    Ok(Bundle { system, images, control_pages: header.control_pages })
}

/// A part whose bounds `BundleHeader::check` has found inside the bundle.
fn part(bundle: &[u8], offset: u64, bytes: u64) -> &[u8] {
    let range = usize::try_from(offset)
        .ok()
        .zip(usize::try_from(offset + bytes).ok())
        .and_then(|(start, end)| bundle.get(start..end));
    range.unwrap_or_default()
}

fn named(bundle: &[u8], image: &BundleImage) -> Result<NamedImage, BundleError> {
    let end = image.name.iter().position(|byte| *byte == 0).unwrap_or(image.name.len());
    let name = String::from_utf8_lossy(&image.name[..end]).into_owned();
    let bytes = part(bundle, image.offset, image.bytes);
    match ImageHeader::check(bytes) {
        Ok(_) => Ok(NamedImage { name, bytes: bytes.to_vec() }),
        Err(error) => Err(BundleError::Image { name, error }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::elf::flatten;
    use crate::elf::tests::{elf_file, load};
    use axolotl_abi::start::IMAGE_GPA;
    use proptest::prelude::*;
    use zerocopy::FromBytes;

    fn image(name: &str, code: &[u8]) -> NamedImage {
        let loads = [load(5, IMAGE_GPA, code, code.len() as u64)];
        let bytes = flatten(&elf_file(2, IMAGE_GPA, &loads)).expect("valid");
        NamedImage { name: name.into(), bytes }
    }

    fn system() -> System {
        let (domains, drivers) = (Vec::new(), Vec::new());
        System { version: system::VERSION, name: "test".into(), domains, drivers }
    }

    fn sample() -> Vec<u8> {
        let images = [image("control-domain", b"first"), image("demo-guest", &[7; 5000])];
        write(&system(), &images, 512).expect("valid")
    }

    #[test]
    fn what_was_written_is_read_back() {
        let images = vec![image("control-domain", b"first"), image("demo-guest", &[7; 5000])];
        let bundle = read(&sample()).expect("sound");
        assert_eq!(bundle, Bundle { system: system(), images, control_pages: 512 });
    }

    #[test]
    fn nothing_unreadable_is_written() {
        let long = image("a-name-that-is-longer-than-31-bytes", b"x");
        assert!(matches!(write(&system(), &[long], 1), Err(BundleError::LongName(_))));
        let none = write(&system(), &[], 1);
        assert_eq!(none, Err(BundleError::Header(ImageError::BadCount)));
        let broken = NamedImage { name: "x".into(), bytes: vec![0; 4096] };
        assert!(matches!(write(&system(), &[broken], 1), Err(BundleError::Image { .. })));
    }

    /// Behind the table the checksum covers everything, the padding included.
    #[test]
    fn every_flipped_bit_behind_the_table_is_found() {
        let sound = sample();
        let table_end = size_of::<BundleHeader>() + 2 * size_of::<BundleImage>();
        for at in (table_end..sound.len()).step_by(97) {
            let mut bundle = sound.clone();
            bundle[at] ^= 1 << (at % 8);
            assert_eq!(read(&bundle), Err(BundleError::Checksum), "byte {at}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

        /// Whatever happens to the header and the table, no offset leaves the file: the bundle is
        /// refused, or reads as one that follows all rules.
        #[test]
        fn damaged_heads_are_refused_or_harmless(
            damage in prop::collection::vec((0_usize..136, any::<u8>()), 1..8),
            cut in prop::option::of(any::<prop::sample::Index>()),
        ) {
            let mut bundle = sample();
            for (at, value) in damage {
                bundle[at] = value;
            }
            if let Some(cut) = cut {
                bundle.truncate(cut.index(bundle.len()));
            }
            if let Ok(read) = read(&bundle) {
                for image in &read.images {
                    prop_assert!(ImageHeader::check(&image.bytes).is_ok());
                }
            }
        }

        /// The same with a checksum that fits, so that the rules behind it are reached.
        #[test]
        fn damage_under_a_right_checksum_never_panics(
            damage in prop::collection::vec((136_usize..8192, any::<u8>()), 1..8),
        ) {
            let mut bundle = sample();
            for (at, value) in damage {
                bundle[at] = value;
            }
            let sum = crc32(&bundle[136..]);
            let (header, _) = BundleHeader::mut_from_prefix(&mut bundle).expect("long enough");
            header.crc32 = sum;
            let _ = read(&bundle);
        }
    }
}
