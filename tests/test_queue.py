"""Our queue alone: what SQS promises and moto does not, files, disks, kill -9."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from local_cloud.functions.queue import MAX_BYTES, Queue, QueueError
from tests.clock import Clock
from tests.storm import storm

ROOT = Path(__file__).parent.parent
DEADLINE_S = 60


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def queue(tmp_path: Path, clock: Clock) -> Iterator[Queue]:
    with (
        Queue(tmp_path / "dead.db", clock=clock) as dead,
        Queue(
            tmp_path / "queue.db", max_receives=1, dead_letters=dead, clock=clock
        ) as opened,
    ):
        yield opened


def test_an_older_receipt_does_not_delete(queue: Queue, clock: Clock):
    queue.max_receives = 5
    queue.send("work")
    (first,) = queue.receive()
    clock.ahead_s += 60
    (second,) = queue.receive()
    queue.delete(first.receipt)
    with pytest.raises(QueueError, match=r"received again since. Leave it"):
        queue.change_visibility(first.receipt, 0)
    assert queue.counts().in_flight == 1
    queue.delete(second.receipt)
    assert queue.counts().total == 0


def test_messages_come_in_the_order_sent(queue: Queue):
    for n in range(30):
        queue.send(str(n))
    found = [message.body for _ in range(3) for message in queue.receive(10)]
    assert found == [str(n) for n in range(30)]


def test_dead_letters_can_be_driven_back(queue: Queue, clock: Clock):
    dead = queue.dead_letters
    assert dead is not None
    for n in range(12):
        queue.send(str(n), attributes={"n": str(n)})
    lost = {m.id for _ in range(2) for m in queue.receive(10)}
    clock.ahead_s += 60
    assert queue.receive(10) == []
    assert dead.counts().ready == 12
    assert queue.redrive() == 12
    assert dead.counts().total == 0
    back = [m for _ in range(2) for m in queue.receive(10)]
    assert [m.attributes["n"] for m in back] == [str(n) for n in range(12)]
    assert {m.receive_count for m in back} == {1}
    assert not lost & {m.id for m in back}


def test_driving_back_needs_dead_letters(tmp_path: Path):
    with Queue(tmp_path / "q") as queue, pytest.raises(QueueError, match="has none"):
        queue.redrive()


def test_a_queue_is_not_its_own_dead_letters(tmp_path: Path):
    with (
        Queue(tmp_path / "q") as dead,
        pytest.raises(QueueError, match="found the same"),
    ):
        Queue(tmp_path / "q", dead_letters=dead)


@pytest.mark.parametrize("body", ["", "\0", "a\x1b[0m", "\ud800", b"bytes", None])
def test_what_xml_cannot_hold_is_refused(queue: Queue, body: Any):
    with pytest.raises(QueueError, match="allowed in XML"):
        queue.send(body)


def test_bytes_count_not_characters(queue: Queue):
    with pytest.raises(QueueError, match="1,048,576 bytes"):
        queue.send("\u00fc" * (MAX_BYTES // 2 + 1))


def test_a_negative_delay_is_refused(queue: Queue):
    with pytest.raises(QueueError, match="delay_s from 0 to 900, found -1"):
        queue.send("x", delay_s=-1)


def test_a_text_is_no_batch(queue: Queue):
    with pytest.raises(QueueError, match="found one text"):
        queue.send_batch("ab")


def test_attributes_count(queue: Queue):
    with pytest.raises(QueueError, match="up to 10 attributes"):
        queue.send("x", attributes={str(n): "" for n in range(11)})
    with pytest.raises(QueueError, match="attributes included"):
        queue.send("x" * MAX_BYTES, attributes={"a": "b"})


@pytest.mark.parametrize(
    "options",
    [{"visibility_s": -1}, {"max_receives": 0}, {"retention_s": 59},
     {"visibility_s": float("nan")}],
)  # fmt: skip
def test_impossible_settings_are_refused(tmp_path: Path, options: dict[str, float]):
    with pytest.raises(QueueError, match="Choose within"):
        Queue(tmp_path / "q", **options)
    assert not (tmp_path / "q").exists()


def test_a_queue_outlives_its_object(tmp_path: Path):
    with Queue(tmp_path / "q") as queue:
        sent = queue.send("kept")
    with Queue(tmp_path / "q") as queue:
        assert [message.id for message in queue.receive()] == [sent]


def test_a_long_poll_hears_another_process(tmp_path: Path):
    code = (
        "import sys; from local_cloud.functions.queue import Queue; "
        "Queue(sys.argv[1]).send('from elsewhere')"
    )
    with Queue(tmp_path / "q") as queue:
        argv = [sys.executable, "-c", code, str(tmp_path / "q")]
        with subprocess.Popen(argv, cwd=ROOT) as other:
            found = queue.receive(wait_s=20)
        assert other.returncode == 0
    assert [message.body for message in found] == ["from elsewhere"]


def test_a_long_poll_takes_no_processor_time(tmp_path: Path):
    with Queue(tmp_path / "q") as queue:
        before = time.thread_time()
        assert queue.receive(wait_s=0.5) == []
        assert time.thread_time() - before < 0.1  # a busy loop takes 0.5


def test_of_many_threads_each_message_has_one(tmp_path: Path):
    found: list[str] = []
    with Queue(tmp_path / "q") as queue:
        for start in range(0, 200, 10):
            queue.send_batch([str(n) for n in range(start, start + 10)])

        def drain_some() -> None:
            while messages := queue.receive(7):
                found.extend(message.body for message in messages)
                queue.delete_batch([message.receipt for message in messages])

        threads = [threading.Thread(target=drain_some) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE_S)
        assert queue.counts().total == 0
    assert sorted(found, key=int) == [str(n) for n in range(200)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork: run it on Linux")
def test_a_forked_child_opens_its_own(tmp_path: Path):
    code = """
import os, sys
from local_cloud.functions.queue import Queue
with Queue(sys.argv[1]) as queue:
    queue.send("parent")
    if not (child := os.fork()):
        queue.send("child")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    print(sorted(message.body for message in queue.receive(10)))
"""
    argv = [sys.executable, "-W", "error", "-c", code, str(tmp_path / "q")]
    done = subprocess.run(
        argv, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert (done.stdout, done.stderr) == ("['child', 'parent']\n", "")


def test_several_processes_make_one_file(tmp_path: Path):
    code = (
        "import sys; from local_cloud.functions.queue import Queue; "
        "[Queue(f'{sys.argv[1]}/{n}').send('x') for n in range(60)]"
    )
    argv = [sys.executable, "-c", code, str(tmp_path)]
    many = [subprocess.Popen(argv, cwd=ROOT, stderr=subprocess.PIPE) for _ in range(4)]
    errors = [process.communicate(timeout=DEADLINE_S)[1].decode() for process in many]
    assert errors == [""] * 4
    for n in range(60):
        with Queue(tmp_path / str(n)) as queue:
            assert queue.counts().total == 4


# ## Files that cannot be used


def test_a_missing_folder_is_named(tmp_path: Path):
    with pytest.raises(QueueError, match=r"exists .*absent.*Make the folder"):
        Queue(tmp_path / "absent" / "q")


def test_a_file_that_is_no_database_is_left_alone(tmp_path: Path):
    path = tmp_path / "q"
    path.write_bytes(b"minutes of the last meeting\n" * 100)
    with pytest.raises(QueueError, match=r"not a database.*move it away"):
        Queue(path)
    assert path.read_bytes() == b"minutes of the last meeting\n" * 100


def test_another_programs_database_is_left_alone(tmp_path: Path):
    path = tmp_path / "q"
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE messages (text)")
    db.close()
    before = path.read_bytes()
    with pytest.raises(QueueError, match="another program's database"):
        Queue(path)
    assert path.read_bytes() == before


def test_a_newer_format_is_named(tmp_path: Path):
    path = tmp_path / "q"
    Queue(path).close()
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version = 2")
    db.close()
    with pytest.raises(QueueError, match="format 1, found format 2"):
        Queue(path)


def test_a_damaged_file_is_said(tmp_path: Path):
    path = tmp_path / "q"
    with Queue(path) as queue:
        for _ in range(20):
            queue.send_batch(["x" * 4000] * 10)
    size = path.stat().st_size
    with open(path, "r+b") as file:  # all but the first page
        file.seek(4096)
        file.write(b"\xa5" * (size - 4096))
    with Queue(path) as queue, pytest.raises(QueueError, match=r"malformed.*move it"):
        queue.receive()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An empty file system of 24 MB in memory."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system takes root: run this test as root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def fill(queue: Queue) -> list[str]:
    """Sends until the queue refuses; gives the ids it acknowledged."""
    acknowledged: list[str] = []
    with pytest.raises(QueueError, match=r"room on the disk .*make room, repeat"):
        acknowledged.extend(iter(lambda: queue.send("x" * 20_000), None))
    return acknowledged


def drain(queue: Queue, found: list[str]) -> None:
    """Receives and deletes all; adds the ids to `found`."""
    while messages := queue.receive(10):
        found += [message.id for message in messages]
        queue.delete_batch([message.receipt for message in messages])


def test_a_full_disk_refuses_senders_and_serves_receivers(disk: Path):
    found: list[str] = []
    with Queue(disk / "q") as queue:
        sent = fill(queue)
        assert len(sent) > 100
        sent += fill(queue)
        drain(queue, found)
        assert found == sent
        assert queue.counts().total == 0


def test_a_disk_filled_by_others_keeps_what_was_acknowledged(disk: Path):
    found: list[str] = []
    with Queue(disk / "q") as queue:
        sent = fill(queue)
        command = ["dd", "if=/dev/zero", f"of={disk / 'others'}", "bs=4k"]
        assert b"No space" in subprocess.run(command, capture_output=True).stderr
        with pytest.raises(QueueError, match="room on the disk"):
            drain(queue, found)
        assert fill(queue) == []
    assert len(found) < len(sent)
    (disk / "others").unlink()
    with Queue(disk / "q", clock=lambda: time.time() + 60) as queue:
        drain(queue, found)
        assert set(found) == set(sent)
        assert queue.counts().total == 0


# ## kill -9


def test_storms_of_kills_lose_nothing_and_do_nothing_twice(tmp_path: Path):
    count = 3000
    rough = {"kill_every_s": 0.02, "most_kills": 30}
    outcome = storm(tmp_path, count=count, deadline_s=300, **rough)
    everything = {f"p{p}-{n}" for p in range(2) for n in range(count)}
    assert outcome.acknowledged == everything
    assert outcome.lost == set()
    assert outcome.total == len(outcome.done)  # each side effect once
    assert outcome.done | outcome.dead == everything
    assert outcome.kills >= 10
    assert outcome.deliveries > outcome.total  # there was something to do twice
