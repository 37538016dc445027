//! Names of NBD exports wherever a file name is accepted.

use std::sync::Arc;

use block::{BlockDevice, Error, Result};
use image::Secrets;
use image::secret::TlsKind;
use image::spec::{Opening, Protocol, ProtocolRequest};
use nbd_server::client::{self, NbdDevice, StartTls};
use nbd_server::tls::psk;
use nbd_server::uri::{self, ExportName, TlsParameters};
use serde_json::{Map, Value};

/// Makes the library open exports of NBD servers.
pub(crate) fn register() {
    image::spec::register(Arc::new(Nbd));
}

#[derive(Debug)]
struct Nbd;

impl Protocol for Nbd {
    fn driver(&self) -> &'static str {
        "nbd"
    }

    fn check(&self, request: &ProtocolRequest) -> Result<()> {
        name_of(request).map(drop)
    }

    fn shown_name(&self, request: &ProtocolRequest) -> Option<String> {
        let name = name_of(request).ok()?;
        // What a URI of qemu's cannot say is shown as it was given.
        (name.tls.is_none() && name.tls_creds.is_none()).then(|| name.to_string())
    }

    fn open(&self, request: &ProtocolRequest, how: &Opening<'_>) -> Result<Arc<dyn BlockDevice>> {
        let name = name_of(request)?;
        let tls = tls_of(&name, how.secrets)?;
        let device = NbdDevice::open(&name, tls, request.writable)?;
        Ok(Arc::new(if how.no_flush { device.without_flushes() } else { device }))
    }
}

/// What a server exports, as text.
pub(crate) fn list(name: &str, secrets: &Secrets) -> Result<String> {
    let name = ExportName::parse(name)?;
    let tls = tls_of(&name, secrets)?;
    Ok(client::render(&client::list(&name, tls.as_ref())?))
}

fn name_of(request: &ProtocolRequest) -> Result<ExportName> {
    if let Some(name) = &request.name {
        return ExportName::parse(name);
    }
    let mut options = vec![];
    flatten("", &request.options, &mut options);
    ExportName::from_options(options.iter().map(|(key, value)| (key.as_str(), value.as_str())))
}

/// Options with dotted keys.
fn flatten(prefix: &str, options: &Map<String, Value>, flat: &mut Vec<(String, String)>) {
    for (key, value) in options {
        let key = format!("{prefix}{key}");
        match value {
            Value::Object(inner) => flatten(&format!("{key}."), inner, flat),
            Value::String(text) => flat.push((key, text.clone())),
            Value::Bool(on) => flat.push((key, if *on { "on" } else { "off" }.to_owned())),
            other => flat.push((key, other.to_string())),
        }
    }
}

/// What TLS needs, if it is wanted: as the name says, or as the object says that it refers to.
pub(crate) fn tls_of(name: &ExportName, secrets: &Secrets) -> Result<Option<Arc<dyn StartTls>>> {
    let Some(id) = &name.tls_creds else {
        return name.tls.as_ref().map(client::load_tls).transpose();
    };
    let creds = secrets.tls(id)?;
    if creds.server {
        return Err(Error::usage("Expecting TLS credentials with a client endpoint"));
    }
    let hostname = name.tls.as_ref().and_then(|tls| tls.hostname.clone());
    let base = TlsParameters { hostname, verify_peer: creds.verify_peer, ..TlsParameters::default() };
    let parameters = match creds.kind {
        TlsKind::X509 => {
            TlsParameters { kind: Some(uri::TlsKind::X509), certificates: Some(creds.dir.clone()), ..base }
        }
        TlsKind::Psk => TlsParameters {
            kind: Some(uri::TlsKind::Psk),
            psk_file: Some(creds.dir.join("keys.psk")),
            username: Some(creds.username.clone().unwrap_or_else(|| psk::QEMU_USERNAME.to_owned())),
            ..base
        },
    };
    client::load_tls(&parameters).map(Some)
}
