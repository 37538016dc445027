//! What is to be served, to whom and how: what the words of `vimg serve` and those of `qemu-nbd` both come down to.

use std::path::{Path, PathBuf};
use std::time::Duration;

use block::Error;
use block::file::CacheMode;
use image::Secrets;
use nbd_server::kernel::Device;
use nbd_server::proto::DEFAULT_PORT;
use nbd_server::server::export::DetectZeroes;
use qcow2::snapshot::Selector;

use crate::exit::{Failure, Outcome};

/// Everything that has been decided.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) images: Vec<Image>,
    pub(crate) description: String,
    pub(crate) format: Option<String>,
    pub(crate) served: Served,
    pub(crate) window: Window,
    pub(crate) io: Io,
    pub(crate) place: Where,
    pub(crate) authentication: Authentication,
    pub(crate) tls_optional: bool,
    pub(crate) max_clients: usize,
    pub(crate) handshake_timeout: Option<Duration>,
    pub(crate) threads: usize,
    pub(crate) once: bool,
    pub(crate) fork: bool,
    pub(crate) pid_file: Option<PathBuf>,
    /// Print the URIs of the exports once they are there.
    pub(crate) announce: bool,
    pub(crate) logging: Logging,
    pub(crate) metrics: Option<PathBuf>,
    pub(crate) force_share: bool,
    pub(crate) image_opts: bool,
    pub(crate) secrets: Secrets,
}

/// An image and the name of its export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Image {
    pub(crate) export: String,
    pub(crate) filename: String,
}

/// How an image is shown.
#[derive(Debug, Clone, Default)]
pub(crate) struct Served {
    pub(crate) read_only: bool,
    pub(crate) overlay: bool,
    pub(crate) snapshot: Option<Selector>,
    pub(crate) bitmaps: Vec<String>,
    pub(crate) allocation_depth: bool,
    pub(crate) resizable: bool,
    pub(crate) multi_conn: bool,
}

/// How much of it is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Window {
    Whole,
    /// Bytes.
    Part {
        offset: u64,
        len: Option<u64>,
    },
    Partition(u32),
}

/// How its files are used.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Io {
    pub(crate) cache: CacheMode,
    pub(crate) discard: bool,
    pub(crate) detect_zeroes: DetectZeroes,
}

/// Where clients come from.
#[derive(Debug)]
pub(crate) enum Where {
    /// The socket that systemd passes, or else the usual port of this machine's own address.
    Default,
    Tcp(Vec<(String, u16)>),
    Unix {
        path: PathBuf,
        mode: Option<u32>,
    },
    Stdio,
    /// The kernel of this machine: the image becomes this disk.
    Kernel(Device),
}

/// How clients know the server, and it them.
#[derive(Debug)]
pub(crate) enum Authentication {
    None,
    X509 { dir: PathBuf, verify_peer: bool },
    Psk { file: PathBuf },
}

/// How events are told.
#[derive(Debug, Clone, Default)]
pub(crate) struct Logging {
    pub(crate) json: bool,
    pub(crate) file: Option<PathBuf>,
}

impl Logging {
    pub(crate) fn parse(form: &str, file: Option<PathBuf>) -> Outcome<Self> {
        match form {
            "human" | "json" => Ok(Self { json: form == "json", file }),
            other => Err(Failure::usage(format!("--log expects 'human' or 'json' not '{other}'"))),
        }
    }
}

impl Io {
    /// Understands the four modes, in qemu-nbd's words.
    pub(crate) fn parse(cache: &str, aio: &str, discard: &str, detect_zeroes: &str) -> Outcome<Self> {
        let cache =
            CacheMode::parse(cache).ok_or_else(|| Failure::usage(format!("Invalid cache mode `{cache}'")))?;
        match aio {
            "threads" | "io_uring" => {}
            "native" if cache.direct() => {}
            "native" => {
                let words =
                    "aio=native was specified, but it requires cache.direct=on, which was not specified.";
                return Err(Failure::usage(words));
            }
            other => return Err(Failure::usage(format!("invalid aio mode `{other}'"))),
        }
        let discard = match discard {
            "ignore" | "off" => false,
            "unmap" | "on" => true,
            other => return Err(Failure::usage(format!("Invalid discard mode `{other}'"))),
        };
        let detect_zeroes = match detect_zeroes {
            "off" => DetectZeroes::Off,
            "on" => DetectZeroes::On,
            "unmap" if discard => DetectZeroes::Unmap,
            "unmap" => {
                let words = "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap";
                return Err(Failure::usage(words));
            }
            _ => return Err(Failure::usage("Failed to parse detect_zeroes mode")),
        };
        Ok(Self { cache, discard, detect_zeroes })
    }
}

/// The images that are named: one as it is, or any number as NAME=IMAGE.
pub(crate) fn images(words: &[String], export: Option<&str>, image_opts: bool) -> Outcome<Vec<Image>> {
    if let [only] = words
        && (export.is_some() || image_opts || split(only).is_none())
    {
        return Ok(vec![Image { export: export.unwrap_or_default().to_owned(), filename: only.clone() }]);
    }
    if export.is_some() {
        return Err(Failure::usage("--export names the export of a single image; call several NAME=IMAGE"));
    }
    words
        .iter()
        .map(|word| {
            let (name, filename) = split(word).ok_or_else(|| {
                let error = Error::usage(format!("'{word}' is one of several images and has no name"));
                Failure::from(
                    error.hint(format!("clients ask for exports by name: disk={word}, for example")),
                )
            })?;
            Ok(Image { export: name.to_owned(), filename: filename.to_owned() })
        })
        .collect()
}

/// Splits NAME=IMAGE. A file that is really called so, and a name with a slash or colon in it, is an image.
fn split(word: &str) -> Option<(&str, &str)> {
    let (name, filename) = word.split_once('=')?;
    let is_image = name.contains(['/', ':', '{']) || filename.is_empty() || Path::new(word).exists();
    (!is_image).then_some((name, filename))
}

/// `HOST:PORT`, `[V6]:PORT`, `:PORT`, `HOST` or `PORT`.
pub(crate) fn address(text: &str) -> Outcome<(String, u16)> {
    let wrong =
        || Failure::usage(format!("'{text}' is no address to listen on: HOST:PORT, [V6]:PORT or :PORT"));
    if let Ok(port) = text.parse() {
        return Ok((String::new(), port));
    }
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (host, rest) = rest.split_once(']').ok_or_else(wrong)?;
            (host, rest.strip_prefix(':'))
        }
        None => match text.rsplit_once(':') {
            // An address of IPv6 without brackets.
            Some((host, _)) if host.contains(':') => (text, None),
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        },
    };
    let port = port.map_or(Ok(DEFAULT_PORT), |port| port.parse().map_err(|_| wrong()))?;
    Ok((host.to_owned(), port))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(export: &str, filename: &str) -> Image {
        Image { export: export.to_owned(), filename: filename.to_owned() }
    }

    fn words(words: &[&str]) -> Vec<String> {
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    #[test]
    fn one_image_needs_no_name_and_several_do() {
        let of = |list: &[&str], export| images(&words(list), export, false).ok();
        assert_eq!(of(&["a.raw"], None), Some(vec![named("", "a.raw")]));
        assert_eq!(of(&["a.raw"], Some("x")), Some(vec![named("x", "a.raw")]));
        assert_eq!(of(&["a=a.raw"], None), Some(vec![named("a", "a.raw")]));
        assert_eq!(of(&["/a=b/c.raw"], None), Some(vec![named("", "/a=b/c.raw")]));
        assert_eq!(of(&["json:{\"x\":\"=\"}"], None).unwrap()[0].export, "");
        let two = vec![named("a", "1"), named("b", "nbd://h/x?y=z")];
        assert_eq!(of(&["a=1", "b=nbd://h/x?y=z"], None), Some(two));
        assert_eq!(of(&["a=1", "2"], None), None);
        assert_eq!(of(&["a=1", "b=2"], Some("x")), None);
    }

    #[test]
    fn addresses() {
        let of = |text: &str| address(text).ok();
        assert_eq!(of("10.0.0.1:99"), Some(("10.0.0.1".to_owned(), 99)));
        assert_eq!(of("[::1]:99"), Some(("::1".to_owned(), 99)));
        assert_eq!(of("[::1]"), Some(("::1".to_owned(), DEFAULT_PORT)));
        assert_eq!(of("::1"), Some(("::1".to_owned(), DEFAULT_PORT)));
        assert_eq!(of(":0"), Some((String::new(), 0)));
        assert_eq!(of("0"), Some((String::new(), 0)));
        assert_eq!(of("localhost"), Some(("localhost".to_owned(), DEFAULT_PORT)));
        assert_eq!(of("host:x"), None);
        assert_eq!(of("[::1"), None);
    }
}
