//! What `--help` and `--version` print.

/// The version of qemu-nbd whose options these are.
const QEMU_VERSION: &str = "10.0.2";

/// `--version`: the first line begins as qemu-nbd's does.
pub(super) fn version() -> String {
    format!(
        "qemu-nbd {QEMU_VERSION} (vimg {})\nThis is vimg under the name of qemu-nbd, whose options it takes.\n",
        env!("CARGO_PKG_VERSION")
    )
}

/// `--help`.
pub(super) const TEXT: &str = "\
Usage: qemu-nbd [OPTIONS] FILE
  or:  qemu-nbd -L [OPTIONS]
Serves a disk image to NBD clients (this is vimg; 'vimg serve --help' shows its own options)

  -h, --help                this text
  -V, --version             the version

Connections:
  -p, --port=PORT           TCP port (10809)
  -b, --bind=IFACE          address to listen on (0.0.0.0)
  -k, --socket=PATH         listen on a Unix socket, by its absolute path
  -e, --shared=NUM          clients at once (1; 0: any number)
  -t, --persistent          go on when the last client has left
  -v, --verbose             say what happens
  -x, --export-name=NAME    name of the export (empty)
  -D, --description=TEXT    description of the export
      --handshake-limit=N   seconds that a client's handshake may take (10; 0: any time)

What is shown of the image:
  -o, --offset=OFFSET       begin at this byte
  -A, --allocation-depth    offer qemu:allocation-depth
  -B, --bitmap=NAME         offer a dirty bitmap as qemu:dirty-bitmap:NAME (repeatable)

General:
  -L, --list                list the exports of another server
      --object TYPE,id=ID,..  define a secret or TLS credentials
      --tls-creds=ID        require TLS with these credentials
      --tls-authz=ID        ask this object who may connect
      --tls-hostname=NAME   the name in the server's certificate, with -L
  -T, --trace WORDS         accepted; there are no trace points
      --fork                go into the background once ready
      --pid-file=PATH       write the server's process number there
      --selinux-label=LABEL label of the Unix socket

The kernel's NBD devices:
  -c, --connect=DEV         show FILE as the device DEV
  -d, --disconnect          take the device FILE away

The image:
  -f, --format=FORMAT       its format (default: found out)
  -r, --read-only           refuse writes
  -s, --snapshot            keep writes in a temporary file
  -l, --load-snapshot=SNAPSHOT
                            show an internal snapshot, read-only: ID_OR_NAME, or
                            snapshot.id=ID,snapshot.name=NAME
  -n, --nocache             the same as --cache=none
      --cache=MODE          none, writeback (default), writethrough, directsync, unsafe
      --aio=MODE            native, io_uring or threads
      --discard=MODE        ignore (default) or unmap
      --detect-zeroes=MODE  off (default), on or unmap
      --image-opts          FILE is a full set of options
";
