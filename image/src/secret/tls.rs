//! Objects that say how TLS is spoken (`tls-creds-x509`, `tls-creds-psk`). They are only understood here; the files
//! are read when a connection needs them.

use std::path::{Path, PathBuf};

use block::{Error, Result, ResultExt as _};
use serde_json::Value;

use super::Properties;

/// The kind of credentials.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TlsKind {
    /// Certificates.
    X509,
    /// A key that both sides know.
    Psk,
}

impl TlsKind {
    /// The kind of an object of this type, if it is one of TLS.
    pub(super) fn of_object(kind: &str) -> Option<Self> {
        match kind {
            "tls-creds-x509" => Some(Self::X509),
            "tls-creds-psk" => Some(Self::Psk),
            _ => None,
        }
    }

    /// Whether there is what everything else hangs on.
    fn check_folder(self, dir: &Path) -> Result<()> {
        let path = dir.join(match self {
            Self::X509 => "ca-cert.pem",
            Self::Psk => "keys.psk",
        });
        std::fs::metadata(&path)
            .map(drop)
            .context(|| format!("Unable to access credentials {}", path.display()))
    }

    /// Keys besides `qom-type` and `id`. `priority` and `sanity-check` make no difference here: there are no weak
    /// ciphers to be switched off, and certificates are always examined.
    fn keys(self) -> &'static [&'static str] {
        match self {
            Self::X509 => &["dir", "endpoint", "verify-peer", "priority", "sanity-check", "passwordid"],
            Self::Psk => &["dir", "endpoint", "verify-peer", "priority", "username"],
        }
    }
}

/// How TLS is to be spoken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsCreds {
    /// With what.
    pub kind: TlsKind,
    /// The folder of certificates, or of the file of keys (`keys.psk`).
    pub dir: PathBuf,
    /// Whether it is for a server.
    pub server: bool,
    /// Whether the other side has to prove who it is.
    pub verify_peer: bool,
    /// Whose key it is.
    pub username: Option<String>,
}

impl TlsCreds {
    pub(super) fn from_properties(kind: TlsKind, properties: &Properties) -> Result<Self> {
        let known = |key: &str| key == "qom-type" || key == "id" || kind.keys().contains(&key);
        if let Some(key) = properties.0.keys().find(|key| !known(key)) {
            return Err(Error::usage(format!("Parameter '{key}' is unexpected")));
        }
        if properties.0.contains_key("passwordid") {
            return Err(Error::unsupported("keys of certificates that are encrypted are not read here")
                .hint("decrypt the key with: openssl pkey -in client-key.pem -out client-key.pem"));
        }
        let server = match properties.text("endpoint")?.as_deref() {
            None | Some("client") => false,
            Some("server") => true,
            Some(other) => {
                return Err(Error::usage(format!("Parameter 'endpoint' does not accept value '{other}'")));
            }
        };
        let dir = properties.text("dir")?.ok_or_else(|| Error::usage("Missing 'dir' property value"))?;
        let dir = PathBuf::from(dir);
        kind.check_folder(&dir)?;
        Ok(Self {
            kind,
            dir,
            server,
            verify_peer: switch(properties.0.get("verify-peer"), "verify-peer")?.unwrap_or(true),
            username: properties.text("username")?,
        })
    }
}

fn switch(value: Option<&Value>, key: &str) -> Result<Option<bool>> {
    match value {
        None => Ok(None),
        Some(Value::Bool(on)) => Ok(Some(*on)),
        Some(Value::String(text)) => crate::spec::parse_bool(key, text).map(Some),
        Some(_) => Err(Error::usage(format!("Invalid parameter type for '{key}', expected: boolean"))),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Secrets;
    use super::*;

    fn parse(text: &str) -> Result<Secrets> {
        Secrets::parse(&[text.to_owned()])
    }

    #[test]
    fn objects_say_how_tls_is_spoken() {
        let folder = tempfile::tempdir().unwrap();
        for file in ["ca-cert.pem", "keys.psk"] {
            std::fs::write(folder.path().join(file), b"").unwrap();
        }
        let dir = folder.path().display();
        let secrets =
            parse(&format!("tls-creds-x509,id=t,dir={dir},endpoint=client,verify-peer=off")).unwrap();
        let creds = secrets.tls("t").unwrap();
        assert_eq!(
            (creds.kind, creds.dir.as_path(), creds.verify_peer),
            (TlsKind::X509, folder.path(), false)
        );
        let secrets = parse(&format!("tls-creds-psk,id=p,dir={dir},username=me")).unwrap();
        assert_eq!(secrets.tls("p").unwrap().username.as_deref(), Some("me"));
        assert_eq!(secrets.tls("t").unwrap_err().to_string(), "No TLS credentials with id 't'");
        for wrong in [
            "tls-creds-x509,id=t",
            "tls-creds-x509,id=t,dir=/x,foo=1",
            "tls-creds-x509,id=t,dir=/x,endpoint=x",
            "tls-creds-x509,id=t,dir=/x,verify-peer=x",
            "tls-creds-x509,id=t,dir=/nonexistent",
        ] {
            parse(wrong).unwrap_err();
        }
        let twice = ["secret,id=t,data=x".to_owned(), format!("tls-creds-psk,id=t,dir={dir}")];
        Secrets::parse(&twice).unwrap_err();
    }
}
