//! The port that firmware writes its log to, byte by byte; handed on in lines.

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;

use crate::bus::Registers;
use crate::engine::Observer;

/// The port.
pub(crate) const LOG_PORT: u16 = 0x402;
/// What reading it answers where there is a log.
const PRESENT: u8 = 0xe9;
/// Bytes that are gathered, should a line not end.
const GATHER: usize = 4096;

/// The log.
pub(crate) struct Log {
    observer: Arc<dyn Observer>,
    gathered: Mutex<Vec<u8>>,
}

impl fmt::Debug for Log {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Log")
    }
}

impl Log {
    /// A log that `observer` reads.
    pub(crate) fn new(observer: Arc<dyn Observer>) -> Self {
        Self { observer, gathered: Mutex::default() }
    }

    /// Hands on what has been written of a line that has not ended.
    pub(crate) fn flush(&self) {
        self.hand_on(&mut self.gathered.lock());
    }

    fn hand_on(&self, gathered: &mut Vec<u8>) {
        if !gathered.is_empty() {
            self.observer.firmware_log(gathered, Instant::now());
            gathered.clear();
        }
    }
}

impl Registers for Log {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(PRESENT);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        let mut gathered = self.gathered.lock();
        gathered.extend(data);
        if data.contains(&b'\n') || gathered.len() >= GATHER {
            self.hand_on(&mut gathered);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Lines(Mutex<Vec<String>>);

    impl Observer for Lines {
        fn console(&self, _bytes: &[u8], _at: Instant) {}
        fn firmware_log(&self, bytes: &[u8], _at: Instant) {
            self.0.lock().push(String::from_utf8(bytes.to_vec()).unwrap());
        }
    }

    #[test]
    fn lines_are_handed_on_whole() {
        let lines = Arc::new(Lines::default());
        let log = Log::new(Arc::clone(&lines) as _);
        for byte in b"SeaBIOS\nBoot" {
            log.write(0, &[*byte]);
        }
        assert_eq!(*lines.0.lock(), ["SeaBIOS\n"]);
        log.flush();
        log.flush();
        assert_eq!(*lines.0.lock(), ["SeaBIOS\n", "Boot"]);
        for _ in 0..2 * GATHER {
            log.write(0, b"x");
        }
        assert_eq!(lines.0.lock().len(), 4, "a line without an end");
        let mut answer = [0];
        log.read(0, &mut answer);
        assert_eq!(answer, [PRESENT]);
    }
}
