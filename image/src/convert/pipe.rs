//! Converting into a pipe: images of the one kind that can be written without looking back.

use std::fmt;
use std::io::Write;
use std::sync::Arc;

use block::{Error, ErrorKind, HostExtent, Result, ResultExt as _, Storage, ZeroMode};
use parking_lot::Mutex;

use super::{
    Bitmaps, ConvertReport, ConvertRequest, Fresh, Source, convert_devices, option, refuse_impossible, sized,
};
use crate::create::{CreateRequest, prepare_create};
use crate::progress::Progress;

/// An image that is sent away while it is made.
#[derive(Debug)]
pub struct PipeTarget {
    /// What it is to be like. The name in it is used in messages only.
    pub create: CreateRequest,
    output: Arc<dyn Storage>,
}

impl PipeTarget {
    /// The image goes to `output`.
    pub fn new(create: CreateRequest, output: Box<dyn Write + Send>) -> Self {
        Self { create, output: Arc::new(Output(Mutex::new(State { output, sent: 0 }))) }
    }
}

/// Whether the request is for an image that can be written to a pipe.
pub fn can_be_sent(create: &CreateRequest) -> bool {
    create.format.name() == "vmdk" && option(create, "subformat") == Some("streamOptimized")
}

/// Converts into a pipe.
pub(super) fn convert_to_pipe(
    request: &ConvertRequest,
    target: &PipeTarget,
    source: &Source,
    progress: &dyn Progress,
) -> Result<ConvertReport> {
    let create = sized(&target.create, source.size());
    refuse_impossible(request, &create)?;
    if create.backing_file.is_some() || option(&create, "backing_file").is_some() {
        return Err(Error::usage("an image in a pipe cannot have a backing file"));
    }
    if request.bitmaps != Bitmaps::Leave {
        return Err(Error::usage("an image in a pipe cannot have bitmaps"));
    }
    let prepared = prepare_create(&create)?;
    let converting = || request.making(&create);
    prepared.validate().context(converting)?;
    progress.starting();
    let device = prepared.stream(&target.output, request.compression).context(converting)?;
    let lengths = request.source_lengths();
    let options = super::EngineOptions {
        compress: true,
        ordered: true,
        ..request.engine_options(Fresh::Zeros, create.format, None)
    };
    let tally = convert_devices(source, &*device, &options, progress)?;
    request.check_lengths(&lengths)?;
    device.close().context(|| "error while flushing the target".to_owned())?;
    Ok(ConvertReport { size: source.size(), tally })
}

/// A listener to the convert of a source that can be read only once: how much there is to do is found out on the
/// way.
pub(super) struct Once<'a>(&'a dyn Progress);

/// Refuses what would look at the source twice.
pub(super) fn refuse_second_look<'a>(
    request: &ConvertRequest,
    progress: &'a dyn Progress,
) -> Result<Once<'a>> {
    let again = match request {
        _ if request.salvage => "--salvage",
        _ if request.sources.len() > 1 => "a second source",
        _ if request.window.is_some() => "a part",
        _ => return Ok(Once(progress)),
    };
    Err(Error::usage(format!(
        "an image that comes through a pipe is read as it comes: {again} does not go with that"
    )))
}

impl Progress for Once<'_> {
    fn update(&self, done: u64, total: u64) {
        self.0.update(done, total);
    }

    fn cancelled(&self) -> bool {
        self.0.cancelled()
    }

    fn starting(&self) {
        self.0.starting();
    }

    fn warn(&self, message: &str) {
        self.0.warn(message);
    }
}

/// The pipe as a container that only grows.
struct Output(Mutex<State>);

struct State {
    output: Box<dyn Write + Send>,
    /// Bytes that have been sent.
    sent: u64,
}

impl fmt::Debug for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Output").field("sent", &self.0.lock().sent).finish_non_exhaustive()
    }
}

fn not_in_a_pipe<T>() -> Result<T> {
    Err(Error::unsupported("this cannot be done in a pipe"))
}

impl Storage for Output {
    fn len(&self) -> Result<u64> {
        Ok(self.0.lock().sent)
    }

    fn set_len(&self, _len: u64) -> Result<()> {
        not_in_a_pipe()
    }

    fn read_at(&self, _buf: &mut [u8], _offset: u64) -> Result<()> {
        not_in_a_pipe()
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let mut state = self.0.lock();
        if offset != state.sent {
            let message =
                format!("offset {offset:#x} in a pipe in which {:#x} bytes have been sent", state.sent);
            return Err(Error::new(ErrorKind::Io, message));
        }
        state.output.write_all(buf)?;
        state.sent += buf.len() as u64;
        Ok(())
    }

    fn zero_range(&self, _offset: u64, _len: u64, _mode: ZeroMode) -> Result<()> {
        not_in_a_pipe()
    }

    fn discard_range(&self, _offset: u64, _len: u64) -> Result<()> {
        not_in_a_pipe()
    }

    fn allocate_range(&self, _offset: u64, _len: u64) -> Result<()> {
        not_in_a_pipe()
    }

    fn sync(&self) -> Result<()> {
        Ok(self.0.lock().output.flush()?)
    }

    fn extent(&self, _offset: u64, max_len: u64) -> Result<HostExtent> {
        Ok(HostExtent { data: true, len: max_len })
    }

    fn read_only(&self) -> bool {
        false
    }

    fn name(&self) -> String {
        "standard output".to_owned()
    }
}
