"""The load generator, run as anyone would run it, against a server that may stall."""

from __future__ import annotations

import asyncio
import csv
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from local_cloud.scaling import omission

ROOT = Path(__file__).parent.parent
LOCUSTFILE = ROOT / "exercises" / "locustfile.py"


class Streams(BaseHTTPRequestHandler):
    """Answers like the API, at once; one at a time if it is told to stall."""

    protocol_version = "HTTP/1.1"
    stall_s = 0.0  # of the first request, in which all others wait
    broken = False
    gate = threading.Lock()
    asked: list[float]

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        type(self).asked.append(time.perf_counter())
        with type(self).gate:
            if len(type(self).asked) == 1:
                time.sleep(type(self).stall_s)
        if type(self).broken:
            self.send_error(500)
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        delta = json.dumps({"choices": [{"delta": {"content": "Hi"}}]})
        for data in (delta, "[DONE]"):
            piece = f"data: {data}\n\n".encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@contextmanager
def stand_in(**settings: Any) -> Iterator[tuple[str, type[Streams]]]:
    handler = type("Handler", (Streams,), {"asked": [], **settings})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)


def locust(folder: Path, *options: str) -> subprocess.CompletedProcess:
    argv = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless"]
    argv += ["--csv", str(folder / "load"), "--json-file", str(folder / "load")]
    return subprocess.run(
        [*argv, *options], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def stats(folder: Path) -> dict[str, dict[str, str]]:
    """The rows of locust's table, by name."""
    with open(folder / "load_stats.csv") as file:
        return {row["Name"]: row for row in csv.DictReader(file)}


def test_a_run_against_the_real_api(server: Any, tmp_path: Path) -> None:
    told = locust(
        tmp_path, "--host", server.url, "--rate", "3", "--duration", "2", "--peak", "1"
    )
    assert told.returncode == 0, told.stderr
    rows = stats(tmp_path)
    whole, first = rows["whole answer"], rows["first token"]
    assert int(whole["Request Count"]) == int(first["Request Count"]) >= 2
    assert int(whole["Failure Count"]) == 0
    assert float(first["Average Response Time"]) < float(whole["Average Response Time"])
    written = json.loads((tmp_path / "load.json").read_text())
    assert {row["name"] for row in written} >= {"whole answer", "first token"}


def test_a_stall_is_met_by_all_who_were_due_in_it(tmp_path: Path) -> None:
    with stand_in(stall_s=1.5) as (url, handler):
        told = locust(
            tmp_path, "--host", url, "--rate", "20", "--peak", "1", "--duration", "3"
        )
    assert told.returncode == 0, told.stderr
    # Sent although nothing was answered: half of the requests were due in the stall.
    begun = handler.asked[0]
    early = sum(at < begun + 1.5 for at in handler.asked)
    assert early > len(handler.asked) / 4
    assert float(stats(tmp_path)["first token"]["90%"]) > 500


def test_failures_are_counted_and_end_in_an_exit_code(tmp_path: Path) -> None:
    with stand_in(broken=True) as (url, _):
        told = locust(tmp_path, "--host", url, "--rate", "9", "--duration", "1")
    assert told.returncode == 1
    row = stats(tmp_path)["whole answer"]
    assert row["Failure Count"] == row["Request Count"] != "0"
    assert "status 500" in (tmp_path / "load_failures.csv").read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--host", "http://example.com"], "attack"),
        (["--host", "http://127.0.0.1:1", "--rate", "0"], "a rate above 0"),
        (["--host", "http://127.0.0.1:1", "--rate", "1e9"], "at most 100,000"),
        ([], "pass --host"),
    ],
)
def test_impossible_runs_are_refused(
    options: list[str], words: str, tmp_path: Path
) -> None:
    told = locust(tmp_path, *options)
    assert (told.returncode, words in told.stderr) == (2, True), told.stderr


def test_shapes_are_as_high_as_they_say(tmp_path: Path) -> None:
    """Read in a process of its own: importing locust patches sockets."""
    code = """
import locust  # first: it patches what the others import
import json
from collections import Counter
from exercises.locustfile import SHAPES, schedule
print(json.dumps({
    shape: Counter(int(at // 20) for at in schedule(shape, 20, 4, 100, 1))
    for shape in SHAPES
}))
assert schedule("daily", 5, 2, 9, 3) == schedule("daily", 5, 2, 9, 3)
"""
    told = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert told.returncode == 0, told.stderr
    counts = {
        shape: [fifths[str(i)] / 400 for i in range(5)]  # in units of the lowest rate
        for shape, fifths in json.loads(told.stdout).items()
    }
    assert counts["constant"] == pytest.approx([1] * 5, abs=0.2)
    assert counts["spike"] == pytest.approx([1, 1, 4, 1, 1], abs=0.4)
    assert counts["steps"] == sorted(counts["steps"])
    assert counts["daily"][2] > 2 * counts["daily"][0]


def test_a_closed_loop_does_not_see_the_stall_that_an_open_one_sees() -> None:
    experiment = omission.Experiment(seconds=2.5, stall_at_s=1.0, stall_s=0.8)
    closed, opened, truth = asyncio.run(omission.measure(experiment))
    assert 0 < closed.met_stall < 5 * experiment.clients < opened.met_stall
    assert opened.met_stall > 0.8 * truth.met_stall  # more, where the machine stalls
    assert opened.p99_s > 0.8 * truth.p99_s


def test_the_truth_is_arithmetic() -> None:
    stays = omission.true_latencies([0.0, 1.0, 1.5, 4.0], [0.1] * 4, (0.9, 2.9))
    assert stays == pytest.approx([0.1, 2.0, 1.6, 0.1])
    with pytest.raises(ValueError, match="the stall within the run"):
        omission.Experiment(seconds=1)
