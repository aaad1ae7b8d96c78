"""Grades exercise 3: by days small enough to do by hand, and by both for real."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from threading import Barrier
from typing import Any

import pytest

from course import process
from local_cloud.functions import costs
from tests.graders.plugin import Call, Submission, points

EACH = {"cold_s": 2.0, "warm_s": 0.5, "cold_billed_s": 1.8, "warm_billed_s": 0.4}
COLD, WARM = EACH["cold_s"], EACH["warm_s"]


def calls_of(submission: Submission, *rows: tuple[float, float, int, bool]) -> Any:
    return [submission.call("Call", *row).value for row in rows]


# The first is warm, and one of the warm ones is slower than any cold one.
ROWS = (
    (70.0, 0.0, 65, False),
    (400.0, 300.0, 390, True),
    (60.0, 0.0, 55, False),
    (900.0, 0.0, 890, False),
    (420.0, 330.0, 410, True),
    (80.0, 0.0, 75, False),
    (440.0, 310.0, 430, True),
    (50.0, 0.0, 45, False),
)


# -- 1a


def told(submission: Submission, name: str, expected_s: float, because: str) -> None:
    found = submission.call("typical", calls_of(submission, *ROWS))
    value = getattr(found.value, name, None)
    Call(f"typical(<3 cold calls, 5 warm ones>).{name}", value).near(
        expected_s, because
    )


@points(2, hint="Each call says which kind it is.")
def check_typical_tells_cold_from_warm(submission: Submission) -> None:
    """Medians of what callers wait, of the cold calls and of the warm ones."""
    because = "its callers waited 400, 420 and 440 ms, init and answer together"
    told(submission, "cold_s", 0.42, because)
    told(submission, "warm_s", 0.07, "of 50, 60, 70, 80 and 900 ms that is the median")


@points(1, hint="The bill is in the report, and counts init.")
def check_typical_knows_what_is_billed(submission: Submission) -> None:
    """What is billed contains the init phase."""
    told(submission, "cold_billed_s", 0.41, "390, 410 and 430 ms were billed")
    told(submission, "warm_billed_s", 0.065, "45, 55, 65, 75 and 890 ms were billed")


@points(1, hint="What was never measured has no median.")
def check_typical_needs_both_kinds(submission: Submission) -> None:
    """Without a cold call, or without a warm one, there is nothing to tell."""
    for cold in (True, False):
        rows = [row for row in ROWS if row[3] == cold]
        kind = "warm" if cold else "cold"
        because = f"no {kind} call was measured, and a guess looks like a figure"
        calls = calls_of(submission, *rows)
        submission.refuses(ValueError, "typical", calls, because=because)


# -- 1b


def functioned(
    submission: Submission, times: Sequence[float], keep_alive_s: float
) -> Call:
    each = submission.call("Typical", **EACH).value
    found = submission.call("by_function", list(times), each, keep_alive_s)
    text = f"by_function({list(times)}, <cold 2 s, warm 0.5 s>, {keep_alive_s})"
    right = hasattr(found.value, "latencies_s")
    found.must(right, "a Replayed", "it tells what each call waited")
    return Call(text, found.value)


def waited(
    found: Call, expected: Sequence[float], because: str, cold: int | None = None
) -> None:
    got = [round(x, 3) for x in found.value.latencies_s]
    found.must(got == list(expected), f"latencies {list(expected)}", because, got=got)
    cold = list(expected).count(COLD) if cold is None else cold
    found.must(found.value.cold == cold, f"{cold} cold", because, got=found.value.cold)


@points(2, hint="Who comes while it works needs another one.")
def check_a_sandbox_does_one_call_at_a_time(submission: Submission) -> None:
    """Calls at once need a sandbox each."""
    found = functioned(submission, [0.0, 0.0, 1.0, 3.0, 3.1, 3.2], 100.0)
    because = "three came while all sandboxes worked; then there were three to wait"
    waited(found, [COLD, COLD, COLD, WARM, WARM, WARM], because)


@points(2, hint="Counted from when its last call was done.")
def check_a_sandbox_stays_for_a_while(submission: Submission) -> None:
    """An idle sandbox ends after keep_alive_s, counted from its last call's end."""
    found = functioned(submission, [0.0, 11.5, 21.5, 32.5], 10.0)
    because = "it is idle for 9.5, 9.5 and 10.5 s, and ends after 10"
    waited(found, [COLD, WARM, WARM, COLD], because)


@points(1, hint="Two wait: which one gets the call, and what becomes of the other?")
def check_the_one_used_last_is_used_next(submission: Submission) -> None:
    """The others grow old, so that a second one is gone when it is wanted again."""
    found = functioned(submission, [0.0, 0.5, 5.0, 8.0, 11.0, 14.0, 17.0, 17.0], 10.0)
    expected = [COLD, COLD, WARM, WARM, WARM, WARM, WARM, COLD]
    because = "one sandbox did all the single calls; the other was idle for 15 s"
    waited(found, expected, because)


@points(1, hint="Cold calls and warm ones have a bill each.")
def check_each_call_is_billed(submission: Submission) -> None:
    """What is billed is the sum of what each kind is billed."""
    found = functioned(submission, [0.0, 0.0, 5.0, 50.0], 10.0)
    because = "three cold calls are billed 1.8 s each, and a warm one 0.4 s"
    Call(f"{found.text}.billed_s", found.value.billed_s).near(5.8, because)


# -- on the real platform

KEEP_ALIVE_S = 2.0
PAUSE = 0.8  # times what the slowest call took: so a busy machine is waited for
START_S = 30.0  # within which two threads meet
TOKEN = {"prompt": "Name a colour.", "max_tokens": 1}


@dataclass(frozen=True)
class Measured:
    """Calls of the lesson's function on the platform, and when each was made."""

    times: list[float]
    calls: list[Any]  # as the submission's own Call

    @property
    def cold(self) -> int:
        return sum(call.cold for call in self.calls)


@pytest.fixture(scope="session")
def measured(submission: Submission) -> Measured:
    """One call, one more, two at once; and one when all sandboxes have ended."""
    from concurrent.futures import ThreadPoolExecutor

    from local_cloud.functions import Platform, cold_starts
    from models import packed
    from serverless_deployment import deployed

    submission.call("typical", calls_of(submission, *ROWS))  # or not started
    packed.ensure()
    function = deployed("compared", keep_alive_s=KEEP_ALIVE_S)
    log: list[tuple[float, Any]] = []
    with Platform() as cloud, ThreadPoolExecutor(2) as pool:
        cloud.deploy(function)
        begin, slowest_s = time.perf_counter(), 0.0

        def call(together: Barrier) -> None:
            together.wait(START_S)
            at = time.perf_counter() - begin
            log.append((at, cold_starts.call(cloud, function.name, TOKEN)))

        for at_once in (1, 1, 2):
            list(pool.map(call, [Barrier(at_once)] * at_once))
            slowest_s = max(each.total_ms for _, each in log) / 1000
            time.sleep(min(PAUSE * slowest_s, KEEP_ALIVE_S / 2))  # the callers' own
        gone = f"the sandboxes of {function.name} to end"
        process.wait_until(lambda: not cloud.sandboxes(function.name), 30.0, gone)
        time.sleep(slowest_s)  # gone, too, where each call takes what is typical
        call(Barrier(1))
    log.sort(key=lambda pair: pair[0])
    kept = ((c.total_ms, c.ready_ms, c.billed_ms, c.cold) for _, c in log)
    return Measured([at for at, _ in log], calls_of(submission, *kept))


@points(
    2,
    hint="It ran on your machine just now; replay it on paper.",
    needs="model",
    slow=True,
    limit_s=60,
)
def check_as_many_are_cold_on_the_platform(
    submission: Submission, measured: Measured
) -> None:
    """Of calls that were made for real, it predicts how many were cold."""
    each = submission.call("typical", measured.calls).value
    found = submission.call("by_function", measured.times, each, KEEP_ALIVE_S)
    at = ", ".join(f"{when:.2f}" for when in measured.times)
    because = f"the platform started so many for calls at {at} s"
    Call(f"{found.text}.cold", found.value.cold).equals(measured.cold, because)


@points(
    1,
    hint="What its caller waits is more than the init phase.",
    needs="model",
    slow=True,
    limit_s=60,
)
def check_typical_is_what_was_measured(
    submission: Submission, measured: Measured
) -> None:
    """A real cold start, told as its caller felt it."""
    found = submission.call("typical", measured.calls)
    waits = [call.total_ms for call in measured.calls if call.cold]
    because = "so long callers waited for a cold start, in the median, on this machine"
    value = found.value.cold_s
    Call("typical(<measured calls>).cold_s", value).near(
        statistics.median(waits) / 1000, because
    )


# -- 2a


def contained(submission: Submission, times: Sequence[float], *how: Any) -> Call:
    found = submission.call("by_container", list(times), *how)
    right = hasattr(found.value, "latencies_s")
    found.must(right, "a Replayed", "it tells what each call waited")
    return found


@points(2, hint="A slot is free when its last call is done.")
def check_a_container_lets_wait(submission: Submission) -> None:
    """Who finds no slot free waits for the next one."""
    found = contained(submission, [10.0, 10.0, 10.0, 10.5, 20.0], 2.0, 2, 0.0)
    because = "two slots take 2 s each: the third call begins at 12, the fourth, too"
    waited(found, [2.0, 2.0, 4.0, 3.5, 2.0], because, cold=0)


@points(1, hint="Until start_s there is no slot at all.")
def check_a_container_starts_once(submission: Submission) -> None:
    """Who comes before it is ready waits for that; nobody does later."""
    found = contained(submission, [0.0, 2.0, 3.5, 80_000.0], 0.5, 4, 3.0)
    because = "it serves from second 3 on, and does not end when nobody comes"
    waited(found, [3.5, 1.5, 0.5, 0.5], because, cold=0)


# -- 2b


def replayed(submission: Submission, latencies: Sequence[float], **more: Any) -> Any:
    return submission.call("Replayed", tuple(latencies), **more).value


SIZES = {"function_mb": 2048.0, "vcpus": 2.0, "memory_gb": 4.0}
DAYS = costs.MONTH_S / 86_400
BOX_USD = costs.container_cost(costs.MONTH_S, 2.0, 4.0)


def function_usd(calls: int, billed_s: float) -> float:
    """Dollars a month for days of so many calls."""
    return costs.lambda_cost(DAYS * calls, DAYS * billed_s, 2048.0)


def compared(
    submission: Submission,
    function_s: Sequence[float],
    container_s: Sequence[float],
    billed_s: float = 1_000.0,
    slo_s: float = 1.0,
) -> Call:
    sides = (
        replayed(submission, function_s, cold=1, billed_s=billed_s),
        replayed(submission, container_s),
    )
    sizes = submission.call("Sizes", **SIZES).value
    return submission.call("compare", *sides, sizes, slo_s)


def part(found: Call, name: str, key: str = "") -> Call:
    value: Any = getattr(found.value, name, None)
    if key:
        right = isinstance(value, dict) and key in value
        found.must(right, f"{name} of the {key}", "both are compared", got=value)
        value = value[key]
    return Call(f"compare(...).{name}{f'[{key!r}]' if key else ''}", value)


@points(1, hint="Round the rank up; no mean, nothing in between.")
def check_compare_tells_percentiles(submission: Submission) -> None:
    """p50 and p99 are latencies that somebody had."""
    function = [0.1] * 98 + [2.0, 3.0]
    container = [0.3, 0.2, 0.4, 0.1]
    found = compared(submission, function, container)
    because = "98 of 100 waited 0.1 s, one 2 s, one 3 s"
    part(found, "p50_s", "function").near(0.1, because)
    part(found, "p99_s", "function").near(2.0, because)
    because = "it answered in 0.1, 0.2, 0.3 and 0.4 s"
    part(found, "p50_s", "container").near(0.2, because)
    part(found, "p99_s", "container").near(0.4, because)


@points(2, hint="A container is paid when nobody comes; a function when one does.")
def check_compare_tells_a_month(submission: Submission) -> None:
    """Dollars for a month of such days."""
    for calls, billed_s in ((200, 90.0), (4_000, 40_000.0)):
        found = compared(submission, [0.1] * calls, [0.2] * calls, billed_s)
        because = f"{calls} calls and {billed_s:g} s a day, for {DAYS:.2f} days"
        usd = function_usd(calls, billed_s)
        part(found, "usd_per_month", "function").near(usd, because, within=0.001)
        because = "2 vCPU and 4 GB are paid for the whole month"
        part(found, "usd_per_month", "container").near(BOX_USD, because, within=0.001)


@points(1, hint="What does one call cost, on average?")
def check_compare_tells_the_break_even(submission: Submission) -> None:
    """The calls a month that would cost as much as the container."""
    for calls, billed_s in ((200, 90.0), (4_000, 40_000.0)):
        found = compared(submission, [0.1] * calls, [0.2] * calls, billed_s)
        a_call = function_usd(calls, billed_s) / (DAYS * calls)
        because = f"a call costs {a_call:.3g} dollars, the container {BOX_USD:.2f}"
        part(found, "break_even").near(BOX_USD / a_call, because, within=0.001)


CHEAP_S, DEAR_S = 90.0, 90_000.0  # billed a day: the function costs less, or more
CASES = (
    # function's latency, container's, billed, choice, reasons
    (0.5, 0.4, CHEAP_S, "function", {"the function costs less"}),
    (0.5, 0.4, DEAR_S, "container", {"the container costs less"}),
    (
        1.5,
        0.4,
        CHEAP_S,
        "container",
        {"the function is too slow", "the function costs less"},
    ),
    (
        0.5,
        1.4,
        DEAR_S,
        "function",
        {"the container is too slow", "the container costs less"},
    ),
    (
        1.5,
        1.4,
        DEAR_S,
        None,
        {
            "the function is too slow",
            "the container is too slow",
            "the container costs less",
        },
    ),
)


def cases(submission: Submission) -> Iterator[tuple[Call, str, Any, Any]]:
    for function_s, container_s, billed_s, choice, reasons in CASES:
        found = compared(submission, [function_s] * 9, [container_s] * 9, billed_s)
        because = (
            f"p99 is {function_s} and {container_s} s where 1 s is promised, and a "
            f"month costs {function_usd(9, billed_s):.2f} and {BOX_USD:.2f} dollars"
        )
        yield found, because, choice, reasons


@points(2, hint="First who is fast enough, then who is cheaper.")
def check_compare_chooses(submission: Submission) -> None:
    """The cheaper one of those that are fast enough; or none."""
    for found, because, choice, _ in cases(submission):
        part(found, "choice").equals(choice, because)


@points(1, hint="A reason holds or does not, whatever was chosen.")
def check_compare_gives_reasons(submission: Submission) -> None:
    """The reasons are those that hold, also against the choice."""
    for found, because, _, reasons in cases(submission):
        got = part(found, "reasons")
        expected = f"{sorted(reasons)}"
        right = set(got.value or ()) == reasons
        got.must(right, expected, because, got=f"{sorted(got.value or ())}")


# -- both for real

IMAGE = "model-api:runtime"
# A deployment at second 0, twenty callers in its first second, then one every 400 s.
TIMES = [i / 20 for i in range(20)] + [400.0 * i for i in range(1, 216)]


@pytest.fixture(scope="session")
def container(measured: Measured) -> tuple[float, float]:
    """Seconds until a container of the model is ready, and those of an answer."""
    from local_cloud.containers import engine, trials

    with engine.connect() as docker:
        if not docker.has(IMAGE):
            docker.build(IMAGE, target="runtime")
        env = {"ALLOW_ANONYMOUS": "1"}
        with docker.container(IMAGE, port=trials.PORT, environment=env) as box:
            start_s = box.wait_ready(trials.READY, trials.START_S)
            took = []
            for _ in range(4):
                begin = time.perf_counter()
                trials.ask(box.url, "none", tokens=1)
                took.append(time.perf_counter() - begin)
    return start_s, statistics.median(took)


@points(
    2,
    hint="Print what compare gives for these figures.",
    needs="docker",
    slow=True,
    limit_s=560,
)
def check_real_figures_lead_to_their_conclusion(
    submission: Submission, measured: Measured, container: tuple[float, float]
) -> None:
    """A function and a container, started and measured now: who keeps the promise."""
    start_s, service_s = container
    each = submission.call("typical", measured.calls).value
    function = submission.call("by_function", TIMES, each, 300.0).value
    box = submission.call("by_container", TIMES, service_s, 1, start_s).value
    # Of 235 calls twenty come while it starts; all but a few find no sandbox.
    cold_s = statistics.median(c.total_ms for c in measured.calls if c.cold) / 1000
    free_s, waits_s = start_s, []
    for at in TIMES:
        free_s = max(free_s, at) + service_s
        waits_s.append(free_s - at)
    box_p99 = sorted(waits_s)[-3]  # two of 235 may wait longer
    slo_s = (cold_s + box_p99) / 2
    sizes = submission.call("Sizes").value
    found = submission.call("compare", function, box, sizes, slo_s)
    figures = (
        f"a cold start took {cold_s:.3f} s, the container {start_s:.3f} s to start, "
        f"once, and {service_s:.3f} s for each answer"
    )
    part(found, "p99_s", "function").near(cold_s, figures)
    part(found, "p99_s", "container").near(box_p99, figures)
    fast = "function" if cold_s < box_p99 else "container"
    part(found, "choice").equals(fast, f"{figures}; {slo_s:.3f} s were promised")
