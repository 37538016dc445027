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
            let read = stdin.take(MOST_KEY).read_to_end(bytes.vec_mut());
            read.context(|| "could not read the keys from standard input".to_owned())?;
            let lines = bytes.split(|byte| *byte == b'\n');
            let lines =
                lines.map(|line| line.strip_suffix(b"\r").unwrap_or(line)).filter(|line| !line.is_empty());
            let passphrases: Vec<_> = lines.map(|line| Secret::new(line.to_vec())).collect();
            if passphrases.is_empty() {
                return Err(Failure::usage("--keys-from-stdin: there is no passphrase on standard input"));
            }
            keys.push(Key { selector: Selector::All, passphrases });
        }
        let effort = if app.global.slow_keys { Effort::UNBOUNDED } else { Effort::DEFAULT };
        Ok(Keys::new(keys, effort))
    }
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
