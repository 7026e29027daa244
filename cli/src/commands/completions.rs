//! `qlora completions`: shell completion scripts.

use clap::Args;
use clap_complete::Shell;
use qlora_wgpu::error::Result;

use crate::output::print;

/// Prints a script that completes commands, flags and paths in a shell
///
/// Put it where the shell looks for such scripts, and start a new shell:
///   bash        ~/.local/share/bash-completion/completions/qlora
///   zsh         _qlora in a folder of $fpath, before compinit
///   fish        ~/.config/fish/completions/qlora.fish
///   powershell  qlora completions powershell | Out-String | Invoke-Expression, in $PROFILE
///   elvish      eval (qlora completions elvish | slurp), in ~/.config/elvish/rc.elv
#[derive(Args, Debug)]
#[command(verbatim_doc_comment)]
#[command(after_help = "Examples:\n  \
    qlora completions bash > ~/.local/share/bash-completion/completions/qlora\n  \
    qlora completions fish > ~/.config/fish/completions/qlora.fish")]
pub struct CompletionsArgs {
    /// Your shell
    #[arg(value_enum)]
    shell: Shell,
}

/// Prints the script for `command`.
pub fn run(args: &CompletionsArgs, mut command: clap::Command) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut command, "qlora", &mut script);
    print(&String::from_utf8_lossy(&script)).map(drop)
}
