//! The `qlora` command; see `qlora --help`.

use std::process::ExitCode;

fn main() -> ExitCode {
    qlora_wgpu::cli::run()
}
