//! Rules of guests with kernels of their own.

use super::{Checked, MIB, Rules, index_of, schema};
use crate::program::{KERNEL, RAMDISK};
use axolotl_abi::system::{Kernel, Role};
use toml::Spanned;

/// Most vCPUs of such a guest.
pub(super) const MAX_VCPUS: u32 = 8;
/// Least and most memory, MiB.
const MEMORY_MIB: (u32, u32) = (32, 65_536);
/// Longest command line: Linux reads no more.
const MAX_CMDLINE: usize = 2047;

impl Rules<'_> {
    /// What stands for the kernel among the images, if the domain has one.
    pub(super) fn kernel_image(&self, d: &schema::Domain, role: Role) -> Checked<Option<String>> {
        let Some(kernel) = &d.kernel else {
            for (key, value) in [("ramdisk", &d.ramdisk), ("cmdline", &d.cmdline)] {
                if let Some(value) = value {
                    let message = format!("`{key}` without `kernel`");
                    return self.refuse(value.span(), message, "add `kernel = \"debian\"`");
                }
            }
            return Ok(None);
        };
        if role != Role::Guest {
            let message = "`kernel` on a domain that is no guest";
            return self.refuse(kernel.span(), message, "kernels of their own are for guests");
        }
        if let Some(image) = &d.image {
            let message = "`image` beside `kernel`";
            return self.refuse(image.span(), message, "a guest has one of the two");
        }
        Ok(Some(format!("{KERNEL}{}", kernel.get_ref())))
    }

    /// What the kernel gets.
    pub(super) fn kernel(
        &self,
        d: &schema::Domain,
        images: &mut Vec<String>,
    ) -> Checked<Option<Kernel>> {
        let Some(kernel) = &d.kernel else { return Ok(None) };
        let cmdline = d.cmdline.as_ref().map_or(String::new(), |text| text.get_ref().clone());
        if let Some(text) = d.cmdline.as_ref().filter(|_| cmdline.len() > MAX_CMDLINE) {
            let message = format!("`cmdline` is {} bytes long", cmdline.len());
            return self.refuse(text.span(), message, format!("at most {MAX_CMDLINE} bytes"));
        }
        // A distribution's kernel comes with a ramdisk of its own unless another is named.
        let named = d.ramdisk.as_ref().map(|ramdisk| ramdisk.get_ref().clone());
        let is_path = kernel.get_ref().contains(['/', '.']);
        let ramdisk = named.or_else(|| (!is_path).then(|| kernel.get_ref().clone()));
        let ramdisk = ramdisk.map(|path| index_of(images, &format!("{RAMDISK}{path}")));
        Ok(Some(Kernel { ramdisk, cmdline }))
    }

    pub(super) fn kernel_memory(&self, memory: &Spanned<u32>) -> Checked<u32> {
        let (least, most) = MEMORY_MIB;
        Ok(self.within("memory", memory, least, most)? * MIB)
    }
}
