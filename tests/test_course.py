"""What the lessons stand on: figures that hold, load that is honest, clean ends."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from course import draw, lesson, load, machine, measure, process, report, show
from course.load import Outcome
from course.request import Events

ROOT = Path(__file__).resolve().parents[1]


# ---------------------------------------------------------------- import


def test_importing_needs_only_the_standard_library_and_does_nothing() -> None:
    rooms = [p.stem for p in (ROOT / "course").glob("[a-z]*.py")]
    code = f"""
        import sys, threading
        for name in ("rich", "matplotlib", "httpx", "numpy"):
            sys.modules[name] = None      # importing it now fails
        before = set(threading.enumerate())
        for room in {rooms}:
            __import__("course." + room)
        assert set(threading.enumerate()) == before
    """
    assert len(rooms) == 9, rooms
    done = python("-c", textwrap.dedent(code))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def python(*argv: str, **options) -> subprocess.CompletedProcess[str]:
    """Runs Python from the repository's root, every warning an error."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    return subprocess.run(
        [sys.executable, "-W", "error", *argv],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        **{"stdin": subprocess.DEVNULL, **options},
    )


# ---------------------------------------------------------------- measure


@pytest.mark.parametrize(
    ("n", "q", "ranks"),
    [
        # Published tables of nonparametric 95 % intervals for the median.
        (5, 0.5, (None, None)),
        (6, 0.5, (1, 6)),
        (10, 0.5, (2, 9)),
        (20, 0.5, (6, 15)),
        (100, 0.5, (40, 61)),
        # 0.99**367 > 0.025 >= 0.99**368: only then can the maximum bound p99.
        (367, 0.99, (359, None)),
        (368, 0.99, (360, 368)),
    ],
)
def test_interval_ranks_are_those_of_the_tables(n, q, ranks) -> None:
    assert measure.interval_ranks(n, q) == ranks


@pytest.mark.parametrize("q", [50, 90])
def test_intervals_hold_the_true_percentile_as_often_as_they_say(q) -> None:
    draws = random.Random(20)
    truth = -math.log(1 - q / 100)  # of the exponential distribution
    held = 0
    for _ in range(1000):
        sample = measure.Series(tuple(draws.expovariate(1) for _ in range(60)))
        found = sample.percentile(q)
        assert found.low is not None
        assert found.high is not None
        held += found.low <= truth <= found.high
    assert 940 <= held <= 990  # 950 promised; discrete ranks give a little more


def test_a_bound_that_few_values_cannot_give_is_none_and_said() -> None:
    found = measure.Series(tuple(range(20))).percentile(99)
    assert found.high is None
    assert "n=20 is too few" in str(found)


def test_percentiles_are_numpys() -> None:
    numpy = pytest.importorskip("numpy")
    values = tuple(random.Random(1).gauss(10, 3) for _ in range(37))
    series = measure.Series(values)
    for q in (0, 1, 25, 50, 90, 99, 100):
        assert series.at(q) == pytest.approx(numpy.percentile(values, q))
    assert series.spread == pytest.approx(series.at(75) - series.at(25))


@pytest.mark.parametrize("values", [(), (1.0, float("nan"))])
def test_a_series_of_nothing_is_refused(values) -> None:
    with pytest.raises(ValueError, match="at least one value and no NaN"):
        measure.Series(values)


def test_measure_leaves_the_warm_up_out() -> None:
    calls = []
    series = measure.measure(lambda: calls.append(1), warmup=3, repeats=5)
    assert (len(calls), series.n, series.unit) == (8, 5, "s")


def test_compare_takes_turns_and_changes_who_goes_first() -> None:
    calls: list[str] = []
    measure.compare(
        lambda: calls.append("a"), lambda: calls.append("b"), warmup=0, repeats=3
    )
    assert "".join(calls) == "abbaab"


def test_pairing_finds_a_difference_that_drift_would_hide() -> None:
    drift = [1.5**turn for turn in range(10)]  # the machine slows down all the time
    noise = random.Random(3)
    a = measure.Series(tuple(1.1 * d * noise.uniform(0.99, 1.01) for d in drift))
    b = measure.Series(tuple(d * noise.uniform(0.99, 1.01) for d in drift))
    ratio = measure.Paired(a, b).ratio()
    assert ratio.low is not None
    assert 1 < ratio.low < 1.1 < ratio.value * 1.02
    unpaired = a.percentile(50)
    assert unpaired.low is not None
    assert unpaired.low < b.median  # taken apart, they show nothing


def test_pairing_finds_no_difference_where_there_is_none() -> None:
    noise = random.Random(4)
    a, b = (
        measure.Series(tuple(noise.uniform(0.9, 1.1) for _ in range(30))) for _ in "ab"
    )
    ratio = measure.Paired(a, b).ratio()
    assert ratio.low is not None
    assert ratio.high is not None
    assert ratio.low < 1 < ratio.high


def test_a_stopwatch_runs_and_then_stands_still() -> None:
    with measure.stopwatch() as watch:
        assert watch.seconds <= watch.seconds
    assert watch.seconds == watch.seconds > 0


@pytest.mark.parametrize(
    ("files", "share"),
    [
        ({"cpu.max": "50000 100000"}, 0.5),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "25000", "cpu/cpu.cfs_period_us": "100000"}, 0.25),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({"cpu.max": "99900000 100000"}, None),  # more than the machine has
        ({}, None),
    ],
)
def test_the_processors_a_cgroup_leaves_are_counted(tmp_path, files, share) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    whole = float(len(os.sched_getaffinity(0)))
    assert machine.cpu_quota(tmp_path) == (share or whole)


def test_the_memory_a_cgroup_leaves_is_counted(tmp_path) -> None:
    whole = machine.memory_bytes(tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.memory_bytes(tmp_path) == whole
    (tmp_path / "memory.max").write_text("1048576\n")
    assert machine.memory_bytes(tmp_path) == 1048576


def test_the_machine_card_reads_as_one_line() -> None:
    card = measure.machine_card(model_digest="0123456789abcdef", runtime="runtime 1")
    line = measure.card_line(card)
    for part in ("GiB RAM", "Python 3.", "runtime 1", "model 0123456789ab"):
        assert part in line


# ---------------------------------------------------------------- load

TOY_SERVER = """
import asyncio, json, time

seen, until = {}, {}

async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    while (await receive()).get("more_body"):
        pass
    path = scope["path"]
    if path.startswith("/stall"):              # the 20th request stalls everyone
        seen[path] = seen.get(path, 0) + 1
        if seen[path] == 20:
            until[path] = time.monotonic() + 0.8
        await asyncio.sleep(until.get(path, 0.0) - time.monotonic())
    status, headers, chunks = ANSWERS.get(path, (200, [], [b"ok"]))
    start = {"type": "http.response.start", "status": status, "headers": headers}
    await send(start)
    for chunk in chunks:
        if isinstance(chunk, float):
            await asyncio.sleep(chunk)
        else:
            body = {"type": "http.response.body", "body": chunk, "more_body": True}
            await send(body)
    await send({"type": "http.response.body", "body": b""})

def piece(text, **more):
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None, **more}
    return b"data: " + json.dumps({"choices": [choice]}, ensure_ascii=False).encode()

ROLE = b'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}\\n\\n'
CAFE = piece("caf\\u00e9")
CUT = CAFE.index(b"\\xc3") + 1                   # inside the two bytes of one letter
USAGE = b'data: {"choices": [], "usage": {"completion_tokens": 7}}\\n\\n'
STOP = piece("", finish_reason="stop") + b"\\r\\n\\r\\n"
DONE = b"data: [DONE]\\n\\n"
MULTI = b'data: {"choices": [{"delta":\\ndata: {"content": "two lines"}}]}\\n\\n'
ERROR = b'data: {"error": {"message": "engine closed"}}\\n\\n'
REFUSAL = b'{"error": {"message": "too many", "type": "rate_limit", "code": "x"}}'
RETRY = [(b"retry-after", b"7")]

ANSWERS = {
    "/chat": (200, [], [ROLE, 0.05, CAFE[:CUT], 0.05, CAFE[CUT:] + b"\\n", 0.05,
                        b"\\n", 0.4, piece("!") + b"\\n\\n: ping\\n\\n",
                        0.05, MULTI, STOP, USAGE, DONE]),
    "/completion": (200, [], [b'data: {"choices": [{"text": "hi"}]}\\n\\n', DONE]),
    "/error": (200, [], [piece("a") + b"\\n\\n", 0.05, ERROR]),
    "/broken": (200, [], [piece("a") + b"\\n\\n"]),
    "/nonsense": (200, [], [b"data: 5\\n\\ndata: {oops\\n\\n", DONE]),
    "/limit": (429, RETRY, [REFUSAL]),
    "/full": (503, [], [b"plain words"]),
    "/bug": (500, [], []),
    "/hang": (200, [], [piece("a") + b"\\n\\n", 30.0]),
    "/away": (307, [(b"location", b"http://192.0.2.1/")], []),
}
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[str]:
    """The address of a real uvicorn that answers, stalls, breaks off and refuses."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "toy_server.py").write_text(TOY_SERVER)
    port = process.free_port()
    argv = [sys.executable, "-m", "uvicorn", "toy_server:app", "--port", str(port)]
    argv += ["--app-dir", str(folder), "--log-level", "warning"]
    url = f"http://127.0.0.1:{port}"
    with process.child(argv, ready=f"{url}/", stop_s=0.5):
        yield url


def ask(url: str, **options) -> Outcome:
    """One streamed request."""

    async def one() -> Outcome:
        async with load.client() as client:
            body = {"messages": [{"role": "user", "content": "hi"}]}
            return await load.stream_chat(client, url, body, **options)

    return asyncio.run(one())


def test_only_an_open_loop_shows_a_stall_as_users_meet_it(server) -> None:
    """100 requests; the 20th makes the server stall for 0.8 s. Who notices?"""

    async def run(loop: str) -> list[Outcome]:
        async with load.client(server) as client:

            async def send(_: int) -> Outcome:
                return await load.post(client, f"/stall/{loop}", {})

            if loop == "closed":
                return await load.run_closed_loop(send, clients=1, requests=100)
            return await load.run_open_loop(send, load.constant_arrivals(100, 1))

    def told(outcomes: list[Outcome]) -> tuple[int, measure.Series]:
        found = load.summarise(outcomes, 1, 1)
        assert found.ok == 100
        assert found.total is not None
        assert found.total.max > 0.7
        return sum(outcome.total_s > 0.25 for outcome in outcomes), found.total

    # One unlucky request, which no percentile shows; or everyone who was due in the
    # 0.55 s before it was nearly over: 55 of 100. A slow machine adds to both.
    closed, closed_s = told(asyncio.run(run("closed")))
    opened, opened_s = told(asyncio.run(run("open")))
    assert opened > 4 * closed
    assert closed_s.p90 < opened_s.p50


def test_a_streamed_answer_is_timed_piece_by_piece(server) -> None:
    found = ask(f"{server}/chat")
    assert found.ok, found.error
    assert found.text == "café!two lines"
    assert found.finish_reason == "stop"
    assert found.tokens == 7  # what the server says, not the three pieces
    assert len(found.gaps_s) == 2
    assert found.first_token_s is not None
    # The role alone is no token; half of a line is none either.
    assert 0.14 <= found.first_token_s < found.total_s
    assert found.first_token_s + found.gaps_s[0] > 0.5  # the server waited 0.4 s there
    assert found.time_per_token_s == pytest.approx(sum(found.gaps_s) / 6)


def test_each_piece_is_told_when_it_comes(server) -> None:
    told: list[int] = []
    assert ask(f"{server}/chat", on_piece=told.append).ok
    assert told == [1, 2, 3]


def test_a_text_completion_is_read_too_and_its_pieces_counted(server) -> None:
    found = ask(f"{server}/completion")
    assert (found.ok, found.text, found.tokens) == (True, "hi", 1)


@pytest.mark.parametrize(
    ("path", "status", "error"),
    [
        ("/error", 200, "engine closed"),
        ("/broken", 200, "broke off before [DONE]"),
        ("/nonsense", 200, "expected a JSON object in an event, found '5'"),
        ("/limit", 429, "too many"),
        ("/full", 503, "plain words"),
        ("/bug", 500, "status 500, empty body"),
        ("/away", 307, "status 307"),  # not followed, least of all off this machine
    ],
)
def test_what_goes_wrong_is_an_outcome(server, path, status, error) -> None:
    found = ask(server + path)
    assert not found.ok
    assert found.status == status
    assert error in (found.error or "")
    assert found.refused == (status in (429, 503))
    assert found.retry_after_s == (7.0 if path == "/limit" else None)


def test_an_answer_that_never_ends_is_ended(server) -> None:
    found = ask(f"{server}/hang", deadline_s=1)
    assert found.text == "a"
    assert found.error == "no complete answer within 1 s"


def test_a_server_that_is_not_there_is_an_outcome() -> None:
    found = ask(f"http://127.0.0.1:{process.free_port()}/")
    assert found.status is None
    assert "ConnectError" in (found.error or "")


@pytest.mark.parametrize(
    "host", ["example.org", "192.0.2.1", "0.0.0.0", "localhost.example.org", "10.0.0.1"]
)
def test_only_this_machine_is_a_target(host) -> None:
    with pytest.raises(PermissionError, match="allow_remote=True"):
        ask(f"http://{host}/")
    load.check_target(host, allow_remote=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_this_machine_is_a_target(host) -> None:
    load.check_target(host)


def test_events_do_not_depend_on_where_the_bytes_are_cut() -> None:
    stream = (
        "\ufeffdata: one\n\n: comment\n\ndata:two\r\ndata:  zwei é\r\n\r\n"
        "event: x\nid: 3\ndata: three\r\rdata\n\nretry: 5\n\ndata: unfinished"
    ).encode()
    whole = Events().feed(stream)
    assert whole == ["one", "two\n zwei é", "three", ""]
    for size in (1, 2, 3, 5):
        events = Events()
        parts = [stream[i : i + size] for i in range(0, len(stream), size)]
        assert [data for part in parts for data in events.feed(part)] == whole


def test_arrivals_are_reproducible_and_as_many_as_asked() -> None:
    arrivals = load.poisson_arrivals(50, 20, seed=1)
    assert arrivals == load.poisson_arrivals(50, 20, seed=1)
    assert arrivals != load.poisson_arrivals(50, 20, seed=2)
    assert arrivals == sorted(arrivals)
    assert arrivals[0] > 0
    assert arrivals[-1] < 20
    assert abs(len(arrivals) - 1000) < 4 * 1000**0.5
    gaps = measure.Series(tuple(b - a for a, b in itertools.pairwise(arrivals)))
    assert gaps.median == pytest.approx(0.02 * 0.693, rel=0.15)  # exponential: ln 2
    assert load.constant_arrivals(4, 1) == [0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize("rate", [0, -1, 1e9, float("nan")])
def test_a_run_has_a_bound(rate) -> None:
    with pytest.raises(ValueError, match="at most 100,000 requests"):
        load.constant_arrivals(rate, 10)


async def answer(_: int) -> Outcome:
    """A server that takes 50 ms and sends its only token then."""
    await asyncio.sleep(0.05)
    return Outcome(status=200, first_token_s=0.05, total_s=0.05, tokens=1)


def test_waiting_for_room_counts_as_latency() -> None:
    run = load.run_open_loop(answer, [0.0] * 5, max_in_flight=1)
    outcomes = asyncio.run(run)
    waited = [outcome.first_token_s or 0 for outcome in outcomes]
    assert waited == sorted(waited)
    assert waited[-1] > 0.19  # four others went first
    assert all(o.total_s >= 0.05 + o.late_s for o in outcomes)


def test_an_open_loop_ends_at_its_deadline() -> None:
    async def never(_: int) -> Outcome:
        await asyncio.sleep(60)
        return Outcome()

    run = load.run_open_loop(never, [0.0, 0.01, 50.0], deadline_s=0.2)
    outcomes = asyncio.run(run)
    assert [o.error for o in outcomes] == ["not finished 0.2 s after the run began"] * 3
    assert outcomes[2].total_s == 0  # never due


def test_a_mistake_in_sending_is_raised_and_ends_the_others() -> None:
    ended = []

    async def send(index: int) -> Outcome:
        if index == 3:
            raise KeyError("no such field")
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(index)
        return Outcome()

    with pytest.raises(KeyError, match="no such field"):
        asyncio.run(load.run_open_loop(send, [0.0, 0.0, 0.0, 0.01]))
    assert sorted(ended) == [0, 1, 2]


def test_a_closed_loop_sends_each_request_once_with_so_many_clients() -> None:
    sent, at_once, most = [], 0, 0

    async def send(index: int) -> Outcome:
        nonlocal at_once, most
        sent.append(index)
        at_once += 1
        most = max(most, at_once)
        await asyncio.sleep(0.001)
        at_once -= 1
        return Outcome(status=200)

    outcomes = asyncio.run(load.run_closed_loop(send, clients=3, requests=20))
    assert (sent, len(outcomes), most) == (list(range(20)), 20, 3)


def test_goodput_counts_what_met_both_objectives() -> None:
    def done(due, first, gap, tokens=11) -> Outcome:
        gaps = (gap,) * (tokens - 1)
        total = first + sum(gaps)
        return Outcome(200, None, "stop", None, first, gaps, total, tokens, "", due)

    outcomes = [
        done(0, 0.1, 0.05),  # met
        done(1, 0.9, 0.05),  # late
        done(2, 0.1, 0.30),  # slow
        done(9, 0.5, 0.05),  # met; ends at 10.0
        Outcome(status=429, error="limit", due_s=3, total_s=0.01),
        Outcome(status=503, error="full", due_s=4, total_s=0.01),
        Outcome(status=200, error="broke off", due_s=5, first_token_s=0.1, tokens=3),
        Outcome(error="ConnectError", due_s=6),
    ]
    found = load.summarise(outcomes, ttft_slo_s=0.5, gap_slo_s=0.1)
    assert (found.requests, found.ok, found.refused, found.failed) == (8, 4, 2, 2)
    assert found.seconds == pytest.approx(10)
    assert found.goodput_per_s == pytest.approx(0.2)
    assert found.requests_per_s == pytest.approx(0.4)
    assert found.tokens_per_s == pytest.approx(4.4)
    assert found.first_token is not None
    assert found.first_token.n == 4  # failed ones do not flatter it
    assert found.gap is not None
    assert found.gap.n == 40


# ---------------------------------------------------------------- process

FAMILY = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, lambda *_: open(os.environ["ASKED"], "w").close())
code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); " \\
       "print('up', flush=True); time.sleep(60)"
grandchild = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
grandchild.stdout.readline()
print(os.getpid(), grandchild.pid, flush=True)
while True:
    time.sleep(60)
"""


def family(running: process.Child) -> list[int]:
    """The pids of a stubborn child and its stubborn child, once both are up."""
    process.wait_until(lambda: "\n" in running.output(), 20, "a line with two pids")
    return [int(pid) for pid in running.output().split()]


def all_gone(pids: list[int]) -> bool:
    """Whether all end at once: a killed process still takes its milliseconds."""
    return process.wait_until(lambda: all(map(gone, pids)), 20, f"the end of {pids}")


def gone(pid: int) -> bool:
    """Whether a process has ended; a zombie, whom only its parent can bury, has."""
    try:
        os.kill(pid, 0)
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (ProcessLookupError, FileNotFoundError):
        return True
    return stat.rpartition(")")[2].split()[0] == "Z"


def test_a_failing_block_ends_child_and_grandchild_and_shows_the_output(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("ASKED", str(tmp_path / "asked"))
    pids = []
    with pytest.raises(KeyError) as caught:  # noqa: PT012, SIM117
        with process.child([sys.executable, "-c", FAMILY], stop_s=0.2) as running:
            pids = family(running)
            assert not any(map(gone, pids))
            raise KeyError("a mistake in the lesson")
    assert len(pids) == 2
    assert all_gone(pids)
    assert str(pids[1]) in "".join(caught.value.__notes__)


@pytest.mark.parametrize("stop_s", [0.2, 60], ids=["one Ctrl-C", "impatient Ctrl-C"])
def test_ctrl_c_ends_child_and_grandchild(tmp_path, stop_s) -> None:
    (tmp_path / "family.py").write_text(FAMILY)
    (tmp_path / "parent.py").write_text(
        textwrap.dedent(f"""
        import signal, sys, time
        from course import process
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with process.child([sys.executable, "family.py"], stop_s={stop_s}) as running:
            process.wait_until(lambda: "\\n" in running.output(), 20, "two pids")
            print(running.output(), flush=True)
            time.sleep(60)
        """)
    )
    parent = subprocess.Popen(
        [sys.executable, "parent.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "ASKED": "asked"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    parent.send_signal(signal.SIGINT)
    process.wait_until((tmp_path / "asked").exists, 20, "the child to be asked to end")
    if stop_s == 60:
        parent.send_signal(signal.SIGINT)
    _, errors = parent.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors
    assert all_gone(pids)


def test_a_child_that_dies_early_shows_its_last_words() -> None:
    code = "import sys; print('port taken', flush=True); sys.exit(3)"
    argv = [sys.executable, "-c", code]
    with (
        pytest.raises(process.ChildError, match=r"exit code 3") as caught,
        process.child(argv, ready="http://127.0.0.1:9/", deadline_s=30),
    ):
        pytest.fail("it was never ready")
    assert "port taken" in str(caught.value)
    assert "-c" in str(caught.value)  # which command it was


def test_a_child_that_is_never_ready_is_ended_at_the_deadline(tmp_path) -> None:
    pid = tmp_path / "pid"

    def never() -> bool:
        process.wait_until(lambda: pid.exists() and pid.read_text(), 20, "a start")
        return False

    argv = ["sh", "-c", f"echo $$ > {pid}; exec sleep 60"]
    with (
        pytest.raises(process.ChildError, match=r"to be ready within 0\.1 s"),
        process.child(argv, ready=never, deadline_s=0.1),
    ):
        pytest.fail("it was never ready")
    assert gone(int(pid.read_text()))


def test_a_child_gets_its_variables_beside_ours(monkeypatch) -> None:
    monkeypatch.setenv("OURS", "1")
    code = "import os; print(os.environ['OURS'], os.environ['THEIRS'], flush=True)"
    argv = [sys.executable, "-c", code]
    with process.child(argv, env={"THEIRS": "2"}) as running:
        process.wait_until(lambda: not running.alive, 20, "its end")
    assert running.output() == "1 2\n"  # still there after the block


def test_waiting_gives_what_it_waited_for_or_says_what_that_was() -> None:
    answers = iter([None, 0, "", "here"])
    assert process.wait_until(lambda: next(answers), 5, "it", every_s=0) == "here"
    with pytest.raises(TimeoutError, match=r"Expected a bus within 0\.01 s"):
        process.wait_until(lambda: False, 0.01, "a bus", every_s=0.001)


# ---------------------------------------------------------------- show


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (True, "yes"),
        (1234567, "1,234,567"),
        (1234.5, "1,234"),
        (12.345, "12.3"),
        (0.012345, "0.0123"),
        (0.0, "0.00"),
        (float("nan"), "-"),
        ("as it is", "as it is"),
    ],
)
def test_numbers_are_written_for_people(value, text) -> None:
    assert show.number(value) == text


def test_the_numbers_of_a_column_share_their_decimals() -> None:
    table = show.Table("t", ["a", ("b", "ms")], [(1.07, 3), (40.125, None)])
    assert table.cells() == [["1.07", "3"], ["40.12", "-"]]
    assert show.Table.from_json(table.as_json()).cells() == table.cells()


def test_a_row_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected 2 cells in each row of 't'"):
        show.Table("t", ["a", "b"], [(1,)])


def test_in_a_pipe_nothing_is_cut_coloured_or_taken_for_markup(capsys) -> None:
    columns = [f"a rather long column name {i}" for i in range(12)]
    show.table(show.Table("[bold]wide[/bold]", columns, [range(12)]))
    show.say("[red]not red[/red] :smile:")
    out = capsys.readouterr().out
    for text in (*columns, "[bold]wide[/bold]", "[red]not red[/red] :smile:"):
        assert text in out
    assert "\x1b" not in out
    assert not re.search(r"[ \t]$", out, re.MULTILINE)


# ---------------------------------------------------------------- draw


def test_a_picture_is_1000_pixels_wide_and_needs_no_window(tmp_path) -> None:
    code = f"""
        import sys
        from course import draw
        curves = {{"a": ((1, 2, 4), (3, 4, 5)), "b": ((1, 2), (1, 2), (0, 1), (2, 3))}}
        def both(left, right):
            draw.lines(left, curves, x="clients", y="time (ms)", log_x=True)
            draw.bars(right, {{"x": 1.5, "y": 2}}, x="time (s)", errors={{"x": (1, 2)}})
            assert left.get_xlabel() == "clients" and left.get_ylabel() == "time (ms)"
        draw.picture({str(tmp_path / "new" / "p.png")!r}, both, panels=2)
        assert "matplotlib.pyplot" not in sys.modules
    """
    done = python("-c", textwrap.dedent(code))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    data = (tmp_path / "new" / "p.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(data[16:20], "big") == 1000
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["p.png"]


def test_the_colours_differ() -> None:
    assert len(set(draw.COLOURS)) == len(draw.MARKERS) == len(draw.COLOURS)


# ---------------------------------------------------------------- lesson and report

TOY_LESSON = '''"""A toy lesson.

More words, 100 % of them.
"""
import contextlib, os, signal, sys, time

signal.signal(signal.SIGINT, signal.default_int_handler)
from course import lesson
from course.show import Table


@contextlib.contextmanager
def engine():
    print("opened", flush=True)
    try:
        yield "the engine"
    finally:
        print("closed", flush=True)


def demo_counting(run):
    kept = run.keep("engine", engine)
    run.predict(f"{kept} counts to {2 if run.quick else 10}.")
    with run.progress("counting", 2) as advance:
        advance()
    rows = [("quick" if run.quick else "full", 1 / 3, float("nan"))]
    run.table(Table("Counted <b>", ["how", ("time", "ms"), "n"], rows, note="a note"))
    run.fact("answer", 42, "tokens")
    run.conclude(f"{kept} counted on {run.device}.")
    run.skip("no abacus", "apt-get install abacus")
    run.picture(lambda ax: ax.plot([1, 2]), "curve", size=(10, 3))


def demo_skipping(run):
    raise lesson.Skip("There is no Docker.", "sudo apt-get install docker.io")


def demo_trouble(run):
    run.say("Trouble ahead.")
    trouble = os.environ.get("TROUBLE")
    if trouble == "fail":
        raise KeyError("a bug in the demo")
    if trouble == "hang":
        with engine():
            print("hanging", flush=True)
            time.sleep(60)
    run.say("Over.")


SECTIONS = [
    lesson.Section("Count with confidence", demo_counting),
    lesson.Section("Skip what is missing", demo_skipping),
    lesson.Section("Look for trouble", demo_trouble),
]


def digest(device):
    if os.environ.get("TROUBLE") == "model":
        raise OSError("model: expected 300 MB of room, found 3; make room")
    return "digest-of-" + device


def main(argv=None):
    return lesson.run(
        doc=__doc__,
        sections=SECTIONS,
        argv=argv,
        after="Go on with the next lesson.",
        add_arguments=lambda parser: parser.add_argument("--serve"),
        instead=lambda a: print("serving", a.serve) or 7 if a.serve else None,
        model_digest=digest,
    )


if __name__ == "__main__":
    raise SystemExit(main())
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Runs the toy lesson in its own folder; results go to `reports/` there."""
    (tmp_path / "toy.py").write_text(TOY_LESSON)
    monkeypatch.setenv("REPORTS_DIR", str(tmp_path / "reports"))

    def run(*argv: str, **options) -> subprocess.CompletedProcess[str]:
        return python("toy.py", *argv, cwd=tmp_path, **options)

    return run


def saved(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "reports" / "toy.json").read_text())


def test_a_lesson_runs_from_card_to_next(toy, tmp_path) -> None:
    done = toy()
    assert (done.returncode, done.stderr) == (0, "")
    order = [
        "A toy lesson.",
        "digest-of-c",
        "1 of 3  Count with confidence",
        "opened",
        "Prediction  the engine counts to 10.",
        "Counted <b>",
        "0.333",
        "a note",
        "answer: 42 tokens",
        "Result      the engine counted on cpu.",
        "SKIPPED     no abacus",
        "apt-get install abacus",
        "Picture     reports/toy-curve.png",
        "2 of 3  Skip what is missing",
        "SKIPPED     There is no Docker.",
        "sudo apt-get install docker.io",
        "3 of 3  Look for trouble",
        "Over.",
        "closed",
        "3 sections in",
        "saved in reports/toy.json",
        "Go on with the next lesson.",
    ]
    places = [done.stdout.find(text) for text in order]
    assert -1 not in places, order[places.index(-1)]
    assert places == sorted(places)
    assert "\x1b" not in done.stdout


def test_json_holds_every_figure_at_full_precision(toy, tmp_path) -> None:
    done = toy("--quick", "--json", "all.json", "--device", "cuda")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "all.json").read_text())
    assert record["device"] == "cuda"
    assert record["machine"]["model"] == "digest-of-cuda"
    outcomes = [section["outcome"] for section in record["sections"]]
    assert outcomes == ["done", "skipped", "done"]
    events = {e["kind"]: e for e in record["sections"][0]["events"]}
    assert events["predicted"]["text"] == "the engine counts to 2."
    assert events["table"]["rows"] == [["quick", 1 / 3, None]]
    assert events["table"]["columns"][1] == {"name": "time", "unit": "ms"}
    assert events["fact"]["value"] == 42
    assert events["skipped"]["command"] == "apt-get install abacus"


@pytest.mark.parametrize("wanted", ["2", "skip", "MISSING"])
def test_one_section_by_number_or_word(toy, tmp_path, wanted) -> None:
    done = toy(wanted)
    assert done.returncode == 0
    assert "2 of 3  Skip what is missing" in done.stdout
    assert "1 of 3" not in done.stdout
    assert "opened" not in done.stdout


@pytest.mark.parametrize("wanted", ["0", "4", "abacus", "i"])
def test_a_wrong_section_lists_the_right_ones(toy, tmp_path, wanted) -> None:
    done = toy(wanted)
    assert (done.returncode, done.stdout) == (2, "")
    for title in ("Count with confidence", "Skip what", "Look for trouble"):
        assert title in done.stderr
    assert not (tmp_path / "reports").exists()


def test_help_is_the_docstring_and_the_sections(toy) -> None:
    done = toy("--help")
    assert done.returncode == 0
    assert "More words, 100 % of them." in done.stdout
    assert "2  Skip what is missing" in done.stdout
    for option in ("--pause", "--quick", "--json", "--device", "--serve"):
        assert option in done.stdout


def test_json_into_no_folder_is_refused_before_anything_runs(toy) -> None:
    done = toy("--json", "nowhere/all.json")
    assert (done.returncode, done.stdout) == (2, "")
    assert "expected an existing folder" in done.stderr


def test_another_action_runs_instead_and_without_rich(toy, tmp_path) -> None:
    without = "import sys, toy; sys.modules['rich'] = None; raise SystemExit(toy.main("
    serve = python("-c", without + "['--serve', 'x']))", cwd=tmp_path)
    assert (serve.returncode, serve.stdout) == (7, "serving x\n")
    lessons = python("-c", without + "[]))", cwd=tmp_path)
    assert lessons.returncode == 2
    assert "pip install -r requirements.txt" in lessons.stderr


def test_a_failing_demo_is_shown_and_kept(toy, tmp_path) -> None:
    done = toy(env={"TROUBLE": "fail"})
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "a bug in the demo" in done.stderr
    assert "Over." not in done.stdout
    assert "closed" in done.stdout
    last = saved(tmp_path)["sections"][-1]
    assert last["outcome"] == "failed"
    assert last["events"][-1]["text"] == "KeyError: 'a bug in the demo'"


def test_a_model_that_cannot_be_had_is_told_and_is_no_bug(toy) -> None:
    done = toy(env={"TROUBLE": "model"})
    assert done.returncode == 1
    assert "OSError: model: expected 300 MB of room, found 3; make room" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_a_signal_ends_the_lesson_and_what_it_started(
    toy, tmp_path, number, code
) -> None:
    started = subprocess.Popen(
        [sys.executable, "-W", "error", "toy.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TROUBLE": "hang"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert started.stdout is not None
    for line in started.stdout:
        if line == "hanging\n":
            break
    started.send_signal(number)
    rest, errors = started.communicate(timeout=60)
    assert started.returncode == code
    assert rest.count("closed") == 2  # the demo's own block and what was kept
    assert "Traceback" not in errors
    if number == signal.SIGINT:
        assert "Interrupted" in errors
        # What was finished is kept; the rest is not passed off as finished.
        outcomes = [s["outcome"] for s in saved(tmp_path)["sections"]]
        assert outcomes == ["done", "skipped"]


def test_a_section_run_alone_leaves_the_others_results(toy, tmp_path) -> None:
    assert toy().returncode == 0
    before = saved(tmp_path)["sections"]
    assert toy("count", "--quick").returncode == 0
    after = saved(tmp_path)["sections"]
    assert after[1:] == before[1:]
    assert (before[0]["quick"], after[0]["quick"]) == (False, True)
    # Figures of another device are not mixed in.
    assert toy("skip", "--device", "cuda").returncode == 0
    assert [s["title"] for s in saved(tmp_path)["sections"]] == ["Skip what is missing"]


def test_pause_waits_for_enter_at_a_terminal_only(toy, tmp_path) -> None:
    assert "Enter" not in toy("--pause").stdout
    keyboard, terminal = os.openpty()
    try:
        os.write(keyboard, b"\n\n")
        done = toy("--pause", stdin=terminal)
    finally:
        os.close(keyboard)
        os.close(terminal)
    assert done.returncode == 0
    assert done.stdout.count("Enter goes on") == 2


def test_a_read_only_place_for_results_does_not_spoil_the_lesson(toy, tmp_path) -> None:
    (tmp_path / "reports").write_text("a file where the folder should be")
    done = toy("skip")
    assert done.returncode == 0
    assert "The results were not saved" in done.stderr


def test_the_page_holds_everything_and_points_nowhere(toy, tmp_path) -> None:
    assert toy(env={"TROUBLE": "fail"}).returncode == 1
    done = python("-m", "course", "report")
    assert (done.returncode, done.stderr) == (0, "")
    html = (tmp_path / "reports" / "index.html").read_text()
    assert not re.search(r"https?://|@import|url\(", html)
    assert not re.search(r'(src|href)="(?!data:|#)', html)
    assert not re.search(r"<(script|link|iframe)", html)
    sources = re.findall(r'src="([^"]{0,30})', html)
    assert len(sources) == 1
    assert sources[0].startswith("data:image/png;base64,")
    for text in (
        "the engine counts to 10.",
        "Counted &lt;b&gt;",
        "0.333",
        "the engine counted on cpu.",
        "There is no Docker.",
        "sudo apt-get install docker.io",
        "Python 3.",
        "KeyError: &#x27;a bug in the demo&#x27;",
    ):
        assert text in html
    assert "<b>wide" not in html


def test_the_page_goes_where_it_is_told(toy, tmp_path) -> None:
    assert toy("skip").returncode == 0
    done = python("-m", "course", "report", "--out", str(tmp_path / "new" / "p.html"))
    assert done.returncode == 0
    assert (tmp_path / "new" / "p.html").read_text().endswith("</html>\n")


def test_without_results_the_page_says_what_to_run(tmp_path) -> None:
    done = python("-m", "course", "report", env={"REPORTS_DIR": str(tmp_path)})
    assert done.returncode == 1
    assert "Run a lesson first" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["{oops", "[]", '{"lesson": "x"}'])
def test_damaged_results_are_named(tmp_path, text) -> None:
    (tmp_path / "x.json").write_text(text)
    done = python("-m", "course", "report", env={"REPORTS_DIR": str(tmp_path)})
    assert done.returncode == 1
    assert str(tmp_path / "x.json") in done.stderr
    assert "run the lesson again" in done.stderr


def test_a_file_is_written_whole_or_not_at_all(tmp_path) -> None:
    path = tmp_path / "results.json"
    report.write(path, "old")
    with pytest.raises(UnicodeEncodeError):
        report.write(path, "new \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_demo_can_be_tried_by_itself(capsys) -> None:
    run = lesson.Run(quick=True)
    run.conclude("It works.")
    assert run.events == [{"kind": "concluded", "text": "It works."}]
    assert "It works." in capsys.readouterr().out
