//! `--key` and `--keys-from-stdin`: passphrases for the encrypted volumes of guests, in the words of virt-v2v.

use std::io::Read as _;
use std::path::Path;

use block::{Error, ErrorKind, ResultExt as _};
use crypt::Secret;
use crypt::luks::Effort;
use guestdisk::Keys;
use guestdisk::keys::{Key, Selector};
use image::Secrets;

use crate::app::App;
use crate::exit::{Failure, Outcome};

/// The largest key file (cryptsetup's limit).
const MOST_KEY: u64 = 8 << 20;

/// The most passphrases of standard input: each costs what a key derivation does.
const MOST_PASSPHRASES: usize = 1024;

/// How the keys of a guest are given.
#[derive(Clone, Default, clap::Args)]
pub(crate) struct KeyArgs {
    /// Open the LUKS volume SELECTOR (/dev/sda2, /dev/GROUP/NAME, its UUID, or all) with the passphrase that follows
    /// 'key:', that is the first line of a file ('file:'), or of a secret of --object ('secret:') (repeatable)
    #[arg(
        long,
        value_name = "SELECTOR:key:TEXT|SELECTOR:file:FILE|SELECTOR:secret:ID",
        help_heading = "Encrypted volumes"
    )]
    key: Vec<String>,
    /// Read passphrases for LUKS volumes from standard input, one on each line
    #[arg(long, help_heading = "Encrypted volumes")]
    keys_from_stdin: bool,
}

/// Passphrases are not for showing.
impl std::fmt::Debug for KeyArgs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "KeyArgs({}, {})", self.key.len(), self.keys_from_stdin)
    }
}

impl KeyArgs {
    /// What to do about an error of opening an image, where keys for what is in it are given.
    pub(crate) fn unopened(&self, error: Error) -> Error {
        let said = error.to_string();
        let about_luks = said.contains("luks") || said.contains("key-secret");
        match about_luks && (!self.key.is_empty() || self.keys_from_stdin) {
            true => {
                error.hint("if it is a raw disk that the guest has encrypted from its first byte: -f raw")
            }
            false => error,
        }
    }

    /// The same for a command's failure.
    pub(crate) fn unopened_failure(&self, failure: Failure) -> Failure {
        match failure {
            Failure::Error { exit, error } => Failure::Error { exit, error: self.unopened(error) },
            other => other,
        }
    }

    /// As options of a command line.
    pub(crate) fn words(&self) -> impl Iterator<Item = String> + '_ {
        self.key.iter().map(|key| format!("--key={key}"))
    }

    /// The keys, their files read. To be called once, for standard input can be read once, and before files are given up.
    pub(crate) fn read(&self, secrets: &Secrets, app: &App) -> Outcome<Keys> {
        let mut keys = vec![];
        for text in &self.key {
            keys.push(parse(text, secrets)?);
        }
        if self.keys_from_stdin {
            let mut bytes = Secret::default();
            let stdin = std::io::stdin().lock();
            let read = stdin.take(MOST_KEY + 1).read_to_end(bytes.vec_mut());
            read.context(|| "could not read the keys from standard input".to_owned())?;
            keys.push(Key { selector: Selector::All, passphrases: of_lines(&bytes)? });
        }
        let effort = if app.global.slow_keys { Effort::UNBOUNDED } else { Effort::DEFAULT };
        Ok(Keys::new(keys, effort))
    }
}

/// The passphrases of standard input, one a line, equal ones once.
fn of_lines(bytes: &[u8]) -> Outcome<Vec<Secret>> {
    if bytes.len() as u64 > MOST_KEY {
        return Err(
            Error::unsupported("--keys-from-stdin: there are more than 8 MiB on standard input").into()
        );
    }
    let mut found: Vec<Secret> = vec![];
    for line in bytes.split(|byte| *byte == b'\n') {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if line.is_empty() || found.iter().any(|known| **known == *line) {
            continue;
        }
        if found.len() == MOST_PASSPHRASES {
            let message = format!("--keys-from-stdin: there are more than {MOST_PASSPHRASES} passphrases");
            return Err(Error::unsupported(message).into());
        }
        found.push(Secret::new(line.to_vec()));
    }
    if found.is_empty() {
        return Err(Failure::usage("--keys-from-stdin: there is no passphrase on standard input"));
    }
    Ok(found)
}

/// What to do about an error of opening the disks of a guest.
pub(crate) fn explain(error: Error) -> Error {
    match error.kind() {
        ErrorKind::Denied => {
            error.hint("if the volume is worth the time (maybe hours) and memory, add --slow-keys")
        }
        ErrorKind::Permission => error.hint("see --key SELECTOR:file:FILE, where SELECTOR can be 'all'"),
        _ => error,
    }
}

fn parse(text: &str, secrets: &Secrets) -> Outcome<Key> {
    let at = [":key:", ":file:", ":secret:", ":clevis"]
        .iter()
        .filter_map(|word| Some((text.find(word)?, *word)))
        .min_by_key(|(at, _)| *at);
    // What follows may be a passphrase, and is not repeated.
    let Some((at, word)) = at.filter(|(at, _)| *at > 0) else {
        let wanted = "SELECTOR:key:PASSPHRASE, SELECTOR:file:FILE or SELECTOR:secret:ID";
        return Err(Failure::usage(format!("--key expects {wanted}")));
    };
    let (selector, rest) = (Selector::parse(&text[..at]), &text[at + word.len()..]);
    let passphrases = match word {
        ":key:" => vec![Secret::from(rest)],
        ":file:" => of_file(Path::new(rest))?,
        ":secret:" => vec![secrets.get(rest)?.clone()],
        _ => return Err(Error::unsupported("--key: keys of Clevis are not supported").into()),
    };
    Ok(Key { selector, passphrases })
}

/// The first line of a file, as virt-v2v reads it; or all of it, as cryptsetup reads a key file.
fn of_file(path: &Path) -> Outcome<Vec<Secret>> {
    let what = || format!("could not read the key in '{}'", path.display());
    let mut bytes = Secret::default();
    let file = std::fs::File::open(path).context(what)?;
    file.take(MOST_KEY + 1).read_to_end(bytes.vec_mut()).context(what)?;
    if bytes.len() as u64 > MOST_KEY {
        return Err(Error::unsupported("it is larger than 8 MiB").context(what()).into());
    }
    if bytes.is_empty() {
        return Err(Error::usage("it is empty").context(what()).into());
    }
    let line = bytes.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let line = Secret::new(line.strip_suffix(b"\r").unwrap_or(line).to_vec());
    let mut found = vec![];
    if !line.is_empty() {
        found.push(line);
    }
    if found.first() != Some(&bytes) {
        found.push(bytes);
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passphrases_of_lines() {
        assert_eq!(of_lines(b"a\r\nb\n\na\n").unwrap(), [Secret::from("a"), Secret::from("b")]);
        of_lines(b"\n\n").unwrap_err();
        let many = |count: usize| (0..count).map(|index| format!("{index}\n")).collect::<String>();
        assert_eq!(of_lines(many(1024).as_bytes()).unwrap().len(), 1024);
        of_lines(many(1025).as_bytes()).unwrap_err();
        let most = usize::try_from(MOST_KEY).unwrap();
        assert_eq!(of_lines("abc\n".repeat(most / 4).as_bytes()).unwrap(), [Secret::from("abc")]);
        of_lines(&vec![b'x'; most + 1]).unwrap_err();
    }

    #[test]
    fn only_given_keys_name_the_way_out() {
        let error = || Error::usage("Parameter 'key-secret' is required for cipher");
        let given = KeyArgs { key: vec!["all:key:x".to_owned()], keys_from_stdin: false };
        assert_eq!(given.unopened(error()).hints().len(), error().hints().len() + 1);
        assert_eq!(KeyArgs::default().unopened(error()).hints().len(), error().hints().len());
        let other = Error::usage("no such file");
        assert!(given.unopened(other).hints().is_empty());
    }

    #[test]
    fn selectors_and_passphrases() {
        let secrets = Secrets::parse(&["secret,id=s,data=hidden".to_owned()]).unwrap();
        let parse = |text: &str| parse(text, &secrets);
        let key = parse("/dev/sda2:key:a:file:b").unwrap();
        assert_eq!(key.selector, Selector::Name("/dev/sda2".into()));
        assert_eq!(key.passphrases, [Secret::from("a:file:b")]);
        assert_eq!(parse("all:key:").unwrap().selector, Selector::All);
        assert_eq!(parse("all:secret:s").unwrap().passphrases, [Secret::from("hidden")]);
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("k");
        std::fs::write(&file, "first\nsecond\n").unwrap();
        let found = parse(&format!("UUID=1-2:file:{}", file.display())).unwrap().passphrases;
        assert_eq!(found, [Secret::from("first"), Secret::from("first\nsecond\n")]);
        std::fs::write(&file, "first").unwrap();
        assert_eq!(of_file(&file).unwrap(), [Secret::from("first")]);
        for wrong in ["hush", ":key:hush", "all:hush", "all:clevis", "all:secret:none", "all:file:/no/such"] {
            let failure = parse(wrong).unwrap_err();
            assert!(!format!("{failure:?}").contains("hush"), "{wrong}");
        }
    }
}
