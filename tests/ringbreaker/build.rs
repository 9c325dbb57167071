//! Links with the unikernel's script.

fn main() {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../unikernel/unikernel.ld");
    println!("cargo:rustc-link-arg-bins=-T{script}");
    println!("cargo:rerun-if-changed={script}");
}
