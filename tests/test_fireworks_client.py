"""The careful client on bad days, the function behind it, and the guard of --live."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fireworks
import httpx
import pytest
from fireworks import AsyncFireworks
from jsonschema import Draft202012Validator

import fireworks_deployment as lesson
from fireworks_deployment import MODEL, TRIAGE, Careful, Function, Patience, lookup_for
from local_cloud.fireworks import live
from local_cloud.fireworks.app import serve
from local_cloud.fireworks.calls import IncompleteStream, NotServed, Stalled
from local_cloud.fireworks.clock import Clock
from local_cloud.fireworks.faults import Fault

TICKET = [{"role": "user", "content": "My order A-1042 never came!"}]
SHORT = {"max_tokens": 12, "temperature": 0}
PATIENT = Patience(idle_s=20, whole_s=30, wake_s=120, limit_s=30)
HASTY = Patience(idle_s=0.5, whole_s=30)  # where silence is ordered


@pytest.fixture(scope="module")
def running(shared_model):
    with serve(shared_model, clock=Clock.manual()) as served:
        yield served


@pytest.fixture
def cloud(running):
    yield running
    running.state.faults.clear()
    for deployment in list(running.state.deployments):
        running.state.forget(deployment)


@pytest.fixture
def calls():
    return []


@pytest.fixture
def waits(cloud):
    """The waits that were taken, in virtual time."""
    taken = []

    def sleep(seconds):
        taken.append(seconds)
        cloud.clock.advance(seconds)

    return taken, sleep


@contextmanager
def hooked(client, *, on, do, **options):
    """The same client, which does this on each "request" or "response"."""
    hooks = {on: [do]}
    with fireworks.DefaultHttpxClient(trust_env=False, event_hooks=hooks) as http:
        yield client.with_options(http_client=http, **options)


@pytest.fixture
def sent():
    """The requests that the careful client sent."""
    return []


@pytest.fixture
def careful(cloud, calls, waits, sent):
    with (
        lesson.stand_in(cloud.url) as client,
        hooked(client, on="request", do=sent.append) as noted,
    ):
        yield Careful(noted, patience=PATIENT, log=calls.append, sleep=waits[1])


def test_an_answer_is_whole_and_logged(careful, calls):
    answer = careful.ask(MODEL, TICKET, **SHORT)
    line = json.loads(calls[0].line())
    assert answer.call is calls[0]
    assert (line["outcome"], line["finish_reason"]) == ("ok", "length")
    assert (line["model"], line["deployment"]) == (MODEL, "")
    assert line["request_id"]
    assert line["latency_s"] > line["first_token_s"] > line["server_first_token_s"] > 0
    assert line["completion_tokens"] == 12
    tokens = line["prompt_tokens"] + line["completion_tokens"]
    assert line["dollars"] == pytest.approx(tokens * 0.10 / 1e6)


def test_a_timeout_is_submitted_once(careful, cloud, calls, sent):
    careful.patience = HASTY
    cloud.state.faults.order(Fault("slow", seconds=4, times=None))
    with pytest.raises(Stalled) as raised:
        careful.ask(MODEL, TICKET, **SHORT)
    assert len(sent) == 1
    assert raised.value.call is calls[0]
    assert calls[0].outcome == "Stalled"
    # What is being avoided: the SDK as it comes asks three times.
    plain = careful.client.with_options(max_retries=2, timeout=HASTY.idle_s)
    with pytest.raises(fireworks.APITimeoutError):
        plain.chat.completions.create(model=MODEL, messages=TICKET, **SHORT)
    assert len(sent) == 1 + 3


@pytest.mark.parametrize(
    ("kind", "error"),
    [("cut", IncompleteStream), ("error_event", IncompleteStream), ("stall", Stalled)],
)
def test_a_broken_stream_is_an_error_and_not_repeated(
    careful, cloud, calls, sent, kind, error
):
    cloud.state.faults.order(Fault(kind, seconds=15))
    careful.patience = HASTY if kind == "stall" else PATIENT
    with pytest.raises(error):
        careful.ask(MODEL, TICKET, **SHORT)
    assert len(sent) == 1
    assert [call.outcome for call in calls] == [error.__name__]
    assert calls[0].finish_reason is None
    careful.patience = PATIENT
    assert careful.ask(MODEL, TICKET, **SHORT).text


def test_an_error_event_is_seen_in_strict_mode_too(cloud, calls):
    cloud.state.faults.order(Fault("error_event"))
    with lesson.stand_in(cloud.url, _strict_response_validation=True) as client:
        careful = Careful(client, patience=PATIENT, log=calls.append)
        with pytest.raises(IncompleteStream):
            careful.ask(MODEL, TICKET, **SHORT)


def test_a_stream_that_drips_has_an_end(careful, cloud):
    careful.patience = Patience(idle_s=30, whole_s=0.2)
    with pytest.raises(Stalled, match="whole answer"):
        careful.ask(MODEL, TICKET, max_tokens=1500, temperature=0)


def test_a_rate_limit_is_waited_for_as_long_as_it_says(careful, cloud, waits, calls):
    cloud.state.faults.order(Fault("rate_limit", seconds=7, times=2))
    assert careful.ask(MODEL, TICKET, **SHORT).text
    assert waits[0] == [7, 7]
    assert (calls[0].refusals, calls[0].waited_s, len(calls)) == (2, 14, 1)


def test_a_rate_limit_without_end_has_a_deadline(careful, cloud, waits):
    cloud.state.faults.order(Fault("rate_limit", seconds=12, times=None))
    before = cloud.state.generations
    with pytest.raises(NotServed) as raised:
        careful.ask(MODEL, TICKET, **SHORT)
    assert waits[0] == [12, 12]  # of 30 s
    assert cloud.state.generations == before
    assert isinstance(raised.value.__cause__, fireworks.RateLimitError)


def test_a_cold_start_without_end_has_a_deadline(careful, cloud, waits, calls):
    cloud.state.faults.order(Fault("cold", times=None))
    with pytest.raises(NotServed):
        careful.ask(MODEL, TICKET, **SHORT)
    assert waits[0][:3] == [5.0, 7.5, 11.25]
    assert sum(waits[0]) <= PATIENT.wake_s
    assert calls[0].outcome == "NotServed"


def test_what_waiting_does_not_mend_is_told_at_once(careful, cloud, waits, calls):
    cloud.state.faults.order(Fault("broken"))
    with pytest.raises(fireworks.InternalServerError):
        careful.ask(MODEL, TICKET, **SHORT)
    with pytest.raises(fireworks.NotFoundError):
        careful.ask("accounts/fireworks/models/none", TICKET)
    assert waits[0] == []
    assert [call.outcome for call in calls] == ["InternalServerError", "NotFoundError"]
    assert all(call.request_id for call in calls)


def test_a_refused_connection_is_named(calls):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        with lesson.stand_in(url) as client, pytest.raises(IncompleteStream):
            Careful(client, log=calls.append).ask(MODEL, TICKET)
    assert calls[0].outcome == "IncompleteStream"


def test_async_calls_share_the_manners(cloud, calls):
    async def work():
        async with AsyncFireworks(
            api_key=cloud.api_key, base_url=cloud.url, max_retries=0
        ) as client:
            careful = Careful(client, patience=PATIENT, log=calls.append)
            careful.sleep = lambda seconds: asyncio.sleep(0)
            cloud.state.faults.order(Fault("rate_limit", seconds=1))
            cloud.state.faults.order(Fault("cut"))
            asked = (careful.ask_async(MODEL, TICKET, **SHORT) for _ in range(4))
            return await asyncio.gather(*asked, return_exceptions=True)

    told = asyncio.run(work())
    cut = [one for one in told if isinstance(one, IncompleteStream)]
    assert len(cut) == 1
    assert sum(isinstance(one, lesson.Answer) for one in told) == 3
    assert sum(call.refusals for call in calls) == 1


# Functions, and where they are deployed.


def test_a_function_gives_values_of_its_form(careful):
    for ticket in lesson.TICKETS:
        Draft202012Validator(TRIAGE.returns).validate(TRIAGE(careful, ticket))
    for ticket, known in (("Where is A-1042?", "A-1042"), ("Where is it?", None)):
        name, arguments = lookup_for(ticket)(careful, ticket)
        assert name == "lookup_order"
        assert arguments["order_id"] in (known, None)


def test_a_function_that_is_cut_short_says_so(careful):
    short = Function("short", TRIAGE.instructions, returns=TRIAGE.returns, max_tokens=5)
    with pytest.raises(lesson.CutShort, match="max_tokens"):
        short(careful, lesson.TICKETS[0])


def test_a_deployment_sleeps_wakes_and_is_gone(careful, cloud, calls):
    careful.patience = Patience(wake_s=600)
    with lesson.deployed(careful.client, TRIAGE, sleep=cloud.clock.advance) as name:
        TRIAGE(careful, lesson.TICKETS[0], name)
        cloud.clock.advance(TRIAGE.scaling.sleep_s + 60)
        TRIAGE(careful, lesson.TICKETS[0], name)
        noted = [call.status for call in cloud.state.deployments[name].calls]
        assert noted.count(503) == sum(call.refusals for call in calls)
        assert noted.count(200) == 2
    second = calls[1]
    assert second.refusals > 1
    assert second.deployment == name.rpartition("/")[2]
    assert second.dollars is None  # paid by the second, not by the token
    assert list(careful.client.deployments.list()) == []


def test_a_deployment_is_deleted_when_the_block_fails(careful, cloud):
    with (
        pytest.raises(KeyboardInterrupt),
        lesson.deployed(careful.client, TRIAGE, sleep=cloud.clock.advance),
    ):
        raise KeyboardInterrupt
    assert list(careful.client.deployments.list()) == []


def test_a_deployment_that_was_refused_is_not_deleted(careful, cloud, sent):
    """Nothing was made; and an id that is taken belongs to somebody else."""
    strange = careful.client.with_options(api_key="fw_of-somebody-else")
    with (
        pytest.raises(fireworks.AuthenticationError),
        lesson.deployed(strange, TRIAGE, sleep=cloud.clock.advance),
    ):
        pass
    assert [request.method for request in sent] == ["POST"]


@pytest.mark.parametrize("status", [408, 500, None])
def test_a_deployment_whose_creation_was_not_confirmed_is_deleted(
    careful, cloud, status
):
    def lose(response):
        if response.request.method != "POST":
            return
        if status is None:
            raise httpx.ReadTimeout("lost", request=response.request)
        response.status_code = status

    with (
        hooked(careful.client, on="response", do=lose) as client,
        pytest.raises((fireworks.APITimeoutError, fireworks.APIStatusError)),
        lesson.deployed(client, TRIAGE, sleep=cloud.clock.advance),
    ):
        pass
    assert cloud.state.deployments  # it had been made
    assert left(cloud) == []


# Money.


class Trap(BaseHTTPRequestHandler):
    """Remembers that somebody called."""

    def handle_one_request(self):
        self.server.called.append(self.client_address)
        self.close_connection = True


@pytest.fixture
def trap():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Trap)
    server.called = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join(5)


def test_the_default_run_uses_no_exported_key_and_no_exported_address(trap, tmp_path):
    """The whole of sections 1 and 4, in a process of its own, with a sniffing SDK."""
    url = f"http://127.0.0.1:{trap.server_port}"
    exported = {
        "FIREWORKS_API_KEY": "fw_secret-canary",
        "FIREWORKS_BASE_URL": url,
        "FIREWORKS_ACCOUNT_ID": "somebody",
        "HTTP_PROXY": url,
        "http_proxy": url,
        "ALL_PROXY": url,
    }
    sent = tmp_path / "sent"
    sniff = (
        "import httpx, sys\n"
        "send = httpx.Client.send\n"
        "def note(self, request, **options):\n"
        f"    with open({str(sent)!r}, 'a') as file:\n"
        "        print(request.url, dict(request.headers), file=file)\n"
        "    return send(self, request, **options)\n"
        "httpx.Client.send = note\n"
        "from fireworks_deployment import main\n"
        "sys.exit(main(['1', '--quick']) or main(['4', '--quick']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", sniff],
        cwd=Path(lesson.__file__).parent,
        env={**os.environ, **exported, "REPORTS_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    assert "canary" not in done.stdout + done.stderr
    assert "/chat/completions" in sent.read_text()
    assert "canary" not in sent.read_text()
    assert str(trap.server_port) not in sent.read_text()
    assert trap.called == []


def test_the_stand_in_client_refuses_other_machines():
    for url in ("https://api.fireworks.ai", "http://10.0.0.1:8000", "nonsense"):
        with pytest.raises(ValueError, match="this machine"):
            lesson.stand_in(url)


@pytest.fixture
def real(cloud, monkeypatch):
    """The environment of a live run, whose address is the stand-in's."""
    monkeypatch.setenv("FIREWORKS_API_KEY", cloud.api_key)
    monkeypatch.setenv("FIREWORKS_ACCOUNT_ID", cloud.account_id)
    monkeypatch.setenv("FIREWORKS_BASE_URL", cloud.url)
    return cloud


def go(cloud, typed="spend up to 2 dollars", **options):
    said = []
    options = {"sleep": cloud.clock.advance, "say": said.append, **options}
    code = lesson.go_live(ask=lambda prompt: typed, **options)
    return code, "\n".join(said)


def left(cloud):
    return [d for d in cloud.state.deployments.values() if d.deleted_s is None]


def test_live_asks_runs_and_deletes(real):
    code, said = go(real)
    assert code == 0
    assert real.url in said
    assert '"outcome": "ok"' in said
    assert real.state.deployments
    assert left(real) == []


def test_live_without_consent_or_key_creates_nothing(real, monkeypatch):
    assert go(real, typed="yes")[0] == 1
    monkeypatch.delenv("FIREWORKS_API_KEY")
    code, said = go(real)
    assert code == 1
    assert "FIREWORKS_API_KEY" in said
    assert real.state.deployments == {}


def test_live_with_a_wrong_key_says_so_and_nothing_of_money(real, monkeypatch):
    monkeypatch.setenv("FIREWORKS_API_KEY", "fw_of-somebody-else")
    code, said = go(real)
    assert code == 1
    assert "AuthenticationError" in said
    assert "Nothing is left." in said
    assert "cost money" not in said
    assert real.state.deployments == {}


def test_nobody_at_the_keyboard_is_no_consent():
    def nobody(prompt):
        raise EOFError

    with pytest.raises(live.NotLive):
        live.confirm(nobody, 2)


def test_live_deletes_after_a_ctrl_c(real):
    def interrupted(seconds):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(real, sleep=interrupted)
    assert real.state.deployments
    assert left(real) == []


@pytest.mark.parametrize("end", ["well", "ctrl-c"])
def test_a_delete_that_fails_is_told_with_what_to_type(real, end):
    def sleep(seconds):
        if end == "ctrl-c":
            raise KeyboardInterrupt
        real.clock.advance(seconds)

    real.state.faults.order(Fault("delete_refused", times=None))
    code, said = go(real, sleep=sleep)
    (deployment,) = left(real)
    assert code == 2
    key = '"Authorization: Bearer $FIREWORKS_API_KEY"'
    url = f"{real.url}/v1/{deployment.name}?ignoreChecks=true"
    assert f"curl -X DELETE -H {key} '{url}'" in said
    assert f"firectl deployment delete {deployment.name.rpartition('/')[2]}" in said
    assert real.api_key not in said


def test_the_cap_ends_a_run_that_hangs_and_deletes(real):
    def hang(seconds):
        left_s, _ = signal.setitimer(signal.ITIMER_REAL, 0.01)  # its end comes sooner
        assert 0 < left_s <= 600
        time.sleep(30)

    code, said = go(real, cap=live.Cap(dollars=2, seconds=600), sleep=hang)
    assert code == 1
    assert "CapReached" in said
    assert real.state.deployments
    assert left(real) == []


def test_the_cap_ends_a_read_that_hangs(careful, cloud):
    cloud.state.faults.order(Fault("slow", seconds=30))
    careful.patience = Patience(idle_s=30)
    with pytest.raises(live.CapReached), live.capped(0.5):
        careful.ask(MODEL, TICKET, **SHORT)


def test_dollars_bound_the_time():
    assert live.Cap(2.0, 10_000).lasts_s(8.0) == pytest.approx(900)
    assert live.Cap(2.0, 60).lasts_s(8.0) == 60
    with pytest.raises(ValueError, match="dollars"):
        live.Cap(0)


def test_sigterm_ends_a_live_run_by_its_finally():
    with pytest.raises(SystemExit) as raised, live.capped(5):
        signal.raise_signal(signal.SIGTERM)
    assert raised.value.code == 128 + signal.SIGTERM
