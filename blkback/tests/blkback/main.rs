//! Backend and frontends together, with a store and a disk, in one process.

mod disk;
mod front;
mod images;
mod liars;
mod real;
mod restart;
mod rig;
mod traffic;
mod volumes;
