//! `vimg`: create, inspect, convert, check and compare virtual disk images.

mod app;
mod cli;
mod cmd;
mod exit;
mod hint;
mod keys;
mod nbd;
mod output;
mod programs;
mod progress;
mod sandbox;
mod snapshot;

use std::process::ExitCode;

fn main() -> ExitCode {
    app::main(std::env::args_os())
}
