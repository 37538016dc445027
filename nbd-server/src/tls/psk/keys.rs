//! The file of keys as GnuTLS has it: `user:key` in lines, the key in hexadecimal. A user that begins with `#` is in
//! hexadecimal, too.

use std::collections::HashMap;
use std::path::Path;

use block::{Error, Result};
use zeroize::Zeroizing;

use crate::tls::folder::{read, shown};

/// RFC 4279, section 5.3, wants 128 at least, and OpenSSL has room for that many.
const USERNAME_BYTES_MAX: usize = 128;
/// As much as psktool makes.
const KEY_BYTES_MAX: usize = 512;

/// A key, which leaves memory when it is no longer needed.
pub(super) type Key = Zeroizing<Vec<u8>>;

/// Keys by user.
#[derive(Default)]
pub(super) struct Keys(HashMap<Vec<u8>, Key>);

/// Keys are not for showing.
impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Keys({})", self.0.len())
    }
}

impl Keys {
    /// Reads all of a file.
    pub(super) fn read(path: &Path) -> Result<Self> {
        let text = Zeroizing::new(read(path)?);
        let mut keys = Self::default();
        for (number, line) in (1..).zip(text.split(|&byte| byte == b'\n')) {
            let line = line.trim_ascii();
            if line.is_empty() {
                continue;
            }
            let (user, key) = parse(line).map_err(|message| {
                let error = Error::invalid(format!("line {number}: {message}")).context(shown(path));
                error.hint(
                    "a line is user:key with the key in hexadecimal; 'psktool -u USER -p FILE' makes one",
                )
            })?;
            // The first one counts, as for GnuTLS.
            keys.0.entry(user).or_insert(key);
        }
        if keys.0.is_empty() {
            let error = Error::invalid("the file holds no key").context(shown(path));
            return Err(error.hint("'psktool -u USER -p FILE' makes one"));
        }
        Ok(keys)
    }

    /// The key of a user.
    pub(super) fn get(&self, user: &[u8]) -> Option<&Key> {
        self.0.get(user)
    }

    /// The key that a client means.
    pub(super) fn choose<'a>(&'a self, path: &Path, username: Option<&'a str>) -> Result<(&'a str, &'a Key)> {
        let Some(username) = username else {
            let mut all = self.0.iter();
            return match (all.next(), all.next()) {
                (Some((user, key)), None) => match std::str::from_utf8(user) {
                    Ok(user) => Ok((user, key)),
                    Err(_) => Err(Error::invalid("the user's name is not text").context(shown(path))),
                },
                _ => {
                    let error = Error::usage(format!("there are {} keys", self.0.len())).context(shown(path));
                    Err(error.hint("name the user: username in the URI (nbds://USER@HOST/) or in --object"))
                }
            };
        };
        match self.get(username.as_bytes()) {
            Some(key) => Ok((username, key)),
            None => {
                let error =
                    Error::usage(format!("there is no key of user '{username}'")).context(shown(path));
                Err(error.hint("name another user: username in the URI (nbds://USER@HOST/) or in --object"))
            }
        }
    }
}

fn parse(line: &[u8]) -> std::result::Result<(Vec<u8>, Key), String> {
    // A name may have colons in it; a key has none.
    let colon = line.iter().rposition(|&byte| byte == b':').ok_or("there is no colon")?;
    let (user, key) = (&line[..colon], &line[colon + 1..]);
    let user = match user.strip_prefix(b"#") {
        Some(digits) => hexadecimal(digits).ok_or("the user after # is not hexadecimal")?.to_vec(),
        None => user.to_vec(),
    };
    let key = hexadecimal(key).ok_or("the key is not hexadecimal")?;
    if user.is_empty() || user.len() > USERNAME_BYTES_MAX || user.contains(&0) {
        return Err(format!(
            "the user has {} bytes, of 1 to {USERNAME_BYTES_MAX}, and none may be zero",
            user.len()
        ));
    }
    if key.is_empty() || key.len() > KEY_BYTES_MAX {
        return Err(format!("the key has {} bytes, of 1 to {KEY_BYTES_MAX}", key.len()));
    }
    Ok((user, key))
}

fn hexadecimal(digits: &[u8]) -> Option<Key> {
    if !digits.len().is_multiple_of(2) {
        return None;
    }
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|value| u8::try_from(value).ok());
    let bytes: Option<Vec<u8>> =
        digits.chunks_exact(2).map(|pair| Some(digit(pair[0])? << 4 | digit(pair[1])?)).collect();
    bytes.map(Zeroizing::new)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(text: &str) -> Result<Keys> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys.psk");
        std::fs::write(&path, text).unwrap();
        Keys::read(&path)
    }

    #[test]
    fn lines_are_users_and_keys() {
        let found = keys("alice:00Ff\n\n  a:b:01  \r\n#6e616d65:02\nalice:33\n").unwrap();
        assert_eq!(found.get(b"alice").unwrap().as_slice(), [0, 255]);
        assert_eq!(found.get(b"a:b").unwrap().as_slice(), [1]);
        assert_eq!(found.get(b"name").unwrap().as_slice(), [2]);
        assert!(found.get(b"bob").is_none());
        assert_eq!(format!("{found:?}"), "Keys(3)");
    }

    #[test]
    fn what_is_wrong_is_told_with_its_line_and_never_the_key() {
        for text in ["secret", "a:secret", "a:123", ":12", "a:", "#zz:12", "a\0:12"] {
            let error = keys(&format!("ok:12\n{text}\n")).unwrap_err();
            assert!(error.to_string().contains("line 2: "), "{error}");
            assert!(!error.to_string().contains("secret"), "{error}");
        }
        keys("").unwrap_err();
        keys(&format!("{}:12", "a".repeat(USERNAME_BYTES_MAX + 1))).unwrap_err();
        keys(&format!("a:{}", "0".repeat(2 * KEY_BYTES_MAX + 2))).unwrap_err();
        keys(&format!("a:{}", "0".repeat(2 * KEY_BYTES_MAX))).unwrap();
    }

    #[test]
    fn a_client_has_to_say_who_it_is_unless_there_is_one_only() {
        let path = Path::new("keys");
        let one = keys("alice:01").unwrap();
        assert_eq!(one.choose(path, None).unwrap().0, "alice");
        let two = keys("alice:01\nbob:02").unwrap();
        assert!(two.choose(path, None).unwrap_err().to_string().contains("2 keys"));
        assert_eq!(two.choose(path, Some("bob")).unwrap().1.as_slice(), [2]);
        assert!(two.choose(path, Some("carol")).unwrap_err().to_string().contains("carol"));
    }
}
