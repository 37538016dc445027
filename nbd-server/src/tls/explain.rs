//! What goes wrong in TLS, in words for people: whose fault it is and what the certificate said.

use std::io;

use rustls::pki_types::UnixTime;
use rustls::{AlertDescription, CertificateError, Error, PeerIncompatible};

/// The error of a session. Identity that does not hold is `PermissionDenied`; everything else is `InvalidData`.
pub(super) fn explain(error: &Error) -> io::Error {
    let (kind, message) = match error {
        Error::InvalidCertificate(error) => (io::ErrorKind::PermissionDenied, certificate(error)),
        Error::NoCertificatesPresented => (
            io::ErrorKind::PermissionDenied,
            "the peer has shown no certificate, and one is required".to_owned(),
        ),
        Error::AlertReceived(alert) => (io::ErrorKind::PermissionDenied, received(*alert)),
        Error::PeerIncompatible(reason) => (io::ErrorKind::InvalidData, incompatible(reason)),
        Error::InvalidMessage(_) => {
            (io::ErrorKind::InvalidData, format!("what the peer sends is not TLS as it should be: {error}"))
        }
        error => (io::ErrorKind::InvalidData, error.to_string()),
    };
    io::Error::new(kind, format!("TLS: {message}"))
}

fn certificate(error: &CertificateError) -> String {
    match error {
        CertificateError::ExpiredContext { not_after, .. } => {
            format!("the peer's certificate has expired{}", at(*not_after))
        }
        CertificateError::NotValidYetContext { not_before, .. } => {
            format!("the peer's certificate does not count yet: not before{}", at(*not_before))
        }
        CertificateError::Revoked => "the peer's certificate has been revoked (ca-crl.pem)".to_owned(),
        CertificateError::UnknownIssuer => {
            "the peer's certificate is not signed by an authority that is trusted here (ca-cert.pem)"
                .to_owned()
        }
        CertificateError::BadSignature => {
            "the peer's certificate is not signed by an authority that is trusted here (one of ca-cert.pem has the \
             same name, but another key), or the peer does not have its key"
                .to_owned()
        }
        CertificateError::ExpiredRevocationListContext { next_update, .. } => {
            format!("the list of revoked certificates (ca-crl.pem) has expired{}", at(*next_update))
        }
        CertificateError::ApplicationVerificationFailure => {
            "the client's certificate is good, but it is not among those that may come in".to_owned()
        }
        CertificateError::NotValidForNameContext { expected, presented } => {
            let names = if presented.is_empty() { "nothing".to_owned() } else { presented.join(", ") };
            format!(
                "the server's certificate is not for '{}', but for {names} (tls-hostname can name another)",
                expected.to_str()
            )
        }
        CertificateError::InvalidPurposeContext { required, .. } => {
            format!("the peer's certificate is not meant for this purpose ({required})")
        }
        error => format!("the peer's certificate is not good: {error}"),
    }
}

/// A point in time, as far as it can be told.
fn at(time: UnixTime) -> String {
    let duration = std::time::Duration::from_secs(time.as_secs());
    x509_cert::der::DateTime::from_unix_duration(duration)
        .map_or_else(|_| String::new(), |date| format!(" {date}"))
}

fn received(alert: AlertDescription) -> String {
    let meaning = match alert {
        AlertDescription::UnknownCA => "it does not trust the authority that has signed our certificate",
        AlertDescription::CertificateRequired => "it wants a certificate of ours",
        AlertDescription::BadCertificate => "it does not like our certificate, or the lack of one",
        AlertDescription::CertificateExpired => "our certificate has expired for it",
        AlertDescription::CertificateRevoked => "our certificate has been revoked for it",
        AlertDescription::CertificateUnknown | AlertDescription::UnsupportedCertificate => {
            "it cannot use our certificate"
        }
        AlertDescription::AccessDenied => "our certificate is good, but we may not come in",
        AlertDescription::HandshakeFailure => {
            "both sides have no cipher in common, or it wants a certificate of ours (or a shared key: tls-psk)"
        }
        AlertDescription::ProtocolVersion => "it does not have TLS 1.2 or 1.3",
        _ => "it gives no reason",
    };
    format!("the peer has refused: {meaning} (alert {alert:?})")
}

fn incompatible(reason: &PeerIncompatible) -> String {
    match reason {
        // The extension came with TLS 1.2, and is the first thing that rustls misses in older ones.
        PeerIncompatible::SignatureAlgorithmsExtensionRequired
        | PeerIncompatible::SupportedVersionsExtensionRequired
        | PeerIncompatible::Tls12NotOffered
        | PeerIncompatible::ServerDoesNotSupportTls12Or13
        | PeerIncompatible::Tls12NotOfferedOrEnabled => "the peer does not have TLS 1.2 or 1.3".to_owned(),
        PeerIncompatible::NoCipherSuitesInCommon => {
            "both sides have no cipher in common (does the peer want a shared key, tls-psk?)".to_owned()
        }
        reason => format!("the peer cannot be talked to: {reason:?}"),
    }
}
