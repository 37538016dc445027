//! `--object tls-creds-*`: how server and clients know each other, in QEMU's words.

use std::path::PathBuf;

use super::Words;
use crate::cmd::serve::plan::Authentication;
use crate::exit::{Failure, Outcome};

/// Credentials that an object defines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Creds {
    /// The object's type without `tls-creds-`.
    kind: String,
    endpoint_is_server: bool,
    dir: Option<PathBuf>,
    verify_peer: bool,
}

/// Whether an object is about TLS, and not a secret, say.
pub(super) fn is_for_tls(object: &str) -> bool {
    let kind = object.strip_prefix("qom-type=").unwrap_or(object);
    kind.starts_with("tls-creds-") || kind.starts_with("authz-")
}

/// The credentials of `--tls-creds`.
pub(super) fn find(words: &Words) -> Outcome<Creds> {
    let wanted = words.tls_creds.as_deref().unwrap_or_default();
    let failed = |why: &str| Failure::usage(format!("Failed to get TLS creds: {why}"));
    let mut found = None;
    for object in &words.objects {
        let options = options(object)?;
        let of = |name: &str| options.iter().rev().find(|(key, _)| key == name).map(|(_, value)| value);
        if of("id").map(String::as_str) == Some(wanted) {
            found = Some(options.clone());
        }
    }
    let options = found.ok_or_else(|| failed(&format!("No TLS credentials with id '{wanted}'")))?;
    let creds = parse(&options)?
        .ok_or_else(|| failed(&format!("Object with id '{wanted}' is not TLS credentials")))?;
    if creds.endpoint_is_server == words.list {
        let side = if words.list { "client" } else { "server" };
        return Err(failed(&format!("Expected TLS credentials for a {side} endpoint")));
    }
    Ok(creds)
}

fn options(object: &str) -> Outcome<Vec<(String, String)>> {
    let text = match object.split([',', '=']).next() {
        Some("qom-type") => object.to_owned(),
        _ => format!("qom-type={object}"),
    };
    Ok(image::options::parse(&[text])?)
}

fn parse(options: &[(String, String)]) -> Outcome<Option<Creds>> {
    let mut creds = Creds { kind: String::new(), endpoint_is_server: false, dir: None, verify_peer: true };
    for (name, value) in options {
        match name.as_str() {
            "qom-type" => match value.strip_prefix("tls-creds-") {
                Some(kind) => kind.clone_into(&mut creds.kind),
                None => return Ok(None),
            },
            "id" | "sanity-check" | "username" => {}
            "endpoint" => match value.as_str() {
                "server" | "client" => creds.endpoint_is_server = value == "server",
                other => {
                    let words = format!("Parameter 'endpoint' does not accept value '{other}'");
                    return Err(Failure::usage(words));
                }
            },
            "dir" => creds.dir = Some(value.into()),
            "verify-peer" => match value.as_str() {
                "on" | "yes" | "true" | "y" => creds.verify_peer = true,
                "off" | "no" | "false" | "n" => creds.verify_peer = false,
                _ => return Err(Failure::usage("Parameter 'verify-peer' expects 'on' or 'off'")),
            },
            // `priority` and `passwordid`: to ignore them would be another security than the one that was asked for.
            other => {
                let words =
                    format!("Property 'tls-creds-{}.{other}' is not in this version of vimg", creds.kind);
                return Err(Failure::usage(words));
            }
        }
    }
    Ok(Some(creds))
}

impl Creds {
    /// How the server knows its clients.
    pub(super) fn for_server(self) -> Outcome<Authentication> {
        let dir = self.dir.ok_or_else(|| Failure::usage("Missing 'dir' property value"))?;
        match self.kind.as_str() {
            "x509" => Ok(Authentication::X509 { dir, verify_peer: self.verify_peer }),
            "psk" => Ok(Authentication::Psk { file: dir.join("keys.psk") }),
            kind => {
                let words = format!("TLS credentials of type '{kind}' are not in this version of vimg");
                Err(Failure::usage(words))
            }
        }
    }
}
