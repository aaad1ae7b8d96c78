"""A function on Fireworks.ai: a prompt, a form, a model and a policy, behind one call.

There is no product named "Fireworks.ai Functions". There are models, paid by the token
or by the second of a GPU; forms that an answer can be forced into; and tools a model
can ask for. What people call a function is all of these behind one Python callable, and
the callable is yours to write: with timeouts that do not pay twice, answers that are
whole or fail, and a deployment that is gone when you are.

You will see: a client that can never spend money; a triage of support tickets deployed,
put to sleep, woken and deleted; every bad day of a hosted API and what a careful client
does on it; the bill of a day, and a local model that overflows into the cloud.

Run it:     python fireworks_deployment.py              all four sections, a minute
            python fireworks_deployment.py 2 --quick    one section, rough figures, soon
            python fireworks_deployment.py --live       on the real service: it asks
                                                        first, has caps, and cleans up
Import it:  from fireworks_deployment import Careful, Function, deployed
Needs:      pip install -r requirements.txt; no key, no network: a stand-in on loopback
            answers by the shared model, through the real SDK (--live needs a key)
Next:       replay a day of your own: --trace your_day.csv
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import fireworks
from fireworks import Fireworks

import models
from course import lesson
from course.lesson import Run
from local_cloud.fireworks import bills, hybrid, live, traffic, trials
from local_cloud.fireworks.asking import Asking
from local_cloud.fireworks.calls import Answer, Call, CallFailed, scaling_up
from local_cloud.fireworks.faults import Fault
from local_cloud.fireworks.hybrid import Route, Situation
from local_cloud.fireworks.prices import (
    GPU_HOUR,
    SERVERLESS,
    UP_TO_4B,
    PerToken,
    Tokens,
)
from local_cloud.fireworks.traffic import Hour
from local_cloud.functions.costs import HOUR_S

if TYPE_CHECKING:
    from local_cloud.fireworks.app import Served

ACCOUNT = "course"  # of the stand-in
FAKE_KEY = "fw_fake_for-the-stand-in-only"  # opens nothing but the stand-in
MODEL = "accounts/fireworks/models/smollm2-135m-instruct"
LIVE_MODEL = "accounts/fireworks/models/llama-v3p2-1b-instruct"

# ## Setting up a Fireworks.ai account
#
# An account has a name, keys and a bill. A key is money: whoever reads it can spend.
# So it comes from the environment, is never printed, and the code that is run most
# often, which is the code that is being learned or tested, must be unable to use it.
#
# The SDK takes a key and an address from the environment if it is not told otherwise.
# Convenient, and the reason for many bills. The client of the stand-in is told
# otherwise: its key is a fake, its address is this machine, and no proxy is asked.


def stand_in(url: str, **options: Any) -> Fireworks:
    """A client that cannot spend money, whatever the environment holds.

    Raises:
        ValueError: the address is not on this machine.
    """
    live.refuse_other_machines(url)
    return fireworks.Fireworks(
        api_key=FAKE_KEY,
        account_id=ACCOUNT,
        base_url=url,
        max_retries=0,
        http_client=fireworks.DefaultHttpxClient(trust_env=False),
        **options,
    )


def demo_account(run: Run) -> None:
    """Look around in the account, and try a key that opens nothing."""
    run.predict("A key of someone else opens nothing; ours opens this account alone.")
    with stand_in(cloud_of(run).url) as client:
        run.table(trials.account(client))
        run.conclude(
            f"The client asks {client.base_url} and nobody else, with a key that is no "
            "secret."
        )


def cloud_of(run: Run) -> Served:
    """The stand-in, one for all sections."""
    return run.keep("cloud", partial(trials.cloud, run.device))


# ## Configuring and deploying functions
#
# Between a prompt and a function stand four decisions. The form: a JSON schema or
# tools, enforced while the answer is generated, so that parsing cannot fail. The model.
# The deployment: how many replicas, on which GPU, how soon they go to sleep. And the
# manners of the client, because a hosted model fails in ways a local one does not:
#
# - A generation that timed out was computed, and is billed. The SDK would submit it
#   twice more. Here it is submitted once; who wants it again says so.
# - A stream that was cut ends like one that is complete. What tells them apart is a
#   finish_reason. Without one, there is no answer.
# - A stream that stalls is not an error to anyone. Silence must have a limit.
# - 503 DEPLOYMENT_SCALING_UP and 429 mean that nothing was generated: asking again is
#   safe, so it is done, as slowly as they say, up to a deadline of its own.


@dataclass(frozen=True)
class Scaling:
    """The deployment policy: which GPU, how many replicas, how soon to sleep."""

    gpu: str = "NVIDIA_H100_80GB"
    gpus: int = 1  # a replica
    least: int = 0  # replicas; 0 lets it sleep, and then it costs nothing
    most: int = 1
    sleep_s: int = 300  # of idleness until it sleeps; the service takes no less

    @property
    def usd_per_hour(self) -> float:
        """What it costs while it is up, at most."""
        return GPU_HOUR[self.gpu] * self.gpus * self.most

    def arguments(self) -> dict[str, Any]:
        """As `deployments.create` takes it."""
        return {
            "accelerator_type": self.gpu,
            "accelerator_count": self.gpus,
            "min_replica_count": self.least,
            "max_replica_count": self.most,
            "autoscaling_policy": {"scale_to_zero_window": f"{self.sleep_s}s"},
        }


@dataclass(frozen=True)
class Patience:
    """How long to wait for what, in seconds."""

    idle_s: float = 30.0  # silence: before the first token, and between two pieces
    whole_s: float = 120.0  # one generation
    wake_s: float = 900.0  # waking a deployment, all its 503s together
    limit_s: float = 60.0  # a rate limit, all its 429s together


# Between two refusals, 503 or 429, that do not say how long.
FIRST_WAIT_S, WAIT_GROWTH, LONGEST_WAIT_S = 5.0, 1.5, 60.0


@dataclass
class Careful(Asking):
    """A client that asks once, waits where it may, and gives whole answers or fails."""

    patience: Patience = field(default_factory=Patience)

    def wait_s(self, problem: Any, refusals: int) -> float | None:
        """Seconds until asking again is safe and worth it; None: do not ask again."""
        status = getattr(problem, "status_code", None)
        if status != 429 and not (status == 503 and scaling_up(problem)):
            return None
        told = problem.response.headers.get("retry-after", "")
        grown = FIRST_WAIT_S * WAIT_GROWTH**refusals
        return float(told) if told.isdigit() else min(grown, LONGEST_WAIT_S)


class CutShort(ValueError):
    """The answer reached max_tokens: its form is not complete."""


@dataclass(frozen=True)
class Function:
    """Instructions, a form, a model and a deployment policy: a function.

    The form is a JSON schema of what it `returns`, or `tools`, of which it calls one.
    """

    name: str
    instructions: str
    model: str = MODEL
    returns: Mapping[str, Any] | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    max_tokens: int = 96
    scaling: Scaling = field(default_factory=Scaling)

    def __call__(self, careful: Careful, text: str, model: str = "") -> Any:
        """The value for `text`: what the schema describes, or (tool, arguments).

        `model` is where to ask, if not the shared model: what `deployed` gives.

        Raises:
            CutShort: the answer did not fit into max_tokens.
            CallFailed, fireworks.APIStatusError: as `Careful.ask` does.
        """
        answer = careful.ask(model or self.model, self.messages(text), **self.options())
        return self.value(answer)

    def messages(self, text: str) -> list[Any]:
        """The prompt: what never changes comes first, for the prompt cache."""
        return [
            {"role": "system", "content": self.instructions},
            {"role": "user", "content": text},
        ]

    def options(self) -> dict[str, Any]:
        """The form and the limits of a request."""
        made: dict[str, Any] = {"temperature": 0, "max_tokens": self.max_tokens}
        if self.tools:
            return {**made, "tools": list(self.tools), "tool_choice": "required"}
        form = {"name": self.name, "schema": dict(self.returns or {"type": "object"})}
        return {**made, "response_format": {"type": "json_schema", "json_schema": form}}

    def value(self, answer: Answer) -> Any:
        """The value of a whole answer."""
        if answer.call.finish_reason == "length":
            raise CutShort(
                f"{self.name}: expected an answer of at most {self.max_tokens} tokens, "
                f"found {answer.text[-40:]!r} at its end; raise max_tokens"
            )
        if not self.tools:
            return json.loads(answer.text)
        name, arguments = answer.tools[0]
        return name, json.loads(arguments)


@contextlib.contextmanager
def deployed(
    client: Fireworks,
    function: Function,
    *,
    ready_s: float = 900.0,
    sleep: Callable[[float], Any] = time.sleep,
) -> Iterator[str]:
    """Deploy a function for the length of the block; gives the name to ask for.

    The id is chosen here, not by the service: so it can be deleted even if the answer
    to its creation never came. Only a refusal leaves nothing to delete.

    Raises:
        live.LeftRunning: it could not be deleted; the message is what to type.
    """
    id = f"{function.name}-{secrets.token_hex(4)}"
    with contextlib.ExitStack() as at_the_end:
        at_the_end.callback(live.delete, client, id)
        try:
            policy = function.scaling.arguments()
            client.deployments.create(
                base_model=function.model, deployment_id=id, **policy
            )
        except fireworks.APIStatusError as problem:
            if live.refused(problem):
                at_the_end.pop_all()
            raise
        live.wait_until_ready(
            client, id, within_s=ready_s, every_s=FIRST_WAIT_S, sleep=sleep
        )
        yield f"accounts/{client.account_id}/deployments/{id}"


TRIAGE = Function(
    name="triage",
    # The form is enforced but not seen by the model: examples show what it is for.
    # Strings in it have no bound, and a small model can count in one without end.
    instructions="Sort the support ticket. Answer in JSON like these.\n"
    'Order Z-55 is late: {"intent": "delivery", "urgent": false, "order_id": "Z-55"}\n'
    'My money back now: {"intent": "refund", "urgent": true, "order_id": null}\n'
    'I lost my password: {"intent": "account", "urgent": false, "order_id": null}',
    returns={
        "type": "object",
        "properties": {
            "intent": {"enum": ["delivery", "refund", "account", "other"]},
            "urgent": {"type": "boolean"},
            "order_id": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        },
        "required": ["intent", "urgent", "order_id"],
    },
)
ORDER = re.compile(r"\b[A-Z]-?\d+\b")  # how our shop writes an order's number


def lookup_for(ticket: str) -> Function:
    """The function that looks up the order of this ticket, by a tool.

    What code can find, code finds: the numbers in the ticket become the only ones that
    may be looked up. So the model chooses and cannot invent, and the argument has an
    end, which a free string has not.
    """
    found = sorted(set(ORDER.findall(ticket)))
    fields = {"order_id": {"enum": [*found, None]}}
    parameters = {"type": "object", "properties": fields, "required": [*fields]}
    tool = {
        "name": "lookup_order",
        "description": "Find an order by its number",
        "parameters": parameters,
    }
    return Function(
        name="lookup",
        instructions="Look up the order that the ticket is about.",
        tools=[{"type": "function", "function": tool}],
    )


TICKETS = (
    "My order A-1042 never arrived and I need it today!",
    "Please refund order B-77, the lamp is broken.",
    "How do I change the e-mail address of my account?",
    "Where is parcel C-9001? It was due on Monday.",
)


def go_live(
    function: Function = TRIAGE,
    *,
    sleep: Callable[[float], Any] = time.sleep,
    **how: Any,
) -> int:
    """The same function on the real service; `how` and the exit code: `live.run`."""

    def work(client: Fireworks, lasts_s: float, say: Callable[[str], Any]) -> None:
        careful = Careful(client, patience=Patience(30, 60, lasts_s), sleep=sleep)
        careful.log = lambda call: say(call.line())
        with deployed(client, function, ready_s=lasts_s, sleep=sleep) as name:
            for ticket in TICKETS:
                say(f"{ticket} -> {function(careful, ticket, name)}")

    what = f"one deployment of {function.model} on {function.scaling.gpu}"
    return live.run(work, what, function.scaling.usd_per_hour, **how)


def careful_of(run: Run, **options: Any) -> Careful:
    """A careful client of the stand-in, for which waiting takes no time."""
    cloud = cloud_of(run)
    client = run.keep("client", lambda: stand_in(cloud.url))
    return Careful(client, sleep=cloud.clock.advance, **options)


def demo_functions(run: Run) -> None:
    """Deploy a function, use it, let it sleep, wake it; then have bad days."""
    cloud, log = cloud_of(run), list[Call]()
    careful = careful_of(run, log=log.append)
    run.predict("READY is not yet serving, and a sleeper refuses until it is awake.")
    with deployed(careful.client, TRIAGE, sleep=cloud.clock.advance) as name:
        for ticket in TICKETS:
            TRIAGE(careful, ticket, name)
        cloud.clock.advance(TRIAGE.scaling.sleep_s + 60)
        TRIAGE(careful, TICKETS[0], name)
        lookup_for(TICKETS[0])(careful, TICKETS[0], name)
    left = list(careful.client.deployments.list())
    names = [*(f"ticket {i}" for i in range(1, 5)), "after a sleep", "a tool"]
    run.table(trials.function_table(names, log))
    hasty = Patience(idle_s=1, whole_s=10, wake_s=120, limit_s=30)
    ask = careful_of(run, patience=hasty, log=lambda call: None).ask
    run.table(trials.bad_days(cloud, careful.client, ask, MODEL, TICKETS[0]))
    run.conclude(
        f"Of {len(log)} calls {sum(c.outcome == 'ok' for c in log)} gave a value of "
        f"the right form; waking took {log[4].waited_s:.0f} s (emulated) and "
        f"{log[4].refusals} refusals; deployments left: {len(left)}."
    )


# ## Optimizing performance and cost
#
# Three things decide the bill of a function: how many tokens it reads and writes, how
# many of those it reads again, and whether it pays by the token or by the second.
#
# - What never changes comes first in a prompt: a known beginning is sooner, and cheaper
#   where the model has a rate for it. Calls of one session say so (`user`), or they
#   land on a replica that has never seen it.
# - What can wait goes into a batch, at half the price.
# - A GPU of one's own costs the same busy or idle. It can sleep; then the first call
#   waits. FP8 makes it less busy; the bill falls once fewer replicas are needed.


def day_bills(
    day: Sequence[Hour], a_call: Tokens, price: PerToken, scaling: Scaling
) -> dict[str, float]:
    """Dollars a day for each way to pay. One replica is taken to be enough."""
    number, waiting = sum(h.calls for h in day), sum(h.can_wait for h in day)
    plain, known = a_call.dollars(price, known=False), a_call.dollars(price)
    batch = min(known, a_call.dollars(price, known=False, batch=True))
    up_s, _ = bills.awake(traffic.arrivals(day), scaling.sleep_s)
    return {
        "serverless": number * plain,
        "and a known beginning": number * known,
        "and what can wait, by batch": (number - waiting) * known + waiting * batch,
        "on demand, always on": 24 * scaling.usd_per_hour,
        "on demand, asleep when idle": up_s / HOUR_S * scaling.usd_per_hour,
    }


def break_even(usd_per_hour: float, call_usd: float) -> float:
    """Calls an hour from which on a GPU of one's own is cheaper, if it can do them."""
    return usd_per_hour / call_usd


# The other way is to own the ordinary load and to rent the rest. A local machine is
# paid whether it works or not, so its answers cost nothing more: it goes first. The
# cloud gets what would come too late, and everything while the local side is down.


@dataclass(frozen=True)
class Promise:
    """What callers may expect, and what it may cost."""

    soon_s: float = 2.0  # a whole answer; later than that goes to the cloud
    late_s: float = hybrid.LATE_S  # later than that is refused: the caller has gone
    day_usd: float = 1.0  # for the cloud


def route(now: Situation, promise: Promise) -> Route:
    """Local first; overflow by latency or failure, as far as the money goes."""
    if now.local_s is not None and now.local_s <= promise.soon_s:
        return Route("local", "soon enough")
    trouble = "local is down" if now.local_s is None else "local is late"
    if not now.cloud_up:
        lack = "the cloud is down"
    elif now.spent_usd + now.call_usd > promise.day_usd:
        lack = "the money is spent"
    else:
        return Route("cloud", trouble)
    if now.local_s is not None and now.local_s <= promise.late_s:
        return Route("local", f"late, but {lack}")
    return Route("nowhere", f"{trouble}, {lack}")


def demo_cost(run: Run) -> None:
    """What a day costs with each way to pay, and what a local model changes."""
    day = getattr(run.arguments, "trace", None) or traffic.read()
    log: list[Call] = []
    careful = careful_of(run, log=log.append)
    run.predict("A second ticket finds the beginning of its prompt in the cache.")
    for ticket in trials.tickets(2):
        asked = TRIAGE.messages(ticket)
        careful.ask(MODEL, asked, user="a new session", **TRIAGE.options())
    a_call, own = Tokens.of(log[-1]), TRIAGE.scaling
    models_of = {"up to 4B": UP_TO_4B, "gpt-oss-120b": SERVERLESS["gpt-oss-120b"]}
    told = {name: day_bills(day, a_call, p, own) for name, p in models_of.items()}
    run.table(bills.table(told, day, a_call))
    hour, busiest = own.usd_per_hour, max(h.calls for h in day)
    run.picture(
        bills.break_even_picture(models_of, a_call, hour, busiest), "break-even"
    )
    run.conclude(
        f"The GPU, at {hour:.2f} dollars an hour, pays from "
        f"{break_even(hour, a_call.dollars(UP_TO_4B)):,.0f} calls an hour on; the "
        f"busiest hour of the day has {busiest:,}."
    )
    demo_hybrid(run, day, a_call)


def demo_hybrid(run: Run, day: Sequence[Hour], a_call: Tokens) -> None:
    """Send both sides more than the local one can do; then replay the day."""
    cloud, far = cloud_of(run), partial(TRIAGE, careful_of(run))
    near = trials.local(cloud, TRIAGE.messages, TRIAGE.options())
    sides = trials.sides(near, a_call.dollars(UP_TO_4B), rounds=1 if run.quick else 3)
    hasty = Promise(soon_s=1.5 * sides.typical_s, late_s=60)
    log = trials.burst(cloud, near, far, partial(route, promise=hasty), sides)
    run.table(trials.decisions(log))
    run.say(log[-1].line())
    times = traffic.arrivals(day)
    days = hybrid.compare(times, partial(route, promise=Promise()), sides)
    run.table(trials.day_table(days, sides))
    refused = ", ".join(f"{name}: {told.refused:,}" for name, told in days.items())
    run.conclude(f"Calls refused, of {len(times):,}: {refused}.")


# ## Monitoring and logging
#
# One line a call, in JSON, is worth more than any dashboard: which model, how long and
# how long it waited, tokens, dollars, the id to quote to support, and how it ended.
# Failed calls have a line too, and theirs are the ones that are read. The server's own
# measure of the first token stands beside the client's: the difference is the network.
# For deployments the account has metrics too: what they count, the log must explain.


def demo_logging(run: Run) -> None:
    """The log of a good and a bad call, and the service's own count of others."""
    cloud, log = cloud_of(run), list[Call]()
    careful = careful_of(run, log=log.append)
    run.predict("Each call has its line, also the one that failed; the counts agree.")
    TRIAGE(careful, TICKETS[1])
    cloud.state.faults.order(Fault("cut"))
    with contextlib.suppress(CallFailed):
        TRIAGE(careful, TICKETS[1])
    for call in log:
        run.say(call.line())
    good, bad = log
    with deployed(careful.client, TRIAGE, sleep=cloud.clock.advance) as name:
        for ticket in TICKETS:
            TRIAGE(careful, ticket, name)
        run.table(trials.last_minute(careful.client, name, log[2:]))
    outside = 1000 * ((good.first_token_s or 0) - (good.server_first_token_s or 0))
    run.conclude(
        f"{outside:.1f} ms of the first token's {1000 * (good.first_token_s or 0):.1f} "
        f"were spent outside the server; the cut call is logged as {bad.outcome}."
    )


SECTIONS = [
    lesson.Section("Setting up a Fireworks.ai account", demo_account),
    lesson.Section("Configuring and deploying functions", demo_functions),
    lesson.Section("Optimizing performance and cost", demo_cost),
    lesson.Section("Monitoring and logging", demo_logging),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this lesson."""
    add = parser.add_argument
    add("--trace", type=traffic.option, metavar="CSV", help="a day of your calls")
    add("--live", action="store_true", help="on the real service")
    add("--model", default=LIVE_MODEL, help="which, for --live")
    add("--dollars", type=float, default=2.0, help="cap of --live")


def instead(arguments: argparse.Namespace) -> int | None:
    """With --live: the real thing in place of the sections."""
    if not arguments.live:
        return None
    function = replace(TRIAGE, model=arguments.model)
    return go_live(function, cap=live.Cap(arguments.dollars))


def main(argv: list[str] | None = None) -> int:
    """Run the lesson, or the function on the real service."""
    return lesson.run(
        doc=__doc__,
        sections=SECTIONS,
        argv=argv,
        number=4,
        after="replay a day of your own: --trace your_day.csv",
        model_digest=models.prepare,
        add_arguments=add_arguments,
        instead=instead,
    )


if __name__ == "__main__":
    raise SystemExit(main())
