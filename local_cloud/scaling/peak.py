"""A peak that is more than the server can do: straight to it, or through `/v1/jobs`.

`direct` sends it to a stand-in behind a balancer that keeps nobody waiting for long.
`queued` sends it to the jobs' API, whose workers, processes too, ask the same server;
one of them is killed at a job, and one job is poisoned. The queue is a real one.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from course import load
from course.load import Outcome
from course.measure import Series
from course.process import Child, child, free_port, wait_until
from course.show import Cell, Table
from local_cloud.scaling import standin
from local_cloud.scaling.balancer import wait_up
from local_cloud.scaling.jobs import Jobs, SQLiteJobs
from local_cloud.scaling.policies import Picker
from local_cloud.scaling.trials import PATH, one_queue, send_all

if TYPE_CHECKING:
    from course.lesson import Run
    from local_cloud.scaling.redis_jobs import RedisJobs

START_S = 60.0  # a worker may take, where many processes start at once


@dataclass(frozen=True)
class Peak:
    """More than the server can do, for a moment."""

    rate_per_s: float = 250.0
    seconds: float = 1.0
    service_ms: float = 20.0
    slots: int = 2  # so that 2 / 20 ms = 100 a second can be served
    patience_s: float = 0.25  # in front of the server; then 503
    lease_s: float = 1.0  # extended three times in it, also on a busy machine

    @property
    def due(self) -> list[float]:
        return load.constant_arrivals(self.rate_per_s, self.seconds)

    @property
    def body(self) -> dict[str, float]:
        return {"service_ms": self.service_ms}


@contextmanager
def server(peak: Peak) -> Iterator[str]:
    """One stand-in with the peak's slots; gives its URL."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    argv = standin.command(port, "--slots", str(peak.slots))
    with child(argv, ready=f"{url}/health/ready"):
        yield url


def direct(url: str, picker: Picker, peak: Peak) -> list[Outcome]:
    """The peak to the server, through a balancer that keeps nobody waiting for long."""
    with one_queue(picker, peak.slots, peak.patience_s) as balancer:
        host, _, port = url.removeprefix("http://").partition(":")
        balancer.add("server", host, int(port))
        wait_up(balancer, ["server"])
        bodies = [peak.body] * len(peak.due)
        return asyncio.run(send_all(balancer.url + PATH, bodies, peak.due))


@dataclass(frozen=True)
class Shown:
    """What became of a peak that went to a server, and to each queue by its name."""

    sent: int
    served: int  # by the server alone
    queues: dict[str, Queued]


def show(run: Run, picker: Picker, peak: Peak) -> Shown:
    """The peak straight to a server, and through each queue that can be had here."""
    from local_cloud.scaling import redis_jobs

    can = 1000 * peak.slots / peak.service_ms
    run.predict(
        f"{peak.rate_per_s:g} requests a second meet a server for {can:g}: most are "
        f"refused, or all done after {peak.rate_per_s * peak.seconds / can:.1f} s."
    )
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url = stack.enter_context(server(peak))
        places = {"SQLite": str(folder / "jobs")}
        if shutil.which("redis-server"):
            places["Redis"] = stack.enter_context(redis_jobs.redis_server(folder))
        else:
            run.skip("Redis: no redis-server in PATH", redis_jobs.INSTALL)
        with run.progress("peak", 1 + len(places)) as advance:
            outcomes, queues = direct(url, picker, peak), {}
            advance()
            for name, place in places.items():
                queues[name] = queued(place, url, peak)
                advance()
    served = sum(outcome.ok for outcome in outcomes)
    run.table(table(len(outcomes), served, queues, peak))
    return Shown(len(outcomes), served, queues)


@dataclass(frozen=True)
class Queued:
    """What became of a peak that was accepted first and worked off then."""

    accepted: int
    refused: int
    answered: Series  # seconds from when a request was due to its 202
    done: int
    seconds: float  # from the first submit to the last job's end
    redelivered_s: float  # from the kill to the job being leased again
    killed_state: str  # of the job whose worker was killed, at the end
    killed_tries: int
    poison_state: str
    poison_tries: int

    @property
    def lost(self) -> int:
        """Accepted and not done."""
        return self.accepted - self.done


def opened(place: str) -> SQLiteJobs | RedisJobs:
    """The queue in a file, or in the Redis of a URL."""
    if not place.startswith("redis://"):
        return SQLiteJobs(place)
    from local_cloud.scaling.redis_jobs import RedisJobs

    return RedisJobs(place)


def command(*arguments: object) -> list[str]:
    """This file as a program: see `main`."""
    return [sys.executable, "-m", "local_cloud.scaling.peak", *map(str, arguments)]


@dataclass
class Workers:
    """Processes that lease jobs and hand them to the server."""

    place: str
    url: str
    lease_s: float
    stack: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def start(self) -> Child:
        argv = command("work", self.place, self.url, self.lease_s)
        return self.stack.enter_context(child(argv))


def queued(place: str, url: str, peak: Peak, *, deadline_s: float = 60.0) -> Queued:
    """The peak to `/v1/jobs`, after a worker was killed at a job and beside a poison.

    Args:
        place: a new file for SQLite, or a Redis URL.
        url: of the server that does the work.
    """
    api = f"http://127.0.0.1:{(port := free_port())}"
    serve = child(command("serve", place, port), ready=f"{api}/openapi.json")
    with serve, Workers(place, url, peak.lease_s) as workers:
        jobs: Any = opened(place)
        try:
            killed, again_s = killed_at_work(jobs, workers, peak)
            poison = jobs.submit("not a request")
            began = time.monotonic()
            outcomes = asyncio.run(submit_all(f"{api}/v1/jobs", peak))
            wait_until(partial(settled, jobs), deadline_s, "all jobs to end")
            seconds = time.monotonic() - began
            accepted = [outcome for outcome in outcomes if outcome.status == 202]
            states = [jobs.get(outcome.text).state for outcome in accepted]
            ends = jobs.get(killed), jobs.get(poison)
        finally:
            jobs.close()
    return Queued(
        accepted=len(accepted),
        refused=sum(outcome.refused for outcome in outcomes),
        answered=Series(tuple(outcome.total_s for outcome in accepted)),
        done=states.count("done"),
        seconds=seconds,
        redelivered_s=again_s,
        killed_state=ends[0].state,
        killed_tries=ends[0].tries,
        poison_state=ends[1].state,
        poison_tries=ends[1].tries,
    )


def killed_at_work(jobs: Jobs, workers: Workers, peak: Peak) -> tuple[str, float]:
    """Kill a worker that holds a job; the job's id and seconds until another has it.

    Whoever holds a job asks the server when the file it names is gone. So the victim is
    at work when it is killed, and the others have started and are free.
    """
    with tempfile.TemporaryDirectory() as folder:
        held, probed = Path(folder) / "held", Path(folder) / "probed"
        held.touch()
        probed.touch()
        id = jobs.submit({**peak.body, "hold": str(held)})
        victim = workers.start()
        wait_until(partial(tried, jobs, id), START_S, "a worker to begin")
        probe = {**peak.body, "hold": str(probed)}
        probes = [jobs.submit(probe) for _ in range(peak.slots)]
        for _ in probes:
            workers.start()
        for one in probes:  # a worker does one at a time: all at work are all there
            wait_until(partial(tried, jobs, one), START_S, "all workers to begin")
        probed.unlink()
        for one in probes:
            wait_until(partial(is_done, jobs, one), START_S, "all workers to be free")
        os.kill(victim.pid, signal.SIGKILL)
        began = time.monotonic()
        held.unlink()
        again = partial(tried, jobs, id, 2)
        wait_until(again, START_S, "another worker to begin", every_s=0.01)
        return id, time.monotonic() - began


def tried(jobs: Jobs, id: str, times: int = 1) -> bool:
    found = jobs.get(id)
    return found is not None and found.tries >= times


def is_done(jobs: Jobs, id: str) -> bool:
    found = jobs.get(id)
    return found is not None and found.state == "done"


def settled(jobs: Jobs) -> bool:
    counts = jobs.counts()
    return not counts["waiting"] and not counts["leased"]


async def submit_all(url: str, peak: Peak) -> list[Outcome]:
    """The peak as jobs; the text of an accepted one is its id, out of its Location."""
    async with load.client() as http:

        async def submit(number: int) -> Outcome:
            began = time.perf_counter()
            answer = await http.post(url, json={"payload": peak.body})
            id = answer.headers.get("location", "").rpartition("/")[2]
            took_s = time.perf_counter() - began
            return Outcome(status=answer.status_code, text=id, total_s=took_s)

        return await load.run_open_loop(submit, peak.due)


def asker(url: str) -> Callable[[Any], Any]:
    """Does a job by asking the server; what is no request raises.

    A file named as "hold" holds the job back as long as it is there.
    """
    import httpx

    http = httpx.Client(trust_env=False, timeout=60)

    def ask(payload: Any) -> Any:
        body = {"service_ms": payload["service_ms"]}
        while os.path.exists(payload.get("hold", "")):
            time.sleep(0.01)
        return http.post(url + PATH, json=body).raise_for_status().json()

    return ask


def table(sent: int, served: int, found: Mapping[str, Queued], peak: Peak) -> Table:
    """What became of the peak, by where it went."""
    rows: list[list[Cell]] = [["straight to the server", served, sent - served]]
    rows[0] += [None, None, None, None]
    for name, one in found.items():
        times = [1000 * one.answered.median, one.seconds, one.redelivered_s]
        row = [f"/v1/jobs, {name}", one.done, one.refused + one.lost, *times]
        rows.append([*row, f"{one.poison_state}, {one.poison_tries} tries"])
    columns = ["a peak", "done", "refused or lost", ("202 after", "ms")]
    columns += [("all done", "s"), ("killed job again", "s"), "poisoned job"]
    note = f"n = {sent}; the server {standin.NOTICE}; its balancer refuses after "
    return Table("A peak", columns, rows, f"{note}{peak.patience_s:g} s of waiting")


def main(argv: list[str] | None = None) -> int:
    """A process of a peak: `serve PLACE PORT`, or `work PLACE URL LEASE_S`."""
    role, place, *rest = sys.argv[1:] if argv is None else argv
    jobs = opened(place)
    if role == "serve":
        import uvicorn

        from local_cloud.scaling.jobs_api import create_app

        app = create_app(jobs)
        uvicorn.run(app, port=int(rest[0]), log_level="warning", access_log=False)
    else:
        import threading

        from local_cloud.scaling.worker import work

        ask, lease_s = asker(rest[0]), float(rest[1])
        work(jobs, ask, threading.Event(), lease_s=lease_s, retry_s=0.05)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
