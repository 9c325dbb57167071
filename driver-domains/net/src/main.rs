//! The network driver domain: an Intel 82574L below, the backend of any number of vifs above.
//!
//! All decisions are in `e1000e` and `netback`; here, and in the loop that `net_domain` shares with
//! other cards, they meet the machine. Whatever goes wrong beyond repair ends in a panic: the
//! control domain restarts the domain, which is the repair.

#![cfg_attr(target_os = "none", no_std, no_main)]
#![forbid(unsafe_code)]

#[cfg(target_os = "none")]
mod domain;

#[cfg(not(target_os = "none"))]
fn main() {
    eprintln!("net-domain runs inside Axolotl; build it for x86_64-unknown-none");
    std::process::exit(1);
}
