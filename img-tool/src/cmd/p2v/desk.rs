//! Speaking to a receiver (`vimg p2v --receive`) from the machine that is copied.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use block::num::to_usize;
use block::{BlockDevice, Error, Result};
use image::{Format, Secrets, Spec};
use serde_json::Value;
use v2v::p2v::offer::{self, Acceptance, DESK, DESK_BYTES, Offer, Request};

use super::target::{PLACEHOLDER, with_export, writable};
use crate::app::App;

/// A receiver.
#[derive(Debug)]
pub(super) struct Desk {
    device: Arc<dyn BlockDevice>,
    template: String,
    /// The machine's folder there.
    pub(super) folder: String,
}

impl Desk {
    /// The receiver at a URI; `None` if it is a server of another kind, or cannot be reached.
    ///
    /// # Errors
    /// `Usage`: the name in the URI cannot be a folder.
    pub(super) fn find(template: &str, secrets: &Secrets, app: &App) -> Result<Option<Self>> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos());
        let uri = with_export(template, &format!("{DESK}{}-{now:x}", std::process::id()));
        let options = writable(Format::from_name("raw"), secrets, app);
        match Spec::from_filename(&uri).and_then(|spec| image::open(&spec, &options)) {
            Ok(layer) if layer.device().size() == DESK_BYTES => {
                let folder = offer::folder(&folder_of(template))?;
                Ok(Some(Self { device: layer.device(), template: template.to_owned(), folder }))
            }
            Ok(_) => Ok(None),
            Err(error) => {
                app.tell(&format!("no receiver: {error}"));
                Ok(None)
            }
        }
    }

    /// Asks for something.
    fn ask(&self, request: &Request) -> Result<Value> {
        let text = request.document().to_string().into_bytes();
        // A connection that was lost and made again leads to another desk, which has been asked nothing.
        let mut said = self.say(&text)?;
        if said.is_empty() {
            said = self.say(&text)?;
        }
        offer::answer(&said)
    }

    fn say(&self, text: &[u8]) -> Result<Vec<u8>> {
        let len = u32::try_from(text.len()).ok().filter(|len| u64::from(*len) + 4 <= DESK_BYTES / 2);
        let len = len.ok_or_else(|| Error::usage("the description of the machine is too long"))?;
        self.device.write_at(&[&len.to_be_bytes()[..], text].concat(), 0)?;
        self.device.flush()?;
        let mut len = [0; 4];
        self.device.read_at(&mut len, DESK_BYTES / 2)?;
        let len = u64::from(u32::from_be_bytes(len));
        if len + 4 > DESK_BYTES / 2 {
            return Err(Error::invalid(format!("the receiver answers with {len} bytes")));
        }
        let mut text = vec![0; to_usize(len)];
        self.device.read_at(&mut text, DESK_BYTES / 2 + 4)?;
        Ok(text)
    }

    /// Offers the machine.
    ///
    /// # Errors
    /// `Denied`: the receiver does not want it, with the reason; it cannot be reached.
    pub(super) fn offer(&self, offer: Offer) -> Result<Acceptance> {
        let count = offer.disks.len();
        offer::accepted(&self.ask(&Request::Offer(offer))?, count)
    }

    /// Everything is there, says who got the acceptance `id`. The folder, as it is called at the other end.
    ///
    /// # Errors
    /// As [`offer`](Self::offer).
    pub(super) fn complete(&self, id: &str, machine: Value) -> Result<String> {
        let said =
            self.ask(&Request::Complete { folder: self.folder.clone(), id: id.to_owned(), machine })?;
        Ok(said["folder"].as_str().unwrap_or_default().chars().filter(|c| !c.is_control()).collect())
    }

    /// The URI of an export of the receiver.
    pub(super) fn uri(&self, export: &str) -> String {
        with_export(&self.template, export)
    }
}

/// The name behind the host, without what stands for a disk.
fn folder_of(template: &str) -> String {
    let front = template.split('?').next().unwrap_or_default();
    let rest = front.split_once("://").map_or("", |(_, rest)| rest);
    let export = rest.split_once('/').map_or("", |(_, export)| export);
    export.replace(PLACEHOLDER, "").trim_matches('/').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_behind_the_host_is_the_folder() {
        for (template, folder) in [
            ("nbds://h", ""),
            ("nbds://h:1/", ""),
            ("nbds://h/{disk}", ""),
            ("nbds://h/web1?tls-hostname=x", "web1"),
            ("nbds://h/web1/{disk}", "web1"),
            ("nbd+unix:///web1?socket=/a/b", "web1"),
            ("nbd+unix:///?socket=/a/b", ""),
        ] {
            assert_eq!(folder_of(template), folder, "{template}");
        }
    }
}
