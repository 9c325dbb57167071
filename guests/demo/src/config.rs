//! The guest's configuration: words `key=value` from `extra` of the system file.

use alloc::format;
use alloc::string::{String, ToString};
use core::str::FromStr;
use smoltcp::wire::{Ipv4Address, Ipv4Cidr};

/// How the guest gets its address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Addressing {
    /// From a DHCP server.
    Dhcp,
    /// Fixed.
    Static {
        /// Own address and prefix.
        address: Ipv4Cidr,
        /// Default gateway.
        gateway: Option<Ipv4Address>,
    },
}

/// What can be configured.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Config {
    /// `ip=10.0.2.15/24` and `gateway=10.0.2.2`; DHCP without them, or with `ip=dhcp`.
    pub addressing: Addressing,
    /// `port=80`.
    pub port: u16,
    /// `connections=16`: how many are served at once.
    pub connections: u16,
}

impl Default for Config {
    fn default() -> Self {
        Self { addressing: Addressing::Dhcp, port: 80, connections: 16 }
    }
}

/// What is wrong with a configuration, for its author.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ConfigError(pub String);

impl core::fmt::Display for ConfigError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(&self.0)
    }
}

impl core::error::Error for ConfigError {}

fn parse<T: FromStr>(key: &str, value: &str, example: &str) -> Result<T, ConfigError> {
    let error =
        |_| ConfigError(format!("`{key}={value}` is not understood; write `{key}={example}`"));
    value.parse().map_err(error)
}

fn positive(key: &str, value: &str, example: &str) -> Result<u16, ConfigError> {
    match parse(key, value, example)? {
        0 => Err(ConfigError(format!("`{key}` must not be 0"))),
        number => Ok(number),
    }
}

impl Config {
    /// Reads a configuration. Lines that begin with `#` are comments.
    ///
    /// # Errors
    /// An unknown key, or a value that does not fit its key.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let mut config = Self::default();
        let mut gateway = None;
        let lines = text.lines().filter(|line| !line.trim_start().starts_with('#'));
        for token in lines.flat_map(str::split_whitespace) {
            let (key, value) = token.split_once('=').unwrap_or((token, ""));
            match key {
                "ip" if value == "dhcp" => config.addressing = Addressing::Dhcp,
                "ip" => {
                    let address: Ipv4Cidr = parse(key, value, "10.0.2.15/24")?;
                    config.addressing = Addressing::Static { address, gateway: None };
                }
                "gateway" => gateway = Some(parse(key, value, "10.0.2.2")?),
                "port" => config.port = positive(key, value, "80")?,
                "connections" => config.connections = positive(key, value, "16")?.min(256),
                _ => {
                    let known = "ip, gateway, port, connections";
                    return Err(ConfigError(format!("`{token}` is not known; known are {known}")));
                }
            }
        }
        match (&mut config.addressing, gateway) {
            (Addressing::Static { gateway, .. }, found) => *gateway = found,
            (Addressing::Dhcp, Some(_)) => {
                return Err(ConfigError("`gateway` needs a fixed address in `ip`".to_string()));
            }
            (Addressing::Dhcp, None) => {}
        }
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn nothing_means_dhcp_and_port_80() {
        assert_eq!(Config::parse(" \n"), Ok(Config::default()));
    }

    #[test]
    fn a_fixed_address_with_its_gateway() {
        let config = Config::parse("# my guest\nip=10.0.2.15/24 gateway=10.0.2.2\nport=8080");
        let addressing = Addressing::Static {
            address: Ipv4Cidr::new(Ipv4Address::new(10, 0, 2, 15), 24),
            gateway: Some(Ipv4Address::new(10, 0, 2, 2)),
        };
        assert_eq!(config, Ok(Config { addressing, port: 8080, ..Config::default() }));
    }

    #[test]
    fn mistakes_are_named() {
        for (text, part) in [
            ("prot=80", "`prot=80` is not known"),
            ("port=99999", "`port=99999`"),
            ("port=0", "must not be 0"),
            ("ip=10.0.2.15", "10.0.2.15/24"),
            ("gateway=10.0.2.2", "needs a fixed address"),
            ("ip", "`ip=`"),
        ] {
            let error = Config::parse(text).expect_err(text).to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn no_text_is_too_strange(text in "\\PC*") {
            let _ = Config::parse(&text);
        }
    }
}
