//! Backend and frontend together, with a store and a card, in one process.

mod cost;
mod groups;
mod liars;
mod offloads;
mod queues;
mod restart;
mod rig;
mod traffic;
mod wire;
