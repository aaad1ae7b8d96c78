"""New versions: who meets one first, whether it is worse, and several asked as one.

A balancer is also where a new version meets its first users. Each user must stay with
one version, so the choice is a hash of who asks, not a coin. And whoever looks at the
results every minute and stops when they look significant is wrong far more often than
they think: `false_alarms` shows by how much. `judge` may be asked at any time.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np


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
