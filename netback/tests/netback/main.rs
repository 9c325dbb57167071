//! Backend and frontend together, with a store and a card, in one process.

mod liars;
mod restart;
mod rig;
mod traffic;
