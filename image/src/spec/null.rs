//! `null-co` and `null-aio`: a disk that forgets what is written and costs nothing to read, for benchmarks.

use std::time::Duration;

use block::storage::HostExtent;
use block::{Error, Result, Storage, ZeroMode};
use serde_json::{Map, Value};

use super::node::{Common, first_in_qemu_order, parse_bool, take_text};
use super::protocol::ProtocolRequest;

/// The disk, if nobody says how large it is.
const DEFAULT_SIZE: u64 = 1 << 30;

/// Nothing, of a certain size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Null {
    size: u64,
    latency: Duration,
}

/// Whether a driver is one of these.
pub(super) fn is_null(driver: &str) -> bool {
    matches!(driver, "null-co" | "null-aio")
}

impl Null {
    /// Understands a request for it.
    ///
    /// # Errors
    /// In qemu's words.
    pub(crate) fn of(request: &ProtocolRequest) -> Result<Self> {
        let driver = &request.driver;
        if request.name.as_ref().is_some_and(|name| *name != format!("{driver}://")) {
            return Err(Error::usage(format!("The only allowed filename for this driver is '{driver}://'")));
        }
        let mut options = request.options.clone();
        Common::take(&mut options)?;
        let size = match take_text(&mut options, "size")? {
            Some(text) => crate::options::parse_size("size", &text)?,
            None => DEFAULT_SIZE,
        };
        let latency = match take_text(&mut options, "latency-ns")? {
            Some(text) => crate::options::parse_size("latency-ns", &text)?,
            None => 0,
        };
        if let Some(text) = take_text(&mut options, "read-zeroes")? {
            parse_bool("read-zeroes", &text)?;
        }
        if let Some(key) = first_in_qemu_order(&options) {
            return Err(Error::usage(format!(
                "Block protocol '{driver}' doesn't support the option '{key}'"
            )));
        }
        if i64::try_from(size).is_err() {
            return Err(Error::usage("the disk is too large"));
        }
        Ok(Self { size, latency: Duration::from_nanos(latency) })
    }

    /// The options that describe the disk, as qemu shows them.
    pub(super) fn tree(request: &ProtocolRequest) -> Map<String, Value> {
        let shown = ["size", "read-zeroes"];
        let mut tree = request.options.clone();
        tree.retain(|key, _| shown.contains(&key.as_str()));
        tree.insert("driver".to_owned(), request.driver.clone().into());
        tree
    }

    fn wait(&self) {
        if !self.latency.is_zero() {
            std::thread::sleep(self.latency);
        }
    }
}

impl Storage for Null {
    fn len(&self) -> Result<u64> {
        Ok(self.size)
    }

    fn set_len(&self, _len: u64) -> Result<()> {
        Ok(())
    }

    fn read_at(&self, buf: &mut [u8], _offset: u64) -> Result<()> {
        self.wait();
        buf.fill(0);
        Ok(())
    }

    fn write_at(&self, _buf: &[u8], _offset: u64) -> Result<()> {
        self.wait();
        Ok(())
    }

    fn zero_range(&self, _offset: u64, _len: u64, _mode: ZeroMode) -> Result<()> {
        self.wait();
        Ok(())
    }

    fn discard_range(&self, _offset: u64, _len: u64) -> Result<()> {
        Ok(())
    }

    fn allocate_range(&self, _offset: u64, _len: u64) -> Result<()> {
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        self.wait();
        Ok(())
    }

    fn extent(&self, _offset: u64, max_len: u64) -> Result<HostExtent> {
        Ok(HostExtent { data: false, len: max_len })
    }

    fn read_only(&self) -> bool {
        false
    }

    fn fixed_len(&self) -> bool {
        true
    }

    fn allocated(&self) -> Result<Option<u64>> {
        Ok(Some(0))
    }

    fn name(&self) -> String {
        "null".to_owned()
    }
}
