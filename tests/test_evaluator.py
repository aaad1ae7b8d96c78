"""The portable evaluator: held against promtool, then against what goes wrong live."""

from __future__ import annotations

import json
import math
import random
import re
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import monitoring_setup
from course.process import free_port, wait_until
from local_cloud.monitoring import promql, stack
from local_cloud.monitoring.alerting import Rules
from local_cloud.monitoring.evaluator import Evaluator
from local_cloud.monitoring.notify import MOST_WAITING
from local_cloud.monitoring.promql import Query, QueryError
from local_cloud.monitoring.receivers import Mailbox, Webhook
from local_cloud.monitoring.samples import MOST_SERIES, NAME, Samples, Target, labelled

SCALE, STEP_S, STEPS = 60.0, 0.5, 240  # two minutes of a live drill
DIGITS = 1024 * 99_991  # no ratio of counts lies just between two numbers
HTTP = "http_server_request_duration_seconds_count"
FIRST = "gen_ai_server_time_to_first_token_seconds"
QUEUED = "engine_queued_requests > 8"
HELD = {
    "name": "held",
    "rules": [
        {"alert": "Held", "expr": QUEUED, "for": "2s", "keep_firing_for": "4s"},
        {"record": "queued:limit", "expr": QUEUED, "labels": {"kind": "high"}},
    ],
}
Values = list[float | None]  # None: no sample; infinite: the series ends


def needs_prometheus_2() -> None:
    if missing := stack.found():
        pytest.skip(missing)
    told = subprocess.run(["promtool", "--version"], capture_output=True, text=True)
    if not re.search(r"version 2\.", told.stdout + told.stderr):
        pytest.skip("Prometheus 3 leaves a window's left edge open; install 2.x")


def recorded(seed: int) -> dict[tuple[str, tuple[tuple[str, str], ...]], Values]:
    """Two minutes of three services: errors, restarts, and scrapes that fail."""
    draw = random.Random(seed)
    series: dict[Any, Values] = {}
    for job in ("edge", "api", "idle"):
        good, bad, first, slow = 0.0, 0.0, 0.0, 0.0
        share, late = 0.0, 0.0
        columns: list[list[float | None]] = [[], [], [], []]
        for step in range(STEPS):
            if step % 20 == 0:
                share, late = draw.choice([0, 0, 0.05, 0.3, 1]), draw.choice([0, 0.9])
            if job != "idle":
                requests = draw.randint(0, 9)
                bad += requests * share
                good += requests * (1 - share)
                first += requests
                slow += requests * late
            if draw.random() < 0.01:  # restarted
                good = bad = first = slow = 0.0
            now: list[float | None] = [good, bad, first, first - slow]
            gap = job == "api" and draw.random() < 0.1
            ended = job == "api" and 100 <= step < 110
            now = [math.inf] * 4 if ended else [None] * 4 if gap else now
            for column, value in zip(columns, now, strict=True):
                column.append(value)
        answers = {"http_route": "/v1/completions", "http_request_method": "POST"}
        for code, column in zip(("200", "500"), columns, strict=False):
            labels = {"job": job, **answers, "http_response_status_code": code}
            series[HTTP, tuple(labels.items())] = column
        series[f"{FIRST}_count", (("job", job),)] = columns[2]
        series[f"{FIRST}_bucket", (("job", job), ("le", "2.5"))] = columns[3]
    steps = range(STEPS)
    gauges: dict[str, Values] = {
        "up": [float(draw.random() > 0.2 or step < 120) for step in steps],
        "engine_rows": [8.0] * STEPS,
        "engine_queued_requests": [float((step // 7) % 3 * 6) for step in steps],
        "engine_stalled_seconds": [max(0.0, step - 200.0) for step in steps],
        "process_resident_memory_bytes": [
            3e8 + max(0, step - 60) * 1e7 + draw.random() * 1e6 for step in steps
        ],
        "model_input_drift_psi": [math.nan] * 80 + [0.3] * 60 + [0.1] * 100,
        "model_input_drift_limit": [0.2] * STEPS,
        "host_clock_seconds": [
            step * STEP_S + (9.0 if 50 <= step < 90 else 0) for step in steps
        ],
    }
    gauges["host_clock_offset_seconds"] = [
        1000.0 + (9 if 50 <= step < 90 else 0) for step in steps
    ]
    for name, values in gauges.items():
        series[name, (("job", "api"),)] = values
    return series


def evaluated(series: Any, rules: Rules) -> Iterator[tuple[float, Samples, Rules]]:
    """After each evaluation: the time and all there is to ask."""
    samples = Samples(keep_s=1e6)
    for step in range(STEPS):
        at = step * STEP_S
        for (name, labels), values in series.items():
            value, identity = values[step], labelled(name, dict(labels))
            if value == math.inf:
                samples.end(identity, at)
            elif value is not None:
                samples.add(identity, at, value)
        rules.evaluate(samples, at)
        yield at, samples, rules


def expectations(series: Any, groups: Any) -> list[dict[str, Any]]:
    """What this evaluator says at each moment, as tests for promtool."""
    records = {rule.get("record") for group in groups for rule in group["rules"]}
    tests: list[dict[str, Any]] = []
    for at, samples, rules in evaluated(series, Rules(groups)):
        alerts = [
            written("ALERTS", {**alert.labels, "alertstate": alert.state})
            for alert in rules.alerts()
        ]
        tests.append(expectation(at, "ALERTS", dict.fromkeys(alerts, 1.0)))
        tests += [asked(name, samples, at) for name in sorted(records - {None})]
    return tests


def asked(text: str, samples: Samples, at: float) -> dict[str, Any]:
    """An expression and what it is here; promtool compares numbers to the last bit."""
    whole = f"round(({text}) * {DIGITS})"
    found: dict[str, float] = {}
    for labels, value in Query(whole).vector(samples, at).items():
        if not math.isnan(value):
            name = dict(labels).get(NAME, "")
            plain = {k: v for k, v in labels if k != NAME}
            found[written(name, plain)] = value
    return expectation(at, f"{whole} > -Inf", found)


def expectation(at: float, expr: str, found: dict[str, float]) -> dict[str, Any]:
    samples = [{"labels": labels, "value": value} for labels, value in found.items()]
    when = f"{round(at * 1000)}ms"
    return {"expr": expr, "eval_time": when, "exp_samples": samples}


def written(name: str, labels: dict[str, str]) -> str:
    return name + "{" + ",".join(f'{k}="{v}"' for k, v in labels.items()) + "}"


def promtool(folder: Path, groups: Any, series: Any, tests: Any) -> None:
    """Raises StackError where the real Prometheus sees it otherwise."""
    words = {None: "_", math.inf: "stale"}
    test = {
        "interval": "500ms",
        "input_series": [
            {
                "series": written(name, dict(labels)),
                "values": " ".join(words.get(v) or repr(v) for v in values),
            }
            for (name, labels), values in series.items()
        ],
        "promql_expr_test": tests,
    }
    rules, file = folder / "rules.json", folder / "test.json"
    rules.write_text(json.dumps({"groups": groups}))
    whole = {"rule_files": [str(rules)], "evaluation_interval": "500ms"}
    file.write_text(json.dumps({**whole, "tests": [test]}))
    stack.check("promtool", "test", "rules", str(file))


@pytest.mark.prometheus
@pytest.mark.parametrize("seed", [1, 2])
def test_it_agrees_with_prometheus_at_every_evaluation(seed: int, tmp_path: Path):
    needs_prometheus_2()
    series, groups = recorded(seed), [*monitoring_setup.groups(SCALE), HELD]
    tests = expectations(series, groups)
    states = str([test["exp_samples"] for test in tests if test["expr"] == "ALERTS"])
    alerts = {"AvailabilityBurn", "FirstTokenBurn", "TargetDown", "MemoryGrows", "Held"}
    alerts |= {"ClockStep", "ClockSkew", "InputDrift"}
    missing = {name for name in alerts if name not in states}
    assert not missing, "the recording must have something to disagree about"
    promtool(tmp_path, groups, series, tests)


@pytest.mark.prometheus
@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("rate", lambda series, first, end, *_: series.values[end - 1]),  # no increase
        ("predict_linear", promql.RANGE_FUNCTIONS["last_over_time"]),
    ],
)
def test_an_evaluator_that_is_wrong_would_be_found_out(
    name: str, wrong: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    needs_prometheus_2()
    series, groups = recorded(1), monitoring_setup.groups(SCALE)
    monkeypatch.setitem(promql.RANGE_FUNCTIONS, name, wrong)
    with pytest.raises(stack.StackError, match="FAILED"):
        promtool(tmp_path, groups, series, expectations(series, groups))


@pytest.mark.prometheus
def test_what_dashboards_ask_is_answered_alike(tmp_path: Path):
    """Functions no rule uses, and the ways two vectors are matched."""
    needs_prometheus_2()
    series = recorded(4)
    bucket = "histogram_quantile(0.5, sum by (le) (x_bucket))"
    for edge, values in {"0.1": [1, 2], "1": [5, 9], "+Inf": [6, 20]}.items():
        series["x_bucket", (("le", edge),)] = [float(v) for v in values * 120]
    texts = [
        bucket,
        f"sum by (job) (increase({HTTP}[20s] offset 5s))",
        "deriv(process_resident_memory_bytes[30s]) / 1000000000",
        f"avg without (http_response_status_code) ({HTTP})",
        f"{FIRST}_count - ignoring (le) {FIRST}_bucket",
        "max_over_time(engine_queued_requests[7s]) / on (job) engine_rows",
        'engine_queued_requests > bool 6 or absent(nothing{job="x"})',
        f"{FIRST}_count unless on (job) up == 0",
        "clamp_max(engine_queued_requests, 7) * 2 != 14",
        f'count({HTTP}{{http_response_status_code!~"5..",job!="idle"}})',
    ]
    tests = [
        asked(text, samples, at)
        for at, samples, _ in evaluated(series, Rules([]))
        for text in texts
        if at % 7 == 0
    ]
    assert all(any(test["exp_samples"] for test in tests[i::10]) for i in range(10))
    promtool(tmp_path, [], series, tests)


# ## What goes wrong


class Page:
    """A target: its `/metrics` says what `text` is, `pause_s` after it was asked."""

    def __init__(self, text: str = "", pause_s: float = 0.0) -> None:
        self.text, self.pause_s, self.asked = text, pause_s, 0
        page = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                page.asked += 1
                self.send_response(200)
                self.end_headers()
                for piece in page.text.splitlines(keepends=True):
                    page.over.wait(page.pause_s)
                    try:
                        self.wfile.write(piece.encode())
                    except OSError:
                        return

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.over = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.address = f"127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Page:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


def group(*rules: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"name": "of a test", "rules": list(rules)}]


def rule(name: str, expr: str, severity: str, **more: Any) -> dict[str, Any]:
    return {"alert": name, "expr": expr, "labels": {"severity": severity}, **more}


def values(evaluator: Evaluator, expr: str) -> dict[str, float]:
    """By job."""
    found = evaluator.query(expr)
    return {one["metric"].get("job", ""): float(one["value"][1]) for one in found}


def test_targets_that_hang_trickle_or_talk_nonsense_are_down_and_harm_no_other():
    fine = Page("x 1\n")
    trickle = Page("x 1\n" * 50, pause_s=0.2)
    nonsense = Page("<html>not metrics</html>\n")
    with fine, trickle, nonsense, socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        targets = {"fine": fine.address, "trickle": trickle.address}
        targets |= {"nonsense": nonsense.address, "silent": f"127.0.0.1:{port}"}
        targets["nobody"] = f"127.0.0.1:{free_port()}"
        rules = group(rule("Down", "up == 0 or x > 5", "page"))
        with Evaluator(rules, targets, scale=60) as evaluator:
            evaluator.await_scraped()
            asked = fine.asked
            wait_until(lambda: fine.asked > asked + 3, 20, "the beat to go on")
            down = {"trickle": 0, "nonsense": 0, "silent": 0, "nobody": 0}

            def as_it_is() -> bool:  # a scrape may be late: then all look again
                alerts = {alert["labels"]["job"] for alert in evaluator.alerts()}
                seen = values(evaluator, "up"), values(evaluator, "x"), alerts
                return seen == ({"fine": 1, **down}, {"fine": 1}, set(down))

            wait_until(as_it_is, 30, "the fine one up and the others down")


def test_a_dead_receiver_is_told_when_it_is_back_and_delays_no_other():
    port = free_port()
    dead, alive = Webhook(port=port), Webhook()
    dead.stop()
    with Page("x 9\n") as page, alive, Mailbox() as mailbox:
        rules = group(rule("High", "x > 5", "page"))
        everyone = [dead, alive, mailbox]
        with Evaluator(rules, {"api": page.address}, everyone, scale=60) as evaluator:
            wait_until(lambda: alive.notifications, 10, "the living to be told")
            wait_until(lambda: mailbox.notifications, 10, "the mail to be sent")
            outbox = evaluator.outboxes[0]
            wait_until(lambda: outbox.failures > 1, 10, "attempts")
            assert "refused" in outbox.last_error
            page.text = "x 1\n"
            wait_until(lambda: len(alive.notifications) == 2, 10, "the end")
            with Webhook(port=port) as back:
                wait_until(lambda: len(back.notifications) == 2, 20, "both, in order")
                told = [(one.status, one.alert) for one in back.notifications]
    assert told == [("firing", "High"), ("resolved", "High")]
    assert [one.status for one in mailbox.notifications][:1] == ["firing"]
    assert alive.notifications[0].job == "api"


def test_a_receiver_that_talks_nonsense_ends_nothing():
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener, Page("x 9\n") as page:
        listener.settimeout(0.2)

        def answer() -> None:
            while not over.is_set():
                try:
                    connection, _ = listener.accept()
                except TimeoutError:
                    continue
                with connection:
                    connection.recv(65_536)
                    connection.sendall(b"220 this is no web server\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        hook: Any = SimpleNamespace(config=lambda: {"webhook_configs": [{"url": url}]})
        rules = group(rule("High", "x > 5", "page"))
        try:
            with Evaluator(rules, {"api": page.address}, [hook]) as evaluator:
                failed = evaluator.outboxes[0]
                wait_until(lambda: failed.failures > 1, 20, "attempts")
                assert evaluator.alerts()[0]["state"] == "firing"
        finally:
            over.set()
            thread.join()


def test_a_receiver_that_is_dead_for_long_costs_no_memory():
    hook = Webhook()
    hook.stop()
    evaluator = Evaluator([], {}, [hook])
    rules = Rules(group(rule("Always", "vector(1)", "page")))
    rules.evaluate(Samples(10), 0)
    for _ in range(3 * MOST_WAITING):
        evaluator._tell(rules.alerts()[0])
    assert len(evaluator.outboxes[0].waiting) == MOST_WAITING


def test_a_page_for_a_dead_receiver_is_not_pushed_out_by_the_watchdog():
    hook = Webhook()
    hook.stop()
    evaluator = Evaluator([], {}, [hook])
    rules = Rules(
        group(rule("High", "vector(9)", "page"), rule("Watchdog", "vector(1)", "none"))
    )
    rules.evaluate(Samples(10), 0)
    page, beat = rules.alerts()
    (outbox,) = evaluator.outboxes
    evaluator._tell(beat)
    for alert in (page, *[beat] * 3 * MOST_WAITING):
        evaluator._tell(alert)
    told = [one["groupLabels"]["alertname"] for one in outbox.waiting]
    assert told == ["Watchdog", "High"]


def test_notifications_are_whole_sentences():
    """As Prometheus fills them in: of a target with a job, and of a rule without."""
    samples = Samples(100)
    Target(samples, {"job": "api"}, {"up"}).take(0, None)
    rules = Rules(monitoring_setup.groups(SCALE))
    for at in (0.0, 2.5):
        rules.evaluate(samples, at)
    told = {alert.name: alert.annotations["summary"] for alert in rules.alerts()}
    assert told["TargetDown"] == "api: gives no metrics"
    assert told["Watchdog"] == "fires always; silence is the alarm"


@pytest.mark.parametrize(
    "text",
    [
        "{{ with $labels.job }}{{ . | toUpper }}{{ end }}",
        "{{ $value | humanizeDuration }}",
        '{{ query "up" | first }}',
    ],
)
def test_a_template_that_would_be_told_raw_is_refused(text: str):
    annotations = {"summary": f"a {{{{ $labels.job }}}} and {text}"}
    with pytest.raises(QueryError, match=r"Expected a template .* alert High, found"):
        Rules(group(rule("High", "up > 0", "page", annotations=annotations)))


def test_a_ticket_is_withheld_while_its_page_fires_and_the_watchdog_goes_on():
    rules = group(
        rule("Burn", "x > 1", "ticket"),
        rule("Burn", "x > 5", "page"),
        rule("Watchdog", "vector(1)", "none"),
    )
    with (
        Page("x 9\n") as page,
        Webhook() as webhook,
        Evaluator(rules, {"api": page.address}, [webhook], scale=300),
    ):
        wait_until(lambda: webhook.notifications, 20, "the page")
        page.text = "x 3\n"
        wait_until(lambda: len(webhook.notifications) == 3, 20, "the ticket")
        for _ in range(3):
            heard = webhook._heard
            wait_until(lambda heard=heard: webhook._heard > heard, 20, "a beat")
    told = {(one.status, one.severity) for one in webhook.notifications}
    assert told == {("firing", "page"), ("resolved", "page"), ("firing", "ticket")}
    assert webhook.notifications[0].severity == "page"


def test_a_step_of_the_clock_moves_no_window_and_is_seen(
    monkeypatch: pytest.MonkeyPatch,
):
    evaluator = Evaluator([], {})
    before, real = evaluator.now(), time.time
    monkeypatch.setattr(time, "time", lambda: real() + 3600)
    assert evaluator.now() - before < 60
    monkeypatch.undo()
    causes = [monitoring_setup.causes(SCALE)]
    with (
        Page(f"host_clock_seconds {time.time() - 3600}\n") as page,
        Evaluator(causes, {"api": page.address}) as evaluator,
    ):
        wait_until(lambda: "ClockSkew" in str(evaluator.alerts()), 20, "the alert")


def test_the_past_can_be_asked_for_and_what_it_cannot_do_is_said():
    with Page("x 2\n") as page, Evaluator(TWICE, {"api": page.address}) as evaluator:

        def a_second() -> Any:
            end = evaluator.now()
            found = evaluator.query_range("x:twice", end - 1, end, 0.5)
            return found and len(found[0]["values"]) == 3 and found[0]

        series = wait_until(a_second, 20, "a second of the past")
        assert series["metric"]["job"] == "api"
        assert {value for _, value in series["values"]} == {"4.0"}
        with pytest.raises(QueryError, match="topk"):
            evaluator.query("topk(1, x)")
    for text in (
        "topk(1, x)",
        "x[5m:1m]",
        "a * on (job) group_left b",
        "rate(",
        "{a='b'}",
    ):
        with pytest.raises(QueryError, match="Expected PromQL"):
            Evaluator(group(rule("Bad", text, "page")), {})


TWICE = group({"record": "x:twice", "expr": "2 * x"})


def test_a_rule_with_two_answers_leaves_the_others_alone():
    """Two series on one side of a division: an error for Prometheus too."""
    samples = Samples(100)
    for instance in ("a", "b"):
        samples.add(labelled("x", {"instance": instance}), 1, 1)
        samples.add(labelled("y", {"instance": instance}), 1, 1)
    rules = Rules(
        group(rule("Two", "x / on () y > 0", "page"), rule("One", "x > 0", "page"))
    )
    rules.evaluate(samples, 1)
    assert {alert.name for alert in rules.alerts()} == {"One"}


def test_memory_is_bounded_in_time_and_in_series():
    samples = Samples(keep_s=10)
    for at in range(10_000):
        samples.add(labelled("x", {}), float(at), 1.0)
    (kept,) = samples.by_name["x"].values()
    assert 10 <= len(kept.times) <= 25
    for number in range(2 * MOST_SERIES):
        samples.add(labelled("y", {"user": str(number)}), 1.0, 1.0)
    assert samples.count == MOST_SERIES
    assert samples.refused == MOST_SERIES + 1
    samples.forget(before=5.0)
    assert samples.count == 1, "series that have ended make room"


def test_a_time_that_goes_back_is_refused():
    samples = Samples(100)
    for at in (5.0, 5.0, 4.0):
        samples.add(labelled("x", {}), at, at)
    assert Query("x").vector(samples, 6) == {labelled("x", {}): 5.0}
    assert samples.refused == 2


def test_a_targets_own_job_label_does_not_pretend():
    samples = Samples(100)
    Target(samples, {"job": "api"}, {"x"}).take(1, 'x{job="other"} 1\ny 2\n')
    assert Query("x").vector(samples, 1) == {
        labelled("x", {"job": "api", "exported_job": "other"}): 1.0
    }
    assert "y" not in samples.by_name, "no rule asks for it"
