//! `serve --list`: what another server offers, for people or as JSON.

use image::Secrets;
use nbd_server::client::{self, FLAG_NAMES, Listed};
use nbd_server::proto::HeaderStyle;
use nbd_server::uri::ExportName;
use serde_json::{Value, json};

use crate::app::App;
use crate::cli::OutputFormat;
use crate::exit::{Exit, Outcome};

/// Asks the server that `uri` names.
pub(super) fn run(uri: &str, output: OutputFormat, secrets: &Secrets, app: &App) -> Outcome {
    let name = ExportName::parse(uri)?;
    let tls = crate::nbd::tls_of(&name, secrets)?;
    let exports = client::list(&name, tls.as_ref())?;
    match output {
        OutputFormat::Human => app.print(&client::render(&exports))?,
        OutputFormat::Json => {
            let exports: Vec<_> = exports.iter().map(document).collect();
            app.print(&format!("{:#}\n", json!({ "exports": exports })))?;
        }
    }
    Ok(Exit::OK)
}

fn document(export: &Listed) -> Value {
    let mut document = json!({
        "name": export.name,
        "description": export.description,
        "replies": match export.style {
            HeaderStyle::Simple => "simple",
            HeaderStyle::Structured => "structured",
            HeaderStyle::Extended => "extended",
        },
        "contexts": export.contexts,
    });
    if let Some(info) = &export.info {
        let flags = FLAG_NAMES.iter().filter(|(flag, _)| info.flags & flag != 0);
        document["size"] = json!(info.size);
        document["flags"] = flags.map(|(_, name)| *name).collect();
        document["minimum-block"] = json!(info.min_block);
        document["preferred-block"] = json!(info.preferred_block);
        document["maximum-block"] = json!(info.max_block);
    }
    document
}
