//! What a certificate says about its holder. Whether it is true is for rustls to find out.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use block::{Error, Result};
use rustls::pki_types::{CertificateDer, IpAddr, ServerName};
use x509_cert::certificate::{CertificateInner, Raw};
use x509_cert::der::Decode as _;
use x509_cert::der::oid::AssociatedOid as _;
use x509_cert::ext::pkix::SubjectAltName;

/// The certificate's fields; those rules of RFC 5280 that authorities are known to break (long serial numbers) are not
/// insisted on.
type Certificate = CertificateInner<Raw>;

/// The holder's distinguished name as in RFC 4514: `CN=client,O=Example,C=GB`.
pub(super) fn distinguished_name(certificate: &CertificateDer<'_>) -> Option<String> {
    let certificate = Certificate::from_der(certificate).ok()?;
    Some(certificate.tbs_certificate().subject().to_string())
}

/// Whether the certificate counts today.
pub(super) fn check_dates(certificate: &CertificateDer<'_>) -> Result<()> {
    let certificate = Certificate::from_der(certificate)
        .map_err(|error| Error::invalid(format!("the certificate cannot be understood: {error}")))?;
    let validity = certificate.tbs_certificate().validity();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    if now < validity.not_before.to_unix_duration() {
        let since = validity.not_before.to_date_time();
        return Err(Error::invalid(format!("the certificate is not valid before {since}")));
    }
    if now > validity.not_after.to_unix_duration() {
        let until = validity.not_after.to_date_time();
        return Err(Error::invalid(format!("the certificate has expired at {until}")));
    }
    Ok(())
}

/// Whether the certificate names its holder only in the old way, by its common name, and that is `server`.
///
/// RFC 6125, section 6.4.4, lets the common name count where there is no name of the proper kind; GnuTLS does it, and
/// so the certificates of many a QEMU installation have nothing else.
pub(super) fn common_name_is(certificate: &CertificateDer<'_>, server: &ServerName<'_>) -> bool {
    let Ok(certificate) = Certificate::from_der(certificate) else { return false };
    let extensions = certificate.tbs_certificate().extensions();
    let has_proper_names =
        extensions.is_some_and(|all| all.iter().any(|one| one.extn_id == SubjectAltName::OID));
    if has_proper_names {
        return false;
    }
    let Ok(Some(name)) = certificate.tbs_certificate().subject().common_name() else { return false };
    match server {
        ServerName::DnsName(wanted) => name.value().eq_ignore_ascii_case(wanted.as_ref()),
        ServerName::IpAddress(wanted) => {
            name.value().parse().is_ok_and(|ip: std::net::IpAddr| IpAddr::from(ip) == *wanted)
        }
        _ => false,
    }
}
