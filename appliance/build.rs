//! Compiles the appliance's init, `init/src/main.rs`, to a static program that the library embeds.
//!
//! `VIMG_APPLIANCE_INIT` names a program that was built elsewhere (static, for the machine that is built for). Where
//! none can be built, the library is built all the same and says so when an appliance is to be started.
#![allow(clippy::print_stdout, reason = "that is how a build script talks to cargo")]

use std::env;
use std::error::Error;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=init/src");
    println!("cargo:rerun-if-changed=src/wire.rs");
    println!("cargo:rerun-if-env-changed=VIMG_APPLIANCE_INIT");
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("no OUT_DIR")?).join("init");
    if let Some(built) = env::var_os("VIMG_APPLIANCE_INIT") {
        std::fs::copy(&built, &out).map_err(|error| format!("{}: {error}", built.display()))?;
        return Ok(());
    }
    if let Err(error) = compile(&out) {
        println!(
            "cargo:warning=the appliance's init could not be built, there will be no appliance: {error}"
        );
        std::fs::write(&out, b"")?;
    }
    Ok(())
}

fn compile(out: &Path) -> Result<(), Box<dyn Error>> {
    let target = env::var("TARGET")?;
    if !target.contains("-linux-") {
        return Err(format!("{target} is no Linux").into());
    }
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| OsString::from("rustc"));
    let mut command = Command::new(rustc);
    command.args([
        "--edition",
        "2024",
        "--crate-name",
        "appliance_init",
        "--crate-type",
        "bin",
        "--cap-lints",
        "allow",
    ]);
    command.args(["--target", &target, "-C", "target-feature=+crt-static", "-C", "relocation-model=static"]);
    command.args(["-C", "opt-level=s", "-C", "panic=abort", "-C", "strip=symbols", "-C", "codegen-units=1"]);
    command.args(["-C", "overflow-checks=on", "init/src/main.rs", "-o"]).arg(out);
    let done = command.output()?;
    if done.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&done.stderr);
    let first = said.lines().find(|line| line.starts_with("error")).unwrap_or("rustc failed");
    Err(format!("{first} (a static C library is needed: Debian's libc6-dev)").into())
}
