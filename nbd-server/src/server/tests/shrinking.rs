//! A disk that becomes smaller between the look at its size and the request.

use std::sync::atomic::AtomicUsize;

use super::*;

/// Tells its old size so many times more.
#[derive(Debug)]
struct Shrinking {
    disk: Arc<Raw>,
    times: AtomicUsize,
}

const SMALLER: u64 = 4096;

impl BlockDevice for Shrinking {
    fn size(&self) -> u64 {
        let more = |times: usize| times.checked_sub(1);
        let old = self.times.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok();
        if old { SIZE } else { SMALLER }
    }
    fn read_only(&self) -> bool {
        false
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        block::device::check_range(offset, buf.len() as u64, SMALLER)?;
        self.disk.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        block::device::check_range(offset, buf.len() as u64, SMALLER)?;
        self.disk.write_at(buf, offset)
    }
    fn write_zeroes_at(&self, offset: u64, len: u64, mode: ZeroMode) -> Result<()> {
        self.disk.write_zeroes_at(offset, len, mode)
    }
    fn discard_at(&self, offset: u64, len: u64) -> Result<()> {
        self.disk.discard_at(offset, len)
    }
    fn flush(&self) -> Result<()> {
        Ok(())
    }
    fn layer_extent(&self, offset: u64, max_len: u64) -> Result<LayerExtent> {
        block::device::check_range(offset, 1, SMALLER)?;
        self.disk.layer_extent(offset, max_len.min(SMALLER - offset))
    }
}

#[test]
fn a_disk_that_shrinks_under_a_request_is_an_error() {
    let times = AtomicUsize::new(usize::MAX);
    let device = Arc::new(Shrinking { disk: disk(), times });
    let export = Export::new("", Arc::clone(&device) as Arc<dyn BlockDevice>, ExportOptions::default());
    let (_server, mut client) = connect(config(vec![export]));
    client.go(HeaderStyle::Structured);
    for (command, offset, len, wanted) in [
        (command::READ, 500_000, 16, Errno::EINVAL),
        (command::READ, 500_000, 50_000, Errno::EINVAL),
        (command::READ, 500_000, 200_000, Errno::EINVAL),
        (command::READ, 0, 900_000, Errno::EINVAL),
        (command::BLOCK_STATUS, 500_000, 200_000, Errno::EINVAL),
        (command::CACHE, 500_000, 200_000, Errno::EINVAL),
    ] {
        device.times.store(1, Ordering::Relaxed);
        client.request(command, 0, 1, offset, len);
        let (_, payload) = client.chunks().pop().unwrap();
        assert_eq!(payload[..4], wanted.0.to_be_bytes(), "{command} {offset} {len}");
    }
}
