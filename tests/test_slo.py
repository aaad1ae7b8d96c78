"""Objectives as data, the rules made of them, and how soon those find a fault."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import pytest

import monitoring_setup as lesson
from local_cloud.monitoring import deployed
from local_cloud.monitoring.objectives import (
    SLO,
    Selector,
    SLOError,
    promql_seconds,
    promql_time,
    within,
)
from local_cloud.monitoring.rule_groups import MEMORY_BYTES
from serving.metrics import FIRST_TOKEN_S, Metrics

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy" / "prometheus"
ALL, BAD = Selector("requests"), Selector("requests", {"code": "~5.."})


def slo(objective: float = 0.99, **changes: object) -> SLO:
    parts = {"name": "some", "description": "answers", "bad": BAD, "total": ALL}
    return SLO(**{**parts, "objective": objective, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("objective", [0.9306, 0.99, 0.9999])
def test_an_objective_above_the_lowest_pages_within_the_hour(objective: float):
    assert lesson.detection_s(slo(objective), 1.0) < 3600


@pytest.mark.parametrize(
    ("objective", "found"),
    [(0.93055, "93.05"), (0.5, "50.00"), (1.0, "100.00"), (1.01, "101"), (0, "0.00")],
)
def test_an_objective_that_pages_late_or_cannot_be_kept_is_refused(objective, found):
    with pytest.raises(SLOError, match=rf"93\.06.*found {found}.*: promise"):
        slo(objective)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"good": ALL}, "either its good events or its bad, found both"),
        ({"bad": None}, "either its good events or its bad, found neither"),
        ({"name": "First Token"}, "a name of small letters"),
        ({"objective": math.nan}, "found nan"),
    ],
)
def test_a_promise_that_makes_no_rule_is_refused(changes: dict, words: str):
    with pytest.raises(SLOError, match=words):
        slo(**changes)


def test_a_threshold_between_two_edges_is_refused_and_the_edges_are_named():
    with pytest.raises(SLOError, match=r"found 2 s. Take 1 or 2.5 s"):
        within("ttft_seconds", FIRST_TOKEN_S, 2)


@pytest.mark.parametrize("edge", FIRST_TOKEN_S)
def test_every_edge_selects_a_series_that_the_api_has(edge: float):
    shown = Metrics("smollm2", lambda: None).render()
    text = (shown if isinstance(shown, bytes) else shown[0]).decode()
    bucket = within(lesson.FIRST_TOKEN, FIRST_TOKEN_S, edge)
    lines = [re.match(r"(\w+)\{(.*)\} ", line) for line in text.splitlines()]
    series = [(m[1], dict(re.findall(r'(\w+)="([^"]*)"', m[2]))) for m in lines if m]
    assert sum(bucket.matches(*one) for one in series) == 1


@pytest.mark.parametrize(
    ("labels", "taken"),
    [
        ({"route": "/v1/chat", "code": "500"}, True),
        ({"route": "/v1/chat", "code": "500", "job": "edge"}, True),
        ({"route": "/v1/chat", "code": "200"}, False),
        ({"route": "/v1/chat", "code": "5000"}, False),  # the whole value must match
        ({"route": "/health", "code": "500"}, False),
        ({"code": "500"}, False),
    ],
)
def test_a_selector_takes_what_its_promql_takes(labels: dict[str, str], taken: bool):
    selector = Selector("requests", {"route": "~/v1/.*", "code": "~5.."})
    assert selector.promql() == 'requests{route=~"/v1/.*",code=~"5.."}'
    assert selector.matches("requests", labels) is taken
    assert not selector.matches("responses", labels)


def test_quotes_and_backslashes_stay_within_the_selector():
    assert Selector("m", {"a": 'x"\\d'}).promql() == r'm{a="x\"\\d"}'


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(259_200, "3d"), (5400, "90m"), (90, "90s"), (0.5, "500ms"), (0, "0d")],
)
def test_durations_are_written_in_one_unit(seconds: float, text: str):
    assert promql_time(seconds) == text
    assert promql_seconds(text) == seconds


def first_fire_s(slo: SLO, share: float, scale: float, history_s: float) -> float:
    """The definition, tried moment by moment: no formula."""
    step = 0.05
    for tick in range(1, 40_000):
        bad_s = tick * step
        for window in (w for w in lesson.WINDOWS if w.severity == "page"):
            ratios = [
                share * min(bad_s, span) / min(bad_s + history_s, span)
                for span in (window.long_s / scale, window.short_s / scale)
            ]
            if min(ratios) > window.burn * slo.budget:
                return bad_s
    return math.inf


@pytest.mark.parametrize("history_s", [5.0, 65.0, 1e6])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.3, 0.07, 0.05])
def test_the_prediction_is_what_the_windows_do(share: float, history_s: float):
    predicted = lesson.detection_s(slo(), share, 60, history_s)
    assert predicted == pytest.approx(
        first_fire_s(slo(), share, 60, history_s), abs=0.06
    )


def test_the_prediction_on_full_windows_is_the_workbooks_formula():
    assert lesson.detection_s(slo(), 1.0) == pytest.approx(3600 * 14.4 * 0.01)
    assert lesson.detection_s(slo(), 0.1) == pytest.approx(6 * 3600 * 6 * 0.01 / 0.1)


@pytest.mark.parametrize("scale", [60.0, 7.5])
def test_scale_changes_times_and_nothing_else(scale: float):
    def times(text: str) -> list[float]:
        durations = re.findall(r"\[(\w+)\]|^(\d+m?[smhd])$", text)
        ahead = re.findall(r", (\d[\d.]*)\)", text)  # seconds that are no duration
        found = [promql_seconds(a or b) for a, b in durations]
        return [*found, *map(float, ahead)]

    def rest(text: str) -> str:
        return re.sub(r"\[\w+\]|^\d+m?[smhd]$|, \d[\d.]*\)", "", text)

    def texts(group: dict) -> list[str]:
        pairs = [(r["expr"], r.get("for", "0s")) for r in group["rules"]]
        return [group["interval"], *chain.from_iterable(pairs)]

    def names(group: dict) -> list[str]:  # dashboards ask by them
        return [rule.get("record") or rule["alert"] for rule in group["rules"]]

    for slow, fast in zip(lesson.groups(), lesson.groups(scale), strict=True):
        for one, other in zip(texts(slow), texts(fast), strict=True):
            assert rest(one) == rest(other)
            assert times(other) == [t / scale for t in times(one)]
        assert names(slow) == names(fast)


def test_deploy_is_what_the_lesson_generates():
    pytest.importorskip("yaml", reason="pip install -r requirements-tests.txt")
    wanted = deployed.files(lesson.groups(), lesson.rule_tests())
    there = {
        str(path.relative_to(DEPLOY)): path.read_text("utf-8")
        for path in DEPLOY.rglob("*.yml")
    }
    assert there == wanted, "run: python monitoring_setup.py --deploy"


def test_what_compose_runs_for_monitoring_has_all_its_files(tmp_path: Path):
    """Each mount and secret is there, and each file that a command or another names."""
    yaml = pytest.importorskip("yaml", reason="pip install -r requirements-tests.txt")
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))
    services = {
        name: service
        for name, service in compose["services"].items()
        if service.get("profiles") == ["monitoring"]
    }
    assert services.keys() == {"prometheus", "alertmanager", "receiver", "grafana"}
    for name, service in services.items():
        mounts = dict(mount.split(":")[1::-1] for mount in service["volumes"])
        for source in mounts.values():
            there = (ROOT / source).is_dir() if "/" in source else False
            assert there or source in compose["volumes"], (name, source)
        for word in service.get("command", []):
            if word.startswith("--config.file="):
                file = Path(word.partition("=")[2])
                assert (ROOT / mounts[str(file.parent)] / file.name).is_file(), word
        assert set(service.get("secrets", [])) <= compose["secrets"].keys()
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text("utf-8"))
    (key,) = [j["authorization"] for j in config["scrape_configs"] if len(j) > 2]
    (secret,) = services["prometheus"]["secrets"]
    assert key["credentials_file"] == f"/run/secrets/{secret}"
    hosts = {a["static_configs"][0]["targets"][0] for a in config["scrape_configs"]}
    assert {host.split(":")[0] for host in hosts} <= {*compose["services"], "localhost"}
    assert compose["services"]["api"]["mem_limit"] == f"{MEMORY_BYTES >> 20}m"


def test_the_receiver_of_compose_runs_on_what_is_mounted(tmp_path: Path):
    """A bare Python and this one folder, and it listens where Alertmanager calls."""
    (tmp_path / "local_cloud").symlink_to(ROOT / "local_cloud")
    bare = [sys.executable, "-I", "-S", "-c"]
    program = (
        f"import sys, runpy; sys.path.insert(0, {str(tmp_path)!r}); "
        "sys.argv = ['receivers', '--help']; "
        "runpy.run_module('local_cloud.monitoring.receivers', run_name='__main__')"
    )
    done = subprocess.run([*bare, program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "http://receiver:9099/" in (DEPLOY / "alertmanager.yml").read_text("utf-8")


def test_the_api_shows_a_clock_that_is_set(monkeypatch: pytest.MonkeyPatch):
    def offset(metrics: Metrics) -> float:
        lines = metrics.render()[0].decode().splitlines()
        (line,) = [one for one in lines if one.startswith("host_clock_offset_seconds ")]
        return float(line.split()[1])

    metrics, real = Metrics("smollm2", lambda: None), time.time
    assert abs(offset(metrics)) < 1
    monkeypatch.setattr(time, "time", lambda: real() - 3600)
    assert offset(metrics) == pytest.approx(-3600, abs=60)


@pytest.mark.parametrize("text", ["0", "-1", "301", "1e6", "nan", "x"])
def test_a_scale_that_makes_no_window_is_refused(text: str, capsys):
    with pytest.raises(SystemExit):
        lesson.main(["--watch", "http://127.0.0.1:9", "--scale", text])
    assert "--scale" in capsys.readouterr().err
