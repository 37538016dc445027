//! Key slots: which passphrases open an encrypted image, by the words of `amend`.

use block::{Error, Result};
use crypt::luks::CreateOptions;
use crypt::luks::slots::Change;

use crate::options::Options;
use crate::secret::Secrets;

/// The change that options ask for; `prefix` is what stands before their names (`encrypt.` in qcow2).
///
/// # Errors
/// In qemu's words: options that do not go together, or secrets that there are not.
pub(crate) fn change(options: &Options, prefix: &str, secrets: &Secrets) -> Result<Change> {
    let given = |name: &str| options.given(&format!("{prefix}{name}"));
    let number = |name: &str| options.number(&format!("{prefix}{name}"));
    let must_not = |name: &str, when: &str| {
        let error = Error::usage(format!("'{name}' must not be given when {when} keyslots"));
        if given(name).is_some() { Err(error) } else { Ok(()) }
    };
    let slot = number("keyslot").map(u64::cast_signed);
    match given("state") {
        None => Err(Error::usage("Parameter 'state' is missing")),
        Some("active") => {
            let Some(new) = given("new-secret") else {
                return Err(Error::usage("'new-secret' is required to activate a keyslot"));
            };
            must_not("old-secret", "activating")?;
            let iter_time = number("iter-time").unwrap_or(CreateOptions::ITER_TIME);
            Ok(Change::Add { new: secrets.passphrase(new)?.clone(), slot, iter_time })
        }
        Some("inactive") => {
            must_not("new-secret", "erasing")?;
            must_not("iter-time", "erasing")?;
            let old = given("old-secret").map(|id| secrets.passphrase(id).cloned()).transpose()?;
            Ok(Change::Erase { old, slot })
        }
        Some(other) => Err(Error::usage(format!("Parameter 'state' does not accept value '{other}'"))),
    }
}
