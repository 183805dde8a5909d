//! Finds the migrations that the published crate ships, so that the bench runs on the schema of that very version.

use std::{env, path::PathBuf, process::Command};

fn main() {
    let cargo = env::var("CARGO").expect("CARGO");
    let target = env::var("TARGET").expect("TARGET");
    // Of this platform alone: a build downloads no crates of the others, and a listing of all of them would need those.
    let listing = Command::new(cargo)
        .args(["metadata", "--format-version=1", "--locked", "--offline"])
        .args(["--filter-platform", &target])
        .output()
        .expect("cargo metadata");
    if !listing.status.success() {
        panic!("cargo metadata: {}", String::from_utf8_lossy(&listing.stderr));
    }
    let text = String::from_utf8(listing.stdout).expect("utf-8");
    // "manifest_path":"/.../pg_task-1.0.0/Cargo.toml"; no other package's directory is named like that.
    let path = text
        .split("\"manifest_path\":\"")
        .filter_map(|rest| rest.split('"').next())
        .find(|path| path.contains("/pg_task-"))
        .expect("pg_task among the packages");
    let migrations = PathBuf::from(path).with_file_name("migrations");
    println!(
        "cargo:rustc-env=PG_TASK_MIGRATIONS={}",
        migrations.display()
    );
    println!("cargo:rustc-env=PG_TASK_MANIFEST={path}");
    println!("cargo:rerun-if-changed=Cargo.lock");
}
