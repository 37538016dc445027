//! What an appliance may say, which a hostile file system may have taken over: bells on the line, payloads in the mailbox.

use appliance::wire::{
    Bell, Failure, Hello, Listing, Maybe, Message, Names, Number, Ran, Request, Room, Scanner, WireStat,
};

/// A payload of every kind, and a line.
pub fn appliance_wire(bytes: &[u8]) {
    payload::<Request>(bytes);
    payload::<Hello>(bytes);
    payload::<Listing>(bytes);
    payload::<Maybe>(bytes);
    payload::<Names>(bytes);
    payload::<Number>(bytes);
    payload::<Ran>(bytes);
    payload::<Room>(bytes);
    payload::<WireStat>(bytes);
    payload::<Failure>(bytes);
    line(bytes);
}

/// What makes sense is written so that it is read as the same.
fn payload<M: Message + PartialEq + std::fmt::Debug>(bytes: &[u8]) {
    if let Ok(message) = M::decode(bytes) {
        let again = M::decode(&message.encode()).expect("what was written is read");
        assert_eq!(again, message);
    }
}

/// However a line comes in pieces, it says the same. Bytes of 0xff stand for bells, the next one says how much of it is
/// there.
fn line(bytes: &[u8]) {
    let (mut line, mut rest) = (vec![], bytes);
    while let Some((&byte, more)) = rest.split_first() {
        rest = more;
        match more.split_first() {
            Some((&len, more)) if byte == 0xff => {
                let bell = Bell { id: len.into(), status: 0, len: len.into(), crc: 1 };
                let bell = bell.encode();
                line.extend_from_slice(&bell[..bell.len().min(len.into())]);
                rest = more;
            }
            _ => line.push(byte),
        }
    }
    let whole = heard(&line, line.len().max(1));
    for pieces in [1, 7, 33] {
        assert_eq!(heard(&line, pieces), whole, "in pieces of {pieces}");
    }
}

/// The bells, and everything else; what may still become a bell is left out.
fn heard(line: &[u8], pieces: usize) -> (Vec<Bell>, Vec<u8>) {
    let (mut scanner, mut bells, mut other) = (Scanner::default(), vec![], vec![]);
    for piece in line.chunks(pieces) {
        scanner.push(piece, |bell| bells.push(bell), |bytes| other.extend_from_slice(bytes));
    }
    (bells, other)
}
