//! Requests of many threads at once, and servers that have their own ideas of order, size and age.

use std::thread;

use block::num::to_usize;
use block::testing::Random;
use block::{BlockDevice as _, ErrorKind, Stored, ZeroMode};

use super::fake::{Export, FLAGS, Fake, with_export};
use crate::proto::{Errno, HeaderStyle, Request, chunk, command, command_flags, transmission};

const STYLES: [HeaderStyle; 3] = [HeaderStyle::Simple, HeaderStyle::Structured, HeaderStyle::Extended];

/// A disk in memory, served in batches of which the last is answered first, reads in pieces.
fn serve(fake: &Fake, size: u64) {
    let mut disk: Vec<u8> = (0..size).map(|at| u8::try_from(at / 64 % 251).unwrap()).collect();
    let mut waiting: Vec<(Request, Vec<u8>)> = vec![];
    while let Some((request, payload)) = fake.request() {
        if request.command == command::DISC {
            return;
        }
        waiting.push((request, payload));
        // Batches end when nothing arrives for a moment.
        let more = nix::poll::PollFd::new(fake.channel.clear_socket().unwrap(), nix::poll::PollFlags::POLLIN);
        if nix::poll::poll(&mut [more], 1u8).unwrap() > 0 && waiting.len() < 7 {
            continue;
        }
        for (request, payload) in waiting.drain(..).rev() {
            answer(fake, &request, &payload, &mut disk);
        }
    }
}

fn answer(fake: &Fake, request: &Request, payload: &[u8], disk: &mut [u8]) {
    let (offset, length) = (request.offset, request.length);
    match request.command {
        command::READ => {
            let place = &disk[to_usize(offset)..to_usize(offset + length)];
            if fake.style == HeaderStyle::Simple {
                fake.simple(request, Errno::OK);
                fake.send(place);
                return;
            }
            let half = place.len() / 2;
            fake.data(request, 0, offset + half as u64, &place[half..]);
            if half > 0 {
                fake.data(request, 0, offset, &place[..half]);
            }
            fake.chunk(request, chunk::FLAG_DONE, chunk::NONE, &[]);
        }
        command::WRITE => {
            disk[to_usize(offset)..to_usize(offset + length)].copy_from_slice(payload);
            fake.done(request);
        }
        command::WRITE_ZEROES => {
            disk[to_usize(offset)..to_usize(offset + length)].fill(0);
            fake.done(request);
        }
        _ => fake.done(request),
    }
}

#[test]
fn many_threads_share_a_connection_whose_answers_come_in_any_order() {
    for style in STYLES {
        let size = 1 << 20;
        let export = Export { size, style, ..Export::default() };
        let device = with_export(export, move |fake| serve(&fake, size));
        thread::scope(|scope| {
            for worker in 0..8 {
                let device = &device;
                scope.spawn(move || {
                    let mut random = Random::new(worker);
                    let (start, len) = (worker * size / 8, to_usize(size / 8));
                    let mut model = vec![0; len];
                    device.read_at(&mut model, start).unwrap();
                    for _ in 0..100 {
                        let at = to_usize(random.below(len as u64 - 20_000));
                        let some = to_usize(1 + random.below(20_000));
                        match random.below(4) {
                            0 => {
                                let bytes = vec![u8::try_from(random.below(256)).unwrap(); some];
                                device.write_at(&bytes, start + at as u64).unwrap();
                                model[at..at + some].copy_from_slice(&bytes);
                            }
                            1 => {
                                device
                                    .write_zeroes_at(start + at as u64, some as u64, ZeroMode::UNMAP)
                                    .unwrap();
                                model[at..at + some].fill(0);
                            }
                            2 => device.flush().unwrap(),
                            _ => {
                                let mut buf = vec![1; some];
                                device.read_at(&mut buf, start + at as u64).unwrap();
                                assert!(buf == model[at..at + some], "{style:?} worker {worker} at {at}");
                            }
                        }
                    }
                });
            }
        });
    }
}

#[test]
fn everybody_hears_of_the_end() {
    let device = with_export(Export::default(), |fake| {
        for _ in 0..4 {
            fake.request();
        }
    });
    thread::scope(|scope| {
        for worker in 0..4 {
            let device = &device;
            scope.spawn(move || match worker % 2 {
                0 => device.read_at(&mut [0; 512], 0).unwrap_err(),
                _ => device.write_at(&[0; 512], 0).unwrap_err(),
            });
        }
    });
}

#[test]
fn whole_blocks_are_what_the_server_gets() {
    let size = 64 << 10;
    let export = Export { size, blocks: Some((4096, 4096, 8192)), ..Export::default() };
    let device = with_export(export, move |fake| {
        let mut disk = vec![7; to_usize(size)];
        while let Some((request, payload)) = fake.request() {
            let whole = request.offset.is_multiple_of(4096) && request.length.is_multiple_of(4096);
            let small = !matches!(request.command, command::READ | command::WRITE) || request.length <= 8192;
            assert!(whole && small && request.offset + request.length <= size, "{request:?}");
            answer(&fake, &request, &payload, &mut disk);
        }
    });
    let mut model = vec![7; to_usize(size)];
    device.write_at(&[1; 100], 4000).unwrap();
    model[4000..4100].fill(1);
    device.write_at(&[2; 9000], 12_000).unwrap();
    model[12_000..21_000].fill(2);
    device.write_zeroes_at(16_000, 10_000, ZeroMode::UNMAP).unwrap();
    model[16_000..26_000].fill(0);
    device.write_zeroes_at(30_001, 5, ZeroMode::ALLOCATE).unwrap();
    model[30_001..30_006].fill(0);
    device.discard_at(100, 5000).unwrap();
    let mut buf = vec![0; to_usize(size)];
    device.read_at(&mut buf, 0).unwrap();
    assert!(buf == model);
    let mut part = [0; 77];
    device.read_at(&mut part, size - 77).unwrap();
    assert_eq!(part, [7; 77]);
}

#[test]
fn an_old_server_is_served_as_far_as_it_goes() {
    let flags = transmission::HAS_FLAGS;
    let export = Export { flags, style: HeaderStyle::Simple, go: false, ..Export::default() };
    let device = with_export(export, |fake| serve(&fake, 1 << 20));
    device.write_zeroes_at(10, 100, ZeroMode::UNMAP).unwrap();
    let error = device.write_zeroes_at(10, 100, ZeroMode::UNMAP.fast()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    device.discard_at(0, 4096).unwrap();
    device.flush().unwrap();
    let mut buf = [1; 4];
    device.read_at(&mut buf, 108).unwrap();
    assert_eq!(buf, [0, 0, 1, 1]);
    assert_eq!(device.layer_extent(0, 100).unwrap().stored, Stored::Data);
    assert_eq!(device.resize(1, block::Preallocation::Off).unwrap_err().kind(), ErrorKind::Unsupported);
    assert_eq!(device.read_at(&mut buf, 1 << 20).unwrap_err().kind(), ErrorKind::OutOfRange);
}

#[test]
fn zeros_say_what_may_become_of_the_space() {
    let device = with_export(Export { style: HeaderStyle::Extended, ..Export::default() }, |fake| {
        for (flags, errno) in [
            (0, Errno::OK),
            (command_flags::NO_HOLE, Errno::OK),
            (command_flags::FAST_ZERO, Errno::ENOTSUP),
            (0, Errno::ENOTSUP),
        ] {
            let (request, _) = fake.request().unwrap();
            assert_eq!(
                (request.command, request.flags, request.length),
                (command::WRITE_ZEROES, flags, 1 << 20)
            );
            match errno {
                Errno::OK => fake.done(&request),
                _ => fake.chunk(&request, chunk::FLAG_DONE, chunk::ERROR, &[0, 0, 0, 95, 0, 0]),
            }
        }
        let (request, payload) = fake.request().unwrap();
        assert_eq!((request.command, request.flags), (command::WRITE, command_flags::PAYLOAD_LEN));
        assert!(payload == vec![0; 1 << 20]);
        fake.done(&request);
        fake.request();
    });
    let zero = |mode| device.write_zeroes_at(0, 1 << 20, mode);
    zero(ZeroMode::UNMAP).unwrap();
    zero(ZeroMode::ALLOCATE).unwrap();
    assert_eq!(zero(ZeroMode::UNMAP.fast()).unwrap_err().kind(), ErrorKind::Unsupported);
    zero(ZeroMode::UNMAP).unwrap();
}

#[test]
fn an_export_grows_where_the_server_lets_it() {
    let export = Export { flags: FLAGS | transmission::SEND_RESIZE, ..Export::default() };
    let device = with_export(export, |fake| {
        let (request, _) = fake.request().unwrap();
        assert_eq!((request.command, request.offset), (command::RESIZE, 2 << 20));
        fake.done(&request);
        fake.request();
    });
    device.resize(2 << 20, block::Preallocation::Off).unwrap();
    assert_eq!(device.size(), 2 << 20);
    device.resize(1 << 63, block::Preallocation::Off).unwrap_err();
}
