"""The part of PromQL that rules need, over samples kept in memory.

For machines without Prometheus, and to see how little of it an alert needs. The text
is parsed by `promql-parser`; what is computed follows Prometheus 2.x to the last digit
(the tests hold it against `promtool`). What is not here is refused when the query is
made, not when an outage needs it.
"""

from __future__ import annotations

import math
import operator
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from local_cloud.monitoring.samples import (
    LOOKBACK_S,
    NAME,
    Labels,
    Samples,
    Series,
    labelled,
)
from local_cloud.monitoring.scrape import quantile

__all__ = ["Query", "QueryError", "Samples", "Vector", "labelled"]

Vector = dict[Labels, float]
Value = float | Vector


class QueryError(ValueError):
    """A query that cannot be answered here, or has no one answer."""


class Query:
    """A PromQL expression: `Query("sum(rate(x[5m])) > 1").at(samples, time)`."""

    def __init__(self, text: str) -> None:
        import promql_parser

        self.text = text
        try:
            self.tree = promql_parser.parse(text)
        except ValueError as error:
            raise QueryError(f"Expected PromQL, found {text!r}: {error}") from None
        self.names: set[str] = set()  # of the series it reads
        self.reach_s = LOOKBACK_S  # how far back it looks
        self._check(self.tree)

    def at(self, samples: Samples, at: float) -> Value:
        """The number or the vector at a time."""
        return _evaluate(self.tree, samples, at)

    def vector(self, samples: Samples, at: float) -> Vector:
        """The same, a number as the vector of one series without labels."""
        value = self.at(samples, at)
        return value if isinstance(value, dict) else {frozenset(): value}

    def _check(self, node: Any) -> None:
        kind = type(node).__name__
        known = kind in EVALUATORS
        if kind == "Call":
            known = node.func.name in {"timestamp", *FUNCTIONS, *RANGE_FUNCTIONS}
            if node.func.name == "timestamp":  # of what is computed it has none
                known = type(node.args[0]).__name__ == "VectorSelector"
        elif kind == "AggregateExpr":
            known = str(node.op) in AGGREGATES
        elif kind == "BinaryExpr":
            grouped = node.modifier and "OneToOne" not in str(node.modifier.card)
            known = str(node.op) in SETS or (
                str(node.op) in {**ARITHMETIC, **COMPARISONS} and not grouped
            )
        elif kind in ("MatrixSelector", "VectorSelector"):
            vector = getattr(node, "vector_selector", node)
            known = (
                bool(vector.name) and not vector.at and not vector.matchers.or_matchers
            )
            self.names.add(vector.name)
            span = _seconds(getattr(node, "range", None))
            self.reach_s = max(self.reach_s, span + _seconds(vector.offset))
        if not known:
            raise QueryError(
                f"Expected PromQL that this evaluator has, found {node} in "
                f"{self.text!r}. Install Prometheus, or write the rule without it."
            )
        for child in _children(node):
            self._check(child)


def _children(node: Any) -> Iterator[Any]:
    for name in ("expr", "lhs", "rhs"):
        if (child := getattr(node, name, None)) is not None:
            yield child
    yield from getattr(node, "args", ())


def _seconds(span: Any) -> float:
    return span.total_seconds() if span is not None else 0.0


def _evaluate(node: Any, samples: Samples, at: float) -> Any:
    return EVALUATORS[type(node).__name__](node, samples, at)


# Selecting


def _select(vector: Any, samples: Samples) -> Iterator[tuple[Labels, Series]]:
    wanted = [(str(m.op), m.name, m.value) for m in vector.matchers.matchers]
    for labels, series in samples.by_name.get(vector.name, {}).items():
        has = dict(labels)
        if all(_fits(op, has.get(name, ""), value) for op, name, value in wanted):
            yield labels, series


def _fits(op: str, found: str, wanted: str) -> bool:
    if op in ("MatchOp.Equal", "MatchOp.NotEqual"):
        return (found == wanted) == (op == "MatchOp.Equal")
    return bool(_pattern(wanted).fullmatch(found)) == (op == "MatchOp.Re")


@cache
def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(text)


def _vector(node: Any, samples: Samples, at: float, part: int = 1) -> Vector:
    """The values now; with `part=0` their times."""
    at -= _seconds(node.offset)
    found = ((labels, s.current(at)) for labels, s in _select(node, samples))
    return {labels: sample[part] for labels, sample in found if sample}


# Functions of one series in a window: (series, first, last + 1, from, to) to a value.
# The window is closed on both sides, as in Prometheus 2 (3 leaves the left side open).


def _extrapolated(
    series: Series, first: int, end: int, start_s: float, end_s: float, rate: bool
) -> float | None:
    """The increase of a counter, stretched to the whole window as Prometheus does.

    Samples do not fall on the window's edges. The increase between the first and last
    is carried on to an edge that is nearer than 1.1 mean distances of samples, else by
    half a distance: there the series has probably begun or ended. And never before
    the moment at which the counter would have been zero.
    """
    if end - first < 2:
        return None
    last, times, values = end - 1, series.times, series.values
    grown = values[last] - values[first] + series.lost[last] - series.lost[first]
    sampled = times[last] - times[first]
    distance = sampled / (last - first)
    before, after = times[first] - start_s, end_s - times[last]
    if grown > 0 and values[first] >= 0:
        before = min(before, sampled * (values[first] / grown))
    near, stretched = distance * 1.1, sampled
    stretched += before if before < near else distance / 2
    stretched += after if after < near else distance / 2
    factor = stretched / sampled
    return grown * (factor / (end_s - start_s) if rate else factor)


def _line(series: Series, first: int, end: int, at: float) -> tuple[float, float]:
    """A gauge's value at a time and its change a second, by least squares."""
    n = end - first
    xs = [time - at for time in series.times[first:end]]
    ys = series.values[first:end]
    mean_x, mean_y = math.fsum(xs) / n, math.fsum(ys) / n
    both = math.fsum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    slope = both / math.fsum((x - mean_x) ** 2 for x in xs)
    return mean_y - slope * mean_x, slope


def _deriv(series: Series, first: int, end: int, *_: float) -> float | None:
    return _line(series, first, end, 0.0)[1] if end - first > 1 else None


def _predict(
    series: Series, first: int, end: int, _: float, end_s: float, later_s: float
) -> float | None:
    if end - first < 2:
        return None
    value, slope = _line(series, first, end, end_s)
    return value + slope * later_s


def _over(of: Callable[[list[float]], float]) -> Callable[..., float | None]:
    return lambda series, first, end, *_: of(series.values[first:end])


RANGE_FUNCTIONS: dict[str, Callable[..., float | None]] = {
    "rate": lambda *window: _extrapolated(*window, rate=True),
    "increase": lambda *window: _extrapolated(*window, rate=False),
    "deriv": _deriv,
    "predict_linear": _predict,
    "avg_over_time": _over(lambda values: math.fsum(values) / len(values)),
    "min_over_time": _over(min),
    "max_over_time": _over(max),
    "sum_over_time": _over(math.fsum),
    "count_over_time": _over(len),
    "last_over_time": _over(lambda values: values[-1]),
}


def _call(node: Any, samples: Samples, at: float) -> Value:
    name = node.func.name
    if name == "timestamp":
        times = _vector(node.args[0], samples, at, part=0)
        return {_without(labels, NAME): time for labels, time in times.items()}
    if name not in RANGE_FUNCTIONS:
        return FUNCTIONS[name](node, [_evaluate(a, samples, at) for a in node.args])
    window, *others = node.args
    details = [_evaluate(other, samples, at) for other in others]
    end_s = at - _seconds(window.vector_selector.offset)
    start_s = end_s - _seconds(window.range)
    result: Vector = {}
    for labels, series in _select(window.vector_selector, samples):
        first = bisect_left(series.times, start_s)
        end = bisect_right(series.times, end_s)
        if end > first:
            of = RANGE_FUNCTIONS[name]
            value = of(series, first, end, start_s, end_s, *details)
            if value is not None:
                result[_without(labels, NAME)] = value
    return result


def _absent(node: Any, arguments: list[Value]) -> Vector:
    """1 if there is nothing; it carries the labels the selector asks for."""
    if arguments[0]:
        return {}
    matchers = (
        node.args[0].matchers.matchers if hasattr(node.args[0], "matchers") else ()
    )
    equal = [(m.name, m.value) for m in matchers if str(m.op) == "MatchOp.Equal"]
    return {frozenset(equal): 1.0}


def _quantile(node: Any, arguments: list[Any]) -> Vector:
    """`histogram_quantile` of each histogram in the vector."""
    q, vector = arguments
    histograms: dict[Labels, dict[float, float]] = {}
    for labels, count in vector.items():
        if (edge := dict(labels).get("le")) is not None:
            buckets = histograms.setdefault(_without(labels, NAME, "le"), {})
            buckets[float(edge)] = count
    return {labels: quantile(q, buckets) for labels, buckets in histograms.items()}


FUNCTIONS: dict[str, Callable[[Any, list[Any]], Value]] = {
    "histogram_quantile": _quantile,
    "absent": _absent,
    "vector": lambda _, given: {frozenset(): given[0]},
    "round": lambda _, given: _mapped(given[0], _round),
    "abs": lambda _, given: _mapped(given[0], abs),
    "clamp_min": lambda _, given: _mapped(given[0], lambda v: max(v, given[1])),
    "clamp_max": lambda _, given: _mapped(given[0], lambda v: min(v, given[1])),
}


def _round(value: float) -> float:
    """Half is rounded up."""
    return float(math.floor(value + 0.5)) if math.isfinite(value) else value


def _mapped(vector: Vector, of: Callable[[float], float]) -> Vector:
    return {_without(labels, NAME): of(value) for labels, value in vector.items()}


# Aggregating


AGGREGATES: dict[str, Callable[[list[float]], float]] = {
    "sum": sum,
    "min": min,
    "max": max,
    "count": len,
    "avg": lambda values: sum(values) / len(values),
}


def _aggregate(node: Any, samples: Samples, at: float) -> Vector:
    groups: dict[Labels, list[float]] = {}
    for labels, value in _evaluate(node.expr, samples, at).items():
        groups.setdefault(_grouped(labels, node.modifier), []).append(value)
    return {labels: AGGREGATES[str(node.op)](of) for labels, of in groups.items()}


def _grouped(labels: Labels, modifier: Any) -> Labels:
    if modifier is None:
        return frozenset()
    if str(modifier.type).endswith("By"):
        return frozenset(pair for pair in labels if pair[0] in modifier.labels)
    return _without(labels, NAME, *modifier.labels)


def _without(labels: Labels, *names: str) -> Labels:
    return frozenset(pair for pair in labels if pair[0] not in names)


# Operators


def _divide(a: float, b: float) -> float:
    """As IEEE 754 has it: without traffic a ratio is 0/0, NaN, which fires nothing."""
    if b:
        return a / b
    if not a or math.isnan(a):
        return math.nan
    return math.copysign(math.inf, a) * math.copysign(1.0, b)


ARITHMETIC = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": _divide,
}
COMPARISONS = {
    ">": operator.gt,
    "<": operator.lt,
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
}
SETS = ("and", "or", "unless")


def _binary(node: Any, samples: Samples, at: float) -> Value:
    left, right = _evaluate(node.lhs, samples, at), _evaluate(node.rhs, samples, at)
    op = str(node.op)
    if op in SETS:
        return _set(op, left, right, node.modifier)
    if not isinstance(left, dict) and not isinstance(right, dict):
        return float({**ARITHMETIC, **COMPARISONS}[op](left, right))
    keep = op in COMPARISONS and not (node.modifier and node.modifier.return_bool)
    result: Vector = {}
    for labels, a, b in _pairs(left, right, node.modifier):
        value = float({**ARITHMETIC, **COMPARISONS}[op](a, b))
        if keep and value:  # a comparison lets pass what fits, unchanged
            result[labels] = a if isinstance(left, dict) else b
        elif not keep:
            result[_without(labels, NAME)] = value
    return result


def _pairs(
    left: Value, right: Value, modifier: Any
) -> Iterator[tuple[Labels, float, float]]:
    """What is compared with what, and the labels of the result."""
    if not isinstance(left, dict):
        assert isinstance(right, dict)
        yield from ((labels, left, value) for labels, value in right.items())
    elif not isinstance(right, dict):
        yield from ((labels, value, right) for labels, value in left.items())
    else:
        partners = _unique(right, modifier)
        for key, (labels, value) in _unique(left, modifier).items():
            if key in partners:
                on = modifier and modifier.matching
                yield (key if on else labels), value, partners[key][1]


def _unique(vector: Vector, modifier: Any) -> dict[Labels, tuple[Labels, float]]:
    found: dict[Labels, tuple[Labels, float]] = {}
    for labels, value in vector.items():
        key = _matching(labels, modifier)
        if key in found:
            raise QueryError(f"Expected one series for each {set(key)}, found several.")
        found[key] = labels, value
    return found


def _matching(labels: Labels, modifier: Any) -> Labels:
    matching = modifier and modifier.matching
    if matching and str(matching.type).endswith("Include"):
        return frozenset(pair for pair in labels if pair[0] in matching.labels)
    return _without(labels, NAME, *(matching.labels if matching else ()))


def _set(op: str, left: Vector, right: Vector, modifier: Any) -> Vector:
    if op == "or":
        known = {_matching(labels, modifier) for labels in left}
        more = {s: v for s, v in right.items() if _matching(s, modifier) not in known}
        return {**left, **more}
    known = {_matching(labels, modifier) for labels in right}
    wanted = op == "and"
    return {
        s: v for s, v in left.items() if (_matching(s, modifier) in known) == wanted
    }


EVALUATORS: dict[str, Callable[[Any, Samples, float], Any]] = {
    "NumberLiteral": lambda node, *_: node.val,
    "ParenExpr": lambda node, *rest: _evaluate(node.expr, *rest),
    "VectorSelector": _vector,
    "MatrixSelector": lambda node, *_: None,  # only functions read a window
    "Call": _call,
    "AggregateExpr": _aggregate,
    "BinaryExpr": _binary,
}
