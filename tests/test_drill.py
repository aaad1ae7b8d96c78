"""The drill: what it says of good and bad days, and that it leaves nothing broken."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Timer
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

SCALE = 240.0  # a quarter of a second is a minute
HISTORY_S = 4.0


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def state(pid: int) -> str:
    """R, S, or T for stopped, as the kernel has it."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def due_s(history_s: float) -> float:
    return monitoring_setup.detection_s(monitoring_setup.SLOS[0], 1.0, SCALE, history_s)


@pytest.fixture(scope="module")
def outcomes() -> SimpleNamespace:
    """Errors, a blip, then a stopped server: all real, by the portable watch."""
    jobs = dict.fromkeys(("errors", "blip", "stopped"), "api")
    groups = monitoring_setup.groups(SCALE)
    with Ground(groups, jobs, scale=SCALE, portable=True) as ground:
        time.sleep(HISTORY_S)
        faults = [
            drill.errors(ground, "errors", 1.0, due_s),
            drill.blip(ground, "blip", 1, due_s),
        ]
        told = drill.run(ground, faults, HISTORY_S)
        ratio = monitoring_setup.ratio_name(6 * 3600) + '{slo="availability"}'
        curves = drill.burn_curves(ground, told, ratio, 0.01)
        told += drill.run(ground, [drill.freeze(ground, "stopped", due_s)], HISTORY_S)
        (api,) = ground.servers.values()
        left = state(api.child.pid), [edge.faults for edge in ground.edges.values()]
    by_job = {one.fault.job: one for one in told}
    return SimpleNamespace(told=by_job, curves=curves, pid=api.child.pid, left=left)


def test_a_fault_is_found_told_twice_and_resolved(outcomes: SimpleNamespace):
    for job in ("errors", "stopped"):
        one = outcomes.told[job]
        assert one.measured_s is not None
        assert one.resolved_s is not None
        assert set(one.told_s) == {"webhook", "mail"}
        assert min(one.told_s.values()) > 0
    assert outcomes.told["stopped"].predicted_s > outcomes.told["errors"].predicted_s


def test_the_history_shows_the_burn_passing_its_limit(
    outcomes: SimpleNamespace, tmp_path: Path
):
    times, burns = outcomes.curves["errors, 100%"]
    before = [burn for at, burn in zip(times, burns, strict=True) if at < 0]
    assert max(before) < 6 < max(burns)
    told = list(outcomes.told.values())
    image = tmp_path / "burn.png"
    picture(image, lambda ax: drill.draw(ax, outcomes.curves, told, 6))
    assert image.stat().st_size > 10_000


def test_nothing_stays_broken_and_nothing_stays(outcomes: SimpleNamespace):
    found, faults = outcomes.left
    assert found != "T"
    assert faults == [Faults()] * 3
    assert not alive(outcomes.pid)


# ## Bad days of the drill itself


class Watch:
    """Alerts as a test wants them: those of `fires(seconds since the start)`."""

    def __init__(self, fires: Callable[[float], bool]) -> None:
        self.fires, self.start = fires, time.monotonic()

    def alerts(self) -> list[dict[str, Any]]:
        if not self.fires(time.monotonic() - self.start):
            return []
        labels = {"alertname": "A", "job": "j", "severity": "page"}
        return [{"labels": labels, "state": "firing"}]


def ground_of(fires: Callable[[float], bool]) -> Any:
    return SimpleNamespace(watch=Watch(fires), notifications=[], scale=60)


def fault(done: list[str], **more: Any) -> Fault:
    begin, end = lambda: done.append("start"), lambda: done.append("stop")
    return Fault("f", "j", "A", lambda _: 0.2, begin, end, **more)


def test_it_says_how_long_each_step_took():
    done: list[str] = []
    ground = ground_of(lambda s: 0.4 < s < 1.6)
    hearing = Timer(0.8, lambda: ground.notifications.append(heard(time.time())))
    hearing.start()
    (one,) = drill.run(ground, [fault(done)], 1)
    hearing.join()
    assert 0.2 < one.measured_s < one.told_s["webhook"] < one.lasted_s + 0.01
    assert one.resolved_s is not None
    assert done[:2] == ["start", "stop"]


def test_a_blip_that_wakes_somebody_is_no_success_nor_one_that_hit_nobody():
    struck = iter([0, 3])
    quiet = fault([], lasts_s=0.1, struck=lambda: next(struck))
    (one,) = drill.run(ground_of(lambda s: False), [quiet], 1)
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
    assert not replace(one, told_s={}).good  # nobody heard of it
    assert not replace(one, resolved_s=None).good  # nor of its end


def test_a_missed_fault_is_ended_and_said_to_be_missed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(drill, "PATIENCE_S", 0.3)
    done: list[str] = []
    (one,) = drill.run(ground_of(lambda s: False), [fault(done)], 1)
    assert (one.measured_s, one.good, done[:2]) == (None, False, ["start", "stop"])
    assert "none" in drill.table([one], "t").rows[0]


def test_what_fires_already_is_not_taken_for_a_find(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(drill, "RESOLVE_S", 0.2)
    done: list[str] = []
    with pytest.raises(TimeoutError, match="before the drill"):
        drill.run(ground_of(lambda s: True), [fault(done)], 1)
    assert done == []


def test_a_fault_that_does_not_begin_is_ended_with_the_others():
    done: list[str] = []
    bad = replace(fault(done), start=lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        drill.run(ground_of(lambda s: False), [fault(done), bad], 1)
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

        def interrupted(_: float) -> bool:
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
