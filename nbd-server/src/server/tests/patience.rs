//! Clients that take their time, and work that takes longer than its client.

use std::sync::atomic::AtomicUsize;

use super::*;

/// A client of a disk that answers at once, which the server knows.
fn warm() -> (Server, Client) {
    let (server, mut client) = connect(one_export());
    client.go(HeaderStyle::Simple);
    for cookie in 0..100 {
        client.request(command::READ, 0, cookie, 4096, 16);
        client.simple(16);
    }
    (server, client)
}

#[test]
fn a_reply_does_not_wait_for_the_rest_of_the_next_request() {
    for len in [4096, 200_000] {
        let (_server, client) = warm();
        let header = |command, cookie, length| {
            Request { flags: 0, command, cookie, offset: 0, length }.encode(HeaderStyle::Simple)
        };
        // The first reply of a queue leaves alone anyway.
        let reads = [header(command::READ, 1, 16), header(command::READ, 2, 16)].concat();
        client.send(&[reads, header(command::WRITE, 3, len), vec![1; 1000]].concat());
        assert_eq!([client.simple(16).1, client.simple(16).1], [1, 2]);
        client.send(&vec![1; block::num::to_usize(len) - 1000]);
        assert_eq!(client.simple(0), (Errno::OK, 3, vec![]));
    }
}

#[test]
fn a_client_may_send_before_it_receives() {
    let (_server, client) = warm();
    // More than socket buffers hold, in either direction.
    let len = 900_000;
    client.request(command::READ, 0, 1, 0, len);
    std::thread::sleep(Duration::from_millis(200));
    client.request(command::WRITE, 0, 2, 0, len);
    client.send(&vec![1; block::num::to_usize(len)]);
    assert_eq!(client.simple(block::num::to_usize(len)).1, 1);
    assert_eq!(client.simple(0), (Errno::OK, 2, vec![]));
}

/// A disk of a pebibyte of which every byte has to be read, and the reads.
#[derive(Debug)]
struct Endless(AtomicUsize);

impl BlockDevice for Endless {
    fn size(&self) -> u64 {
        1 << 50
    }
    fn read_only(&self) -> bool {
        true
    }
    fn read_at(&self, _buf: &mut [u8], _offset: u64) -> Result<()> {
        self.0.fetch_add(1, Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(1));
        Ok(())
    }
    fn write_at(&self, _buf: &[u8], _offset: u64) -> Result<()> {
        Err(Error::unsupported("read-only"))
    }
    fn write_zeroes_at(&self, _offset: u64, _len: u64, _mode: ZeroMode) -> Result<()> {
        Err(Error::unsupported("read-only"))
    }
    fn discard_at(&self, _offset: u64, _len: u64) -> Result<()> {
        Err(Error::unsupported("read-only"))
    }
    fn flush(&self) -> Result<()> {
        Ok(())
    }
    fn layer_extent(&self, offset: u64, max_len: u64) -> Result<LayerExtent> {
        Ok(block::extent::all_data(offset, max_len, self.size()))
    }
}

#[test]
fn reading_ahead_ends_with_its_client() {
    let endless = Arc::new(Endless(AtomicUsize::new(0)));
    let device: Arc<dyn BlockDevice> = Arc::clone(&endless) as _;
    let (server, mut client) = connect(config(vec![Export::new("", device, ExportOptions::default())]));
    client.go(HeaderStyle::Extended);
    // More than there are threads: nobody is left who would see that the client goes.
    for cookie in 0..40 {
        client.request(command::CACHE, 0, cookie, 0, 1 << 50);
    }
    while endless.0.load(Ordering::Relaxed) == 0 {
        std::thread::sleep(Duration::from_millis(1));
    }
    drop(client);
    let (ended, over) = mpsc::channel();
    std::thread::spawn(move || ended.send(server.run().unwrap()));
    over.recv_timeout(Duration::from_secs(20)).unwrap();
}

#[test]
fn a_server_on_pipes_can_be_stopped() {
    let server = Server::new(one_export()).unwrap();
    let (input, ours) = nix::unistd::pipe().unwrap();
    let (theirs, output) = nix::unistd::pipe().unwrap();
    server.serve(Channel::pair(input, output, "pipes")).unwrap();
    let mut client = Client { stream: Channel::pair(theirs, ours, "server"), style: HeaderStyle::Simple };
    client.receive(18);
    client.go(HeaderStyle::Simple);
    client.request(command::READ, 0, 1, 0, 4);
    let handle = server.handle();
    let (ended, over) = mpsc::channel();
    std::thread::spawn(move || ended.send(server.run().unwrap()));
    assert_eq!(client.simple(4).0, Errno::OK);
    handle.stop();
    over.recv_timeout(Duration::from_secs(5)).unwrap();
    assert!(client.is_over());
}
