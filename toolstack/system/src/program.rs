//! What an image of the bundle is made from.

/// Begins the name of an image that is a kernel's.
pub(crate) const KERNEL: &str = "kernel:";
/// Begins the name of an image that is a ramdisk's.
pub(crate) const RAMDISK: &str = "ramdisk:";

/// What an image is made from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Program<'a> {
    /// A package of this workspace.
    Package(&'a str),
    /// A kernel: a path, or the name of a distribution.
    Kernel(&'a str),
    /// A ramdisk: the same.
    Ramdisk(&'a str),
}

impl<'a> Program<'a> {
    /// What one of [`crate::Compiled::images`] means.
    #[must_use]
    pub fn of(image: &'a str) -> Self {
        if let Some(path) = image.strip_prefix(KERNEL) {
            Self::Kernel(path)
        } else if let Some(path) = image.strip_prefix(RAMDISK) {
            Self::Ramdisk(path)
        } else {
            Self::Package(image)
        }
    }
}
