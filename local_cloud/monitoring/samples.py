"""Samples in memory, as Prometheus keeps them: bounded, in order, with their ends."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterator, Mapping

Labels = frozenset[tuple[str, str]]  # "__name__" is one of them

NAME = "__name__"
LOOKBACK_S = 300.0  # how old a sample may be and still be the current one
MOST_SERIES = 10_000  # more come of labels without bounds, not of a model API


def labelled(name: str, labels: Mapping[str, str]) -> Labels:
    """The identity of a series. An empty label is no label."""
    pairs = {**labels, NAME: name}
    return frozenset((key, value) for key, value in pairs.items() if value)


class Series:
    """One series: times, values, and what the counter had reached at its resets."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.values: list[float] = []
        self.lost: list[float] = []  # by resets, up to each sample
        self.ends: list[float] = []  # when it was found gone

    def add(self, at: float, value: float) -> None:
        lost = self.lost[-1] if self.lost else 0.0
        if self.values and value < self.values[-1]:  # false for NaN, as it should be
            lost += self.values[-1]
        self.times.append(at)
        self.values.append(value)
        self.lost.append(lost)

    def forget(self, before: float) -> None:
        """Drop what is older; in large pieces, because each one moves the rest."""
        old = bisect_left(self.times, before)
        if 2 * old > len(self.times):
            del self.times[:old], self.values[:old], self.lost[:old]
            del self.ends[: bisect_left(self.ends, before)]

    def current(self, at: float) -> tuple[float, float] | None:
        """The newest sample, its time and value; None if too old or it had ended."""
        place = bisect_right(self.times, at) - 1
        if place < 0 or self.times[place] < at - LOOKBACK_S:
            return None
        ended = bisect_right(self.ends, at) - bisect_right(self.ends, self.times[place])
        return None if ended else (self.times[place], self.values[place])


class Samples:
    """All series, none older than `keep_s`, never more than MOST_SERIES."""

    def __init__(self, keep_s: float) -> None:
        self.keep_s = keep_s
        self.by_name: dict[str, dict[Labels, Series]] = {}
        self.count = self.refused = 0

    def add(self, series: Labels, at: float, value: float) -> None:
        """One sample. Times must ascend; one that does not is refused, and counted."""
        family = self.by_name.setdefault(dict(series)[NAME], {})
        kept = family.get(series)
        if kept is None:
            if self.count >= MOST_SERIES:
                self.refused += 1
                return
            self.count += 1
            kept = family[series] = Series()
        if kept.times and at <= kept.times[-1]:
            self.refused += 1
            return
        kept.add(at, value)
        kept.forget(at - self.keep_s)

    def end(self, series: Labels, at: float) -> None:
        """The series is gone: it has no current value until the next sample."""
        kept = self.by_name.get(dict(series)[NAME], {}).get(series)
        if kept and kept.times and not (kept.ends and kept.ends[-1] > kept.times[-1]):
            kept.ends.append(at)

    def forget(self, before: float) -> None:
        """Drop whole series that have had no sample since."""
        for family in self.by_name.values():
            for series in [s for s, kept in family.items() if kept.times[-1] < before]:
                del family[series]
                self.count -= 1


class Target:
    """What one target's `/metrics` said: its samples and, as `up`, whether it did.

    Args:
        samples: where they go.
        labels: `job` and `instance`. A metric's own label of such a name is kept as
            `exported_<name>`.
        names: of the series that are wanted; the others are not kept.
    """

    def __init__(
        self, samples: Samples, labels: Mapping[str, str], names: Collection[str]
    ) -> None:
        self.samples, self.labels, self.names = samples, labels, names
        self.known: set[Labels] = set()  # in the last scrape

    def take(self, at: float, text: str | None) -> None:
        """One scrape; None, or what is no metrics, ends all series: it is down."""
        try:
            found = dict(self._read(text)) if text is not None else {}
        except ValueError:
            text, found = None, {}
        for series, value in found.items():
            self.samples.add(series, at, value)
        for gone in self.known - found.keys():
            self.samples.end(gone, at)
        self.known = set(found)
        self.samples.add(labelled("up", self.labels), at, float(text is not None))

    def _read(self, text: str) -> Iterator[tuple[Labels, float]]:
        from prometheus_client.parser import text_string_to_metric_families

        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name in self.names:
                    own = {
                        f"exported_{key}" if key in self.labels else key: value
                        for key, value in sample.labels.items()
                    }
                    yield labelled(sample.name, {**own, **self.labels}), sample.value
