//! System files: what a machine emulates, which domains run on it, and who may use what.
//!
//! A system file is TOML with the words of `xl.cfg` (reference: `docs/system-files.md`).
//! [`load`] reads one, refuses whatever breaks a rule with file, line and a hint, and compiles
//! the rest into what the control domain builds ([`axolotl_abi::system::System`]) and what the
//! host must emulate ([`Machine`]). Building images and starting a machine is left to `xtask`,
//! the building of domains to `control`.

#![forbid(unsafe_code)]

mod error;
mod explain;
mod machine;
mod names;
mod program;
mod rules;
mod schema;

pub use error::SystemError;
pub use explain::explain;
pub use machine::{
    DiskContent, FileFormat, HostForward, Machine, MachineDisk, MachineNic, NicNet, Partition,
    Protocol,
};
pub use names::{bdf_text, mac_text};
pub use program::Program;

use axolotl_abi::image::{ImageHeader, Segment};
use axolotl_abi::system::{FIND_DRIVER, System};
use control::plan;
use error::Source;
use std::ops::Range;
use std::path::Path;

/// A system file that keeps all rules.
#[derive(Debug)]
pub struct Compiled {
    /// What the host emulates.
    pub machine: Machine,
    /// What the control domain builds.
    pub system: System,
    /// What the images are made from, see [`Program::of`]; [`axolotl_abi::system::Domain::image`]
    /// is an index, 0 is the control domain.
    pub images: Vec<String>,
    /// Pages of memory of the control domain.
    pub control_pages: u32,
    /// What is allowed, but probably not meant.
    pub warnings: Vec<String>,
    source: Source,
    /// Where the memory of each domain is set; the control domain's is the last.
    memory_spans: Vec<Range<usize>>,
}

/// Reads and compiles the system file at `path`.
///
/// # Errors
/// The first rule that the file breaks, with its place, or why it cannot be read.
pub fn load(path: &Path) -> Result<Compiled, Box<SystemError>> {
    let shown = path.display().to_string();
    match std::fs::read_to_string(path) {
        Ok(text) => compile(&shown, &text),
        Err(error) => Err(SystemError::unreadable(&shown, &error)),
    }
}

/// Compiles `text`, which came from the file `path`; its stem is the system's name unless the
/// text gives one.
///
/// # Errors
/// The first rule that the text breaks, with its place.
pub fn compile(path: &str, text: &str) -> Result<Compiled, Box<SystemError>> {
    let source = Source::new(path, text);
    let file = schema::parse(&source)?;
    rules::compile(source, &file)
}

impl Compiled {
    /// Checks that the flat image number `index`, whose bytes are `flat`, fits into the memory
    /// of every domain that runs it. For the builder of the bundle, once the image is there.
    ///
    /// # Errors
    /// A damaged image, or the first domain that is too small, with the place of its memory.
    pub fn check_image(&self, index: usize, flat: &[u8]) -> Result<(), Box<SystemError>> {
        let name = self.images.get(index).map_or("?", String::as_str);
        let Ok((_, segments)) = ImageHeader::check(flat) else {
            return Err(SystemError::new(
                &self.source,
                0..0,
                format!("the image of `{name}` is damaged"),
                "build it anew".into(),
            ));
        };
        let image_pages = plan::image_pages(segments);
        if index == 0 {
            let needed = plan::needed_pages(image_pages, 0, 0);
            return self.enough("control", self.control_pages, needed, self.memory_spans.len() - 1);
        }
        for (at, domain) in self.system.domains.iter().enumerate() {
            let found = domain.image == FIND_DRIVER
                && self.system.drivers.iter().any(|driver| driver.image as usize == index);
            if domain.image as usize == index && domain.kernel.is_some() {
                let end = |s: &Segment| s.gfn.saturating_add(s.pages.into());
                let end = segments.iter().map(end).max().unwrap_or(0);
                let needed = u32::try_from(end).unwrap_or(u32::MAX);
                self.enough(&domain.name, domain.memory_pages, needed, at)?;
            } else if domain.image as usize == index || found {
                let config = plan::config_bytes(domain);
                let needed = plan::needed_pages(image_pages, domain.preserved_pages, config);
                self.enough(&domain.name, domain.memory_pages, needed, at)?;
            }
        }
        Ok(())
    }

    fn enough(
        &self,
        name: &str,
        pages: u32,
        needed: u32,
        span: usize,
    ) -> Result<(), Box<SystemError>> {
        if pages >= needed {
            return Ok(());
        }
        let span = self.memory_spans.get(span).cloned().unwrap_or(0..0);
        Err(rules::too_little_memory(&self.source, span, name, pages, needed))
    }
}
