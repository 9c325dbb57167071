//! What part of a disk a volume is, as written in system files and in the key `params` of a vbd.
//!
//! ```text
//!  whole                   all of the disk
//!  gpt:NAME                the GPT partition of that name
//!  guid:XXXXXXXX-XXXX-…    the GPT partition with that unique GUID
//!  range:OFFSET+BYTES      bytes; both may end in K, M, G or T (powers of 1024)
//! ```
//!
//! A controller with several disks (NVMe namespaces, AHCI ports) counts them from 1; `2/whole` is
//! its second disk, no number is the first.

use alloc::string::{String, ToString};
use core::fmt;

/// A volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Volume {
    /// Which disk of the controller, from 1.
    pub disk: u32,
    /// What of it.
    pub extent: Extent,
}

/// A part of a disk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Extent {
    /// All.
    Whole,
    /// A GPT partition, by its name.
    PartitionName(String),
    /// A GPT partition, by its unique GUID, in lower case.
    PartitionGuid(String),
    /// A range of bytes, whole sectors of 512.
    Range {
        /// First byte.
        offset: u64,
        /// How many.
        bytes: u64,
    },
}

/// Why a text names no volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum VolumeError {
    /// None of the forms.
    Form,
    /// The number of the disk.
    Disk,
    /// The partition's name is empty or has more than 36 characters.
    Name,
    /// Not a GUID.
    Guid,
    /// Not numbers, not whole sectors of 512 bytes, or nothing at all.
    Range,
}

impl fmt::Display for VolumeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Form => "write whole, gpt:NAME, guid:GUID or range:OFFSET+BYTES",
            Self::Disk => "the number before `/` is that of a disk, from 1",
            Self::Name => "a partition's name has 1 to 36 characters",
            Self::Guid => "a GUID looks like 12345678-9abc-def0-1234-56789abcdef0",
            Self::Range => "a range is OFFSET+BYTES, multiples of 512, such as 1M+64M",
        })
    }
}

impl core::error::Error for VolumeError {}

impl Volume {
    /// Reads a volume's text.
    ///
    /// # Errors
    /// See [`VolumeError`].
    pub fn parse(text: &str) -> Result<Self, VolumeError> {
        let numbered = text.split_once('/').filter(|(number, _)| {
            !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
        });
        let (disk, rest) = match numbered {
            Some((number, rest)) => (number.parse().map_err(|_| VolumeError::Disk)?, rest),
            None => (1, text),
        };
        if disk == 0 {
            return Err(VolumeError::Disk);
        }
        Ok(Self { disk, extent: Extent::parse(rest)? })
    }
}

impl Extent {
    fn parse(text: &str) -> Result<Self, VolumeError> {
        if text == "whole" {
            return Ok(Self::Whole);
        }
        let (form, rest) = text.split_once(':').ok_or(VolumeError::Form)?;
        match form {
            "gpt" if (1..=36).contains(&rest.chars().count()) => {
                Ok(Self::PartitionName(rest.to_string()))
            }
            "gpt" => Err(VolumeError::Name),
            "guid" if is_guid(rest) => Ok(Self::PartitionGuid(rest.to_ascii_lowercase())),
            "guid" => Err(VolumeError::Guid),
            "range" => range(rest).ok_or(VolumeError::Range),
            _ => Err(VolumeError::Form),
        }
    }
}

impl fmt::Display for Volume {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.disk != 1 {
            write!(f, "{}/", self.disk)?;
        }
        match &self.extent {
            Extent::Whole => f.write_str("whole"),
            Extent::PartitionName(name) => write!(f, "gpt:{name}"),
            Extent::PartitionGuid(guid) => write!(f, "guid:{guid}"),
            Extent::Range { offset, bytes } => write!(f, "range:{offset}+{bytes}"),
        }
    }
}

fn is_guid(text: &str) -> bool {
    let dash = |at| matches!(at, 8 | 13 | 18 | 23);
    text.len() == 36
        && text.bytes().enumerate().all(|(at, byte)| match dash(at) {
            true => byte == b'-',
            false => byte.is_ascii_hexdigit(),
        })
}

fn range(text: &str) -> Option<Extent> {
    let (offset, bytes) = text.split_once('+')?;
    let (offset, bytes) = (size(offset)?, size(bytes)?);
    let sectors = offset % 512 == 0 && bytes % 512 == 0 && bytes > 0;
    offset.checked_add(bytes).filter(|_| sectors)?;
    Some(Extent::Range { offset, bytes })
}

/// Reads a number of bytes: decimal digits, then perhaps K, M, G or T.
#[must_use]
pub fn size(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(['K', 'M', 'G', 'T']);
    let shift = match &text[digits.len()..] {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return None,
    };
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_is_read_and_written() {
        for (text, shown) in [
            ("whole", "whole"),
            ("1/whole", "whole"),
            ("2/gpt:data/x", "2/gpt:data/x"),
            ("gpt:root", "gpt:root"),
            (
                "guid:12345678-9ABC-def0-1234-56789abcdef0",
                "guid:12345678-9abc-def0-1234-56789abcdef0",
            ),
            ("range:1M+64K", "range:1048576+65536"),
            ("3/range:0+512", "3/range:0+512"),
        ] {
            let volume = Volume::parse(text).unwrap();
            assert_eq!(volume.to_string(), shown);
            assert_eq!(Volume::parse(shown), Ok(volume));
        }
    }

    #[test]
    fn everything_else_is_refused() {
        for (text, error) in [
            ("", VolumeError::Form),
            ("all", VolumeError::Form),
            ("0/whole", VolumeError::Disk),
            ("99999999999/whole", VolumeError::Disk),
            ("gpt:", VolumeError::Name),
            ("guid:12345678-9abc-def0-1234-56789abcdefg", VolumeError::Guid),
            ("range:1+512", VolumeError::Range),
            ("range:512", VolumeError::Range),
            ("range:0+0", VolumeError::Range),
            ("range:16777216T+512", VolumeError::Range),
            ("range:-1+512", VolumeError::Range),
            ("range:0+1KK", VolumeError::Range),
        ] {
            assert_eq!(Volume::parse(text), Err(error), "{text}");
        }
    }
}
