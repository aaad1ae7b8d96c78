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
import json
import logging
import math
import re
import secrets
import time
from collections.abc import Sequence
from contextlib import closing
from datetime import UTC, datetime
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

import models
from course import lesson
from course.lesson import Run
from course.machine import cpu_quota
from course.show import Cell, Table, number
from local_cloud.monitoring import (
    deployed,
    drill,
    energy,
    grafana,
    light_load,
    logs,
    stack,
    terminal,
    traces,
)
from local_cloud.monitoring.drift import WINDOW
from local_cloud.monitoring.energy import Interval
from local_cloud.monitoring.ground import Ground
from local_cloud.monitoring.light_load import CODE, ENGLISH, Seen, load
from local_cloud.monitoring.live import served
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
from local_cloud.monitoring.rule_groups import alert, causes, group
from local_cloud.monitoring.rule_tests import RuleTest, burn_tests, cause_tests
from local_cloud.monitoring.scrape import quantile
from local_cloud.monitoring.traces import SQLiteSpans, Tracing
from model_api import create_app
from serving import trials
from serving.metrics import FIRST_TOKEN_S, PER_TOKEN_S
from serving.settings import Settings
from serving.telemetry import CURRENT

DEPLOY = Path(__file__).resolve().parent / "deploy"

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
# hundred exceeds without drift, so the alert waits for two. `DriftCollector` exports
# both: model_input_drift_psi, model_input_drift_limit.


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
    rows: list[list[Cell]] = []
    found = []
    for feature, who, watch in light_load.watched(asked, psi):
        rows.append([feature, who, watch.value(), watch.limit])
        found += [f"{feature} ({who})"] if watch.value() > watch.limit else []
    columns = ["feature", "users", "PSI", "limit, p99 without drift"]
    run.table(Table(f"Drift, windows of {WINDOW} answers", columns, rows))
    run.conclude(f"Over the limit: {', '.join(found) or 'nothing'}.")


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
    rows: list[list[Cell]] = []
    for name, works in (("one at a time", alone), ("eight at once", together)):
        token = light_load.middle(works)
        grams = sci(token.joules * 1000, token.seconds * 1000 * cpu_quota())
        rows.append([name, str(token.joules), str(grams), turns])
    columns = ["answers", ("energy", "J/token"), ("SCI", "g/1,000 tokens"), "n"]
    run.table(Table(f"Energy by {meter.method}", columns, rows))
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

SECRET_NAME = re.compile(
    r"(?i)authorization|cookie|passw|secret|credential|(api|private).?key|token$"
)
SECRET = re.compile(
    r"""(?isx)
    (?P<rest> (?:authorization|cookie) ["'\\]* \s*[:=,]\s* b?["'\\]* ) [^"'\\\r\n]+
    | (?P<pair> (?:passw\w{0,9}|secret\w{0,9}|credentials?|(?:api|private).?key
        |(?:access|auth|session).?token) ["'\\]* \s*[:=]\s* b?["'\\]* ) [^\s"'\\,;&]+
    | (?P<kind> \b(?:bearer|basic)\s+ ) [^\s"'\\,]{6,}
    | (?P<user> ://[^\s/:@]*: ) [^\s/@]+ (?=@)
    | \b(?:sk|pk|rk|fw|hf|gh[a-z]|xox[a-z]|glpat)[-_][\w-]{8,} | \bAKIA\w{12,}
    | \beyJ[\w-]+\.[\w-]+\.[\w-]*  # a JSON web token
    | -----BEGIN\ [A-Z\ ]*KEY-----.*?(?:-----END[^-]*-----|\Z)
    | (?<![\w-])(?=[\w-]*\d)(?=[\w-]*[a-z])[\w-]{40,}  # long and random; ids have 32
    """
)


class JsonLines(logging.Formatter):
    """The one formatter: any record becomes one line of JSON, with the trace's ids."""

    usual = frozenset(logging.makeLogRecord({}).__dict__) | {"taskName"}

    def __init__(self, known_secrets: Sequence[str] = ()):
        super().__init__()
        self.known = [secret for secret in known_secrets if secret]

    def hide(self, text: str) -> str:
        for secret in self.known:
            text = text.replace(secret, "[redacted]")
        if len(text) < 40 and text.isalnum() and text[:4] != "AKIA":
            return text  # a word or an id: no form fits, and most values are such
        return SECRET.sub(r"\g<rest>\g<pair>\g<kind>\g<user>[redacted]", text)

    def format(self, record: logging.LogRecord) -> str:
        """Never raises: what cannot be said is described."""
        when = datetime.fromtimestamp(record.created, UTC).isoformat()
        told: dict[str, Any] = {"level": record.levelname, "logger": record.name}
        told["message"] = logs.message(record)
        if trace := CURRENT.get():
            ids = ("trace_id", "span_id", "request_id")
            told |= {name: getattr(trace, name, None) for name in ids}
        told |= {k: v for k, v in record.__dict__.items() if k not in self.usual}
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            told["stack"] = record.stack_info
        told = logs.plain(told, self.hide, SECRET_NAME)
        return json.dumps({"time": when, **told})


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
        tracing.keep, before = worth_keeping, len(store.roots())
        asyncio.run(trials.mixed(url, good=190, refused=10))
        logging.getLogger("serving").info("headers: %s", {"x-api-key": "hunter2"})
        tracing.flush()
        kept = [root.error for root in store.roots()[before:]]
        rows = [["answered", 190, kept.count(None)], ["refused", 10, kept.count("429")]]
        run.table(Table("What sampling keeps", ["requests", "sent", "traces"], rows))
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
# those of Google's SRE workbook, chapter 5; each fires when a part of it is gone.

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
    The names of the recorded ratios say the windows of production at any scale.
    """
    spans = sorted({s for w in WINDOWS for s in (w.long_s, w.short_s)})
    labels = {"slo": slo.name}
    recorded = [
        {"record": ratio_name(s), "expr": error_ratio(slo, s / scale), "labels": labels}
        for s in spans
    ]
    alerts = [burn_alert(slo, severity) for severity in ("page", "ticket")]
    return group(slo.name, [*recorded, *alerts], scale)


def alert_name(slo: SLO) -> str:
    """The name of both of its alerts: the page and the ticket differ in severity."""
    return f"{slo.name.title().replace('_', '')}Burn"


def ratio_name(window_s: float) -> str:
    return f"slo:error_ratio:rate{promql_time(window_s)}"


def burn_alert(slo: SLO, severity: str) -> dict[str, Any]:
    """One alert for all windows of a severity: any pair of them, but both of a pair."""

    def burning(window: Window) -> str:
        above = f'{{slo="{slo.name}"}} > {window.burn * slo.budget:.6g}'
        spans = (window.long_s, window.short_s)
        return " and ".join(ratio_name(s) + above for s in spans)

    pairs = [f"({burning(w)})" for w in WINDOWS if w.severity == severity]
    return alert(
        alert_name(slo),
        severity,
        " or ".join(pairs),
        f"promised: {slo.objective:.4g} of {slo.description}; "
        "{{ $value | humanizePercentage }} are not",
        slo=slo.name,
    )


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
    made = [burn_tests(slo, WINDOWS, alert_name(slo)) for slo in SLOS]
    return [*chain.from_iterable(made), *cause_tests()]


# The demonstration makes an hour half a minute, so that alerts also end within sight.
DEMO_SCALE = 120.0
DEMO_HISTORY_S = 6.0  # of good traffic before anything breaks


def predict_s(history_s: float) -> float:
    """When availability pages, if from now on all requests fail."""
    return detection_s(SLOS[0], 1.0, DEMO_SCALE, history_s)


def demo_alerts(run: Run) -> None:
    """Errors, a stopped server and a blip: what was due when, and who was told."""
    if missing := stack.found():
        run.skip(f"the real Prometheus: {missing.partition(';')[0]}", stack.INSTALL)
        run.say("The portable evaluator takes its place, with the same rules.")
    late_s = 2 * INTERVAL_S / DEMO_SCALE  # of a scrape and a look at the rules
    run.predict(
        f"If all fails, a page after {predict_s(DEMO_HISTORY_S):.1f} s and up to "
        f"{late_s:.1f} s more, to be scraped and looked at. If one request fails, none."
    )
    jobs = {"errors": "api", "blip": "api", "stopped": "api-2"}
    with (
        run.progress("drill"),
        Ground(groups(DEMO_SCALE), jobs, scale=DEMO_SCALE, edges_s=(2.5,)) as ground,
    ):
        time.sleep(DEMO_HISTORY_S)
        faults = [
            drill.errors(ground, "errors", 1.0, predict_s),
            drill.freeze(ground, "stopped", predict_s),
            drill.blip(ground, "blip", 1, predict_s),
        ]
        told = drill.run(ground, faults, DEMO_HISTORY_S)
        ratio = f'{ratio_name(6 * HOUR_S)}{{slo="{SLOS[0].name}"}}'
        curves = drill.burn_curves(ground, told, ratio, SLOS[0].budget)
    by = type(ground.watch).__name__
    run.table(drill.table(told, f"The drill at scale {DEMO_SCALE:g}, by {by}"))
    run.picture(partial(drill.draw, curves=curves, outcomes=told, limit=6), "drill")
    apart = [f"{one.late_s:+.1f} s" for one in told if one.late_s and one.fault.barred]
    run.conclude(
        f"Of {len(told)} faults {sum(one.good for one in told)} went as promised; "
        f"alerts came {' and '.join(apart) or 'never, not'} beside their predictions."
    )


# ## Dashboards for visibility
#
# A wall of graphs answers nothing. Each panel below has a question that somebody asks
# when woken: do the users suffer (burn, errors, latency), or is the machine full
# (queue, rows, processor, memory)? Questions and PromQL stand once, in one table that a
# page, a terminal and Grafana draw. `scale` shortens time, as it does for the rules.

JOB = {"job": "api"}  # an edge in front has metrics of the same names
PER_TOKEN = "gen_ai_server_time_per_output_token_seconds"
LIVE_SCALE = 30.0  # five minutes are ten seconds: a page that moves while one looks


def panels(scale: float = 1.0) -> list[Panel]:
    """The dashboard. Each expression gives one number, or nothing."""
    span = promql_time(5 * MINUTE_S / scale)

    def now(metric: str) -> str:
        return f"sum({Selector(metric, JOB).promql()})"

    def rate(metric: str, code: str = "", by: str = "") -> str:
        matchers = JOB | (ANSWERS if metric == HTTP else {})
        matchers |= {"http_response_status_code": code} if code else {}
        return f"sum{by}(rate({Selector(metric, matchers).promql()}[{span}]))"

    def ended(code: str) -> str:
        # Pitfall: before the first failure there is no series of failures, and a panel
        # without data looks like a dead server's. Cure: zero while there are requests.
        return f"({rate(HTTP, code)} or 0 * {rate(HTTP)})"

    def quantiles(histogram: str) -> dict[str, str]:
        buckets = rate(f"{histogram}_bucket", by=" by (le) ")
        shares = {"median": 0.5, "99th percentile": 0.99}
        return {k: f"histogram_quantile({q}, {buckets})" for k, q in shares.items()}

    def burn(slo: SLO, window_s: float) -> str:
        window = promql_time(window_s / scale)
        none = f"0 * sum by (job) (rate({slo.total.promql()}[{window}]))"
        worst = f"max({error_ratio(slo, window_s / scale)} or {none})"
        return f"{worst} / {slo.budget:.6g}"

    active, rows = now("engine_active_rows"), now("engine_rows")
    codes = {"answered": "~2..", "refused": "~4..", "failed": "~5.."}
    ends = {name: ended(code) for name, code in codes.items()}
    errors = {"failed": f"{ends['failed']} / {rate(HTTP)}"}
    fast = {slo.name: burn(slo, HOUR_S) for slo in SLOS}
    left = {slo.name: f"1 - {burn(slo, slo.period_s)}" for slo in SLOS}
    written = rate("engine_generated_tokens_total")
    tokens = {"written": written, "read": rate("engine_prompt_tokens_total")}
    waiting = {"waiting": now("engine_queued_requests")}
    used = {"used": rate("process_cpu_seconds_total")}
    memory = {"resident": now("process_resident_memory_bytes")}
    return [
        Panel("Burn rate", "x", "Will the budget last? 1 is just enough", fast),
        Panel("Budget left", "%", "May a release be risked?", left, "gauge"),
        Panel("Requests", "req/s", "How many, and how do they end?", ends),
        Panel("Errors", "%", "What share fails?", errors),
        Panel("First token", "s", "When does it show?", quantiles(FIRST_TOKEN)),
        Panel("Time per token", "s", "Does it keep pace?", quantiles(PER_TOKEN)),
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
        add_arguments=add_arguments,
        instead=instead,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--deploy", action="store_true", help="write deploy/prometheus and grafana"
    )
    parser.add_argument(
        "--watch", metavar="URL", help="the dashboard of an API or a Prometheus, live"
    )
    parser.add_argument(
        "--scale",
        type=float,
        default=LIVE_SCALE,
        help="of its windows: 1 is production's (default: %(default)g)",
    )


def instead(arguments: argparse.Namespace) -> int | None:
    """What is asked for in place of the lesson; gives the exit code."""
    if arguments.watch:
        return terminal.show(arguments.watch, panels(arguments.scale))
    return write_deploy() if arguments.deploy else None


def write_deploy() -> int:
    """Write all generated files; gives the exit code."""
    written = {f"grafana/{name}": t for name, t in grafana.files(PANELS).items()}
    for name, text in deployed.files(groups(), rule_tests()).items():
        written[f"prometheus/{name}"] = text
    for name, text in written.items():
        path = DEPLOY / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
