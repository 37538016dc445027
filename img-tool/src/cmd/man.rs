//! `man`: manual pages, from the definition of the command line.

use std::path::PathBuf;

use block::ResultExt as _;

use crate::app::App;
use crate::exit::{Exit, Outcome};

/// Write the manual pages into a directory
///
/// One page for the program and one for each command: vimg.1, vimg-info.1, vimg-nbd-attach.1, ...
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  vimg man /usr/local/share/man/man1")]
pub(crate) struct Args {
    /// The directory, which must exist
    pub(crate) directory: PathBuf,
}

pub(crate) fn run(args: &Args, app: &App) -> Outcome {
    let mut command = crate::cli::command(app.program);
    command.build();
    write_page(command.clone(), app.program.to_owned(), args)?;
    for verb in command.get_subcommands() {
        let name = format!("{}-{}", app.program, verb.get_name());
        write_page(verb.clone(), name.clone(), args)?;
        for part in verb.get_subcommands() {
            write_page(part.clone(), format!("{name}-{}", part.get_name()), args)?;
        }
    }
    Ok(Exit::OK)
}

/// Writes the page of one command.
fn write_page(command: clap::Command, name: String, args: &Args) -> block::Result<()> {
    let path = args.directory.join(format!("{name}.1"));
    let mut page = vec![];
    let rendered = clap_mangen::Man::new(command.display_name(name)).render(&mut page);
    let page = String::from_utf8_lossy(&page).replace(".SH EXTRA", ".SH NOTES AND EXAMPLES");
    rendered
        .and_then(|()| std::fs::write(&path, page))
        .context(|| format!("could not write the manual page '{}'", path.display()))
}
