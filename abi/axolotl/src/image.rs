//! Flat images and the bundle: what the host tool makes, and the core or the control domain
//! loads without parsing anything complicated.
//!
//! A bundle is the one boot module beside the core:
//!
//! | part                 | where                                                     |
//! |----------------------|-----------------------------------------------------------|
//! | [`BundleHeader`]     | 0                                                         |
//! | [`BundleImage`] × n  | directly behind it                                        |
//! | system description   | `description_offset`, postcard, see `system`              |
//! | flat images          | page-aligned, each at its [`BundleImage::offset`]         |
//!
//! A flat image is an [`ImageHeader`], [`Segment`]s directly behind it, and their bytes at
//! page-aligned offsets from the image's start. Every offset and length is checked by whoever
//! reads it; [`ImageHeader::check`] and [`BundleHeader::check`] are the one place for that.

use core::mem::size_of;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// `BundleHeader::magic`: "AXBUNDLE".
pub const BUNDLE_MAGIC: u64 = u64::from_le_bytes(*b"AXBUNDLE");
/// `ImageHeader::magic`: "AXIMAGE1".
pub const IMAGE_MAGIC: u64 = u64::from_le_bytes(*b"AXIMAGE1");
/// Most segments of an image.
pub const MAX_SEGMENTS: u32 = 16;
/// Most images of a bundle.
pub const MAX_IMAGES: u32 = 64;

/// First bytes of a bundle.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct BundleHeader {
    /// [`BUNDLE_MAGIC`].
    pub magic: u64,
    /// Bytes of the whole bundle.
    pub bundle_bytes: u64,
    /// Where the system description starts.
    pub description_offset: u64,
    /// Its bytes.
    pub description_bytes: u32,
    /// Number of [`BundleImage`]s. Image 0 is the control domain.
    pub images: u32,
    /// Pages of memory of the control domain, all included.
    pub control_pages: u32,
    /// CRC-32 (ISO-HDLC) of everything behind the image table.
    pub crc32: u32,
}
const _: () = assert!(size_of::<BundleHeader>() == 40);

/// Where a flat image lies in the bundle.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct BundleImage {
    /// From the bundle's start, page-aligned.
    pub offset: u64,
    /// Bytes.
    pub bytes: u64,
    /// NUL-padded name.
    pub name: [u8; 32],
}
const _: () = assert!(size_of::<BundleImage>() == 48);

/// First bytes of a flat image.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ImageHeader {
    /// [`IMAGE_MAGIC`].
    pub magic: u64,
    /// Guest-physical address of the first instruction.
    pub entry: u64,
    /// Number of [`Segment`]s.
    pub segments: u32,
    /// Zero.
    pub reserved: u32,
}
const _: () = assert!(size_of::<ImageHeader>() == 24);

/// `Segment::access`: readable; always set.
pub const ACCESS_READ: u32 = 1;
/// `Segment::access`: writable.
pub const ACCESS_WRITE: u32 = 2;
/// `Segment::access`: executable; never together with writable.
pub const ACCESS_EXECUTE: u32 = 4;

/// Pages of an image that share their access.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Segment {
    /// First page.
    pub gfn: u64,
    /// Number of pages; those behind the file's bytes are zero.
    pub pages: u32,
    /// `ACCESS_*`.
    pub access: u32,
    /// Where the bytes start in the image, page-aligned.
    pub file_offset: u64,
    /// How many.
    pub file_bytes: u64,
}
const _: () = assert!(size_of::<Segment>() == 32);

/// What is wrong with a bundle or image.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ImageError {
    /// Shorter than its headers, or than they say.
    Truncated,
    /// Not of this kind or version.
    BadMagic,
    /// More images or segments than allowed, or none.
    BadCount,
    /// An offset or length that leaves the file or is not page-aligned.
    BadExtent,
    /// Access bits that are unknown, or writable and executable at once.
    BadAccess,
}

impl ImageHeader {
    /// Reads and checks the header and all segments of a flat image.
    ///
    /// # Errors
    /// The first rule of this module that `image` breaks.
    pub fn check(image: &[u8]) -> Result<(Self, &[Segment]), ImageError> {
        let (header, rest) = Self::read_from_prefix(image).map_err(|_| ImageError::Truncated)?;
        if header.magic != IMAGE_MAGIC {
            return Err(ImageError::BadMagic);
        }
        if header.segments == 0 || header.segments > MAX_SEGMENTS {
            return Err(ImageError::BadCount);
        }
        let (segments, _) = <[Segment]>::ref_from_prefix_with_elems(rest, header.segments as usize)
            .map_err(|_| ImageError::Truncated)?;
        for segment in segments {
            segment.check(image.len() as u64)?;
        }
        Ok((header, segments))
    }
}

impl Segment {
    fn check(&self, image_bytes: u64) -> Result<(), ImageError> {
        let end = self.file_offset.checked_add(self.file_bytes).ok_or(ImageError::BadExtent)?;
        if end > image_bytes
            || !self.file_offset.is_multiple_of(4096)
            || self.file_bytes > u64::from(self.pages) * 4096
            || self.gfn > 1 << 36
        {
            return Err(ImageError::BadExtent);
        }
        let known = ACCESS_READ | ACCESS_WRITE | ACCESS_EXECUTE;
        let both = ACCESS_WRITE | ACCESS_EXECUTE;
        if self.access & !known != 0 || self.access & ACCESS_READ == 0 || self.access & both == both
        {
            return Err(ImageError::BadAccess);
        }
        Ok(())
    }
}

impl BundleHeader {
    /// Reads and checks the header and the image table of a bundle. Leaves the checksum to the
    /// caller, and each image to [`ImageHeader::check`].
    ///
    /// # Errors
    /// The first rule of this module that `bundle` breaks.
    pub fn check(bundle: &[u8]) -> Result<(Self, &[BundleImage]), ImageError> {
        let (header, rest) = Self::read_from_prefix(bundle).map_err(|_| ImageError::Truncated)?;
        if header.magic != BUNDLE_MAGIC {
            return Err(ImageError::BadMagic);
        }
        if header.images == 0 || header.images > MAX_IMAGES {
            return Err(ImageError::BadCount);
        }
        let (images, _) = <[BundleImage]>::ref_from_prefix_with_elems(rest, header.images as usize)
            .map_err(|_| ImageError::Truncated)?;
        let within = |offset: u64, bytes: u64| {
            offset.checked_add(bytes).is_some_and(|end| end <= header.bundle_bytes)
        };
        if header.bundle_bytes > bundle.len() as u64
            || !within(header.description_offset, header.description_bytes.into())
            || images.iter().any(|i| i.offset % 4096 != 0 || !within(i.offset, i.bytes))
        {
            return Err(ImageError::BadExtent);
        }
        Ok((header, images))
    }
}
