//! Links at 1 MiB, as kernels do.

fn main() {
    let dir = std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets it");
    println!("cargo:rustc-link-arg-bins=-T{dir}/pvh-test.ld");
    println!("cargo:rerun-if-changed=pvh-test.ld");
    println!("cargo:rerun-if-changed=src/entry.s");
}
