"""What stands between a program and a bill: consent, caps, and an end for everything.

For the real service only. A key is read from the environment and nowhere else, nothing
happens before its owner has typed what it may cost, time and dollars are bounded by a
signal that no hanging read can outlast, and what could not be deleted is told with the
command that deletes it.
"""

from __future__ import annotations

import ipaddress
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import fireworks
from fireworks import Fireworks

from local_cloud.fireworks.calls import CallFailed

KEYS = "https://app.fireworks.ai/settings/users/api-keys"
NEEDED = ("FIREWORKS_API_KEY", "FIREWORKS_ACCOUNT_ID")


class NotLive(Exception):
    """The real service was not used: the message says why, and what to do."""


class CapReached(BaseException):
    """The time that was paid for is over. No `except Exception` may swallow it."""


class LeftRunning(Exception):
    """A deployment could not be deleted, and may cost money: what to type."""


@dataclass(frozen=True)
class Cap:
    """What a live run may take; whichever ends first."""

    dollars: float = 2.0
    seconds: float = 900.0

    def __post_init__(self) -> None:
        if self.dollars <= 0 or self.seconds < 1:
            raise ValueError(f"cap: expected more than 0 dollars and 1 s, found {self}")

    def lasts_s(self, usd_per_hour: float) -> float:
        """How long something at this price may be there."""
        return min(self.seconds, self.dollars / usd_per_hour * 3600)


def refuse_other_machines(url: str) -> None:
    """Let no address pass but one of this machine's own.

    Raises:
        ValueError: it is another.
    """
    host = urlsplit(url).hostname or ""
    try:
        ours = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        ours = False
    if not ours:
        raise ValueError(
            f"stand-in: expected an address on this machine, found {url!r}; for the "
            "real service use --live"
        )


def client() -> Fireworks:
    """A client of the real service. Key and account come from the environment.

    The address stays unset: with a base_url the SDK would ask for /v1, without one for
    /inference/v1, which is where the service answers.

    Raises:
        NotLive: the key or the account is missing.
    """
    if missing := [name for name in NEEDED if not os.environ.get(name)]:
        raise NotLive(
            f"Expected {' and '.join(missing)} in the environment, found nothing. Keys "
            f"are made at {KEYS}: export it, and write it into no file."
        )
    return Fireworks(max_retries=0)


def confirm(ask: Callable[[str], str], dollars: float) -> None:
    """Let the owner of the key type what it may cost.

    Raises:
        NotLive: something else was typed, or nobody is there.
    """
    phrase = f"spend up to {dollars:g} dollars"
    try:
        typed = ask(f'Type "{phrase}" to go on: ')
    except EOFError:
        typed = ""
    if typed.strip() != phrase:
        raise NotLive("Not confirmed: nothing was created, nothing was spent.")


def run(
    work: Callable[[Fireworks, float, Callable[[str], Any]], None],
    what: str,
    usd_per_hour: float,
    *,
    cap: Cap | None = None,
    ask: Callable[[str], str] = input,
    say: Callable[[str], Any] = print,
) -> int:
    """Do `work(client, seconds, say)` on the real service; gives the exit code.

    2 means that something may be left running: what to type has been said.
    """
    cap = cap or Cap()
    lasts_s = cap.lasts_s(usd_per_hour)
    try:
        with client() as real:
            say(
                f"On {real.base_url}, account {real.account_id}: {what}, "
                f"{usd_per_hour:.2f} dollars an hour, for at most {lasts_s:.0f} s; "
                "then it is deleted."
            )
            confirm(ask, cap.dollars)
            with capped(lasts_s):
                work(real, lasts_s, say)
    except LeftRunning as left:
        say(str(left))
        return 2
    except NotLive as why:
        say(str(why))
        return 1
    except (CapReached, TimeoutError, CallFailed, fireworks.APIError) as problem:
        say(f"{type(problem).__name__}: {problem} Nothing is left.")
        return 1
    say("The deployment was deleted.")
    return 0


def refused(problem: fireworks.APIStatusError) -> bool:
    """Whether nothing was made: after a 5xx or a timeout (408) it may have been."""
    return problem.status_code < 500 and problem.status_code != 408


def wait_until_ready(
    client: Fireworks,
    id: str,
    *,
    within_s: float,
    every_s: float,
    sleep: Callable[[float], Any],
) -> None:
    """Look at a deployment until it is READY.

    Raises:
        TimeoutError: it is not within this time, or never will be.
    """
    waited_s = 0.0
    while (found := client.deployments.get(id)).state != "READY":
        if found.state in ("FAILED", "DELETING", "DELETED") or waited_s > within_s:
            raise TimeoutError(
                f"{id}: expected READY within {within_s:g} s, found {found.state}"
            )
        sleep(every_s)
        waited_s += every_s


@contextmanager
def capped(seconds: float) -> Iterator[None]:
    """End the block after so long, even in the middle of a read; SIGTERM unwinds it.

    Raises:
        CapReached: the time was over.
    """

    def over(number: int, frame: Any) -> None:
        raise CapReached(f"Expected an end within {seconds:.0f} s, found none.")

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = {
        signal.SIGALRM: signal.signal(signal.SIGALRM, over),
        signal.SIGTERM: signal.signal(signal.SIGTERM, end),
    }
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def delete(client: Fireworks, id: str) -> None:
    """Delete a deployment, in use or not. No signal comes between.

    Raises:
        LeftRunning: it could not be deleted.
    """
    # Deleting twice is harmless, so this may be tried again. Without ignore_checks it
    # is refused to whoever used the deployment within the hour.
    sure = client.with_options(max_retries=4, timeout=30)
    with undisturbed():
        try:
            sure.deployments.delete(id, ignore_checks=True)
        except fireworks.NotFoundError:
            return
        except fireworks.APIError as problem:
            raise LeftRunning(_by_hand(client, id, problem)) from problem


def _by_hand(client: Fireworks, id: str, problem: Exception) -> str:
    base = str(client.base_url).rstrip("/")
    url = f"{base}/v1/accounts/{client.account_id}/deployments/{id}?ignoreChecks=true"
    return (
        f"Expected {id} to be deleted, found: {problem}\n"
        "It may cost money until it is. Delete it now, with one of:\n"
        f"  firectl deployment delete {id} --ignore-checks\n"
        f"  curl -X DELETE -H \"Authorization: Bearer $FIREWORKS_API_KEY\" '{url}'"
    )


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ctrl-C, SIGTERM and the alarm wait until the block is over."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = {signal.SIGINT, signal.SIGTERM, signal.SIGALRM}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
