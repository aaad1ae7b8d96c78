"""The dashboard: its table, the two that answer it, and the three that show it.

The picture in `docs/live-page.png` is written by

    LIVE_PAGE_PNG=docs/live-page.png python -m pytest tests/test_dashboards.py -k moves
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import combinations, pairwise
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

import monitoring_setup
from course.load import client, stream_chat
from course.process import wait_until
from local_cloud.monitoring import deployed, grafana, live, panels, stack, terminal
from local_cloud.monitoring.panels import (
    Panel,
    Prometheus,
    Scraped,
    SourceError,
    Watch,
    expressions,
)
from local_cloud.monitoring.promql import Query
from local_cloud.monitoring.samples import Samples, labelled
from serving.trials import small_talk
from tests.test_page import Page, browser  # noqa: F401  (a fixture)

ROOT = Path(__file__).parent.parent
SCALE = 60.0  # a minute of the rules takes a second
LIVE = monitoring_setup.panels(SCALE)
DEADLINE_S = 30.0
GAP = "\N{EN DASH}"  # what the page says where there is no value


@pytest.fixture(scope="module")
def busy(server) -> Iterator[str]:
    """The address of the real API while four callers keep it at work."""
    ending = threading.Event()

    async def ask(draw: random.Random) -> None:
        async with client() as http:
            while not ending.is_set():
                body = small_talk(20, draw.randint(8, 48))
                if draw.random() < 0.1:
                    body["max_token"] = 1  # a typo: refused
                await stream_chat(http, f"{server.url}/v1/chat/completions", body)
                await asyncio.sleep(draw.expovariate(1.0))

    async def all_of_them() -> None:
        await asyncio.gather(*(ask(random.Random(seed)) for seed in range(4)))

    callers = threading.Thread(target=lambda: asyncio.run(all_of_them()))
    callers.start()
    yield server.url
    ending.set()
    callers.join(DEADLINE_S)


@pytest.fixture(scope="module")
def prometheus(busy: str) -> Iterator[stack.Stack]:
    """A real Prometheus with the lesson's rules, which scrapes the API."""
    if missing := stack.found():
        pytest.skip(missing)
    groups = monitoring_setup.groups(SCALE)
    target = urlsplit(busy).netloc
    with stack.Stack(groups, {"api": target}, scale=SCALE) as running:
        running.await_scraped()
        yield running


class Target:
    """A server of metrics that says what a test wants; no text: an error."""

    def __init__(self) -> None:
        self.text: str | None = ""
        self.key = ""
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                known = self.headers.get("authorization", "") == f"Bearer {owner.key}"
                status = 500 if owner.text is None else 200
                self.send_response(401 if owner.key and not known else status)
                self.end_headers()
                self.wfile.write((owner.text or "").encode())

            def log_message(self, format: str, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/metrics"


@pytest.fixture
def target() -> Iterator[Target]:
    made = Target()
    serving = threading.Thread(target=made.server.serve_forever, args=(0.05,))
    serving.start()
    yield made
    made.server.shutdown()
    made.server.server_close()
    serving.join(DEADLINE_S)


QUEUE = [Panel("Queue", "requests", "Wait?", {"waiting": 'sum(queued{job="api"})'})]


def has_data(source: panels.Source) -> bool:
    return all(map(math.isfinite, source.read()))


# The table


@pytest.mark.parametrize("text", expressions(monitoring_setup.PANELS))
def test_an_expression_parses_and_gives_one_number_at_most(text: str):
    promql = pytest.importorskip("promql_parser")
    tree = promql.parse(text)
    while isinstance(tree, promql.BinaryExpr | promql.ParenExpr):
        tree = tree.expr if isinstance(tree, promql.ParenExpr) else tree.lhs
        if isinstance(tree, promql.NumberLiteral):
            return  # 1 - max(...)
    # No label is left over which several series could come.
    if isinstance(tree, promql.Call):
        assert tree.func.name == "histogram_quantile"
    else:
        assert isinstance(tree, promql.AggregateExpr)
        assert tree.modifier is None


def test_a_panel_that_nobody_could_draw_is_refused():
    with pytest.raises(ValueError, match=r"Expected a unit of .* found 'furlong'"):
        Panel("Way", "furlong", "How far?", {"way": "sum(way)"})
    with pytest.raises(ValueError, match="Expected an expression in 'Way', found none"):
        Panel("Way", "s", "How far?", {})


# Grafana


def test_deploy_grafana_is_what_the_table_says():
    files = grafana.files(monitoring_setup.PANELS)
    folder = ROOT / "deploy" / "grafana"
    there = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert there == set(files)
    for name, text in files.items():
        assert (folder / name).read_text("utf-8") == text, (
            f"{name} is out of date: python monitoring_setup.py --deploy"
        )


def test_grafanas_own_model_reads_the_dashboard_and_loses_nothing():
    models = pytest.importorskip("grafana_foundation_sdk.models.dashboard")
    cog = pytest.importorskip("grafana_foundation_sdk.cog.encoder")
    plugins = pytest.importorskip("grafana_foundation_sdk.cog.plugins")
    plugins.register_default_plugins()
    written = grafana.dashboard(monitoring_setup.PANELS)
    read = json.loads(cog.JSONEncoder().encode(models.Dashboard.from_json(written)))

    def kept(given: object, found: object, at: str = "") -> None:
        assert type(given) is type(found), at
        if isinstance(given, dict) and isinstance(found, dict):
            for key, value in given.items():
                kept(value, found.get(key), f"{at}.{key}")
        elif isinstance(given, list) and isinstance(found, list):
            for i, (one, other) in enumerate(zip(given, found, strict=True)):
                kept(one, other, f"{at}[{i}]")
        else:
            assert given == found, at

    kept(written, read)


def test_panels_in_grafana_lie_side_by_side_and_ask_the_same():
    board = grafana.dashboard(monitoring_setup.PANELS)
    shown = board["panels"]
    assert len({panel["id"] for panel in shown}) == len(shown)
    for panel in shown:
        at = panel["gridPos"]
        assert at["x"] >= 0
        assert at["x"] + at["w"] <= 24
    for one, other in combinations((panel["gridPos"] for panel in shown), 2):
        assert (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )
    targets = [target for panel in shown for target in panel["targets"]]
    asked = [target["expr"] for target in targets]
    assert asked == expressions(monitoring_setup.PANELS)
    (variable,) = board["templating"]["list"]
    for user in (*shown, *targets):
        assert user["datasource"]["uid"] == f"${{{variable['name']}}}"


def test_deploy_says_what_it_wrote_and_takes_back_what_it_wrote_once(
    tmp_path: Path, capsys
):
    pytest.importorskip("yaml", reason="pip install -r requirements-tests.txt")
    stale, own = (tmp_path / "prometheus" / name for name in ("old.yml", "mine.yml"))
    own.parent.mkdir()
    stale.write_text(f"{deployed.NOTE}groups: []\n")
    own.write_text("groups: []\n")
    deployed.write(
        monitoring_setup.groups(),
        monitoring_setup.rule_tests(),
        monitoring_setup.PANELS,
        tmp_path,
    )
    said = set(map(Path, capsys.readouterr().out.splitlines()))
    there = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert there == said | {own}
    assert tmp_path / "prometheus" / "rules.yml" in said
    assert tmp_path / "grafana" / "dashboards" / "model-api.json" in said


@pytest.mark.parametrize("text", ["0", "-1", "1e6", "inf", "nan", "much"])
def test_a_scale_that_leaves_no_window_is_refused(text: str, capsys):
    argv = ["--watch", "http://127.0.0.1:9", "--scale", text]
    with pytest.raises(SystemExit, match="2"):
        monitoring_setup.main(argv)
    assert "--scale" in capsys.readouterr().err


# The two that answer


@pytest.mark.prometheus
def test_every_expression_of_the_dashboard_has_data_in_prometheus(prometheus):
    board = grafana.dashboard(LIVE)
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]

    def empty() -> list[str]:
        found = {text: prometheus.query(text) for text in asked}
        return [
            text
            for text, series in found.items()
            if len(series) != 1 or not math.isfinite(float(series[0]["value"][1]))
        ]

    wait_until(lambda: not empty(), DEADLINE_S, "data for every expression")
    production = expressions(monitoring_setup.PANELS)
    assert [text for text in production if len(prometheus.query(text)) != 1] == []


def test_every_panel_has_data_without_prometheus(busy: str):
    source = Scraped(f"{busy}/metrics", LIVE)
    wait_until(lambda: has_data(source), DEADLINE_S, "data", every_s=0.3)


@pytest.mark.prometheus
def test_both_answer_the_same_of_the_same_samples(prometheus):
    source = Prometheus(prometheus.prometheus_url, LIVE)

    def settled() -> tuple[float, panels.Values] | None:
        past = source.past(10)[:-3]  # of the last seconds a sample may still come
        complete = past and all(map(math.isfinite, past[-1][1]))
        return past[-1] if complete else None

    now, theirs = wait_until(settled, DEADLINE_S, "data in Prometheus")
    samples = Samples(panels.KEEP_S)
    queries = [Query(text) for text in expressions(LIVE)]
    for name in set().union(*(query.names for query in queries)):
        for series in prometheus.query(f'{name}{{job="api"}}[10m]', at=now):
            labels = {k: v for k, v in series["metric"].items() if k != "__name__"}
            for at, value in series["values"]:
                samples.add(labelled(name, labels), float(at), float(value))
    ours = [next(iter(query.at(samples, now).values())) for query in queries]
    assert ours == pytest.approx(theirs, rel=1e-6)


@pytest.mark.prometheus
def test_prometheus_knows_what_was_before_the_page_was_opened(prometheus):
    source = Prometheus(prometheus.prometheus_url, LIVE)
    (own,) = prometheus.query('process_start_time_seconds{job="prometheus"}')

    def told() -> tuple[float, list[float]] | None:
        now, past = time.time(), source.past(60)
        return (now, [at for at, _ in past]) if past else None

    asked, times = wait_until(told, DEADLINE_S, "a past")
    assert all(b - a == 1 for a, b in pairwise(times))
    assert asked - times[-1] < 3
    assert times[0] >= float(own["value"][1])  # a young one is not filled up


@pytest.mark.prometheus
def test_a_prometheus_that_hangs_is_reported_and_recovers(prometheus, monkeypatch):
    monkeypatch.setattr(panels, "TIMEOUT_S", 0.5)
    watch = Watch(LIVE, Prometheus(prometheus.prometheus_url, LIVE))
    wait_until(lambda: watch.look() or not watch.fault, DEADLINE_S, "its answer")
    pid = prometheus.pids()[0]
    os.kill(pid, signal.SIGSTOP)
    try:  # all its threads do not stop at the very moment
        hangs = lambda: watch.look() or "timed out" in watch.fault  # noqa: E731
        wait_until(hangs, DEADLINE_S, "a fault")
    finally:
        os.kill(pid, signal.SIGCONT)
    assert prometheus.prometheus_url in watch.fault
    assert not any(map(math.isfinite, watch.points[-1][1]))
    wait_until(lambda: watch.look() or not watch.fault, DEADLINE_S, "its answer")


@pytest.mark.prometheus
def test_a_target_that_prometheus_cannot_reach_is_said(prometheus, target: Target):
    target.text = "queued 3\n"
    watch = Watch(QUEUE, Prometheus(prometheus.prometheus_url, QUEUE))
    api = prometheus.targets
    prometheus.targets = {"api": urlsplit(target.url).netloc}
    prometheus.reload()

    def now() -> tuple[float, str]:
        watch.look()
        return watch.points[-1][1][0], watch.fault

    try:
        wait_until(lambda: now() == (3, ""), DEADLINE_S, "the target's value")
        target.text = None
        wait_until(lambda: "'api', found it down" in now()[1], DEADLINE_S, "a fault")
        assert not math.isfinite(now()[0])
    finally:
        prometheus.targets = api
        prometheus.reload()


def test_the_source_is_found_by_asking(target: Target):
    target.text = "queued 1\n"  # answers 200 to anything, and is no Prometheus
    address = target.url.removesuffix("/metrics")
    for url in (address, f"{address}/", target.url):
        found = panels.source(url, QUEUE)
        assert isinstance(found, Scraped)
        assert found.url == target.url
    with pytest.raises(SourceError, match=r"Expected an answer from .*: .*refused"):
        panels.source("http://127.0.0.1:9", QUEUE)


def test_metrics_behind_a_key_are_read_with_it_or_say_how(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    file = tmp_path / "metrics_key"
    target.text, target.key = "queued 1\n", "only-for-metrics-01"
    monkeypatch.delenv("METRICS_KEY_FILE", raising=False)
    assert terminal.show(target.url, QUEUE, looks=1) == 1
    said = capsys.readouterr().err
    assert "found: 401" in said
    assert "METRICS_KEY_FILE" in said
    assert "Prometheus" in said

    monkeypatch.setenv("METRICS_KEY_FILE", str(file))
    for bad in (None, "", "two words\n", "kéy"):
        if bad is not None:
            file.write_text(bad, "utf-8")
        with pytest.raises(SourceError, match="expected a file with one key, found"):
            panels.source(target.url, QUEUE)
    file.write_text(f"{target.key}\n")
    assert has_data(panels.source(target.url, QUEUE))


def test_who_reads_while_another_looks_sees_whole_pictures():
    """A fault and the gap that it explains; and no list changes under its reader."""

    class Moody:
        name, turn = "moody", 0

        def read(self) -> panels.Values:
            self.turn += 1
            if self.turn % 2:
                raise SourceError("odd")
            return [1.0]

        def past(self, seconds: int) -> list[tuple[float, panels.Values]]:
            return []

    watch, over = Watch(QUEUE, Moody()), threading.Event()

    def look() -> None:
        while not over.is_set():
            watch.look()

    looking = threading.Thread(target=look)
    looking.start()
    try:
        for _ in range(3000):
            points, fault = watch.shown
            if points:
                assert math.isfinite(points[-1][1][0]) == (fault == "")
            watch.current()
    finally:
        over.set()
        looking.join()
    assert 0 < len(watch.points) <= panels.SHOWN_S


@pytest.mark.prometheus
def test_a_prometheus_is_known_by_its_answer(prometheus):
    assert isinstance(panels.source(prometheus.prometheus_url, LIVE), Prometheus)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("queued NaN\n", "found none"),
        ("queued +Inf\n", "found none"),
        ("another 1\n", "found none"),
        ("<html>not metrics</html>\n", "found none"),
        (None, "found: 500"),
    ],
)
def test_a_value_that_is_gone_is_a_gap_and_said(target: Target, text, fault):
    watch = Watch(QUEUE, Scraped(target.url, QUEUE))
    target.text = "queued 3\n"
    watch.look()
    target.text = text
    watch.look()
    assert fault in watch.fault
    target.text = "queued 4\n"
    watch.look()
    assert watch.fault == ""
    ((_, _, (first, gap, last)),) = watch.current()
    assert (first, last) == (3, 4)
    assert not math.isfinite(gap)
    assert terminal.sparkline([first, gap, last]) == "▇ █"


# The terminal


def test_a_sparkline_goes_from_zero_to_the_largest():
    assert terminal.sparkline([0, 1, 2, 4]) == "▁▃▅█"
    assert terminal.sparkline([0.0, 0.0]) == "▁▁"
    assert terminal.sparkline([-1, 0, 1]) == "▁▅█"
    assert terminal.sparkline([math.nan, math.inf]) == "  "
    assert len(terminal.sparkline([1.0] * 200, width=60)) == 60


@pytest.mark.parametrize(
    ("value", "unit", "said"),
    [
        (0.0173, "s", "17.3 ms"),
        (2.5, "s", "2.5 s"),
        (0.054, "%", "5.4 %"),
        (512e6, "B", "512 MB"),
        (1234.5, "tokens/s", "1,234 tokens/s"),
        (0.0, "%", "0 %"),
        (math.nan, "s", "-"),
    ],
)
def test_values_are_said_in_fitting_units(value, unit, said):
    assert terminal.say(value, unit) == said


def test_the_terminal_shows_every_curve(target: Target, capsys):
    target.text = "queued 3\n"
    assert terminal.show(target.url, QUEUE, looks=1) == 0
    shown = capsys.readouterr().out
    for text in ("Queue", "waiting", "█", "3 requests", "http://127.0.0.1:"):
        assert text in shown


# The page


@contextmanager
def page_of(source: panels.Source, table: list[Panel]):
    with live.served(Watch(table, source)) as (url, running):
        yield url, running


def events(url: str, count: int) -> list[dict]:
    """The first events that the page gets; anything but strict JSON is an error."""
    found: list[dict] = []
    with httpx.stream("GET", f"{url}/events", timeout=DEADLINE_S) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: "):
                found.append(json.loads(line[6:], parse_constant=pytest.fail))
            if len(found) == count:
                return found
    raise AssertionError(f"expected {count} events, found {len(found)}")


def test_the_page_gets_the_table_once_and_each_point_once(target: Target):
    target.text = "queued NaN\n"
    with page_of(Scraped(target.url, QUEUE), QUEUE) as (url, _):
        first, *more = events(url, 3)
    assert first["panels"][0]["legends"] == ["waiting"]
    assert not any("panels" in event for event in more)
    points = [point for event in (first, *more) for point in event["points"]]
    times = [at for at, _ in points]
    assert len(points) >= 2
    assert sorted(set(times)) == times
    assert {value for _, value in points} == {None}
    assert "found none" in more[-1]["fault"]


def test_readers_that_leave_leave_nothing(target: Target):
    target.text = "queued 1\n"
    before = threading.active_count()
    with page_of(Scraped(target.url, QUEUE), QUEUE) as (url, running):
        for _ in range(10):
            events(url, 1)
        wait_until(lambda: running.watchers == 0, DEADLINE_S, "no reader")
        with httpx.stream("GET", f"{url}/events", timeout=DEADLINE_S) as answer:
            lines = answer.iter_lines()
            next(lines)
            assert running.watchers == 1
            leaving = time.monotonic()
            running.ending = True
    assert time.monotonic() - leaving < DEADLINE_S
    wait_until(lambda: threading.active_count() <= before, DEADLINE_S, "no thread")


def test_another_sites_name_is_refused(target: Target):
    with page_of(Scraped(target.url, QUEUE), QUEUE) as (url, _):
        assert httpx.get(url, headers={"host": "evil.example"}).status_code == 400
        assert httpx.get(f"{url}/../panels.py").status_code == 404


DRAWN = """
return plots.map(({plot}) => {
  const {width, height} = plot.ctx.canvas;
  let sum = 0;
  for (const byte of plot.ctx.getImageData(0, 0, width, height).data) {
    sum = (sum * 31 + byte) % 1e9;
  }
  return sum;
})"""


class Board(Page):
    """The page in a browser."""

    def open(self, url: str) -> None:
        for kind in ("performance", "browser"):
            self.log(kind)
        self.driver.get(url)
        self.until("points.length > 0")

    def drawn(self) -> list[int]:
        """A checksum of each canvas."""
        return self.run(DRAWN)


@pytest.fixture
def board(browser: Page) -> Board:  # noqa: F811
    return Board(browser.driver)


@pytest.mark.browser
def test_the_page_moves_under_load_and_needs_nobody_else(board, busy, tmp_path):
    with page_of(Scraped(f"{busy}/metrics", LIVE), LIVE) as (url, _):
        board.open(url)
        board.until("points.length > 3 && points.at(-1).every((v) => v !== null)")
        before, points = board.drawn(), board.run("return points.length")
        board.until(f"points.length >= {points + 3}")
        after = board.drawn()
        assert len(before) == len(LIVE)
        assert all(a != b for a, b in zip(before, after, strict=True))
        _, *curves = zip(*board.run("return points"), strict=True)
        titles = [panel.title for panel in LIVE for _ in panel.series]
        changed = {t for t, c in zip(titles, curves, strict=True) if len(set(c)) > 2}
        assert {"Requests", "Tokens", "Processor"} <= changed
        assert GAP not in board.texts("dd")

        log = [json.loads(e["message"])["message"] for e in board.log("performance")]
        asked, received = {}, {}  # by request; the stream never finishes
        for event in log:
            details = event["params"]
            name = details.get("requestId")
            if event["method"] == "Network.requestWillBeSent":
                asked[name] = details["request"]["url"]
            elif event["method"] == "Network.dataReceived":
                received[name] = received.get(name, 0) + details["dataLength"]
            elif event["method"] == "Network.loadingFinished":
                received[name] = details["encodedDataLength"]
        own = ("chrome:", "data:")  # of the browser itself
        asked = {name: one for name, one in asked.items() if not one.startswith(own)}
        received = {name: received[name] for name in asked}
        hosts = {urlsplit(one).netloc for one in asked.values()}
        assert hosts == {urlsplit(url).netloc}
        print(f"{sum(received.values()):,} bytes, data included")
        assert len(received) == 4  # the page, uPlot's two files, the stream
        assert 10_000 < sum(received.values()) <= 60_000
        assert board.errors() == []

        picture = Path(os.environ.get("LIVE_PAGE_PNG", tmp_path / "live-page.png"))
        if "LIVE_PAGE_PNG" in os.environ:
            for count in range(30, 181, 30):  # the picture: a full plot
                board.until(f"points.length >= {count}")
        picture.parent.mkdir(exist_ok=True)
        board.driver.save_screenshot(str(picture))
        assert 10_000 < picture.stat().st_size <= 150_000


@pytest.mark.browser
def test_the_page_says_what_is_wrong_and_recovers(board, target: Target):
    target.text = "queued 1\n"
    with page_of(Scraped(target.url, QUEUE), QUEUE) as (url, _):
        board.open(url)
        board.until("$('fault').textContent === ''")
        target.text = None
        board.until("$('fault').textContent.includes('found: 500')")
        assert board.texts("dd") == [GAP]
        target.text = "queued 7\n"
        board.until("$('fault').textContent === ''")
        assert board.texts("dd") == ["7 requests"]
        assert board.errors() == []


@pytest.mark.browser
def test_pause_holds_the_picture_and_is_reached_by_keyboard(board, target: Target):
    target.text = "queued 1\n"
    with page_of(Scraped(target.url, QUEUE), QUEUE) as (url, _):
        board.open(url)
        board.driver.find_element("css selector", "body").send_keys("\ue004 ")
        assert board.run("return paused()")
        held = board.drawn()
        target.text = "queued 9\n"
        board.until("points.at(-1)[1] === 9")
        assert board.drawn() == held
        board.click("pause")
        assert board.drawn() != held
        assert board.texts("dd") == ["9 requests"]
        names = [
            s.accessible_name for s in board.driver.find_elements("tag name", "button")
        ]
        assert names == ["Pause"]


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_curves_stand_out_from_their_ground(board, target: Target, scheme):
    feature = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    target.text = "queued 1\n"
    with page_of(Scraped(target.url, QUEUE), QUEUE) as (url, _):
        board.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", feature)
        try:
            board.open(url)
            names = ("panel", "ink", "soft", "fault", "c0", "c1", "c2")
            ground, *inks = (board.run(f"return css('--{name}')()") for name in names)
            contrasts = [contrast(ink, ground) for ink in inks]
        finally:
            board.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert min(contrasts) >= 4.5  # WCAG 2.2 AA for small text


def contrast(one: str, other: str) -> float:
    """The ratio of two colours' luminances, as WCAG defines it."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)
