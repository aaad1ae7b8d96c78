"""New versions: who meets one first, whether it is worse, and several asked as one.

A balancer is also where a new version meets its first users. Each user must stay with
one version, so the choice is a hash of who asks, not a coin. And whoever looks at the
results every minute and stops when they look significant is wrong far more often than
they think: `false_alarms` shows by how much. `judge` may be asked at any time, and
`split` asks it while two real processes answer.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from course import load
from course.process import child, free_port
from local_cloud.scaling import standin

if TYPE_CHECKING:
    from course.lesson import Run

PATH = "/v1/chat/completions"
USERS, SHARE, FAILING = 200, 0.1, 0.3  # of a live split: who meets what


def version_for(user: str, canary_share: float, experiment: str) -> str:
    """ "canary" or "stable", always the same for one user within one experiment."""
    digest = hashlib.sha256(f"{experiment}\0{user}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    return "canary" if place < canary_share else "stable"


@dataclass(frozen=True)
class Outcomes:
    """How the requests to one version went."""

    requests: int
    failures: int


Verdict = Literal["promote", "roll back", "wait"]


def judge(
    stable: Outcomes,
    canary: Outcomes,
    *,
    enough: int,
    error: float = 0.05,
    effect: float = 0.02,
) -> Verdict:
    """Whether a canary fails more often; valid however often it is asked.

    A mixture sequential probability ratio test of two shares: the evidence against "no
    difference" is averaged over differences of about `effect`, and a true "no
    difference" exceeds 1 / `error` at any time with a probability of at most `error`.
    Source: R. Johari and others, Peeking at A/B Tests, 2017.

    Args:
        enough: requests to the canary after which it is promoted, unless it is worse.
    """
    if not (stable.requests and canary.requests):
        return "wait"
    requests = stable.requests + canary.requests
    share = (stable.failures + canary.failures) / requests
    variance = share * (1 - share) * (1 / stable.requests + 1 / canary.requests)
    worse = canary.failures / canary.requests - stable.failures / stable.requests
    if variance and worse > 0:
        both = variance + effect**2
        log_evidence = (effect * worse) ** 2 / (2 * variance * both)
        log_evidence += math.log(variance / both) / 2
        if log_evidence >= -math.log(error):
            return "roll back"
    return "promote" if canary.requests >= enough else "wait"


def majority(answers: Sequence[str]) -> tuple[str, float]:
    """What most members of an ensemble say, and how many of them; the first of equals.

    Right more often than each of them if they err independently (Condorcet, 1785), for
    the price of all. Where they disagree, ask a larger model or a person.
    """
    if not answers:
        raise ValueError("majority: expected at least one answer, found none")
    answer, votes = Counter(answers).most_common(1)[0]
    return answer, votes / len(answers)


def majority_right(right: float, members: int, questions: int, seed: int) -> float:
    """How often a `majority` is right whose members each are, independently."""
    drawn = np.random.default_rng(seed).random((questions, members)) < right
    votes = np.where(drawn, "right", "wrong").tolist()
    return sum(majority(vote)[0] == "right" for vote in votes) / questions


def false_alarms(
    experiments: int, looks: int, requests: int, failing: float, seed: int
) -> tuple[float, float]:
    """Shares of equal versions that are called worse by who looks again and again.

    Each look comes after `requests` more to both versions. The first share is that of a
    z-test at 5 %, read anew at each look; the second that of `judge`.
    """
    rng = np.random.default_rng(seed)
    drawn = rng.binomial(requests, failing, (experiments, looks, 2)).cumsum(1)
    alarms = [0, 0]
    for failures in drawn.tolist():
        seen = [
            (Outcomes(n * requests, stable), Outcomes(n * requests, canary))
            for n, (stable, canary) in enumerate(failures, 1)
        ]
        alarms[0] += any(_z_score(*pair) > 1.645 for pair in seen)
        alarms[1] += any(judge(*pair, enough=10**9) == "roll back" for pair in seen)
    return alarms[0] / experiments, alarms[1] / experiments


def _z_score(stable: Outcomes, canary: Outcomes) -> float:
    """How many standard errors the canary's failures exceed the stable version's."""
    share = (stable.failures + canary.failures) / (stable.requests + canary.requests)
    variance = share * (1 - share) * (1 / stable.requests + 1 / canary.requests)
    worse = canary.failures / canary.requests - stable.failures / stable.requests
    return worse / math.sqrt(variance) if variance else 0.0


# Two versions that run.


@dataclass(frozen=True)
class Split:
    """What a canary did among users who asked until the judge had spoken."""

    met: int  # users who met the canary
    strayed: int  # users who met both versions
    stable: Outcomes
    canary: Outcomes
    verdict: Verdict


def split(users: int, share: float, failing: float, *, rounds: int = 20) -> Split:
    """Two stand-ins, the newer of which fails at times; each user asks once a round.

    Args:
        share: of the users who meet the canary.
        failing: share of its requests that the canary fails.
        rounds: after so many the canary has been asked enough, and is promoted.
    """
    with ExitStack() as stack:
        urls = {
            "stable": _version(stack),
            "canary": _version(stack, "--failing", str(failing), "--seed", "1"),
        }
        return asyncio.run(_ask_by_rounds(urls, users, share, rounds))


def _version(stack: ExitStack, *options: str) -> str:
    """A version that serves until the stack ends; its URL."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    argv = standin.command(port, "--service-ms", "1", "--slots", "8", *options)
    stack.enter_context(child(argv, ready=f"{url}/health/ready"))
    return url


async def _ask_by_rounds(
    urls: dict[str, str], users: int, share: float, rounds: int
) -> Split:
    names = [f"user-{number}" for number in range(users)]
    met: dict[str, set[str]] = defaultdict(set)
    seen = {version: Outcomes(0, 0) for version in urls}
    enough = rounds * sum(version_for(n, share, "live") == "canary" for n in names)
    async with load.client() as http:

        async def send(number: int) -> load.Outcome:
            version = version_for(names[number], share, "live")
            outcome = await load.post(http, urls[version] + PATH, {})
            met[names[number]].add(version)
            before, bad = seen[version], not outcome.ok
            seen[version] = Outcomes(before.requests + 1, before.failures + bad)
            return outcome

        verdict: Verdict = "wait"
        while verdict == "wait":
            await load.run_closed_loop(send, clients=8, requests=users)
            verdict = judge(seen["stable"], seen["canary"], enough=enough)
    by_canary = [user for user, versions in met.items() if "canary" in versions]
    both = sum(len(versions) > 1 for versions in met.values())
    return Split(len(by_canary), both, seen["stable"], seen["canary"], verdict)


def show(run: Run, seed: int) -> None:
    """Who looks often, a live canary, and an ensemble."""
    naive, proper = false_alarms(300, 50, 200, 0.02, seed)
    name = "equal canaries called worse, by who looks 50 times"
    run.fact(name, f"{naive:.0%} with a test at 5 %, {proper:.1%} with `judge`")
    found = split(USERS, SHARE, FAILING)
    name = f"a canary that fails {FAILING:.0%}, for {found.met} of {USERS} users"
    told = f"{found.canary.failures} of its {found.canary.requests} requests failed"
    run.fact(name, f"{found.verdict}, when {told}; {found.strayed} users met both")
    name = "right: a model, and the majority of three that err independently"
    run.fact(name, f"80 % (assumed), {majority_right(0.8, 3, 10_000, seed):.0%}")
