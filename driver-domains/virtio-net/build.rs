//! Links the domain at the addresses that its loader expects.

fn main() {
    let target = std::env::var("CARGO_CFG_TARGET_OS").unwrap_or_default();
    let here = std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets it");
    let script = format!("{here}/../../unikernel/unikernel.ld");
    println!("cargo:rerun-if-changed={script}");
    if target == "none" {
        println!("cargo:rustc-link-arg-bins=-T{script}");
    }
}
