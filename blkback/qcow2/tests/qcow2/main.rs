//! Images under load, on disks in memory that reorder, fail and die.

mod crash;
mod disk;
mod host;
mod images;
mod model;
mod qemu;
