//! `-l SNAPSHOT`: which internal snapshot of a source is meant.

use qcow2::snapshot::Selector;

use crate::app::App;
use crate::exit::{Failure, Outcome};

/// Texts that begin so are options; everything else is an id or a name.
const OPTIONS: &str = "snapshot.";

/// A snapshot as the user named it.
#[derive(Debug, Clone)]
pub(crate) struct Wanted {
    pub(crate) selector: Selector,
    /// By `snapshot.id=` or `snapshot.name=`: qemu-img then looks in the first of several sources only.
    pub(crate) by_option: bool,
}

impl Wanted {
    /// Understands what is to be deleted: qemu-img looks for names only. Ids have to be called so.
    pub(crate) fn by_name(text: &str, app: &App) -> Outcome<Selector> {
        if text.starts_with(OPTIONS) {
            return Ok(Self::parse(text, app)?.selector);
        }
        Ok(Selector::Both { id: None, name: Some(text.as_bytes().to_vec()) })
    }

    /// Understands the value of `-l`.
    pub(crate) fn parse(text: &str, app: &App) -> Outcome<Self> {
        if !text.starts_with(OPTIONS) {
            return Ok(Self { selector: Selector::IdOrName(text.as_bytes().to_vec()), by_option: false });
        }
        let (mut id, mut name) = (None, None);
        for (key, value) in image::options::parse(&[text.to_owned()])? {
            match key.as_str() {
                "snapshot.id" => id = Some(value.into_bytes()),
                "snapshot.name" => name = Some(value.into_bytes()),
                other => {
                    app.complain(&format!("Invalid parameter '{other}'"));
                    return Err(Failure::usage(format!("Failed in parsing snapshot param '{text}'")));
                }
            }
        }
        Ok(Self { selector: Selector::Both { id, name }, by_option: true })
    }
}
