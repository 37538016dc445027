//! Both ends against each other in memory, and over a socket through a [`Channel`](crate::channel::Channel). That they
//! understand others (GnuTLS in QEMU, nbdkit and libnbd) is for the suite to show.

mod authority;
mod channel;
mod folder;
mod hostile;
#[cfg(feature = "psk")]
mod psk;
mod x509;

use std::io;

use crate::channel::Session;

/// Carries bytes from one to the other until nobody has anything to say.
fn exchange(one: &mut dyn Session, other: &mut dyn Session) -> io::Result<()> {
    loop {
        let sent = deliver(one, other)? + deliver(other, one)?;
        if sent == 0 {
            return Ok(());
        }
    }
}

fn deliver(from: &mut dyn Session, to: &mut dyn Session) -> io::Result<usize> {
    let mut wire = vec![];
    from.seal(&[], &mut wire)?;
    if !wire.is_empty() {
        to.feed(&wire)?;
    }
    Ok(wire.len())
}

/// What `to` reads of what `from` says.
fn say(from: &mut dyn Session, to: &mut dyn Session, words: &[u8]) -> Vec<u8> {
    let mut wire = vec![];
    from.seal(words, &mut wire).unwrap();
    to.feed(&wire).unwrap();
    read_all(to)
}

fn read_all(session: &mut dyn Session) -> Vec<u8> {
    let mut all = vec![];
    let mut buf = [0; 1000];
    loop {
        match session.plaintext(&mut buf).unwrap() {
            0 => return all,
            read => all.extend_from_slice(&buf[..read]),
        }
    }
}
