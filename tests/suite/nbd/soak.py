"""Random requests over several connections against a model: URI SEED SECONDS."""
import random
import sys
import threading
import time

import nbd

uri, seed, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
WORKERS = 4
BLOCK = 96 << 10  # Whose is a byte? Blocks belong to the workers in turn.
probe = nbd.NBD()
probe.connect_uri(uri)
size = probe.get_size()
model = bytearray(probe.pread(size, 0))
deadline = time.monotonic() + seconds
failures = []
counts = [0] * WORKERS


def work(me):
    dice = random.Random(seed * WORKERS + me)
    h = nbd.NBD()
    h.connect_uri(uri)
    other = nbd.NBD()
    other.connect_uri(uri)
    mine = list(range(me, size // BLOCK, WORKERS))
    trimmed = set()
    while time.monotonic() < deadline and not failures:
        block = dice.choice(mine)
        start = dice.randrange(BLOCK)
        length = min(dice.choice((1, 511, 512, 4096, 5000, 65536, BLOCK)), BLOCK - start)
        at = block * BLOCK + start
        what = dice.randrange(10)
        counts[me] += 1
        fua = nbd.CMD_FLAG_FUA if dice.randrange(50) == 0 else 0
        if what < 4:
            data = dice.randbytes(length) if dice.randrange(4) else bytes([dice.randrange(3)]) * length
            h.pwrite(data, at, fua)
            model[at:at + length] = data
        elif what == 4:
            h.zero(length, at, dice.choice((0, nbd.CMD_FLAG_NO_HOLE)) | fua)
            model[at:at + length] = bytes(length)
        elif what == 5:
            h.trim(length, at, fua)
            # What was discarded reads as what it was, or as zeros: from now on it is what is read now.
            got = h.pread(length, at)
            old = model[at:at + length]
            bad = [i for i in range(length) if got[i] != old[i] and got[i] != 0]
            if bad:
                failures.append(f"discard of {length} at {at}: byte {bad[0]} is neither old nor zero")
            model[at:at + length] = got
        elif what == 6 and dice.randrange(20) == 0:
            h.flush()
        else:
            # On the other connection: what is answered on one is seen on all.
            reader = dice.choice((h, other))
            got = reader.pread(length, at)
            if got != model[at:at + length]:
                bad = next(i for i in range(length) if got[i] != model[at + i])
                failures.append(f"read of {length} at {at}: byte {bad} is {got[bad]}, not {model[at + bad]}")
    h.shutdown()
    other.shutdown()


def guarded(me):
    try:
        work(me)
    except Exception as error:  # whatever it is, the seed repeats it
        failures.append(repr(error))


threads = [threading.Thread(target=guarded, args=(me,)) for me in range(WORKERS)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not failures, failures
assert probe.pread(size, 0) == model, "the disk as a whole differs"
probe.flush()
print(f"{sum(counts)} requests")
