//! The virtio network driver domain: a card below, the backend of any number of vifs above.
//!
//! All decisions are in `virtio_net`, `netback` and `net_domain`; here they meet the machine.
//! Whatever goes wrong beyond repair ends in a panic: the control domain restarts the domain,
//! which is the repair.

#![cfg_attr(target_os = "none", no_std, no_main)]
#![forbid(unsafe_code)]

#[cfg(target_os = "none")]
mod domain;

#[cfg(not(target_os = "none"))]
fn main() {
    eprintln!("virtio-net-domain runs inside Axolotl; build it for x86_64-unknown-none");
    std::process::exit(1);
}
