//! Images under load, on disks in memory that reorder, fail and die.

#![expect(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

mod crash;
mod disk;
mod host;
mod images;
mod model;
mod qemu;
