//! `qemu-nbd -L`: what another server offers.

use nbd_server::client;
use nbd_server::uri::{Address, ExportName, TlsParameters};

use super::Words;
use crate::app::App;
use crate::cli::ObjectArgs;
use crate::exit::{Exit, Outcome};

/// Asks the server and prints its list.
pub(super) fn run(words: &Words, app: &App) -> Outcome {
    let address = match &words.socket {
        Some(path) => Address::Unix(path.clone()),
        None => {
            let (host, port) = words.address()?;
            Address::Tcp { host, port }
        }
    };
    let mut name = ExportName::new(address, "");
    name.tls_creds.clone_from(&words.tls_creds);
    name.tls = words
        .tls_hostname
        .clone()
        .map(|hostname| TlsParameters { hostname: Some(hostname), ..TlsParameters::default() });
    let secrets = ObjectArgs::of(words.objects.clone()).secrets()?;
    let tls = crate::nbd::tls_of(&name, &secrets)?;
    app.print(&client::render(&client::list(&name, tls.as_ref())?))?;
    Ok(Exit::OK)
}
