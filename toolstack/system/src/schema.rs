//! What may stand in a system file, before any rule is looked at.

use crate::error::{Source, SystemError};
use crate::names::nearest;
use serde::Deserialize;
use toml::Spanned;

/// The whole file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct File {
    pub(crate) version: Option<Spanned<u32>>,
    pub(crate) name: Option<Spanned<String>>,
    pub(crate) machine: Spanned<Machine>,
    #[serde(default)]
    pub(crate) control: Control,
    #[serde(default)]
    pub(crate) domain: Vec<Spanned<Domain>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Machine {
    pub(crate) memory: Spanned<u32>,
    pub(crate) cpus: Spanned<u32>,
    pub(crate) cpu: Option<String>,
    #[serde(default)]
    pub(crate) nic: Vec<Spanned<Nic>>,
    #[serde(default)]
    pub(crate) disk: Vec<Spanned<MachineDisk>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Nic {
    pub(crate) model: Spanned<String>,
    pub(crate) bdf: Spanned<String>,
    pub(crate) mac: Option<Spanned<String>>,
    pub(crate) net: Option<Spanned<String>>,
    pub(crate) host_forward: Option<Spanned<Vec<Spanned<String>>>>,
    pub(crate) listen: Option<Spanned<String>>,
    pub(crate) connect: Option<Spanned<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct MachineDisk {
    pub(crate) model: Spanned<String>,
    pub(crate) bdf: Spanned<String>,
    pub(crate) file: Spanned<String>,
    pub(crate) size: Option<Spanned<String>>,
    pub(crate) format: Option<Spanned<String>>,
    pub(crate) readonly: Option<Spanned<bool>>,
    pub(crate) content: Option<Spanned<String>>,
    #[serde(default)]
    pub(crate) partitions: Vec<Spanned<Partition>>,
    pub(crate) serial: Option<Spanned<String>>,
    pub(crate) sector_size: Option<Spanned<u32>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Partition {
    pub(crate) name: Spanned<String>,
    pub(crate) size: Spanned<String>,
    pub(crate) cow: Option<Spanned<String>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Control {
    pub(crate) memory: Option<Spanned<u32>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Domain {
    pub(crate) name: Spanned<String>,
    pub(crate) role: Option<Spanned<String>>,
    pub(crate) image: Option<Spanned<String>>,
    pub(crate) kernel: Option<Spanned<String>>,
    pub(crate) ramdisk: Option<Spanned<String>>,
    pub(crate) cmdline: Option<Spanned<String>>,
    pub(crate) driver: Option<Spanned<String>>,
    pub(crate) memory: Spanned<u32>,
    pub(crate) vcpus: Option<Spanned<u32>>,
    pub(crate) preserved_pages: Option<Spanned<u32>>,
    pub(crate) on_crash: Option<Spanned<String>>,
    pub(crate) on_poweroff: Option<Spanned<String>>,
    pub(crate) on_reboot: Option<Spanned<String>>,
    pub(crate) restart: Option<Spanned<Restart>>,
    pub(crate) budget_us: Option<Spanned<u32>>,
    pub(crate) period_us: Option<Spanned<u32>>,
    #[serde(default)]
    pub(crate) pci: Vec<Spanned<Pci>>,
    #[serde(default)]
    pub(crate) vif: Vec<Spanned<Vif>>,
    #[serde(default)]
    pub(crate) disk: Vec<Spanned<Disk>>,
    pub(crate) extra: Option<Spanned<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Restart {
    pub(crate) min_runtime_ms: Option<Spanned<u32>>,
    pub(crate) max_quick_deaths: Option<Spanned<u32>>,
    pub(crate) max_per_minute: Option<Spanned<u32>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Pci {
    pub(crate) bdf: Spanned<String>,
    pub(crate) dma: Option<Spanned<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Vif {
    pub(crate) mac: Spanned<String>,
    pub(crate) backend: Spanned<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Disk {
    pub(crate) backend: Spanned<String>,
    pub(crate) volume: Spanned<String>,
    pub(crate) mode: Option<Spanned<String>>,
    pub(crate) cow: Option<Spanned<bool>>,
    pub(crate) backing: Option<Spanned<String>>,
    pub(crate) dev: Option<Spanned<String>>,
}

/// Reads a file without looking at its rules.
pub(crate) fn parse(source: &Source) -> Result<File, Box<SystemError>> {
    toml::from_str(&source.text).map_err(|error| {
        let message = error.message().lines().collect::<Vec<_>>().join(" ");
        let (message, hint) = explain_parse_error(&message);
        SystemError::new(source, error.span().unwrap_or(0..0), message, hint)
    })
}

/// Splits serde's one sentence into what is wrong and what to do.
fn explain_parse_error(message: &str) -> (String, String) {
    if let Some(rest) = message.strip_prefix("unknown field `") {
        let mut words = rest.split('`').step_by(2);
        let key = words.next().unwrap_or_default();
        let known: Vec<&str> = rest.split('`').skip(2).step_by(2).collect();
        let all = format!("known keys here: {}", known.join(", "));
        let hint = match nearest(key, known.iter().copied()) {
            Some(near) => format!("did you mean `{near}`? {all}"),
            None => all,
        };
        return (format!("unknown key `{key}`"), hint);
    }
    if let Some(rest) = message.strip_prefix("missing field `") {
        let key = rest.trim_end_matches('`');
        return (format!("`{key}` is missing"), format!("add a line `{key} = …`"));
    }
    (message.to_owned(), "docs/system-files.md has all keys and their types".into())
}
