"""The drill: what it says of good and bad days, and that it leaves nothing broken."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import monitoring_setup
from course import process
from course.draw import picture
from local_cloud.monitoring import drill, stack
from local_cloud.monitoring.drill import Fault, Outcome
from local_cloud.monitoring.faults import Faults
from local_cloud.monitoring.ground import Ground, Server, Traffic
from local_cloud.monitoring.promql import Query
from local_cloud.monitoring.receivers import Notification
from local_cloud.monitoring.samples import Samples, labelled
from local_cloud.monitoring.stack import StackError
from tests.benchmarks.bars import Bars
from tests.test_prometheus_stack import listening

SCALE = 180.0  # a third of a second is a minute
HISTORY_S = 6.0
SHARE = 0.15  # of requests that fail: not found at once, so an alert can be too early
BUSY_S = 12.0  # that a busy machine may be late; it is never early for that


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def state(pid: int) -> str:
    """R, S, or T for stopped, as the kernel has it."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def due_s(share: float, history_s: float) -> float:
    slo = monitoring_setup.SLOS[0]
    return monitoring_setup.detection_s(slo, share, SCALE, history_s)


@pytest.fixture(scope="module")
def outcomes() -> SimpleNamespace:
    """Errors, a blip and a stopped server: all real, by the portable watch."""
    jobs = {"errors": "api", "blip": "api", "stopped": "api-2"}
    groups = monitoring_setup.groups(SCALE)
    with Ground(groups, jobs, scale=SCALE, portable=True) as ground:
        time.sleep(HISTORY_S)
        faults = [
            drill.errors(ground, "errors", SHARE, partial(due_s, SHARE)),
            drill.blip(ground, "blip", 1, partial(due_s, 1.0)),
            drill.freeze(ground, "stopped", partial(due_s, 1.0)),
        ]
        told = drill.run(ground, faults, HISTORY_S)
        ratio = monitoring_setup.ratio_name(6 * 3600) + '{slo="availability"}'
        curves = drill.burn_curves(ground, told, ratio, 0.01)
        pids = [server.child.pid for server in ground.servers.values()]
        open_to = {pid: listening(pid) for pid in (os.getpid(), *pids)}
        left = [*map(state, pids)], [edge.faults for edge in ground.edges.values()]
    by_job = {one.fault.job: one for one in told}
    return SimpleNamespace(
        told=by_job, curves=curves, pids=pids, left=left, open_to=open_to
    )


@pytest.mark.parametrize("job", ["errors", "stopped", "blip"])
def test_what_was_predicted_comes_true(
    job: str, outcomes: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
):
    """Found, and not too early; told by both; resolved. Or silent."""
    monkeypatch.setattr(drill, "LATE_S", BUSY_S)
    one = outcomes.told[job]
    assert one.good, one
    told_by = set() if job == "blip" else {"webhook", "mail"}
    assert set(one.told_s) == told_by
    assert all(at > 0 for at in one.told_s.values())


def test_a_stopped_server_is_counted_once_the_edge_gives_up():
    """Before that nothing is, so that the past grows no longer meanwhile."""
    ground: Any = SimpleNamespace(
        servers={"api": Server(None, 1)},  # type: ignore[arg-type]
        edges={"stopped": SimpleNamespace(timeout_s=2.0)},
        jobs={"stopped": "api"},
    )
    stopped = drill.freeze(ground, "stopped", lambda history_s: history_s / 10)
    assert stopped.predict(30.0) == 2.0 + 3.0


def test_nobody_listens_outside_this_machine(outcomes: SimpleNamespace):
    """Edges and receivers in this process, and each API in its own."""
    assert all(outcomes.open_to.values())
    assert set().union(*outcomes.open_to.values()) == {"0100007F"}


def test_the_history_shows_the_burn_passing_its_limit(
    outcomes: SimpleNamespace, tmp_path: Path
):
    times, burns = outcomes.curves["errors, 15%"]
    before = [burn for at, burn in zip(times, burns, strict=True) if at < 0]
    assert max(before) < 6 < max(burns)
    told = list(outcomes.told.values())
    image = tmp_path / "burn.png"
    picture(image, lambda ax: drill.draw(ax, outcomes.curves, told, 6))
    assert image.stat().st_size > 10_000


def test_nothing_stays_broken_and_nothing_stays(outcomes: SimpleNamespace):
    found, faults = outcomes.left
    assert "T" not in found
    assert faults == [Faults()] * 3
    assert not any(map(alive, outcomes.pids))


# ## Bad days of the drill itself


class Watch:
    """Alerts as a test wants them: those of `fires(number of this look)`."""

    def __init__(self, fires: Callable[[int], bool]) -> None:
        self.fires, self.looks = fires, 0

    def alerts(self) -> list[dict[str, Any]]:
        self.looks += 1
        if not self.fires(self.looks):
            return []
        labels = {"alertname": "A", "job": "j", "severity": "page"}
        return [{"labels": labels, "state": "firing"}]


def ground_of(fires: Callable[[int], bool]) -> Any:
    return SimpleNamespace(watch=Watch(fires), notifications=[], scale=60)


def fault(done: list[str], **more: Any) -> Fault:
    begin, end = lambda: done.append("start"), lambda: done.append("stop")
    return Fault("f", "j", "A", lambda _: 0.2, begin, end, **more)


def test_it_says_how_long_each_step_took():
    """It fires from the third look to the seventh, and is heard of at the fifth."""
    done: list[str] = []

    def fires(look: int) -> bool:
        if look == 5:
            ground.notifications.append(heard(time.time()))
        return 3 <= look < 8

    ground = ground_of(fires)
    (one,) = drill.run(ground, [fault(done)], 1)
    assert 0 < one.measured_s < one.told_s["webhook"] < one.lasted_s + 0.01
    assert one.resolved_s is not None
    assert ground.watch.looks == 8
    assert done[:2] == ["start", "stop"]


def test_a_blip_that_wakes_somebody_is_no_success_nor_one_that_hit_nobody():
    struck = iter([0, 3])
    quiet = fault([], lasts_s=0.1, struck=lambda: next(struck))
    (one,) = drill.run(ground_of(lambda _: False), [quiet], 1)
    assert one.good
    assert one.struck == 3
    assert not replace(one, struck=0).good
    assert not replace(one, measured_s=0.5).good


def heard(at: float) -> Notification:
    """A page for the fault of these tests."""
    return Notification(at, "firing", "A", "page", "webhook", "j", "")


@pytest.mark.parametrize(
    ("measured_s", "good"),
    [(None, False), (6.9, False), (7.1, True), (13.9, True), (14.1, False)],
)
def test_the_bars_lie_3_s_before_and_4_s_after(measured_s: float | None, good: bool):
    barred = fault([], barred=True)
    one = Outcome(barred, 0.0, 1.0, 10.0, measured_s, {"mail": 11.0}, 2.0)
    assert one.good == good
    soon = replace(one, predicted_s=2.0)
    assert not replace(soon, measured_s=0.9).good  # what is due soon can be early, too
    assert replace(soon, measured_s=1.1).good
    assert not replace(one, told_s={}).good  # nobody heard of it
    assert not replace(one, resolved_s=None).good  # nor of its end


def test_a_missed_fault_is_ended_and_said_to_be_missed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(drill, "PATIENCE_S", 0.3)
    done: list[str] = []
    (one,) = drill.run(ground_of(lambda _: False), [fault(done)], 1)
    assert (one.measured_s, one.good, done[:2]) == (None, False, ["start", "stop"])
    assert "none" in drill.table([one], "t").rows[0]


def test_what_fires_already_is_not_taken_for_a_find(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(drill, "RESOLVE_S", 0.2)
    done: list[str] = []
    with pytest.raises(TimeoutError, match="before the drill"):
        drill.run(ground_of(lambda _: True), [fault(done)], 1)
    assert done == []


def test_a_fault_that_does_not_begin_is_ended_with_the_others():
    done: list[str] = []
    bad = replace(fault(done), start=lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        drill.run(ground_of(lambda _: False), [fault(done), bad], 1)
    assert done == ["start", "stop", "stop"]


def test_only_pages_of_a_job_count_as_false_ones():
    def one(status: str, severity: str, job: str) -> Notification:
        return Notification(0.0, status, "A", severity, "mail", job, "")

    heard = [one("firing", "ticket", "clean"), one("resolved", "page", "clean")]
    heard += [one("firing", "page", "other"), one("firing", "page", "clean")]
    assert drill.pages(heard, "clean") == ["A"]


@pytest.mark.parametrize("history_s", [20.0, 60.0, 200.0])
def test_a_leak_is_predicted_as_the_rule_sees_it(history_s: float):
    """Against `predict_linear` itself on the very ramp."""
    used, rate, limit = 3e8, 2e7, 2.4e9
    predicted = drill.leak_s(used, rate, limit, 60, 240, 0)(history_s)
    samples, step = Samples(1000), 0.5
    rule = Query(f"predict_linear(x[60s], 240) > {limit}")
    for number in range(2000):
        since = number * step - history_s
        samples.add(labelled("x", {}), since + 1000, used + rate * max(0.0, since))
        if number and rule.vector(samples, since + 1000):
            break
    assert predicted == pytest.approx(since, abs=2 * step)
    assert math.isinf(drill.leak_s(used, 0, limit, 60, 240, 0)(history_s))


def test_sigcont_is_sent_whatever_happens(server: SimpleNamespace):
    """The block is left by Ctrl-C with the server stopped."""
    with process.child(["sleep", "60"]) as running:
        stopped = Server(running, 1)
        frozen = fault([], barred=True)
        frozen = replace(frozen, start=stopped.freeze, stop=stopped.thaw)

        def interrupted(_: int) -> bool:
            if state(running.pid) == "T":
                raise KeyboardInterrupt
            return False

        with pytest.raises(KeyboardInterrupt):
            drill.run(ground_of(interrupted), [frozen], 1)
        process.wait_until(lambda: state(running.pid) != "T", 5, "it to go on")
    stopped.restore()  # of one that is gone: nothing


@pytest.mark.prometheus
def test_prometheus_killed_in_mid_drill_is_said_and_all_faults_end():
    if missing := stack.found():
        pytest.skip(missing)
    done: list[str] = []
    with stack.Stack([], {}) as watch:
        ground: Any = SimpleNamespace(watch=watch, notifications=[])
        killer = lambda: os.kill(watch.pids()[0], signal.SIGKILL)  # noqa: E731
        with pytest.raises(StackError, match="Prometheus"):
            drill.run(ground, [fault(done), replace(fault(done), start=killer)], 1)
    assert "stop" in done


def test_a_benchmark_beyond_its_bar_ends_with_1(capsys: pytest.CaptureFixture[str]):
    bars = Bars()
    bars.most("false pages", 0, 0)
    assert bars.code(0) == 0
    bars.most("a scrape", 5.1, 5.0, "ms")
    bars.most("of a request", math.nan, 0.1)
    assert bars.code(0) == 1
    assert bars.code(130) == 130
    assert "a scrape: expected at most 5, found 5.1 ms" in capsys.readouterr().err


def test_traffic_ends_with_its_block():
    seen: list[float] = []

    async def work() -> None:
        import asyncio

        while True:
            seen.append(time.monotonic())
            await asyncio.sleep(0.01)

    with Traffic(work):
        process.wait_until(lambda: len(seen) > 3, 5, "traffic")
    count = len(seen)
    time.sleep(0.1)
    assert len(seen) == count
