//! Registry hives: opened, recovered from logs, walked, changed. What is written is a hive again.

use hive::{Hive, Value};

const KEY: &str = r"ControlSet001\Services\new";

/// Takes the bytes for a hive, and for its log if it was not closed.
pub fn registry_hive(bytes: &[u8]) {
    let Ok(mut hive) = Hive::parse(bytes.to_vec()) else { return };
    if !hive.is_clean() && hive.recover(&[bytes]).is_err() {
        return;
    }
    let walked = hive.walk(&mut |_, key| drop((hive.name(key), hive.values(key))));
    let set = |hive: &mut Hive| {
        let key = hive.create(KEY)?;
        hive.set(key, "Start", &Value::number(0))?;
        hive.set(key, "Start", &Value::text("value"))
    };
    if set(&mut hive).is_err() || walked.is_err() {
        return;
    }
    // In a damaged hive cells may lie in each other, so that what was set need not be found.
    if let Ok(hive) = Hive::parse(hive.into_bytes()) {
        let _ = hive.find(KEY).map(|key| key.map(|key| hive.value(key, "Start")));
    }
}

/// Hives to begin with: closed, and not.
pub fn hive_seeds() -> [Vec<u8>; 2] {
    let mut hive = Hive::empty();
    for index in 0..40 {
        let key = hive.create(&format!(r"ControlSet001\Services\service {}", index * 7 % 40)).unwrap();
        hive.set(key, "Start", &Value::number(index)).unwrap();
        hive.set(key, "ImagePath", &Value::expand(r"system32\drivers\x.sys")).unwrap();
    }
    let closed = hive.into_bytes();
    let mut open = closed.clone();
    // The second of its sequence numbers, and the checksum with it.
    open[8] ^= 1;
    open[508] ^= 1;
    [closed, open]
}
