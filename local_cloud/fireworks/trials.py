"""What the lesson's demonstrations measure on the stand-in."""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import fireworks
import httpx

import models
from course.show import Cell, Table
from local_cloud.fireworks.calls import PROBLEMS, Call, CallFailed
from local_cloud.fireworks.clock import Clock
from local_cloud.fireworks.faults import Fault
from local_cloud.fireworks.hybrid import (
    Decide,
    Decision,
    Refused,
    Replayed,
    Router,
    Sides,
)
from local_cloud.functions.costs import FARGATE_X86, HOUR_S, container_cost
from models import Sampling
from models.errors import ModelError

if TYPE_CHECKING:
    from local_cloud.fireworks.app import Served

BAD_DAYS = {
    "kept back": Fault("slow", seconds=2.0, times=3),
    "cut": Fault("cut"),
    "an error in it": Fault("error_event"),
    "stalled": Fault("stall", seconds=5.0),
    "rate limit, twice": Fault("rate_limit", seconds=2, times=2),
    "cold, three times": Fault("cold", times=3),
    "cold without end": Fault("cold", times=None),
}


@contextmanager
def cloud(device: str) -> Iterator[Served]:
    """The stand-in with the shared model; its clock stands still unless moved."""
    from local_cloud.fireworks.app import serve  # the engine and a web server: 0.2 s

    with models.load(device) as model, serve(model, clock=Clock.manual()) as served:
        yield served


def account(client: Any) -> Table:
    """What is in an account, and what a key of somebody else's finds."""
    rows: list[list[Cell]] = [
        ["account", client.accounts.get().name],
        ["models of everyone", len(list(client.models.list(account_id="fireworks")))],
        ["deployments", len(list(client.deployments.list()))],
        ["address", str(client.base_url)],
    ]
    try:
        client.with_options(api_key="fw_of-somebody-else").models.list()
        rows.append(["a strange key", "let in"])
    except fireworks.AuthenticationError as refusal:
        rows.append(["a strange key", f"{refusal.status_code}"])
    return Table("The account (emulated)", ["what", "found"], rows)


def function_table(names: Sequence[str], calls: Sequence[Call]) -> Table:
    """What each call of a deployed function waited for, read and wrote."""
    columns = ["call", ("refused", "times"), ("waited", "s, virtual")]
    columns += [("first token", "ms"), ("prompt", "tokens"), ("cached", "tokens")]
    columns += [("answer", "tokens"), "ended by"]
    rows = [[name, *cells(call)] for name, call in zip(names, calls, strict=True)]
    return Table("A function, deployed (GPU and boot times emulated)", columns, rows)


def bad_days(
    cloud: Served, client: Any, ask: Callable[..., Any], model: str, text: str
) -> Table:
    """Each fault for the SDK as it comes, and for `ask`, a careful client's."""
    plain = client.with_options(max_retries=2, timeout=1)
    messages = [{"role": "user", "content": text}]
    asked = {"model": model, "messages": messages, "max_tokens": 16}

    def sdk() -> str | None:
        reason = None
        for chunk in plain.chat.completions.create(**asked, stream=True):
            reason = chunk.choices[0].finish_reason if chunk.choices else reason
        return reason

    def careful() -> str | None:
        return ask(**asked).call.finish_reason

    rows = [
        [day, *_one(cloud, fault, sdk), *_one(cloud, fault, careful)]
        for day, fault in BAD_DAYS.items()
    ]
    columns = ["bad day", "the SDK as it comes", ("generated", "times")]
    columns += ["careful", ("generated", "times")]
    note = "generated: as the server counts; each time is billed"
    return Table("Bad days", columns, rows, note)


def _one(cloud: Served, fault: Fault, way: Callable[[], str | None]) -> list[Cell]:
    before = cloud.state.generations
    cloud.state.faults.order(fault)
    try:
        told = f"an answer, ended by {way()}"
    except PROBLEMS as problem:
        told = type(problem).__name__
    except (AttributeError, TypeError) as surprise:  # a chunk that is no chunk
        told = f"a crash: {type(surprise).__name__}"
    finally:
        cloud.state.faults.clear()
    return [told, cloud.state.generations - before]


def cells(call: Call) -> list[Cell]:
    """A call as a row: refusals, waited s, first token ms, tokens, finish_reason."""
    tokens = [call.prompt_tokens, call.cached_tokens, call.completion_tokens]
    return [call.refusals, call.waited_s, ms(call), *tokens, call.finish_reason]


def ms(call: Call) -> float | None:
    """Milliseconds to the first token."""
    return None if call.first_token_s is None else 1000 * call.first_token_s


def last_minute(client: Any, name: str, log: Sequence[Call]) -> Table:
    """What the account's metrics say of a deployment, beside the log of its calls."""
    from prometheus_client.parser import text_string_to_metric_families

    # The SDK has no resource for them. At most 6 reads a minute.
    path = f"/v1/accounts/{client.account_id}/metrics"
    text = client.get(path, cast_to=httpx.Response).text
    told: dict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.labels["deployment"] == name:
                told[family.name.partition(":")[0]] += sample.value
    ours = {
        "request_counter_total": [1 + call.refusals for call in log],
        "requests_error_total": [call.refusals for call in log],
        "tokens_prompt_total": [call.prompt_tokens or 0 for call in log],
        "tokens_cached_prompt_total": [call.cached_tokens or 0 for call in log],
    }
    rows = [[key, told[key], sum(some) / 60] for key, some in ours.items()]
    columns = ["metric", ("service", "a second"), ("own log", "a second")]
    note = 'named "total", yet a rate of the last minute: rate() of it is wrong'
    return Table("A minute of the deployment", columns, rows, note)


# Two sides: the local model and the cloud.


def local(
    cloud: Served, messages: Callable[[str], list[Any]], options: Mapping[str, Any]
) -> Callable[[str], Any]:
    """The same function on the local model: same prompt, same form, no network."""
    from local_cloud.fireworks import schema

    model, form = cloud.state.engine, schema.response_format(options["response_format"])
    assert model is not None
    sampling = Sampling(max_tokens=options["max_tokens"], grammar=form)

    def ask(text: str) -> Any:
        told = model.generate(messages(text), sampling)
        if told.finish_reason == "length":
            raise ModelError(f"Expected a whole answer, found {told.text!r}; ask again")
        return json.loads(told.text)

    return ask


def tickets(number: int) -> list[str]:
    """So many tickets, no two the same."""
    return [f"Order A-{1000 + i} is late, where is it?" for i in range(number)]


# The day that is replayed. The local model is measured; what is emulated says so.
SLOTS = 8  # answers the local model makes at once
LOCAL_HOUR = container_cost(HOUR_S, vcpus=2, memory_gb=4, price=FARGATE_X86)
CLOUD_S = 0.8  # a whole answer of the cloud: emulated, your log has yours
LOCAL_DOWN = (10 * HOUR_S, 10.25 * HOUR_S)  # a quarter of an hour for an update
CLOUD_DOWN = (15 * HOUR_S, 15.5 * HOUR_S)  # half an hour of somebody else's trouble


def sides(ask: Callable[[str], Any], call_usd: float, *, rounds: int) -> Sides:
    """Both sides on that day; `ask`, the local one, is timed with all slots busy."""
    ask(tickets(1)[0])  # warms up
    service_s = [s for _ in range(rounds) for s in at_once(ask, tickets(SLOTS))]
    return Sides(
        SLOTS, service_s, LOCAL_HOUR, CLOUD_S, call_usd, LOCAL_DOWN, CLOUD_DOWN
    )


def at_once(ask: Callable[[str], Any], texts: Sequence[str]) -> list[float]:
    """Seconds that each of these calls takes, all begun at the same moment."""
    together = threading.Barrier(len(texts))

    def one(text: str) -> float:
        together.wait(30)
        start = time.perf_counter()
        with suppress(Refused):  # its log line says so
            ask(text)
        return time.perf_counter() - start

    with ThreadPoolExecutor(len(texts)) as pool:
        return list(pool.map(one, texts))


def burst(
    cloud: Served,
    near: Callable[[str], Any],
    far: Callable[[str], Any],
    decide: Decide,
    sides: Sides,
) -> list[Decision]:
    """Three calls for each local slot, all at once; the cloud's first breaks off."""
    log: list[Decision] = []
    router = Router(
        near,
        far,
        decide,
        slots=sides.slots,
        service_s=sides.typical_s,
        call_usd=sides.call_usd,
        failures=(CallFailed, fireworks.APIError, ModelError),
        log=log.append,
    )
    cloud.state.faults.order(Fault("cut"))
    at_once(router, tickets(3 * sides.slots))
    cloud.state.faults.clear()
    return log


def decisions(log: Sequence[Decision]) -> Table:
    """A log of decisions, counted."""
    took: dict[tuple[str, ...], list[float]] = {}
    for one in log:
        took.setdefault((one.where, one.why, one.outcome), []).append(one.took_s)
    rows = [[*key, len(some), statistics.median(some)] for key, some in took.items()]
    columns = ["where", "why", "outcome", ("calls", ""), ("took, median", "s")]
    note = "the cloud is the stand-in: it has this machine's speed"
    return Table("Calls sent at once through the router", columns, rows, note)


def day_table(days: Mapping[str, Replayed], sides: Sides) -> Table:
    """What a day was with each way, and why calls went where they went."""
    rows: list[list[Cell]] = []
    for name, day in days.items():
        local_too = any(route.where == "local" for route in day.routes)
        machine = 24 * sides.local_usd_per_hour if local_too else 0.0
        sent = sum(n for route, n in day.routes.items() if route.where == "cloud")
        rows.append([name, machine + day.cloud_usd, day.p95_s, day.refused, sent])
    columns = ["way", ("bill", "dollars/day"), ("answer, p95", "s")]
    columns += [("refused", "calls"), ("to the cloud", "calls")]
    note = (
        f"local: service times measured here ({len(sides.service_s)}), "
        f"{sides.slots} at once; cloud: {sides.cloud_s:g} s an answer, emulated, as "
        "are both outages and the day"
    )
    return Table("A day in virtual time", columns, rows, note)
