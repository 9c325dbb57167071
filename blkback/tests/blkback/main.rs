//! Backend and frontends together, with a store and a disk, in one process.

mod disk;
mod front;
mod liars;
mod restart;
mod rig;
mod traffic;
mod volumes;
