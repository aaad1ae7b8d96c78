"""What a function costs, and when a container would cost less.

List prices in US dollars, without free tiers, discounts and data transfer. Each table
says where and when it was read: prices change, the functions below do not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from course import draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MB_PER_GB = 1024  # of a function's memory, as its bill counts
HOUR_S = 3600
MONTH_S = 730 * HOUR_S  # 8,760 hours a year by twelve, as the providers' calculators
FULL_VCPU_MB = 1769  # of memory for which Lambda gives one whole vCPU


@dataclass(frozen=True)
class FunctionPrice:
    """What a provider asks for a function; None where it sells no such thing."""

    name: str
    per_gb_s: float  # of running, initialisation included
    per_request: float
    region: str
    read: str  # year and month of the source
    source: str
    ready_per_gb_s: float | None = None  # kept ready, busy or not
    ready_busy_per_gb_s: float | None = None  # running, where it is kept ready
    snapshot_per_gb_s: float | None = None  # kept in the cache, at least 3 hours
    restore_per_gb: float | None = None


@dataclass(frozen=True)
class ContainerPrice:
    """What a provider asks for a container, for as long as it is up."""

    name: str
    per_vcpu_s: float
    per_gb_s: float
    region: str
    read: str
    source: str
    per_request: float = 0.0


AWS = "https://aws.amazon.com/lambda/pricing"
LAMBDA_X86 = FunctionPrice(
    name="AWS Lambda, x86-64",
    per_gb_s=0.0000166667,
    per_request=0.20e-6,
    region="us-east-1",
    read="2026-05",
    source=AWS,
    ready_per_gb_s=0.0000041667,
    ready_busy_per_gb_s=0.0000097222,
    snapshot_per_gb_s=0.0000015046,
    restore_per_gb=0.0001397998,
)
LAMBDA_ARM = FunctionPrice(
    name="AWS Lambda, arm64",
    per_gb_s=0.0000133334,
    per_request=0.20e-6,
    region="us-east-1",
    read="2026-05",
    source=AWS,
)
AZURE_FLEX = FunctionPrice(
    name="Azure Functions, Flex Consumption",
    per_gb_s=0.000026,
    per_request=0.40e-6,
    region="East US",
    read="2025-05",
    source="https://azure.microsoft.com/pricing/details/functions",
)
FARGATE_X86 = ContainerPrice(
    name="AWS Fargate, x86-64",
    per_vcpu_s=0.04048 / HOUR_S,
    per_gb_s=0.004445 / HOUR_S,
    region="us-east-1",
    read="2026-03",
    source="https://aws.amazon.com/fargate/pricing",
)
FARGATE_ARM = ContainerPrice(
    name="AWS Fargate, arm64",
    per_vcpu_s=0.03238 / HOUR_S,
    per_gb_s=0.00356 / HOUR_S,
    region="us-east-1",
    read="2026-03",
    source="https://aws.amazon.com/fargate/pricing",
)
# Its clock runs only while a request is in the container, however many there are.
CLOUD_RUN = ContainerPrice(
    name="Google Cloud Run, billed by request",
    per_vcpu_s=0.000024,
    per_gb_s=0.0000025,
    region="tier 1",
    read="2025-09",
    source="https://cloud.google.com/run/pricing",
    per_request=0.40e-6,
)
PRICES = (LAMBDA_X86, LAMBDA_ARM, AZURE_FLEX, FARGATE_X86, FARGATE_ARM, CLOUD_RUN)


def lambda_cost(
    requests: float,
    billed_s: float,
    memory_mb: float,
    price: FunctionPrice = LAMBDA_X86,
    *,
    restores: int = 0,
    snapshot_s: float = 0.0,
) -> float:
    """US dollars for requests that ran `billed_s` seconds in all.

    `billed_s` contains every initialisation: it has been billed since August 2025.
    With snapshots, each restore is billed, and each second that one is kept.
    """
    _refuse_negative(requests=requests, billed_s=billed_s, memory_mb=memory_mb)
    gb = memory_mb / MB_PER_GB
    cost = requests * price.per_request + billed_s * gb * price.per_gb_s
    if restores or snapshot_s:
        cost += restores * gb * _sold(price, "restore_per_gb")
        cost += snapshot_s * gb * _sold(price, "snapshot_per_gb_s")
    return cost


def provisioned_cost(
    requests: float,
    busy_s: float,
    ready_s: float,
    memory_mb: float,
    price: FunctionPrice = LAMBDA_X86,
) -> float:
    """US dollars for sandboxes kept ready for `ready_s` seconds, `busy_s` of them busy.

    Several sandboxes add their seconds.
    """
    _refuse_negative(requests=requests, busy_s=busy_s, ready_s=ready_s)
    per_gb = ready_s * _sold(price, "ready_per_gb_s")
    per_gb += busy_s * _sold(price, "ready_busy_per_gb_s")
    return requests * price.per_request + memory_mb / MB_PER_GB * per_gb


def container_cost(
    up_s: float,
    vcpus: float,
    memory_gb: float,
    price: ContainerPrice = FARGATE_X86,
    *,
    requests: float = 0.0,
) -> float:
    """US dollars for a container that is up (or, on Cloud Run, serving) this long."""
    _refuse_negative(up_s=up_s, vcpus=vcpus, memory_gb=memory_gb, requests=requests)
    per_s = vcpus * price.per_vcpu_s + memory_gb * price.per_gb_s
    return up_s * per_s + requests * price.per_request


def break_even_utilisation(
    memory_mb: float,
    vcpus: float,
    memory_gb: float,
    *,
    call_s: float = math.inf,
    function: FunctionPrice = LAMBDA_X86,
    container: ContainerPrice = FARGATE_X86,
) -> float:
    """The busy share of its time from which one container that is always up is cheaper.

    `call_s` is how long a call takes: short ones make the fee of a request count. Over
    1 means that the function is always cheaper.
    """
    busy = lambda_cost(1 / call_s, 1.0, memory_mb, function)
    return container_cost(1.0, vcpus, memory_gb, container) / busy


def provisioned_break_even(price: FunctionPrice = LAMBDA_X86) -> float:
    """The busy share of its time from which a sandbox kept ready costs less."""
    saved = price.per_gb_s - _sold(price, "ready_busy_per_gb_s")
    return _sold(price, "ready_per_gb_s") / saved


def restore_in_init_s(price: FunctionPrice = LAMBDA_X86) -> float:
    """The seconds of initialisation that cost as much as one restore, at any memory."""
    return _sold(price, "restore_per_gb") / price.per_gb_s


def cold_probability(rate: float, keep_alive_s: float) -> float:
    """The chance that a call finds its sandbox gone, when calls come at random.

    That is e^(-rate * keep_alive): no other call in the time before, where `rate` is
    the calls a second of a Poisson process, and each is short beside the keep-alive.
    """
    _refuse_negative(rate=rate, keep_alive_s=keep_alive_s)
    return math.exp(-rate * keep_alive_s)


def facts(
    memory_mb: float, vcpus: float, memory_gb: float
) -> list[tuple[str, float, str]]:
    """What decides between a function and a container: names, figures, units.

    Calls that come at random every five minutes, to sandboxes that are kept as long.
    """
    share = break_even_utilisation(memory_mb, vcpus, memory_gb)
    cold = cold_probability(rate=1 / 300, keep_alive_s=300)
    always = "a container that is always up is cheaper from this busy share on"
    return [
        (always, 100 * share, "%"),
        ("and a provisioned sandbox", 100 * provisioned_break_even(), "%"),
        ("a restore costs as much as init of", restore_in_init_s(), "s"),
        ("one call in 5 min, sandboxes kept as long: cold", 100 * cold, "%"),
    ]


def draw_month(
    ax: Axes, *, memory_mb: float, vcpus: float, memory_gb: float, call_s: float
) -> None:
    """Draws a month's bill over the busy share of it: three ways to be there."""
    shares = [0.0, 0.25, 0.5, 0.75, 1.0]
    bills: dict[str, list[float]] = {
        "on demand": [],
        "provisioned": [],
        "container": [],
    }
    for share in shares:
        busy_s = share * MONTH_S
        calls = busy_s / call_s
        bills["on demand"].append(lambda_cost(calls, busy_s, memory_mb))
        ready = provisioned_cost(calls, busy_s, MONTH_S, memory_mb)
        bills["provisioned"].append(ready)
        bills["container"].append(container_cost(MONTH_S, vcpus, memory_gb))
    draw.lines(
        ax,
        {name: ([100 * share for share in shares], bills[name]) for name in bills},
        x="busy share of the time (%)",
        y="US dollars a month",
        title=f"{memory_mb:,.0f} MB, calls of {call_s:g} s",
    )


def _sold(price: FunctionPrice, name: str) -> float:
    value = getattr(price, name)
    if value is None:
        raise ValueError(
            f"Expected a price with {name}, found that {price.name} lists none; "
            "choose a table that has it, such as LAMBDA_X86."
        )
    return value


def _refuse_negative(**values: float) -> None:
    for name, value in values.items():
        if not value >= 0:  # also refuses nan
            raise ValueError(f"{name}: expected 0 or more, found {value}; correct it.")
