//! Models of everything here that two processors do at once, under every interleaving that the
//! memory model allows, up to three preemptions.
//!
//! `cargo xtask loom`, or `RUSTFLAGS="--cfg loom" cargo test -p shmem --release --test loom`
#![cfg(loom)]

mod events;
mod rings;

fn model(work: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(work);
}
