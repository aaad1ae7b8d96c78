"""Lesson 4's decisions: what a day costs, and which side answers a call."""

from __future__ import annotations

import io
import json
import threading
from functools import partial
from pathlib import Path

import pytest

import fireworks_deployment as lesson
from course import draw
from fireworks_deployment import Promise, Scaling, route
from local_cloud.fireworks import bills, hybrid, prices, traffic
from local_cloud.fireworks.hybrid import Refused, Route, Router, Sides, Situation
from local_cloud.fireworks.prices import PerToken, Tokens
from local_cloud.fireworks.traffic import Hour

# -- the bill of a day, against figures worked out by hand

PRICE = PerToken(input=1.0, cached=0.1, output=4.0)  # dollars a million tokens
A_CALL = Tokens(prompt=100, cached=80, completion=25)
# not known: 100 + 4 x 25 = 200; known: 20 + 8 + 100 = 128; by batch: 200 / 2 = 100
PLAIN, KNOWN, BATCH = 200e-6, 128e-6, 100e-6


def test_the_tokens_of_a_call_cost_what_the_table_says():
    assert A_CALL.dollars(PRICE, known=False) == pytest.approx(PLAIN)
    assert A_CALL.dollars(PRICE) == pytest.approx(KNOWN)
    assert A_CALL.dollars(PRICE, known=False, batch=True) == pytest.approx(BATCH)


def test_the_bill_of_a_day():
    day = [Hour(0, 0)] * 24
    day[12] = Hour(1000, 400)
    told = lesson.day_bills(day, A_CALL, PRICE, Scaling())
    assert told["serverless"] == pytest.approx(1000 * PLAIN)
    assert told["and a known beginning"] == pytest.approx(1000 * KNOWN)
    waiting = 600 * KNOWN + 400 * BATCH
    assert told["and what can wait, by batch"] == pytest.approx(waiting)
    assert told["on demand, always on"] == pytest.approx(24 * 8.0)
    # One hour of calls a few seconds apart, and five minutes until it sleeps.
    up_h = told["on demand, asleep when idle"] / 8.0
    assert up_h == pytest.approx(1 + 300 / 3600, abs=0.02)


def test_a_batch_is_not_used_where_a_known_beginning_is_cheaper():
    cheap = PerToken(input=1.0, cached=0.0, output=0.0)
    day = [Hour(10, 10)] + [Hour(0, 0)] * 23
    told = lesson.day_bills(day, A_CALL, cheap, Scaling())
    assert told["and what can wait, by batch"] == pytest.approx(10 * 20e-6)


def test_a_deployment_is_up_from_a_call_until_it_sleeps():
    assert bills.awake([], 300) == (0.0, 0)
    assert bills.awake([10], 300) == (300, 1)
    assert bills.awake([0, 100, 400, 701], 300) == (100 + 300 + 300 + 300, 2)


def test_the_break_even():
    assert lesson.break_even(8.0, 16e-6) == pytest.approx(500_000)


def test_a_deployment_costs_all_gpus_it_may_have():
    assert Scaling(gpus=2, most=3).usd_per_hour == pytest.approx(6 * 8.0)


def test_every_price_says_where_and_when_it_was_read():
    listed = [prices.UP_TO_4B, prices.ABOVE_16B, *prices.SERVERLESS.values()]
    for source in [*(price.source for price in listed), prices.TOLD_GPUS]:
        assert source.page.startswith("https://")
        assert source.as_of.startswith("2026-")
    assert not prices.SERVERLESS["kimi-k3"].source.first_hand


def test_the_picture_is_drawn(tmp_path: Path):
    ways = {"one": PLAIN, "two": KNOWN, "three": BATCH}
    show = partial(
        bills.draw_break_even, calls_usd=ways, usd_per_hour=8.0, busiest=80_000
    )
    assert draw.picture(tmp_path / "a.png", show).stat().st_size > 10_000


# -- a day of calls


def test_the_day_in_the_tree_is_the_generated_one():
    again = io.StringIO()
    traffic.write(traffic.generate(), again)
    assert again.getvalue() == traffic.DAY.read_text()


def test_calls_come_in_their_hour_and_in_order():
    day = [Hour(3, 0)] + [Hour(0, 0)] * 22 + [Hour(2, 1)]
    times = traffic.arrivals(day)
    assert times == sorted(times)
    assert [int(time // 3600) for time in times] == [0, 0, 0, 23, 23]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "none"),
        ("hour,calls\n0,1\n", "hour,calls"),
        ("hour,calls,can_wait\n" + "0,1,0\n" * 24, "hours from 0 to 23"),
    ],
)
def test_another_file_is_no_day(tmp_path: Path, text: str, found: str):
    path = tmp_path / "day.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=found):
        traffic.read(path)


def test_a_day_that_is_not_there_ends_the_lesson_at_once(capsys):
    with pytest.raises(SystemExit) as end:
        lesson.main(["3", "--trace", "no-such-day.csv"])
    assert end.value.code == 2
    assert "no-such-day.csv" in capsys.readouterr().err


def test_more_cannot_wait_than_come():
    with pytest.raises(ValueError, match="can_wait"):
        Hour(1, 2)


# -- which side answers

PROMISE = Promise(soon_s=2, late_s=10, day_usd=1.0)


@pytest.mark.parametrize(
    ("local_s", "cloud_up", "spent_usd", "expected"),
    [
        (0.5, True, 0.0, Route("local", "soon enough")),
        (0.5, False, 9.0, Route("local", "soon enough")),
        (2.0, True, 0.0, Route("local", "soon enough")),
        (2.1, True, 0.0, Route("cloud", "local is late")),
        (None, True, 0.0, Route("cloud", "local is down")),
        (2.1, True, 0.9, Route("cloud", "local is late")),  # the last that is paid
        (2.1, True, 0.95, Route("local", "late, but the money is spent")),
        (2.1, False, 0.0, Route("local", "late, but the cloud is down")),
        (10.1, True, 0.95, Route("nowhere", "local is late, the money is spent")),
        (10.1, False, 0.0, Route("nowhere", "local is late, the cloud is down")),
        (None, True, 0.95, Route("nowhere", "local is down, the money is spent")),
        (None, False, 0.0, Route("nowhere", "local is down, the cloud is down")),
    ],
)
def test_each_branch_of_the_decision(local_s, cloud_up, spent_usd, expected):
    now = Situation(local_s, cloud_up, call_usd=0.1, spent_usd=spent_usd)
    assert route(now, PROMISE) == expected


def test_what_is_expected_of_the_local_model():
    assert hybrid.expected_s(0, slots=4, service_s=1.0) == 1.0
    assert hybrid.expected_s(3, slots=4, service_s=1.0) == 1.0  # the last free slot
    assert hybrid.expected_s(7, slots=4, service_s=1.0) == 2.0  # one turn to wait


class Broken(Exception):
    """A side that fails."""


def router(local, cloud, promise=PROMISE, **options):
    log = []
    options = {"slots": 1, "service_s": 1.5, "call_usd": 0.4, **options}
    made = Router(
        local,
        cloud,
        partial(route, promise=promise),
        failures=(Broken,),
        log=log.append,
        **options,
    )
    return made, log


def broken(text):
    raise Broken


def test_a_side_that_fails_is_left_alone_and_the_other_answers():
    ask, log = router(broken, str.upper)
    assert [ask("a"), ask("b")] == ["A", "B"]
    assert [(d.where, d.outcome) for d in log] == [
        ("local", "Broken"),
        ("cloud", "ok"),
        ("cloud", "ok"),
    ]
    assert log[1].why == "local is down"
    with pytest.raises(Refused, match="local is down, the money is spent"):
        ask("c")
    line = json.loads(log[-1].line())
    assert (line["where"], line["outcome"]) == ("nowhere", "Refused")
    assert line["spent_usd"] == pytest.approx(0.8)


def test_a_side_that_failed_is_tried_again_after_a_pause():
    failing = [True]

    def local(text):
        if failing.pop() if failing else False:
            raise Broken
        return text

    ask, log = router(local, str.upper, pause_s=0.0)
    assert ask("a") == "a"
    assert [d.where for d in log] == ["local", "local"]


def test_a_full_local_model_overflows():
    inside, go_on = threading.Event(), threading.Event()

    def local(text):
        inside.set()
        assert go_on.wait(60)
        return text

    ask, log = router(local, str.upper)
    first = threading.Thread(target=ask, args=["a"])
    first.start()
    assert inside.wait(60)
    assert ask("b") == "B"
    go_on.set()
    first.join(60)
    assert [(d.where, d.why) for d in log] == [
        ("cloud", "local is late"),
        ("local", "soon enough"),
    ]


def test_a_mistake_is_no_failure_of_a_side():
    def mistaken(text):
        raise ZeroDivisionError

    ask, log = router(mistaken, str.upper)
    with pytest.raises(ZeroDivisionError):
        ask("a")
    assert [d.outcome for d in log] == ["ZeroDivisionError"]


SIDES = Sides(
    slots=1,
    service_s=[4.0],
    local_usd_per_hour=0.1,
    cloud_s=0.5,
    call_usd=0.01,
    local_down=(1000.0, 2000.0),
    cloud_down=(1500.0, 3000.0),
)


def test_a_day_replayed():
    times = [0.0, 1.0, 2.0, 3.0, 1200.0, 1700.0, 2500.0]
    days = hybrid.compare(times, partial(route, promise=Promise(5, 10, 1)), SIDES)
    # Alone: 4, then 4 + 3 s; the third would take 12. Down from 1000 to 2000.
    assert days["local only"].latencies_s == [4.0, 7.0, 4.0]
    assert days["local only"].refused == 4
    assert days["cloud only"].latencies_s == [0.5] * 5
    assert days["cloud only"].refused == 2
    # Both: the first and the last here, what would be late there; at 1700 nobody.
    assert days["hybrid"].latencies_s == [4.0, 0.5, 0.5, 0.5, 0.5, 4.0]
    assert days["hybrid"].refused == 1
    assert days["hybrid"].cloud_usd == pytest.approx(0.04)
    assert days["hybrid"].p95_s == 4.0
