"""What to measure of a model in production, and a promise that wakes somebody in time.

A model that fails does not fall silent: it answers late, or wrongly, or to half of its
callers, and the graphs of the machine look as always. Whoever alarms on every graph is
woken for nothing and soon sleeps on. Here a promise to the users (an objective) is
data, and everything follows from it: the alerts, their tests, the dashboard, and how
long an outage lasts before somebody hears of it. Then things are broken, and the
prediction is compared with the clock.

You will see: one request followed from the client to the log line; the model's drift
and its energy; real alerts from real faults, timed; a dashboard of one table.

Run it:     python monitoring_setup.py              all four sections, a minute
            python monitoring_setup.py 3 --quick    one section, rough figures, soon
            python monitoring_setup.py --watch URL  the dashboard of an API, live
            python monitoring_setup.py --deploy     write deploy/prometheus and grafana
Import it:  from monitoring_setup import SLO, rules, detection_s, psi
Needs:      pip install -r requirements.txt; real alerts also: Prometheus (README)
Next:       change an objective, run section 3 again, and see what moves
"""

from __future__ import annotations

import argparse
import asyncio
import io
import logging
import math
import secrets
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np

import models
from course import lesson
from course.lesson import Run
from course.show import Cell, Table, number
from local_cloud.monitoring import (
    deployed,
    drill,
    energy,
    light_load,
    logs,
    stack,
    terminal,
    traces,
)
from local_cloud.monitoring.curves import Curves
from local_cloud.monitoring.drift import WINDOW
from local_cloud.monitoring.energy import Interval
from local_cloud.monitoring.ground import RATE
from local_cloud.monitoring.light_load import CODE, ENGLISH, Seen, load
from local_cloud.monitoring.live import served
from local_cloud.monitoring.logs import JsonLines
from local_cloud.monitoring.objectives import (
    DAY_S,
    FAST_BURN,
    INTERVAL_S,
    SLO,
    Selector,
    Window,
    promql_time,
    within,
)
from local_cloud.monitoring.panels import Panel, Scraped, Watch, expressions
from local_cloud.monitoring.rule_groups import (
    burn_alert,
    causes,
    events_name,
    group,
    ratio_name,
    recorded,
)
from local_cloud.monitoring.rule_tests import RuleTest, burn_tests, cause_tests
from local_cloud.monitoring.scrape import quantile
from local_cloud.monitoring.traces import SQLiteSpans, Tracing
from model_api import create_app
from serving import trials
from serving.metrics import FIRST_TOKEN_S, PER_TOKEN_S
from serving.settings import Settings

# ## Performance metrics collection
#
# Three lists of what to watch are in use, and they are one. The golden signals are
# latency, traffic, errors and saturation; RED (rate, errors, duration) is what callers
# feel of them, USE (utilisation, saturation, errors) what the machine feels. A server
# only counts. Rates and percentiles are computed from two scrapes, because the counts
# of many servers can be added up and their percentiles cannot.
#
# A mean hides the worst wait. A percentile of a histogram is a guess between two edges;
# only the share under an edge is exact. So a promise gets an edge of its own, and the
# alarm looks at that share. No histogram knows who did not ask: clients who wait for
# answers stop asking while a server stands (coordinated omission). Here they do not.
#
# Pitfall: the first error raises no alarm; its series began at 1 and never rose. Cure:
# label children made up front, of labels whose values can be listed: each is a series
# for ever, and with users' names there would be a million.

GAP_PROMISE_S = 0.02  # from token to token; between two edges of the API's histogram
LOAD_PER_S, LOAD_S, ANSWER_TOKENS = 10.0, 2.5, 20
FIRST_S = "gen_ai_server_time_to_first_token_seconds"


def signals(seen: Seen) -> list[list[Cell]]:
    """How the lists call it, the metric behind it, and its value now."""
    now, waits = seen.counted, seen.counted.buckets(FIRST_S)
    rate, broken = seen.requests() / now.seconds, seen.requests("5")
    mean = now.total(f"{FIRST_S}_sum") / now.total(f"{FIRST_S}_count")
    written = now.total("gen_ai_server_tokens_total", gen_ai_token_type="output")
    queue, rows = "engine_queued_requests", "engine_active_rows"
    cores = now.total("process_cpu_seconds_total") / now.seconds
    return [
        ["traffic", "rate", "", f"{light_load.HTTP}_count", rate, "1/s"],
        ["", "", "", "gen_ai_server_tokens_total", written / now.seconds, "1/s"],
        ["errors", "errors", "errors", "the same, status 5xx", broken, ""],
        ["", "", "", "the same, 4xx: the callers'", seen.requests("4"), ""],
        ["latency", "duration", "", f"{FIRST_S}, p50", quantile(0.5, waits), "s"],
        ["", "", "", "the same, p99", quantile(0.99, waits), "s"],
        ["", "", "", "the same, mean", mean, "s"],
        ["saturation", "", "saturation", queue, seen.highest(queue), "highest"],
        ["", "", "utilisation", rows, seen.highest(rows), "highest"],
        ["", "", "utilisation", "process_cpu_seconds_total", cores, "cores"],
    ]


def show_signals(run: Run, url: str) -> None:
    run.predict("The buckets guess p99 from two edges; under an edge they are exact.")
    ask = partial(trials.small_talk, 12, ANSWER_TOKENS)
    seen = asyncio.run(light_load.load(url, ask, LOAD_PER_S, LOAD_S))
    columns = ["golden", "RED", "USE", "metric", "now", "unit"]
    note = "What vLLM, TGI and Triton call them: local_cloud/monitoring/names.py"
    run.table(Table("Between two scrapes of /metrics", columns, signals(seen), note))
    told = light_load.told_by_histograms(seen.gaps_s, PER_TOKEN_S, GAP_PROMISE_S)
    run.table(told)
    (_, true_ms, _), (_, guess_ms, _), *_ = told.rows
    late, early = (light_load.first_errors(made_up_front=m) for m in (False, True))
    run.conclude(
        f"The true p99 is {number(true_ms)} ms, by the API's buckets "
        f"{number(guess_ms)} ms. Of 3 first errors a series made by them shows {late}, "
        f"one made up front {early}."
    )


# A model also fails with every signal green: other questions come, and it answers as
# fluently as before. Nobody labels traffic, so its distribution is compared with that
# of better days, by the population stability index of binned counts. Rules of thumb
# (0.1, 0.25) ignore how noisy a sample is. The limit here is what one window in a
# hundred exceeds without drift. A window slides and forgets slowly, so that the alert
# waits ten minutes, for much of it to be new. An API exports drift once its operator
# has said which days were the better ones (`drift.watch_prompts`), and rules on it are
# deployed only then (`--deploy --drift`): their silence would look like peace.


def psi(baseline: Sequence[float], window: Sequence[float]) -> float:
    """How far apart two samples' counts are; half a value is added to every bin."""
    if min(sizes := (sum(baseline), sum(window))) < WINDOW:
        raise ValueError(f"psi: expected {WINDOW} values each, found {sizes}; wait")
    a, b = (np.asarray(counts) + 0.5 for counts in (baseline, window))
    a, b = a / a.sum(), b / b.sum()
    return float(((b - a) * np.log(b / a)).sum())


def show_drift(run: Run, url: str) -> None:
    run.predict("Who writes as before stays under the limit; who pastes code does not.")
    as_before = {} if run.quick else {"as before": ENGLISH}
    people = {"baseline": ENGLISH, **as_before, "pasting code": CODE}
    asked = light_load.windows(url, trials.NAME, people, WINDOW)
    scores, over = light_load.scores(asked, psi)
    run.table(scores)
    run.conclude(f"Over the limit: {', '.join(over) or 'nothing'}.")


# Energy is an interval where nothing measures it, as in a virtual machine. Between two
# ways of doing the same work on one machine the unknown watts cancel, so that a ratio
# is known well. The Software Carbon Intensity (ISO/IEC 21031) of 1,000 tokens is O + M:
# energy times the grid's intensity (O = E * I), and its part in making the machine (M).

GRAMS_A_KWH = 473.0  # world's mean in 2024: Ember, Global Electricity Review 2025
EMBODIED_KG = Interval(1000, 4000)  # these two are assumptions: ask the maker
SERVER_THREADS, LIFE_S = 128, 4 * 365 * 86400


def sci(energy: Interval, thread_s: float, intensity: float = GRAMS_A_KWH) -> Interval:
    """Grams of CO2 equivalent: joules used, and threads held for so many seconds."""
    made = EMBODIED_KG * (1000 * thread_s / SERVER_THREADS / LIFE_S)
    return energy * (intensity / 3.6e6) + made


def show_energy(run: Run, url: str) -> None:
    meter = energy.meters(cpu_s=light_load.cpu_seconds(url))[0]
    ask = partial(trials.small_talk, 3, ANSWER_TOKENS)
    turns = 3 if run.quick else 6
    alone, together = light_load.in_turns(url, ask, meter, 8, turns)
    ways = {"one at a time": alone, "eight at once": together}
    run.table(light_load.per_token(ways, sci, f"Energy by {meter.method}"))
    ratio = light_load.ratio(alone, together)
    run.conclude(f"A token alone takes, of the energy of one among eight: {ratio}.")


def demo_metrics(run: Run) -> None:
    """Read the signals of the real API, then its drift and its energy."""
    patient = {"TTFT_TARGET_MS": "60000"}  # nothing is refused for being late
    url = run.keep("server", partial(trials.running_server, run.device, **patient))
    show_signals(run, url)
    show_drift(run, url)
    show_energy(run, url)


# ## Logging and tracing systems
#
# A metric says that something is slow, a trace which part of which request, a log line
# what was said of it. One id leads from each to the others: the caller's, if a W3C
# `traceparent` came. It stands in a context variable, which every task of the request
# inherits and no thread does; so the engine's thread writes times down, and spans are
# made of them at the end. By then it is known who failed and who was slow: what nobody
# will look at is never built, and no exemplar names a trace that was not kept.

SLOW_S = 5.0
KEPT = 0.1  # of the requests that neither failed nor were slow


def worth_keeping(
    trace_id: str, seconds: float, failure: str | None, share: float = KEPT
) -> bool:
    """Tail sampling; the share goes by the id, so that all services keep the same."""
    drawn = int(trace_id[16:], 16) / 2**64
    return failure is not None or seconds >= SLOW_S or drawn < share


# A log line is JSON: one line whatever newlines a caller sent, and fields to search by.
# Prompts and answers stand in no line and no span; they are the callers'. Secrets get
# in by accident, with a header or an exception's text, so all that leaves is looked
# through: for their names, for their shapes, and for the keys that the server knows.
# That is `JsonLines`, the one formatter, in `logs.py`.


def demo_tracing(run: Run) -> None:
    """Follow one request, see what sampling keeps, hide a secret, add up the cost."""
    model = run.keep("model", partial(models.load, run.device))
    run.predict("Watching takes less than 150 µs and 0.1 % of a request's CPU.")
    written, trace_id = io.StringIO(), secrets.token_hex(16)
    settings = Settings(tokens_per_minute=1000)
    with (
        closing(SQLiteSpans()) as store,
        logs.lines(JsonLines(), written, "serving"),
        Tracing(store, partial(worth_keeping, share=1.0)) as tracing,
        trials.served(create_app(settings, model=model, telemetry=tracing)) as url,
    ):
        exemplar = asyncio.run(trials.followed(url, trace_id))
        tracing.flush()
        run.table(traces.table(store.trace(trace_id)))
        said = next(s for s in written.getvalue().splitlines() if trace_id in s)
        run.say(f"Its log line: {said}")
        run.say(f"Its exemplar: {exemplar}")
        tracing.keep = worth_keeping
        run.table(light_load.sampled(url, tracing, store, good=190, refused=10))
        logging.getLogger("serving").info("headers: %s", {"x-api-key": "hunter2"})
        run.say(f"A secret in a log line: {written.getvalue().splitlines()[-1]}")
        count = 200 if run.quick else 1000
        added_s, answer_s = trials.watching_s(model, tracing, count)
    run.conclude(
        f"Metrics, log line and one trace of ten add {added_s * 1e6:.0f} µs of CPU to "
        f"a request, {added_s / answer_s:.3%} of what its answer takes."
    )


# ## Alerting and notification systems
#
# An alert on a cause (a busy processor, a full queue) wakes people while the users are
# content, and sleeps through what nobody thought of. So the promise to the users is
# what alarms. What it lets fail is a budget, and the question is how fast that burns: a
# burn of 1 spends the budget of 30 days in 30 days. The four pairs of windows below are
# those of Google's SRE workbook, chapter 5; each fires when a part of it is gone. The
# long window says that it matters, the short one that it goes on.

ANSWERS = {"http_route": "~/v1/.*", "http_request_method": "POST"}  # no health checks
HTTP = "http_server_request_duration_seconds_count"
FIRST_TOKEN = "gen_ai_server_time_to_first_token_seconds"

SLOS = (
    SLO(
        name="availability",
        objective=0.99,
        description="requests that no fault of the server ends",
        bad=Selector(HTTP, ANSWERS | {"http_response_status_code": "~5.."}),
        total=Selector(HTTP, ANSWERS),
    ),
    SLO(
        name="first_token",
        objective=0.95,
        description="answers whose first token comes within 2.5 s",
        # Pitfall: a threshold between two edges of the histogram is only guessed at.
        # Cure: `within` takes none but an edge, and the alert counts what is under it.
        good=within(FIRST_TOKEN, FIRST_TOKEN_S, 2.5),
        total=Selector(f"{FIRST_TOKEN}_count"),
    ),
)
MINUTE_S, HOUR_S = 60.0, 3600.0
WINDOWS = (
    Window("page", FAST_BURN, HOUR_S, 5 * MINUTE_S),  # 2 % of the budget is gone
    Window("page", 6, 6 * HOUR_S, 30 * MINUTE_S),  # 5 %
    Window("ticket", 3, DAY_S, 2 * HOUR_S),  # 10 %
    Window("ticket", 1, 3 * DAY_S, 6 * HOUR_S),  # 10 %
)
# At night one failure among six requests would be a burn of 17, and wake somebody.
LEAST = 20  # requests in the long window, or no share of them is worth a word


def error_ratio(slo: SLO, window_s: float) -> str:
    """The share of bad events over a window, in PromQL, for each job by itself.

    Not one sum over all jobs: an edge and the API behind it count the same requests.
    """

    def rate(selector: Selector) -> str:
        return f"sum by (job) (rate({selector.promql()}[{promql_time(window_s)}]))"

    if slo.good:
        return f"1 - {rate(slo.good)} / {rate(slo.total)}"
    assert slo.bad is not None  # an SLO counts one or the other
    return f"{rate(slo.bad)} / {rate(slo.total)}"


def events(slo: SLO, window_s: float) -> str:
    """How many events a window holds: of a handful no share says anything."""
    total = f"{slo.total.promql()}[{promql_time(window_s)}]"
    return f"sum by (job) (increase({total}))"


def detection_s(
    slo: SLO, share_of_errors: float, scale: float = 1.0, history_s: float = math.inf
) -> float:
    """Seconds from the start of a fault to the page; infinite if it never pages.

    While a fault lasts, its share of a window grows until the window holds nothing
    else. Where Prometheus is younger than its windows it holds less that is good:
    `history_s` seconds of it, and the same fault is found sooner.
    """

    def crossed_s(window: Window) -> float:
        limit = window.burn * slo.budget
        if share_of_errors <= limit:
            return math.inf
        full = window.long_s / scale * limit / share_of_errors
        return min(full, history_s * limit / (share_of_errors - limit))

    return min(crossed_s(w) for w in WINDOWS if w.severity == "page")


def rules(slo: SLO, scale: float = 1.0) -> dict[str, Any]:
    """The group of Prometheus rules that keeps watch over one objective.

    `scale` shortens time and nothing else: 1 is production, 60 makes minutes seconds.
    The names of what is recorded say the windows of production at any scale.
    """
    spans = {s for w in WINDOWS for s in (w.long_s, w.short_s)}
    kept = {ratio_name(s): error_ratio(slo, s / scale) for s in sorted(spans)}
    kept |= {events_name(w.long_s): events(slo, w.long_s / scale) for w in WINDOWS}
    alerts = [burn_alert(slo, way, WINDOWS, LEAST) for way in ("page", "ticket")]
    return group(slo.name, [*recorded(slo, kept), *alerts], scale)


# Some alerts are on causes all the same: what no request can tell, because none gets
# through (a stopped process), because its answer is good (drift), or because it is
# about the watch itself. A rule that fails to fire looks like peace. So one fires
# always, the watchdog, and its receiver raises the alarm when it falls silent. These
# stand with their tests in `rule_groups.py` and `rule_tests.py`.


def groups(scale: float = 1.0) -> list[dict[str, Any]]:
    """All rules: a group for each objective, and the causes."""
    return [*(rules(slo, scale) for slo in SLOS), causes(scale)]


def rule_tests() -> list[RuleTest]:
    """What promtool tries the rules of production by."""
    return [
        *(t for slo in SLOS for t in burn_tests(slo, WINDOWS, LEAST)),
        *cause_tests(),
    ]


# The demonstration makes an hour half a minute, so that alerts also end within sight.
DEMO_SCALE = 120.0
DEMO_HISTORY_S = 6.0  # of good traffic before anything breaks
DEMO_SHARE = 0.4  # of requests that fail; if all did, it would be found at once


def due_s(share_of_errors: float, history_s: float) -> float:
    """When availability pages in the demonstration, after so long a past."""
    return detection_s(SLOS[0], share_of_errors, DEMO_SCALE, history_s)


def demo_alerts(run: Run) -> None:
    """Errors, a stopped server and a blip: what was due when, and who was told."""
    if missing := stack.found():
        run.skip(f"the real Prometheus: {missing.partition(';')[0]}", stack.INSTALL)
        run.say("The portable evaluator takes its place, with the same rules.")
    late_s = 2 * INTERVAL_S / DEMO_SCALE + 1 / (DEMO_SHARE * RATE)
    soon_s = due_s(DEMO_SHARE, DEMO_HISTORY_S)
    run.predict(
        f"If {DEMO_SHARE:.0%} fail, a page after {soon_s:.1f} s and up to "
        f"{late_s:.1f} s more: for the next to fail, to be scraped and looked at. "
        "If one request fails, none."
    )
    ratio = f'{ratio_name(6 * HOUR_S)}{{slo="{SLOS[0].name}"}}'
    plan = drill.Plan(groups(DEMO_SCALE), DEMO_SCALE, DEMO_HISTORY_S, DEMO_SHARE, due_s)
    with run.progress("drill"):
        told = drill.rehearse(plan, ratio, SLOS[0].budget)
    came = told.outcomes
    run.table(drill.table(came, f"The drill at scale {DEMO_SCALE:g}, by {told.by}"))
    run.say(f"The page of the errors: {told.page or 'none'}")
    picture = partial(drill.draw, curves=told.curves, outcomes=came, limit=6)
    run.picture(picture, "drill")
    apart = [f"{one.late_s:+.1f} s" for one in came if one.late_s and one.fault.barred]
    run.conclude(
        f"Of {len(came)} faults {sum(one.good for one in came)} went as promised; "
        f"alerts came {' and '.join(apart) or 'never, not'} beside their predictions."
    )


# ## Dashboards for visibility
#
# A wall of graphs answers nothing. Each panel below has a question that somebody asks
# when woken: do the users suffer (burn, errors, latency), or is the machine full
# (queue, rows, processor, memory)? Questions and PromQL stand once, in one table that a
# page, a terminal and Grafana draw. `scale` shortens time, as it does for the rules.

JOB = "api"  # an edge in front has metrics of the same names
PER_TOKEN = "gen_ai_server_time_per_output_token_seconds"
LIVE_SCALE = 30.0  # five minutes are ten seconds: a page that moves while one looks


def panels(scale: float = 1.0) -> list[Panel]:
    """The dashboard. Each expression gives one number, or nothing."""
    ask = Curves(JOB, promql_time(5 * MINUTE_S / scale))
    requests = ask.rate(HTTP, ANSWERS)

    def ended(code: str) -> str:
        # Pitfall: before the first failure there is no series of failures, and a panel
        # without data looks like a dead server's. Cure: zero while there are requests.
        some = ask.rate(HTTP, ANSWERS | {"http_response_status_code": code})
        return f"({some} or 0 * {requests})"

    def burn(slo: SLO, window_s: float) -> str:
        window = promql_time(window_s / scale)
        none = f"0 * sum by (job) (rate({slo.total.promql()}[{window}]))"
        worst = f"max({error_ratio(slo, window_s / scale)} or {none})"
        return f"{worst} / {slo.budget:.6g}"

    active, rows = ask.now("engine_active_rows"), ask.now("engine_rows")
    codes = {"answered": "~2..", "refused": "~4..", "failed": "~5.."}
    ends = {name: ended(code) for name, code in codes.items()}
    errors = {"failed": f"{ends['failed']} / {requests}"}
    fast = {slo.name: burn(slo, HOUR_S) for slo in SLOS}
    left = {slo.name: f"1 - {burn(slo, slo.period_s)}" for slo in SLOS}
    written = ask.rate("engine_generated_tokens_total")
    tokens = {"written": written, "read": ask.rate("engine_prompt_tokens_total")}
    waiting = {"waiting": ask.now("engine_queued_requests")}
    used = {"used": ask.rate("process_cpu_seconds_total")}
    memory = {"resident": ask.now("process_resident_memory_bytes")}
    first, pace = ask.quantiles(FIRST_TOKEN), ask.quantiles(PER_TOKEN)
    return [
        Panel("Burn rate", "x", "Will the budget last? 1 is just enough", fast),
        Panel("Budget left", "%", "May a release be risked?", left, "gauge"),
        Panel("Requests", "req/s", "How many, and how do they end?", ends),
        Panel("Errors", "%", "What share fails?", errors),
        Panel("First token", "s", "When does it show?", first),
        Panel("Time per token", "s", "Does it keep pace?", pace),
        Panel("Tokens", "tokens/s", "How much is done?", tokens),
        Panel("Queue", "requests", "Does work wait?", waiting),
        Panel("Rows", "rows", "How many at once?", {"active": active, "all": rows}),
        Panel("Saturation", "%", "Room left?", {"used": f"{active} / {rows}"}, "gauge"),
        Panel("Processor", "cores", "Is it the limit?", used),
        Panel("Memory", "B", "Does it leak?", memory),
    ]


PANELS = panels()


def demo_dashboards(run: Run) -> None:
    """Put the API under load, and look at it through the table."""
    url = run.keep("server", partial(trials.running_server, run.device))
    seconds, live = (5 if run.quick else 8), panels(LIVE_SCALE)
    run.predict(f"All {len(expressions(live))} curves of {len(live)} panels have data.")
    watch = Watch(live, Scraped(f"{url}/metrics", live))
    with served(watch) as (page, _), run.progress(f"Live at {page}"):
        asyncio.run(load(url, partial(trials.small_talk, 30, 32), 3, seconds))
    run.table(terminal.table(watch, f"{seconds} seconds of load"))
    curves = watch.current()
    known = sum(math.isfinite(values[-1]) for *_, values in curves)
    run.conclude(
        f"{known} of {len(curves)} have data, without Prometheus. To look for longer, "
        "at an API or a Prometheus, here and as a page: "
        "python monitoring_setup.py --watch http://127.0.0.1:8000"
    )


SECTIONS = [
    lesson.Section("Performance metrics collection", demo_metrics),
    lesson.Section("Logging and tracing systems", demo_tracing),
    lesson.Section("Alerting and notification systems", demo_alerts),
    lesson.Section("Dashboards for visibility", demo_dashboards),
]


def main(argv: list[str] | None = None) -> int:
    """Run the lesson, or write what is deployed."""
    return lesson.run(
        doc=__doc__,
        sections=SECTIONS,
        argv=argv,
        number=6,
        after="python -m course report",
        add_arguments=partial(terminal.add_arguments, scale_now=LIVE_SCALE),
        instead=instead,
    )


def instead(arguments: argparse.Namespace) -> int | None:
    """What is asked for in place of the lesson; gives the exit code."""
    if arguments.watch:
        return terminal.show(arguments.watch, panels(arguments.scale))
    if arguments.deploy:
        deployed.write(groups(), rule_tests(), PANELS, drift=arguments.drift)
        return 0
    return None


if __name__ == "__main__":
    raise SystemExit(main())
