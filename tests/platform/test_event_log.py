"""An appended batch survives whatever happens next; what was cut off is forgotten."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from assay_platform.errors import StorageError
from assay_platform.storage.log import EventLog, Frame


def test_batches_come_back_in_order_with_their_positions(tmp_path: Path) -> None:
    log = EventLog(tmp_path, segment_bytes=200)
    firsts = [log.append(b"x" * size, count) for size, count in ((10, 1), (0, 5), (300, 2), (7, 1))]
    assert firsts == [0, 1, 6, 8]
    log.close()
    again = EventLog(tmp_path, segment_bytes=200)
    assert again.next_position == 9
    assert list(again.frames()) == [
        Frame(0, 1, b"x" * 10), Frame(1, 5, b""), Frame(6, 2, b"x" * 300), Frame(8, 1, b"x" * 7),
    ]  # fmt: skip
    assert again.append(b"more", 1) == 9
    again.close()


def test_old_segments_go_and_newer_ones_stay(tmp_path: Path) -> None:
    log = EventLog(tmp_path, segment_bytes=100)
    for _ in range(10):
        log.append(b"x" * 60, 1)
    log.drop(5)
    assert min(frame.first for frame in log.frames()) in (4, 5)
    log.drop(10**9)
    assert log.next_position == 10
    log.close()
    assert EventLog(tmp_path, segment_bytes=100).next_position == 10


@pytest.mark.parametrize("cut", [1, 20, 30])
def test_a_frame_that_was_cut_off_is_removed(tmp_path: Path, cut: int) -> None:
    log = EventLog(tmp_path)
    log.append(b"whole", 1)
    log.append(b"cut off", 1)
    log.close()
    [(_, path)] = log.segments()
    os.truncate(path, path.stat().st_size - cut)
    again = EventLog(tmp_path)
    assert [frame.payload for frame in again.frames()] == [b"whole"]
    assert again.append(b"next", 1) == again.next_position - 1 == 1
    assert [frame.payload for frame in again.frames()] == [b"whole", b"next"]
    again.close()


def test_a_damaged_frame_ends_what_is_read(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.append(b"whole", 1)
    log.append(b"damaged", 1)
    log.close()
    [(_, path)] = log.segments()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert [frame.payload for frame in EventLog(tmp_path).frames()] == [b"whole"]


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    with pytest.raises(StorageError, match="one writer"):
        EventLog(tmp_path)
    log.close()
    EventLog(tmp_path).close()


def test_a_kill_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from assay_platform.storage.log import EventLog
log = EventLog(Path({str(tmp_path)!r}), segment_bytes=5000)
while True:
    print(log.append(b"payload" * 20, 3), flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= 900:
            os.kill(process.pid, signal.SIGKILL)
            break
    last = max([900, *(int(line) for line in process.stdout.read().split() if line)])
    process.wait()
    log = EventLog(tmp_path, segment_bytes=5000)
    assert log.next_position >= last + 3
    frames = list(log.frames())
    assert [frame.first for frame in frames] == list(range(0, log.next_position, 3))
    assert all(frame.payload == b"payload" * 20 for frame in frames)


def test_a_full_disk_takes_nothing_and_once_there_is_room_the_log_goes_on(tmp_path: Path) -> None:
    program = """
import resource, signal, sys
from pathlib import Path
from assay_platform.errors import StorageError
from assay_platform.storage.log import EventLog

log = EventLog(Path(sys.argv[1]))
log.append(b"a" * 1000, 1)
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
for limit in (0, 1500):  # nothing of it fits, and a part of it
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
    try:
        log.append(b"b" * 1000, 1)
        raise SystemExit("it was taken")
    except StorageError as error:
        assert "nothing was added" in str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
log.append(b"c" * 1000, 1)
assert [frame.payload[:1] for frame in log.frames()] == [b"a", b"c"]
assert [frame.first for frame in log.frames()] == [0, 1]
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
