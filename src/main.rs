//! The program: reads its arguments, runs one command, says in one line what went wrong.

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use keyward::cli::Cli;

// Checks allocate and free on many threads; musl's allocator takes one lock for that.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    // A second provider could only come from this line running twice.
    let _ = rustls::crypto::ring::default_provider().install_default();
    match Cli::parse().run() {
        Ok(exit) => exit.into(),
        Err(failure) => {
            for line in failure.lines() {
                let _ = writeln!(std::io::stderr(), "error: {line}");
            }
            failure.exit().into()
        }
    }
}
