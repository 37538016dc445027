//! `completions`: scripts for shells, from the definition of the command line.

use crate::app::App;
use crate::exit::{Exit, Outcome};

/// Print a script that completes commands and options in a shell
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  vimg completions bash > /usr/share/bash-completion/completions/vimg
  vimg completions fish > ~/.config/fish/completions/vimg.fish")]
pub(crate) struct Args {
    /// The shell
    pub(crate) shell: clap_complete::Shell,
}

pub(crate) fn run(args: &Args, app: &App) -> Outcome {
    let mut script = vec![];
    clap_complete::generate(args.shell, &mut crate::cli::command(app.program), app.program, &mut script);
    app.print(&String::from_utf8_lossy(&script))?;
    Ok(Exit::OK)
}
