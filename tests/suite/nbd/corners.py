"""Corners of the protocol, as libnbd sees them: URIs of an odd raw image (writable, read-only) and of a chain."""
import errno
import sys

import nbd

raw_uri, read_only_uri, chain_uri = sys.argv[1:4]
SIZE = 1000003


def expect(error, call, *args, **kw):
    try:
        call(*args, **kw)
    except nbd.Error as e:
        assert e.errnum == error, f"{call.__name__}{args}: {e} instead of {errno.errorcode[error]}"
    else:
        raise AssertionError(f"{call.__name__}{args} succeeded instead of {errno.errorcode[error]}")


def lax(uri, **kw):
    """A connection that sends what the library itself would refuse."""
    h = nbd.NBD()
    h.set_strict_mode(0)
    h.connect_uri(uri)
    return h


# --- A writable disk of an odd size.
h = lax(raw_uri)
assert h.get_size() == SIZE
assert h.get_structured_replies_negotiated()
for flag in ("can_df", "can_flush", "can_fua", "can_trim", "can_zero", "can_fast_zero", "can_cache", "can_multi_conn"):
    assert getattr(h, flag)(), flag
assert not h.is_read_only() and not h.is_rotational()
assert h.get_block_size(nbd.SIZE_MINIMUM) == 1
assert h.get_block_size(nbd.SIZE_MAXIMUM) >= 1 << 20

last = h.pread(1, SIZE - 1)
h.pwrite(b"\x5a", SIZE - 1, nbd.CMD_FLAG_FUA)
assert h.pread(3, SIZE - 3)[2:] == b"\x5a"
h.pwrite(last, SIZE - 1)

# Past the end: ENOSPC for what writes, EINVAL for what reads; nothing of it is done.
for at, length in ((SIZE, 1), (SIZE - 1, 2), (1 << 62, 512), ((1 << 64) - 1, 1)):
    expect(errno.ENOSPC, h.pwrite, b"x" * length, at)
    expect(errno.ENOSPC, h.zero, length, at)
    expect(errno.EINVAL, h.pread, length, at)
    expect(errno.EINVAL, h.trim, length, at)
    expect(errno.EINVAL, h.cache, length, at)
assert h.pread(1, SIZE - 1) == last

# Nothing at all is answered, too.
h.pwrite(b"", 10)
h.zero(0, 10)
h.trim(0, 10)
h.cache(0, 10)

# Zeros, with and without a hole; discards; caches; all of them at odd places.
h.pwrite(b"\xff" * 20000, 12345)
h.zero(7000, 13000)
assert h.pread(20000, 12345) == b"\xff" * 655 + bytes(7000) + b"\xff" * (20000 - 7655)
h.zero(5000, 21000, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
assert h.pread(5000, 21000) == bytes(5000)
try:
    h.zero(65536, 65536, nbd.CMD_FLAG_FAST_ZERO)
    assert h.pread(65536, 65536) == bytes(65536)
except nbd.Error as e:
    assert e.errnum == errno.ENOTSUP, e
h.trim(8192, 8192)
h.trim(SIZE - 5, 5)
h.cache(SIZE, 0)
h.flush()

# Flags where they do not belong.
expect(errno.EINVAL, h.pread, 512, 0, nbd.CMD_FLAG_NO_HOLE)
expect(errno.EINVAL, h.pwrite, b"x" * 512, 0, nbd.CMD_FLAG_REQ_ONE)
expect(errno.EINVAL, h.trim, 512, 0, nbd.CMD_FLAG_DF)
expect(errno.EINVAL, h.pread, 512, 0, 1 << 12)

# Large reads; in pieces, and as one.
data = b"".join(h.pread(min(65536, SIZE - at), at) for at in range(0, SIZE, 65536))
assert h.pread(SIZE, 0) == data
pieces = bytearray(SIZE)
kinds = set()


def chunk(buf, offset, status, error):
    kinds.add(status)
    pieces[offset:offset + len(buf)] = buf


h.pread_structured(SIZE, 0, chunk)
assert bytes(pieces) == data and nbd.READ_HOLE in kinds, kinds
chunks = []
h.pread_structured(60000, 0, lambda buf, offset, status, error: chunks.append(len(buf)), nbd.CMD_FLAG_DF)
assert chunks == [60000], chunks

# Many requests in flight, answered in any order, none lost.
answered = []
for number in range(400):
    length = 1 + number * 37 % 5000
    buffer = nbd.Buffer(length)
    at = number * 2311 % (SIZE - length)

    def done(error, number=number, at=at, length=length, buffer=buffer):
        assert error.value == 0
        assert bytes(buffer.to_bytearray()) == data[at:at + length], number
        answered.append(number)
        return 1

    h.aio_pread(buffer, at, completion=done)
while h.aio_in_flight():
    h.poll(-1)
assert sorted(answered) == list(range(400))
h.shutdown()

# Without structured replies, and without fixed newstyle at all.
for prepare in (lambda h: h.set_request_structured_replies(False), lambda h: h.set_handshake_flags(0)):
    h = nbd.NBD()
    prepare(h)
    h.connect_uri(raw_uri)
    assert h.get_size() == SIZE and h.pread(SIZE, 0) == data
    h.shutdown()

# --- Read-only.
h = lax(read_only_uri)
assert h.is_read_only()
for call in (lambda: h.pwrite(b"x", 0), lambda: h.zero(1, 0), lambda: h.trim(1, 0)):
    expect(errno.EPERM, call)
assert h.pread(SIZE, 0) == data, "a refused write has left the connection out of step"
h.shutdown()

# --- Contexts over a chain: two bitmaps, the depth, what is allocated.
h = nbd.NBD()
h.set_opt_mode(True)
h.connect_uri(chain_uri)
names = []
h.opt_list_meta_context(lambda name: names.append(name))
wanted = ["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b0", "qemu:dirty-bitmap:b1"]
assert sorted(names) == wanted, names
names = []
if hasattr(h, "opt_list_meta_context_queries"):
    h.opt_list_meta_context_queries(["qemu:"], lambda name: names.append(name))
    assert sorted(names) == wanted[1:], names
    names = []
    h.opt_list_meta_context_queries(["nobody:", "base:allocation"], lambda name: names.append(name))
    assert names == ["base:allocation"], names
seen = []
h.opt_list(lambda name, description: seen.append(name))
assert seen == ["chain"], seen
h.opt_info()
assert h.get_size() == 1 << 20
h.set_export_name("nobody")
expect(errno.ENOENT, h.opt_go)
h.set_export_name("chain")
for name in wanted:
    h.add_meta_context(name)
h.opt_go()
assert all(h.can_meta_context(name) for name in wanted)


def status(length, offset, flags=0):
    extents = {}

    def note(name, at, entries, error):
        extents[name] = list(zip(entries[::2], entries[1::2]))

    h.block_status(length, offset, note, flags)
    return extents


extents = {name: [] for name in wanted}
at = 0
while at < 1 << 20:
    got = status((1 << 20) - at, at)
    step = min(sum(length for length, _ in entries) for entries in got.values())
    for name, entries in got.items():
        left = step
        for length, value in entries:
            length = min(left, length)
            left -= length
            if length and extents[name] and extents[name][-1][1] == value:
                extents[name][-1] = (extents[name][-1][0] + length, value)
            elif length:
                extents[name].append((length, value))
    at += step
K = 1 << 10
assert extents["base:allocation"] == [(256 * K, 0), (768 * K, 3)], extents
assert extents["qemu:allocation-depth"] == [(128 * K, 2), (64 * K, 1), (64 * K, 2), (768 * K, 0)], extents
assert extents["qemu:dirty-bitmap:b0"] == [(256 * K, 1), (768 * K, 0)], extents
assert extents["qemu:dirty-bitmap:b1"] == [(128 * K, 0), (64 * K, 1), (832 * K, 0)], extents
one = status(150 * K, 100 * K, nbd.CMD_FLAG_REQ_ONE)
assert all(len(entries) == 1 and entries[0][0] <= 150 * K for entries in one.values()), one
h.shutdown()

# --- Extended headers, where this library has them.
if hasattr(h, "get_extended_headers_negotiated"):
    h = nbd.NBD()
    h.connect_uri(raw_uri)
    assert h.get_extended_headers_negotiated()
    assert h.pread(SIZE, 0) == data
