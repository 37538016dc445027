//! What qemu thinks of the dirty bitmaps of an image.

use std::io::Read as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

use crate::Dir;
use crate::command::Cmd;

/// A bitmap as qemu sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeenBitmap {
    /// Its name.
    pub name: String,
    /// Bytes of disk that a bit stands for.
    pub granularity: u64,
    /// `auto`, `in-use`.
    pub flags: Vec<String>,
    /// Its dirty ranges as (offset, length); `None` of one that cannot be used.
    pub dirty: Option<Vec<(u64, u64)>>,
}

/// qemu-nbd, until dropped.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Server {
    /// Ends it; gives what it has complained about.
    fn last_words(&mut self) -> String {
        let mut why = String::new();
        let _ = self.0.kill();
        let _ = self.0.stderr.take().unwrap().read_to_string(&mut why);
        why
    }

    fn new(dir: &Path, socket: &str, name: &str, image: &str) -> Self {
        let command = Cmd::new("qemu-nbd").words("-r -t -e 4 -f qcow2 -k").arg(dir.join(socket)).dir(dir);
        let mut server = Self(command.arg("-B").arg(name).arg(image).spawn());
        let deadline = Instant::now() + Duration::from_secs(20);
        // The socket is there before anybody listens.
        while UnixStream::connect(dir.join(socket)).is_err() {
            let ended = server.0.try_wait().unwrap();
            if ended.is_some() || Instant::now() > deadline {
                let why = server.last_words();
                panic!("qemu-nbd does not serve bitmap '{name}' of {image} ({ended:?}): {why}");
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        server
    }
}

impl Dir {
    /// The bitmaps of a qcow2 image, bits included, as qemu sees them.
    #[track_caller]
    pub fn qemu_bitmaps(&self, image: &str) -> Vec<SeenBitmap> {
        let info = self.qemu_ok(&format!("info -U --output=json {image}")).json();
        let list = info["format-specific"]["data"]["bitmaps"].as_array().cloned().unwrap_or_default();
        list.iter()
            .map(|bitmap| {
                let flags = bitmap["flags"].as_array().unwrap().iter();
                let flags: Vec<String> = flags.map(|flag| flag.as_str().unwrap().to_owned()).collect();
                let name = bitmap["name"].as_str().unwrap().to_owned();
                let usable = !flags.iter().any(|flag| flag == "in-use");
                let dirty = usable.then(|| self.qemu_dirty(image, &name));
                SeenBitmap { name, granularity: bitmap["granularity"].as_u64().unwrap(), flags, dirty }
            })
            .collect()
    }

    /// The dirty ranges of a bitmap, as a client of qemu-nbd sees them.
    #[track_caller]
    fn qemu_dirty(&self, image: &str, name: &str) -> Vec<(u64, u64)> {
        const SOCKET: &str = "bits.sock";
        let mut server = Server::new(self.path(), SOCKET, name, image);
        let socket = self.file(SOCKET);
        let export = format!(
            "driver=nbd,server.type=unix,server.path={},x-dirty-bitmap=qemu:dirty-bitmap:{}",
            socket.display(),
            name.replace(',', ",,")
        );
        let map = Cmd::new("qemu-img").words("map --output=json --image-opts").arg(export).run();
        let ended = server.0.try_wait().unwrap();
        if map.code != Some(0) {
            panic!("{}\nqemu-nbd: {ended:?}: {}", map.story(), server.last_words());
        }
        let map = map.json();
        drop(server);
        std::fs::remove_file(socket).unwrap();
        let mut dirty: Vec<(u64, u64)> = vec![];
        for extent in map.as_array().unwrap().iter().filter(|extent| extent["data"] == false) {
            let (start, len) = (extent["start"].as_u64().unwrap(), extent["length"].as_u64().unwrap());
            match dirty.last_mut() {
                Some((offset, total)) if *offset + *total == start => *total += len,
                _ => dirty.push((start, len)),
            }
        }
        dirty
    }
}
