//! Names and numbers as people write them.

/// Longest name of a domain or system: the core keeps 32 bytes, the last one NUL.
pub(crate) const MAX_NAME: usize = 31;

/// Whether `name` may name a domain or a system: it becomes part of paths and of console lines.
pub(crate) fn is_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= MAX_NAME
        && name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "-_".contains(c))
}

/// Parses `[SSSS:]BB:DD.F`, all hexadecimal.
pub(crate) fn parse_bdf(text: &str) -> Option<u32> {
    let (rest, function) = text.rsplit_once('.')?;
    let (rest, device) = rest.rsplit_once(':')?;
    let (segment, bus) = rest.rsplit_once(':').unwrap_or(("0", rest));
    let number = |digits: &str, most: u32| {
        let plain = !digits.is_empty() && digits.chars().all(|c| c.is_ascii_hexdigit());
        let value = if plain { u32::from_str_radix(digits, 16).ok()? } else { return None };
        (value <= most).then_some(value)
    };
    let bus = number(bus, 0xff)? << 8;
    Some(number(segment, 0xffff)? << 16 | bus | number(device, 0x1f)? << 3 | number(function, 7)?)
}

/// `BB:DD.F`, with the segment in front when it is not 0.
#[must_use]
pub fn bdf_text(bdf: u32) -> String {
    let tail = format!("{:02x}:{:02x}.{}", bdf >> 8 & 0xff, bdf >> 3 & 0x1f, bdf & 7);
    if bdf >> 16 == 0 { tail } else { format!("{:04x}:{tail}", bdf >> 16) }
}

/// Parses six hexadecimal bytes with colons between them.
pub(crate) fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next()?;
        let plain = part.len() == 2 && part.chars().all(|c| c.is_ascii_hexdigit());
        *byte = if plain { u8::from_str_radix(part, 16).ok()? } else { return None };
    }
    parts.next().is_none().then_some(mac)
}

/// Six hexadecimal bytes with colons between them.
#[must_use]
pub fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// The one of `known` that `word` was probably meant to be.
pub(crate) fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    control::names::nearest(word, known)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pci_addresses_round_trip() {
        for text in ["00:02.0", "ff:1f.7", "0001:00:03.1"] {
            assert_eq!(parse_bdf(text).map(bdf_text).as_deref(), Some(text));
        }
        for text in ["", "00:20.0", "00:02.8", "0:0", "+0:02.0", "10000:00:00.0", "00:02.0.0"] {
            assert_eq!(parse_bdf(text), None, "{text}");
        }
    }

    #[test]
    fn ethernet_addresses_round_trip() {
        assert_eq!(parse_mac("00:16:3E:00:00:01").map(mac_text).unwrap(), "00:16:3e:00:00:01");
        for text in
            ["", "00:16:3e:00:00", "00:16:3e:00:00:01:02", "0:16:3e:00:00:01", "zz:16:3e:00:00:01"]
        {
            assert_eq!(parse_mac(text), None, "{text}");
        }
    }
}
