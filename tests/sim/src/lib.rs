//! The whole system in one process, under one seed.
//!
//! The real core ([`hv_core`]) on its fake machine, the real xenstore, backends, drivers and
//! frontends, each domain's code on a stack of its own, the devices' models, and chance. A run is
//! what its seed says, down to each access to shared memory: the same seed makes the same run.

#![forbid(unsafe_code)]

pub mod block;
pub mod control;
pub mod coroutine;
pub mod disk;
pub mod domain;
pub mod guest;
pub mod liar;
pub mod link;
pub mod random;
pub mod run;
pub mod services;
pub mod world;

pub use run::{Deaths, Outcome, Plan, run};
