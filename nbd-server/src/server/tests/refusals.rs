//! Clients that ask for nothing but what they do not get.

use super::event::Event;
use super::*;

/// Counts failures.
#[derive(Debug, Default)]
struct Failures(AtomicU64);

impl Log for Failures {
    fn event(&self, event: &Event<'_>) {
        if let Event::Failed { .. } = event {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }
}

#[test]
fn no_client_fills_the_log() {
    let failures = Arc::new(Failures::default());
    let (_server, mut client) = connect(Config { log: Arc::clone(&failures) as _, ..one_export() });
    client.send(&3_u32.to_be_bytes());
    for _ in 0..2000 {
        assert_eq!(client.option(0x1234, &[])[0].0, reply::ERR_UNSUP);
    }
    let handshake = failures.0.load(Ordering::Relaxed);
    assert!((1..=MAX_TOLD).contains(&handshake), "{handshake}");
    client.option(option::GO, &go_data("", &[]));
    client.style = HeaderStyle::Simple;
    for cookie in 0..2000 {
        client.request(command::READ, 0, cookie, SIZE, 1);
        assert_eq!(client.simple(0).0, Errno::EINVAL);
    }
    let requests = failures.0.load(Ordering::Relaxed) - handshake;
    assert!((1..=MAX_TOLD).contains(&requests), "{requests}");
}

#[test]
fn texts_are_no_longer_than_strings_may_be() {
    let (_server, client) = connect(one_export());
    client.send(&3_u32.to_be_bytes());
    let (kind, text) = client.option(option::GO, &go_data(&"x".repeat(4096), &[])).pop().unwrap();
    assert_eq!((kind, text.len()), (reply::ERR_UNKNOWN, 4096));
}
