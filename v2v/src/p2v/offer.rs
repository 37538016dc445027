//! What the machine that is copied and the one that receives it say to each other, as JSON.
//!
//! ```text
//!   {"vimg-p2v": 1, "offer": {"folder": "web1", "restart": false, "machine": {..},
//!     "disks": [{"name": "sda", "size-bytes": N, "serial": "S1", "table": "6a89..", "data-bytes": M}]}}
//!        -> {"id": "0f5c..", "follows": "a2e1..", "disks": [{"export": "web1/sda", "image": "sda.qcow2", "format": "qcow2", "begun": true}]}
//!   {"vimg-p2v": 1, "complete": {"folder": "web1", "id": "0f5c..", "machine": {..}}}
//!        -> {"folder": "/srv/machines/web1"}
//!   anything that is refused
//!        -> {"error": "what is wrong", "hints": ["what to do"]}
//! ```
//!
//! It goes through an export of its own, [`DESK`] with a word of the sender's choice behind it: a request is written to its
//! beginning, a flush has it carried out, the answer is read from its middle. Each is its length, four bytes with the most
//! significant first, and the text.

use block::{Error, ErrorKind, Result};
use serde_json::{Value, json};

use super::state::Identity;

/// The beginning of the names of exports that take requests.
pub const DESK: &str = "vimg-p2v/";
/// Their size in bytes. Requests are in the first half, answers in the second.
pub const DESK_BYTES: u64 = 8 << 20;

const VERSION: u64 = 1;
/// The most disks of a machine.
const MOST_DISKS: usize = 256;
/// The longest name of a disk or folder.
const MOST_NAME: usize = 64;
/// Larger than any disk.
const MOST_BYTES: u64 = 1 << 60;

/// A machine that wants to be received.
#[derive(Debug, Clone, PartialEq)]
pub struct Offer {
    /// The folder for it below that of the receiver; empty: that one itself.
    pub folder: String,
    /// What an earlier copy has left is to be removed.
    pub restart: bool,
    /// Its description.
    pub machine: Value,
    /// Its disks.
    pub disks: Vec<OfferedDisk>,
}

/// A disk of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OfferedDisk {
    /// Its name: letters, digits, `-` and `_`.
    pub name: String,
    /// By what it is known again.
    pub identity: Identity,
    /// The most bytes that it holds.
    pub data_bytes: u64,
}

/// Where a disk goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Accepted {
    /// The export.
    pub export: String,
    /// The image's name in the end.
    pub image: String,
    /// Its format.
    pub format: String,
    /// An earlier copy of the same disk is in it.
    pub begun: bool,
}

/// The answer to an offer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Acceptance {
    /// Of this acceptance: the next one has another, and ends this one.
    pub id: String,
    /// Of the one before in the same folder, whose images are there still: whoever got that was the last to write to them.
    pub follows: Option<String>,
    /// Where the disks go, in their order.
    pub disks: Vec<Accepted>,
}

/// What is asked of the receiver.
#[derive(Debug, Clone, PartialEq)]
pub enum Request {
    /// Whether the machine may come.
    Offer(Offer),
    /// All disks of the machine in this folder are there; this is its description.
    Complete {
        /// As in the offer.
        folder: String,
        /// Of the acceptance.
        id: String,
        /// The description, with the names of the images.
        machine: Value,
    },
}

/// Whether text may be the name of a file or folder of ours.
fn is_name(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    !text.is_empty() && text.len() <= MOST_NAME && text.bytes().all(plain) && !text.starts_with('.')
}

/// The folder that a name in a URI stands for.
///
/// # Errors
/// `Usage`: it is more than one plain name, or leads to desks.
pub fn folder(name: &str) -> Result<String> {
    if DESK.strip_suffix('/') == Some(name) {
        return Err(Error::usage(format!("'{name}' is the name of what takes requests, not of a folder"))
            .hint("Choose another folder: it is the name behind the host in the URI."));
    }
    if name.is_empty() || is_name(name) {
        return Ok(name.to_owned());
    }
    Err(Error::usage(format!("'{name}' cannot be the folder of a machine"))
        .hint("Letters, digits, '-', '_' and '.' make a name."))
}

impl Request {
    /// As JSON.
    pub fn document(&self) -> Value {
        let disk = |disk: &OfferedDisk| {
            json!({
                "name": disk.name,
                "size-bytes": disk.identity.size_bytes,
                "serial": disk.identity.serial,
                "table": disk.identity.table,
                "data-bytes": disk.data_bytes,
            })
        };
        match self {
            Self::Offer(Offer { folder, restart, machine, disks }) => {
                let disks: Vec<Value> = disks.iter().map(disk).collect();
                let offer = json!({"folder": folder, "restart": restart, "machine": machine, "disks": disks});
                json!({"vimg-p2v": VERSION, "offer": offer})
            }
            Self::Complete { folder, id, machine } => {
                json!({"vimg-p2v": VERSION, "complete": {"folder": folder, "id": id, "machine": machine}})
            }
        }
    }

    /// Reads it; everything in it is a stranger's.
    ///
    /// # Errors
    /// `Invalid`: it is no request, or has names that could lead elsewhere; `Unsupported`: it is of a later version.
    pub fn parse(text: &[u8]) -> Result<Self> {
        let value: Value =
            serde_json::from_slice(text).map_err(|_| Error::invalid("a request that is no JSON"))?;
        match value["vimg-p2v"].as_u64() {
            Some(VERSION) => {}
            Some(later) => {
                let message = format!("a request of version {later}; this receiver knows {VERSION}");
                return Err(Error::unsupported(message).hint("Use the same vimg on both machines."));
            }
            None => return Err(Error::invalid("not a request of vimg p2v")),
        }
        if let Some(complete) = value.get("complete") {
            let folder = folder(text_of(complete, "folder")?)?;
            let id = text_of(complete, "id")?.to_owned();
            return Ok(Self::Complete { folder, id, machine: complete["machine"].clone() });
        }
        let offer = value.get("offer").ok_or_else(|| Error::invalid("a request that is not known"))?;
        let disks = offer["disks"].as_array().filter(|disks| (1..=MOST_DISKS).contains(&disks.len()));
        let disks = disks.ok_or_else(|| Error::invalid(format!("a machine has 1 to {MOST_DISKS} disks")))?;
        let disks: Vec<OfferedDisk> = disks.iter().map(disk).collect::<Result<_>>()?;
        for (index, disk) in disks.iter().enumerate() {
            if disks[..index].iter().any(|other| other.name.eq_ignore_ascii_case(&disk.name)) {
                return Err(Error::invalid(format!("two disks are called '{}'", disk.name)));
            }
        }
        Ok(Self::Offer(Offer {
            folder: folder(text_of(offer, "folder")?)?,
            restart: offer["restart"] == true,
            machine: offer["machine"].clone(),
            disks,
        }))
    }
}

fn text_of<'a>(value: &'a Value, name: &str) -> Result<&'a str> {
    value[name].as_str().ok_or_else(|| Error::invalid(format!("a request without '{name}'")))
}

fn disk(value: &Value) -> Result<OfferedDisk> {
    let name = text_of(value, "name")?;
    if !is_name(name) || name.contains('.') {
        return Err(Error::invalid(format!("'{}' is no name of a disk", name.escape_debug())));
    }
    let number = |key: &str| {
        let wrong = || Error::invalid(format!("the disk {name} has no sensible '{key}'"));
        value[key].as_u64().filter(|bytes| *bytes <= MOST_BYTES).ok_or_else(wrong)
    };
    let identity = Identity {
        size_bytes: number("size-bytes")?,
        serial: text_of(value, "serial")?.to_owned(),
        table: text_of(value, "table")?.to_owned(),
    };
    if identity.size_bytes == 0 {
        return Err(Error::invalid(format!("the disk {name} has no bytes")));
    }
    Ok(OfferedDisk { name: name.to_owned(), identity, data_bytes: number("data-bytes")? })
}

/// The answer to an offer, as JSON.
pub fn acceptance(acceptance: &Acceptance) -> Value {
    let Acceptance { id, follows, disks } = acceptance;
    let disk = |disk: &Accepted| json!({"export": disk.export, "image": disk.image, "format": disk.format, "begun": disk.begun});
    json!({"id": id, "follows": follows, "disks": disks.iter().map(disk).collect::<Vec<_>>()})
}

/// The refusal of anything, as JSON.
pub fn refusal(error: &Error) -> Value {
    json!({"error": error.to_string(), "hints": error.hints()})
}

/// What an answer says, unless it is a refusal.
///
/// # Errors
/// `Denied` with the receiver's words; `Invalid`: it is no answer.
pub fn answer(text: &[u8]) -> Result<Value> {
    let value: Value =
        serde_json::from_slice(text).map_err(|_| Error::invalid("an answer that is no JSON"))?;
    let Some(refused) = value["error"].as_str() else { return Ok(value) };
    let printable =
        |text: &str| text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect::<String>();
    let error = Error::new(ErrorKind::Denied, format!("the receiver refuses: {}", printable(refused)));
    let hints = value["hints"].as_array().into_iter().flatten().filter_map(Value::as_str);
    Err(hints.fold(error, |error, hint| error.hint(printable(hint))))
}

/// The answer to an offer of `count` disks.
///
/// # Errors
/// `Invalid`: it is no such answer.
pub fn accepted(value: &Value, count: usize) -> Result<Acceptance> {
    let text = |name: &str| value[name].as_str().map(str::to_owned);
    let disk = |value: &Value| {
        let text = |name: &str| value[name].as_str().map(str::to_owned);
        let (export, image, format) = (text("export")?, text("image")?, text("format")?);
        Some(Accepted { export, image, format, begun: value["begun"] == true })
    };
    let disks: Option<Vec<Accepted>> =
        value["disks"].as_array().and_then(|all| all.iter().map(disk).collect());
    let wrong = || Error::invalid("the receiver's answer is not understood");
    let disks = disks.filter(|disks| disks.len() == count).ok_or_else(wrong)?;
    Ok(Acceptance { id: text("id").ok_or_else(wrong)?, follows: text("follows"), disks })
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn offer() -> Offer {
        Offer {
            folder: "web1".to_owned(),
            restart: false,
            machine: json!({"format": "vimg-machine"}),
            disks: vec![OfferedDisk {
                name: "sda".to_owned(),
                identity: Identity { size_bytes: 4096, serial: "S".to_owned(), table: String::new() },
                data_bytes: 512,
            }],
        }
    }

    #[test]
    fn requests_and_answers_are_read_back() {
        let complete =
            Request::Complete { folder: String::new(), id: "1".to_owned(), machine: json!({"x": 1}) };
        for request in [Request::Offer(offer()), complete] {
            assert_eq!(Request::parse(request.document().to_string().as_bytes()).unwrap(), request);
        }
        let disks = vec![Accepted {
            export: "web1/sda".to_owned(),
            image: "sda.qcow2".to_owned(),
            format: "qcow2".to_owned(),
            begun: true,
        }];
        for follows in [None, Some("1".to_owned())] {
            let given = Acceptance { id: "2".to_owned(), follows, disks: disks.clone() };
            let text = acceptance(&given).to_string();
            assert_eq!(accepted(&answer(text.as_bytes()).unwrap(), 1).unwrap(), given);
        }
        let text = acceptance(&Acceptance { id: "2".to_owned(), follows: None, disks }).to_string();
        accepted(&answer(text.as_bytes()).unwrap(), 2).unwrap_err();
        let error = Error::usage("no\x1b[2J").hint("Do this.");
        let error = answer(refusal(&error).to_string().as_bytes()).unwrap_err();
        assert_eq!(error.to_string(), "the receiver refuses: no [2J");
        assert_eq!(error.hints(), ["Do this."]);
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        let document = Request::Offer(offer()).document();
        let with = |path: &str, value: Value| {
            let mut document = document.clone();
            *document.pointer_mut(path).unwrap() = value;
            Request::parse(document.to_string().as_bytes()).map(drop)
        };
        for name in ["..", "a/b", "", "/etc", ".hidden", "a\0b", "a.b", &"x".repeat(65)] {
            with("/offer/disks/0/name", json!(name)).unwrap_err();
        }
        for name in ["..", "a/b", "/etc", ".hidden", "a b", "vimg-p2v"] {
            with("/offer/folder", json!(name)).unwrap_err();
        }
        with("/offer/folder", json!("")).unwrap();
        with("/offer/disks/0/size-bytes", json!(0)).unwrap_err();
        with("/offer/disks/0/size-bytes", json!(u64::MAX)).unwrap_err();
        with("/offer/disks", json!([])).unwrap_err();
        let disk = document["offer"]["disks"][0].clone();
        with("/offer/disks", json!([disk, disk])).unwrap_err();
        with("/vimg-p2v", json!(2)).unwrap_err();
        Request::parse(b"{").unwrap_err();
        Request::parse(b"[]").unwrap_err();
    }
}
