//! Initial ramdisks: archives in the "newc" format of cpio.
//!
//! Source: Linux's `Documentation/driver-api/early-userspace/buffer-format.rst`.

/// An archive that grows.
#[derive(Clone, Default, Debug)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

const DIRECTORY: u32 = 0o040_755;
const LINK: u32 = 0o120_777;
const FILE: u32 = 0o100_000;
const CHARACTERS: u32 = 0o020_600;

impl Archive {
    /// Adds a directory. Those above it must be there already.
    pub fn directory(&mut self, path: &str) {
        self.add(path, DIRECTORY, (0, 0), &[]);
    }

    /// Adds a file with permission bits.
    pub fn file(&mut self, path: &str, permissions: u32, bytes: &[u8]) {
        self.add(path, FILE | permissions & 0o7777, (0, 0), bytes);
    }

    /// Adds a symbolic link.
    pub fn link(&mut self, path: &str, target: &str) {
        self.add(path, LINK, (0, 0), target.as_bytes());
    }

    /// Adds a character device.
    pub fn characters(&mut self, path: &str, major: u32, minor: u32) {
        self.add(path, CHARACTERS, (major, minor), &[]);
    }

    /// The whole archive.
    #[must_use]
    pub fn finish(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn add(&mut self, path: &str, mode: u32, (major, minor): (u32, u32), bytes: &[u8]) {
        self.entries += 1;
        let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        let name = u32::try_from(path.len() + 1).unwrap_or(u32::MAX);
        // Inode, mode, owner, group, links, time, length, device, special device, name, checksum.
        let fields = [self.entries, mode, 0, 0, 1, 0, len, 0, 0, major, minor, name, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(bytes);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two entries by hand, byte for byte.
    #[test]
    fn entries_are_as_the_format_has_them() {
        let mut archive = Archive::default();
        archive.directory("bin");
        archive.file("bin/a", 0o755, b"xyz");
        let bytes = archive.finish();
        let head = "070701000000010000\
                    41ed0000000000000000000000010000000000000000000000000000000000000000000000000000000400000000bin\0";
        assert_eq!(&bytes[..head.len()], head.as_bytes());
        let second = &bytes[116..];
        assert_eq!(
            &second[..22],
            b"0707010000000200008".iter().chain(b"1ed").copied().collect::<Vec<u8>>().as_slice()
        );
        assert_eq!(&second[110..124], b"bin/a\0xyz\x000707");
        assert!(bytes.len().is_multiple_of(4));
        assert!(bytes.windows(11).any(|part| part == b"TRAILER!!!\0"));
    }
}
