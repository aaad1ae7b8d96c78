"""Grades exercise 4: its form by what it allows, its manners by replies, its cost by
days replayed through the stand-in's deployment.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jsonschema
import pytest

from exercises.expenses import (
    FALLBACK,
    MODEL,
    Replayed,
    Replica,
    Reply,
    asking,
    replay,
)
from local_cloud.fireworks import traffic
from local_cloud.fireworks.prices import PerToken, Tokens
from local_cloud.fireworks.traffic import Hour
from tests.graders.plugin import Call, Failed, Submission, points

FIELDS = {"category", "amount", "mine"}
CATEGORIES = ("travel", "meals", "office", "other")
NOTE = "Hotel in Ulm 180.00, breakfast 12.50, on my own card"
OTHER_NOTE = "Two chairs on the firm's card, 240.90"
NO_AMOUNT = "Coffee for the meeting, I paid"
GOOD = {"category": "travel", "amount": "180.00", "mine": True}


# -- 1a


def schema_of(found: Call) -> dict[str, Any]:
    """The JSON schema in a request, as the service takes it: objects closed."""
    from local_cloud.fireworks.schema import closed, response_format
    from models.errors import GrammarError

    found.must(isinstance(found.value, dict), "a dict", "it is given as **options")
    form = found.value.get("response_format")
    right = isinstance(form, Mapping) and form.get("type") == "json_schema"
    because = "a form is enforced while the answer is made; a prompt only asks for it"
    found.must(right, "a response_format of the type json_schema", because, got=form)
    try:
        response_format(form)
        inner = form["json_schema"]
        return closed(inner.get("schema", inner))
    except (GrammarError, TypeError, KeyError, AttributeError) as error:
        raise Failed(
            f"called {found.text}, expected a form that is taken because the service "
            f"refuses what it cannot enforce, got {type(error).__name__}: {error}"
        ) from None


@points(2, hint="Bounds and patterns are not enforced there: leave them to your code.")
def check_request_is_taken(submission: Submission) -> None:
    """The service takes the request: its form, its limit, its messages."""
    found = submission.call("request", NOTE)
    schema_of(found)
    asked = found.value
    because = "the same note should give the same entry"
    found.must(asked.get("temperature") == 0, "temperature 0", because)
    most = asked.get("max_tokens")
    because = "an entry has about 20 tokens, and whoever answers without end is paid"
    found.must(
        isinstance(most, int) and 25 <= most <= 64, "25 to 64 max_tokens", because, most
    )
    messages = asked.get("messages")
    right = isinstance(messages, list) and all(
        isinstance(x, dict) and {"role", "content"} <= set(x) for x in messages
    )
    expected = "messages, each with a role and content"
    found.must(right and messages, expected, "a chat is made of them", got=messages)


def allows(schema: dict[str, Any], value: Any) -> bool:
    return jsonschema.Draft202012Validator(schema).is_valid(value)


@points(2, hint="An enum may be made for each note anew.")
def check_request_allows_entries_alone(submission: Submission) -> None:
    """Every entry that may be right is allowed, and nothing else."""
    for note, amounts in ((NOTE, ("180.00", "12.50")), (NO_AMOUNT, (None,))):
        found = submission.call("request", note)
        schema = schema_of(found)
        for values in itertools.product(CATEGORIES, amounts, (True, False)):
            value = dict(zip(("category", "amount", "mine"), values, strict=True))
            because = "it may be the right entry, and what is forbidden cannot be said"
            got = "a schema that forbids it"
            found.must(allows(schema, value), f"{value} to be allowed", because, got)
        for wrong in wrong_entries(amounts[0]):
            because = "the books would take it, and nobody would look again"
            got = "a schema that allows it"
            found.must(not allows(schema, wrong), f"no {wrong}", because, got)


def wrong_entries(amount: str | None) -> list[dict[str, Any]]:
    """Entries that a note with this amount cannot have."""
    right = {**GOOD, "amount": amount}
    changed = [{"category": "fun"}, {"amount": "18.00"}, {"amount": 180.0}]
    changed += [{"mine": "yes"}, {"mine": None}, {"note": "paid"}]
    if amount is not None:
        changed.append({"amount": None})
    missing = [{k: v for k, v in right.items() if k != name} for name in FIELDS]
    return [{**right, **change} for change in changed] + missing


@points(1, hint="A note in the first message makes every prompt new from its start.")
def check_request_begins_alike(submission: Submission) -> None:
    """What never changes comes first, and the note last."""
    one, two = (submission.call("request", note) for note in (NOTE, OTHER_NOTE))
    *before, last = one.value["messages"]
    because = "a beginning that is known is read sooner, and by many prices for less"
    alike = before == two.value["messages"][:-1] and len(before) > 0
    expected = "instructions that are the same for all notes"
    one.must(alike, expected, because, got=before)
    got = last["content"]
    one.must(NOTE in got, "the note in the last message", "it is what to read", got)


@pytest.fixture(scope="session")
def cloud(submission: Submission) -> Iterator[Any]:
    """The stand-in with the model, asked by the real SDK; not for what is not there."""
    submission.call("request", NOTE)
    submission.function("entry")
    with asking() as asked:
        yield asked


@points(
    1,
    hint="Try it: python -m exercises.ex4_fireworks_function",
    needs="model",
    slow=True,
    limit_s=60,
)
def check_answers_are_whole(submission: Submission, cloud: Any) -> None:
    """On the stand-in each answer is whole and an entry."""
    ask, _ = cloud
    for note in (NOTE, NO_AMOUNT):
        found = submission.call("request", note)
        reply = ask(MODEL, found.value)
        because = "cut at max_tokens, JSON is no JSON"
        right = (reply.status, reply.finish_reason) == (200, "stop")
        found.must(right, "an answer that ends by itself", because, got=reply)
        because = "the form was enforced"
        value = json.loads(reply.text)
        right = allows(schema_of(found), value) and set(value) == FIELDS
        found.must(right, "an entry", because, got=value)


# -- 1b


@dataclass
class Service:
    """Replies in their order, and a fallback; writes down who was asked, and waits."""

    replies: Sequence[Reply]
    fallback: Reply = field(default_factory=lambda: whole(GOOD))

    def __post_init__(self) -> None:
        self.asked: list[str] = []
        self.waits: list[float] = []

    def ask(self, model: str, request: Mapping[str, Any]) -> Reply:
        assert isinstance(request, Mapping)
        self.asked.append(model)
        if model == FALLBACK:
            return self.fallback
        return self.replies[min(self.asked.count(MODEL), len(self.replies)) - 1]

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)

    def names(self) -> str:
        short = {MODEL: "MODEL", FALLBACK: "FALLBACK"}
        return ", ".join(short.get(name, name) for name in self.asked) or "nobody"


def whole(value: object, reason: str | None = "stop") -> Reply:
    text = value if isinstance(value, str) else json.dumps(value)
    return Reply(200, text, reason)


def refusal(status: int, after_s: float | None = None) -> Reply:
    return Reply(status, retry_after_s=after_s)


def entered(submission: Submission, service: Service, note: str = NOTE) -> Call:
    """Calls `entry`; the text tells what the service will do."""
    replies = ", then ".join(_told(reply) for reply in service.replies)
    text = f"entry({note!r}, ...) where MODEL gives {replies}"
    function = submission.function("entry")
    with submission.explained(text):
        return Call(text, function(note, service.ask, service.sleep))


def _told(reply: Reply) -> str:
    if reply.status != 200:
        after = reply.retry_after_s
        return f"{reply.status}" + (f" (retry-after {after:g})" if after else "")
    return f"{reply.text!r} (finish_reason {reply.finish_reason!r})"


def asks(found: Call, service: Service, expected: Sequence[str], because: str) -> None:
    wanted = Service(())
    wanted.asked = list(expected)
    right = service.asked == wanted.asked
    found.must(right, f"{wanted.names()} to be asked", because, got=service.names())


@points(1, hint="json.loads, when the answer is whole.")
def check_entry_reads_a_good_answer(submission: Submission) -> None:
    """A good answer is the entry, and nobody else is asked."""
    for note, value in (
        (NOTE, GOOD),
        (NO_AMOUNT, {"mine": False, "amount": None, "category": "meals"}),
    ):
        service = Service([whole(value)])
        found = entered(submission, service, note)
        found.equals(value, "it is whole, and as an entry must be")
        asks(found, service, [MODEL], "each further answer is paid, too")


@points(2, hint="These two alone say that nothing was generated.")
def check_entry_asks_again_when_refused(submission: Submission) -> None:
    """429 and 503 are waited for, as long as told, or longer each time."""
    for status in (429, 503):
        service = Service([refusal(status, 7.0), refusal(status, 3.0), whole(GOOD)])
        found = entered(submission, service)
        found.equals(GOOD, "nothing was generated, so asking again is safe")
        asks(found, service, [MODEL] * 3, "MODEL is well again at the third time")
        because = "the service says when it is worth it; sooner makes it worse"
        waits = service.waits
        found.must(waits == [7.0, 3.0], "waits of 7 and 3 s", because, got=waits)
    service = Service([*[refusal(503)] * 2, whole(GOOD)])
    found = entered(submission, service)
    waits = service.waits
    right = len(waits) == 2 and 1 <= waits[0] <= 5 and waits[1] >= 1.5 * waits[0]
    because = "nobody says how long it takes, and all callers ask at once"
    expected = "a wait of 1 to 5 s, and one at least 1.5 times as long"
    found.must(right, expected, because, got=waits)


@points(1, hint="Look before you sleep.")
def check_entry_has_patience_to_an_end(submission: Submission) -> None:
    """All waits of a note together have a limit; then the fallback is asked."""
    because = "the one who wrote the note waits, too, and FALLBACK is there"
    for after_s, most in ((None, 120.0), (50.0, 100.0), (300.0, 0.0)):
        service = Service([refusal(429, after_s)])
        found = entered(submission, service)
        found.equals(GOOD, because)
        waits = service.waits
        right = sum(waits) <= 120 and service.asked[-1] == FALLBACK
        expected = "at most 120 s of waits, then FALLBACK"
        got = f"waits of {[round(x, 1) for x in waits]}; asked: {service.names()}"
        found.must(right, expected, because, got=got)
        if after_s:
            expected = f"{most:g} s of waits"
            found.must(sum(waits) == most, expected, "one more is too long", got=got)


@points(2, hint="What was generated is paid, whether or not it arrived.")
def check_entry_never_pays_twice(submission: Submission) -> None:
    """After an answer that was cut or failed, only the fallback is asked, once."""
    cut = json.dumps(GOOD)[:20]
    for bad in (
        Reply(200, cut, None),
        Reply(200, json.dumps(GOOD), None),
        Reply(200, cut, "length"),
        Reply(500),
    ):
        service = Service([bad, whole({**GOOD, "mine": False})])
        found = entered(submission, service)
        because = "the first answer was generated and is paid; FALLBACK costs nothing"
        asks(found, service, [MODEL, FALLBACK], because)
        found.equals(GOOD, "FALLBACK gave a good one")
    service = Service([refusal(503, 2.0), Reply(200, cut, None), whole(GOOD)])
    found = entered(submission, service)
    asks(found, service, [MODEL, MODEL, FALLBACK], "the second one was generated")


@points(1, hint="No waiting makes a wrong request right.")
def check_entry_tells_its_own_mistakes(submission: Submission) -> None:
    """A request that is refused for what it is ends in ValueError at once."""
    for status in (400, 401, 404):
        service = Service([Reply(status), whole(GOOD)])
        text = f"entry({NOTE!r}, ...) where MODEL gives {status}"
        function = submission.function("entry")
        because = f"{status} is our mistake, and comes again until we correct it"
        value: object = "no error"
        with submission.explained(text):
            try:
                value = function(NOTE, service.ask, service.sleep)
            except ValueError:
                value = ValueError
        found = Call(text, value)
        found.must(value is ValueError, "ValueError", because)
        asks(found, service, [MODEL], because)


NONSENSE = (
    "The hotel was 180.00 and I paid it myself.",
    '"travel"',
    {**GOOD, "amount": "18.00"},
    {**GOOD, "amount": None},
    {**GOOD, "amount": 180.0},
    {**GOOD, "category": "fun"},
    {**GOOD, "mine": "yes"},
    {**GOOD, "tip": "2.00"},
    {"category": "travel", "amount": "180.00"},
)


@points(1, hint="One function that reads a reply, for whoever gave it.")
def check_entry_believes_nobody(submission: Submission) -> None:
    """What is no entry of this note is not taken, from the fallback neither."""
    for value in NONSENSE:
        service = Service([whole(value)])
        found = entered(submission, service)
        because = "a well-formed lie is worse than no answer"
        asks(found, service, [MODEL, FALLBACK], because)
        found.equals(GOOD, "FALLBACK gave a good one")
        service = Service([Reply(500)], fallback=whole(value))
        found = entered(submission, service)
        text = f"{found.text} and FALLBACK {value!r}"
        found = Call(text, found.value)
        found.equals(None, "a human must look at it")
        asks(found, service, [MODEL, FALLBACK], "there is nobody else to ask")


@points(
    1,
    hint="python -m exercises.ex4_fireworks_function cuts an answer, too.",
    needs="model",
    slow=True,
    limit_s=60,
)
def check_survives_a_bad_day(submission: Submission, cloud: Any) -> None:
    """On the stand-in: rate limits, a cold start and a cut, by the real SDK."""
    from local_cloud.fireworks.faults import Fault

    ask, served = cloud
    days = {
        "429 twice": Fault("rate_limit", seconds=2, times=2),
        "503 three times": Fault("cold", times=3),
        "an answer that is cut": Fault("cut"),
    }
    function = submission.function("entry")
    for what, fault in days.items():
        before = served.state.generations
        served.state.faults.order(fault)
        text = f"entry({NOTE!r}, ...) on the stand-in, which gives {what}"
        try:
            with submission.explained(text):
                found = Call(text, function(NOTE, ask, served.clock.advance))
        finally:
            served.state.faults.clear()
        made = served.state.generations - before
        because = "the service counts, and bills, what it generates"
        found.must(made == 1, "1 generated", because, got=f"{made} generated")
        value = found.value
        because = "whoever answered, it is checked; and MODEL answers well"
        right = fault.kind == "cut" if value is None else str(value["amount"]) in NOTE
        found.must(right, "an entry, or None after a cut", because)


# -- 2a, by replay

REPLICA = Replica(slots=8, answer_s=2.0, usd_per_hour=8.0)
SOON_S, SHARE = 10.0, 0.97
LESSON_USD = 245.0  # ours: 233
SLOW, OTHER_USD = Replica(slots=8, answer_s=4.0, usd_per_hour=5.0), 111.0  # 105
OFFICE_USD = 109.0  # 99


def other_day() -> list[Hour]:
    """Another seed, a fourth as many; and another peak, at nine instead of twelve."""
    calls = [hour.calls // 4 for hour in traffic.generate(seed=70_423)]
    calls[12], calls[9] = 2_250, 10_000
    return [Hour(n, n // 3) for n in calls]


def office_day() -> list[Hour]:
    return [Hour(20 if 7 <= hour < 19 else 0, 0) for hour in range(24)]


@dataclass(frozen=True)
class Day:
    """A day that was replayed with the submission's policy."""

    call: Call
    told: Replayed

    def is_soon(self) -> None:
        share = self.told.share_within(SOON_S)
        because = "waiting for a boot is waiting, and so is a queue"
        expected = f"{SHARE:.0%} of the notes within {SOON_S:g} s"
        self.call.must(share >= SHARE, expected, because, got=f"{share:.1%}")

    def costs(self, most: float) -> None:
        because = "replicas that nobody needs are paid like the others"
        got = f"{self.told.usd:.0f} ({self.told.most_replicas} replicas at most)"
        expected = f"at most {most:.0f} dollars"
        self.call.must(self.told.usd <= most, expected, because, got=got)


def replayed(
    submission: Submission,
    day: list[Hour],
    what: str,
    replica: Replica = REPLICA,
    seed: int = 3,
) -> Day:
    from local_cloud.fireworks.wire import Refusal

    found = submission.call("policy", day, replica)
    arguments = found.value
    found.must(isinstance(arguments, dict), "a dict", "create takes it as arguments")
    found = Call(f"policy(<{what}>, ...), which gave {arguments}", arguments)
    try:
        return Day(found, replay(traffic.arrivals(day, seed), arguments, replica))
    except (Refusal, KeyError, TypeError) as error:
        raise Failed(
            f"called {found.text}, expected arguments that are taken because the "
            f"deployment is made with them, got {type(error).__name__}: {error}"
        ) from None


@pytest.fixture(scope="session")
def lesson_day(submission: Submission) -> Day:
    return replayed(submission, traffic.read(), "the lesson's day", seed=traffic.SEED)


@points(
    2,
    hint="While the first replicas boot, notes pile up: who works them off?",
    slow=True,
    limit_s=40,
)
def check_the_lessons_day_is_soon(lesson_day: Day) -> None:
    """The lesson's day: 97 % of the notes within 10 s."""
    lesson_day.is_soon()


@points(1, hint="Who is paid at three in the morning?", slow=True, limit_s=40)
def check_the_lessons_day_is_cheap(lesson_day: Day) -> None:
    """The lesson's day: at most 245 dollars."""
    lesson_day.costs(LESSON_USD)


@points(2, hint="Compute from the day you are given.", slow=True, limit_s=40)
def check_another_day_is_soon_and_cheap(submission: Submission) -> None:
    """Another day, another peak, on other replicas: soon, and cheap."""
    day = replayed(submission, other_day(), "another day", SLOW)
    day.is_soon()
    day.costs(OTHER_USD)


@points(
    1,
    hint="How often is there no note for five minutes, if twenty come in an hour?",
    slow=True,
    limit_s=40,
)
def check_an_office_is_soon_and_cheap(submission: Submission) -> None:
    """A small office: awake while it works, asleep at night."""
    day = replayed(submission, office_day(), "20 an hour from 7 to 19")
    day.is_soon()
    day.costs(OFFICE_USD)


# -- 2b

TOKENS = Tokens(prompt=2000, cached=1500, completion=150)
PLAIN = PerToken(0.90, 0.90, 0.90)  # cached is no cheaper: what can wait goes by batch
CACHED = PerToken(0.60, 0.02, 0.60)  # cached is cheaper than by batch
BOX = Replica(slots=4, answer_s=1.5, usd_per_hour=7.0)  # 9,600 an hour


def hour_usd(hour: Hour, replicas: int, price: PerToken) -> float:
    """What an hour costs with so many replicas."""
    now_usd = TOKENS.dollars(price)
    later_usd = min(now_usd, TOKENS.dollars(price, known=False, batch=True))
    left = max(0.0, hour.calls - replicas * BOX.per_hour)
    later = min(left, hour.can_wait)
    tokens = (left - later) * now_usd + later * later_usd
    return replicas * BOX.usd_per_hour + tokens


def planned(submission: Submission, day: list[Hour], price: PerToken) -> Call:
    made = submission.call("plan", day, TOKENS, price, BOX).value
    a_note = f"{TOKENS.dollars(price):.5f} dollars a note"
    found = Call(f"plan(<24 hours>, <{a_note}>, ..., {BOX})", made)
    told = getattr(found.value, "replicas", ())
    right = len(told) == 24 and all(isinstance(n, int) and n >= 0 for n in told)
    because = "each hour has its number of replicas"
    found.must(right, "a Plan with 24 numbers", because)
    return found


def is_cheapest(submission: Submission, day: list[Hour], price: PerToken) -> None:
    found = planned(submission, day, price)
    for at, (hour, chosen) in enumerate(zip(day, found.value.replicas, strict=True)):
        most = math.ceil(hour.calls / BOX.per_hour)
        costs = [hour_usd(hour, n, price) for n in range(most + 1)]
        best = min(range(most + 1), key=costs.__getitem__)
        usd = hour_usd(hour, chosen, price)
        because = (
            f"hour {at} has {hour.calls:,} calls ({hour.can_wait:,} can wait), which "
            f"cost {costs[best]:.2f} dollars with {best} and {usd:.2f} with {chosen}"
        )
        right = usd <= costs[best] * 1.0001
        found.must(right, f"{best} replicas", because, got=chosen)


@points(2, hint="From how many notes on is an hour's rent earned?")
def check_plan_rents_where_it_pays(submission: Submission) -> None:
    """Quiet hours are paid by the token, busy ones by the hour."""
    quiet, busy = Hour(3_000, 0), Hour(9_500, 0)
    is_cheapest(submission, [quiet] * 8 + [busy] * 12 + [quiet] * 4, PLAIN)


@points(1, hint="The last replica must earn its rent, too.")
def check_plan_lets_the_rest_overflow(submission: Submission) -> None:
    """What one replica more would not earn is paid by the token."""
    day = [Hour(n, 0) for n in (9_601, 11_000, 12_000, 15_000, 20_000, 81_000)] * 4
    is_cheapest(submission, day, PLAIN)


@points(1, hint="Who can wait costs the half of what, and who is done first?")
def check_plan_bills_every_note(submission: Submission) -> None:
    """The bill: known beginnings, batches where they are cheaper, rent."""
    day = [Hour(2_000, 800)] * 12 + [Hour(11_000, 9_000)] * 12
    for price in (PLAIN, CACHED):
        found = planned(submission, day, price)
        pairs = zip(day, found.value.replicas, strict=True)
        usd = sum(hour_usd(hour, n, price) for hour, n in pairs)
        told = Call(f"{found.text}.usd", found.value.usd)
        because = (
            f"that is the bill with these replicas, {TOKENS} and {price.input:g}, "
            f"{price.cached:g} and {price.output:g} dollars a million"
        )
        told.near(usd, because)
