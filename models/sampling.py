"""What a caller asks of one answer, and how one token is drawn from the logits."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from reprlib import repr as short
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from models.errors import ModelError

if TYPE_CHECKING:
    from models.grammar import Grammar, Matcher

MAX_STOP, MAX_STOP_CHARACTERS = 4, 256
MAX_BIASED = 300
MAX_TOP = 20  # most alternatives reported beside each token


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one answer is generated. Defaults: greedy, at most 128 tokens."""

    max_tokens: int = 128
    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0
    seed: int | None = (
        None  # None draws a fresh seed; the same seed gives the same text
    )
    stop: tuple[str, ...] = ()  # strings that end the answer; they are not part of it
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = (
        None  # None: off. k: each token's log-probability and its top k
    )
    grammar: Grammar | None = None
    forced: tuple[int, ...] = field(default=())  # score these tokens instead of drawing

    def __post_init__(self) -> None:
        _check_integer("max_tokens", self.max_tokens, 1)
        _check_number("temperature", self.temperature, 0, 2)
        _check_number("top_p", self.top_p, 0, 1)
        if self.top_p == 0:
            raise _wrong("top_p", "more than 0", self.top_p, "temperature 0 is greedy")
        if self.seed is not None:
            _check_integer("seed", self.seed, -math.inf)
        _check_stop(self.stop)
        _check_number("presence_penalty", self.presence_penalty, -2, 2)
        _check_number("frequency_penalty", self.frequency_penalty, -2, 2)
        _check_bias(self.logit_bias)
        if self.logprobs is not None:
            _check_integer("logprobs", self.logprobs, 0, MAX_TOP)
        for id in self.forced:
            _check_integer("forced", id, 0)
        if self.forced and self.grammar is not None:
            raise _wrong(
                "forced", "no grammar beside it", self.grammar, "use one of the two"
            )


def _wrong(name: str, expected: str, found: object, do: str) -> ValueError:
    return ValueError(f"{name}: expected {expected}, found {short(found)}; {do}")


def _check_integer(name: str, value: Any, low: float, high: float = math.inf) -> None:
    if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
        return
    expected = "an integer"
    if low > -math.inf:
        expected += f" of at least {low}"
    if high < math.inf:
        expected += f" and at most {high}"
    raise _wrong(name, expected, value, "correct the number")


def _check_number(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _wrong(name, "a number", value, f"send {low} to {high}")
    if not low <= value <= high:  # also refuses NaN
        raise _wrong(name, f"{low} to {high}", value, "move it into this range")


def _check_stop(stop: Any) -> None:
    if not isinstance(stop, tuple) or not all(isinstance(one, str) for one in stop):
        raise _wrong("stop", "a tuple of strings", stop, 'write it as ("...",)')
    if len(stop) > MAX_STOP:
        found = f"{len(stop)} strings"
        raise _wrong("stop", f"at most {MAX_STOP} strings", found, "remove some")
    for one in stop:
        if not 1 <= len(one) <= MAX_STOP_CHARACTERS:
            raise _wrong(
                "stop",
                f"strings of 1 to {MAX_STOP_CHARACTERS} characters",
                f"one of {len(one)} characters",
                "shorten or remove it",
            )
        if not one.isascii() and any("\ud800" <= char <= "\udfff" for char in one):
            raise _wrong("stop", "valid Unicode", one, "remove the lone surrogate")


def _check_bias(bias: Any) -> None:
    if not isinstance(bias, tuple) or not all(
        isinstance(pair, tuple) and len(pair) == 2 for pair in bias
    ):
        expected = "a tuple of (token id, bias) pairs"
        raise _wrong("logit_bias", expected, bias, "write ((id, bias), ...)")
    if len(bias) > MAX_BIASED:
        found, expected = f"{len(bias)} tokens", f"at most {MAX_BIASED} tokens"
        raise _wrong("logit_bias", expected, found, "keep the ones that matter")
    for id, value in bias:
        _check_integer("logit_bias: token id", id, 0)
        _check_number(f"logit_bias: bias of token {id}", value, -100, 100)
    if len({id for id, _ in bias}) < len(bias):
        raise _wrong("logit_bias", "each token once", bias, "remove the repetition")


class Draw(NamedTuple):
    """One drawn token; natural-log probabilities if they were asked for.

    They are the model's own: the log-softmax of its raw logits, before temperature,
    penalties, bias and grammar.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()  # (id, logprob), the most likely first


class Sampler:
    """Draws the tokens of one answer, one call of `draw` a token, in one thread.

    The order is: penalties by what was drawn so far, bias, grammar, temperature,
    top-p. Equal logits are resolved towards the lowest id.
    """

    def __init__(
        self, sampling: Sampling, vocabulary: int, matcher: Matcher | None = None
    ) -> None:
        """`matcher` follows `sampling.grammar`; make it in the caller's thread."""
        if (matcher is None) != (sampling.grammar is None):
            raise _wrong(
                "matcher", "one with a grammar, none without", matcher, "compile it"
            )
        for id in (*(id for id, _ in sampling.logit_bias), *sampling.forced):
            if id >= vocabulary:
                expected = f"token ids below {vocabulary}"
                raise _wrong("logit_bias or forced", expected, id, "use the tokenizer")
        self._sampling = sampling
        self._matcher = matcher
        self._forced = iter(sampling.forced)
        self._left = len(sampling.forced)
        self._counts: Counter[int] = Counter()
        self._penalised = bool(sampling.presence_penalty or sampling.frequency_penalty)
        self._bias_ids = np.array([id for id, _ in sampling.logit_bias], np.int64)
        self._bias = np.array([bias for _, bias in sampling.logit_bias], np.float32)
        # Whether each draw is the argmax and nothing else, so that `greedy` may do it.
        self.plain = not (
            sampling.temperature
            or self._penalised
            or sampling.logit_bias
            or sampling.logprobs is not None
            or sampling.forced
            or matcher is not None
        )
        if sampling.temperature:  # seeding takes longer than all the rest here
            # PCG64 takes no negative seed; other APIs do.
            seed = None if sampling.seed is None else sampling.seed % 2**64
            self._random = np.random.Generator(np.random.PCG64(seed))

    @property
    def finished(self) -> bool:
        """Whether nothing is left to draw: all forced, or the grammar complete."""
        if self._matcher is not None:
            return self._matcher.finished
        return bool(self._sampling.forced) and self._left == 0

    def draw(self, logits: np.ndarray) -> Draw:
        """Draw from `logits` (float32, one per token), which stay as they are."""
        largest = largest_id(logits)
        if self._sampling.forced:
            id = self._next_forced()
        else:
            id = largest if self.plain else self._choose(logits)
        if self._penalised:
            self._counts[id] += 1
        if self._matcher is not None:
            self._matcher.accept(id)
        if self._sampling.logprobs is None:
            return Draw(id)
        return score(logits, id, self._sampling.logprobs)

    def _next_forced(self) -> int:
        if not self._left:
            raise ModelError(
                f"forced: expected at most {len(self._sampling.forced)} draws, found "
                "one more; stop when the sampler has finished"
            )
        self._left -= 1
        return next(self._forced)

    def _choose(self, logits: np.ndarray) -> int:
        logits = self._adjust(logits)
        largest = largest_id(logits)
        if not self._sampling.temperature:
            return largest
        # Below the smallest normal float32, 0 / temperature would be NaN.
        temperature = max(self._sampling.temperature, np.finfo(np.float32).tiny)
        with np.errstate(over="ignore"):
            # Shifted first, so that a tiny temperature overflows downwards only.
            scaled = (logits - logits[largest]) / np.float32(temperature)
        return pick(np.exp(scaled), self._sampling.top_p, self._random.random())

    def _adjust(self, logits: np.ndarray) -> np.ndarray:
        """A changed copy of `logits`, or `logits` itself where nothing changes them."""
        if self._counts or len(self._bias):
            logits = logits.copy()
        if self._counts:
            asked, count = self._sampling, len(self._counts)
            ids = np.fromiter(self._counts.keys(), np.int64, count)
            times = np.fromiter(self._counts.values(), np.float32, count)
            logits[ids] -= asked.presence_penalty + asked.frequency_penalty * times
        if len(self._bias):
            logits[self._bias_ids] += self._bias
        return logits if self._matcher is None else self._matcher.mask(logits)


def greedy(logits: np.ndarray) -> list[int]:
    """The most likely token of each row of `logits` [rows, vocabulary]."""
    ids = logits.argmax(axis=1)
    values = logits[np.arange(len(ids)), ids]
    if not np.isfinite(values).all():
        largest_id(logits[int(np.argmin(np.isfinite(values)))])
    return ids.tolist()


def largest_id(logits: np.ndarray) -> int:
    """The lowest id of the largest logit, which must be a finite number."""
    id = int(logits.argmax())  # of the first NaN if there is one
    if not math.isfinite(logits[id]):
        raise ModelError(
            f"logits: expected finite numbers, found {logits[id]} for token {id}; the "
            "model file may be damaged: build it again"
        )
    return id


def pick(weights: np.ndarray, top_p: float, uniform: float) -> int:
    """The token at `uniform` in [0, 1) of the nucleus of `weights` (any scale)."""
    if top_p == 1:
        return _at(weights.cumsum(dtype=np.float64), uniform)
    ids = nucleus(weights, top_p)
    return int(ids[_at(weights[ids].cumsum(dtype=np.float64), uniform)])


def nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """The ids of the fewest, heaviest tokens with `top_p` of the weight, ascending."""
    total = weights.sum(dtype=np.float64)
    # At most 1000 tokens hold a thousandth each, and usually they are enough; sorting
    # all 49,152 takes ten times as long. Values are sorted, not ids: numpy is faster.
    heavy, sums = _heaviest(weights[weights >= np.float32(total / 1000)])
    if not len(sums) or sums[-1] < top_p * total:
        heavy, sums = _heaviest(weights)
    count = min(int(np.searchsorted(sums, top_p * total)) + 1, len(sums))
    lightest = heavy[count - 1]
    ids = np.flatnonzero(weights >= lightest)
    if surplus := len(ids) - count:  # of the equally light ones, the lowest ids stay
        equal = np.flatnonzero(weights[ids] == lightest)
        ids = np.delete(ids, equal[-surplus:])
    return ids


def _heaviest(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The weights, heaviest first, and their running sums."""
    heavy = np.sort(weights)[::-1]
    return heavy, heavy.cumsum(dtype=np.float64)


def _at(sums: np.ndarray, uniform: float) -> int:
    """The place whose share of the running `sums` holds `uniform`."""
    place = np.searchsorted(sums, uniform * sums[-1], side="right")
    # Rounding may reach the end; the last place with any weight takes it.
    return int(min(place, np.searchsorted(sums, sums[-1])))


def score(logits: np.ndarray, id: int, top: int) -> Draw:
    """Token `id` with its log-probability and the `top` most likely tokens."""
    largest = logits[largest_id(logits)]
    shift = float(largest) + math.log(np.exp(logits - largest).sum(dtype=np.float64))
    ids = largest_ids(logits, top) if top else ()
    alternatives = tuple((other, float(logits[other]) - shift) for other in ids)
    return Draw(id, float(logits[id]) - shift, alternatives)


def largest_ids(logits: np.ndarray, count: int) -> Iterable[int]:
    """The ids of the `count` largest logits, largest first, equal ones lowest first."""
    # The count-th largest of the maxima of blocks bounds the count-th largest logit
    # from below and leaves few to sort: five times faster than a partition.
    maxima = np.maximum.reduceat(logits, np.arange(0, len(logits), 128))
    bound = np.sort(maxima)[-count] if count <= len(maxima) else -np.inf
    ids = np.flatnonzero(logits >= bound)
    order = np.argsort(-logits[ids], kind="stable")
    return ids[order[:count]].tolist()
