"""Joules, as far as this machine can tell, and always as an interval.

    for meter in meters(cpu_s=lambda: scrape(url).total("process_cpu_seconds_total")):
        print(meter.method, meter.joules())

Inside a virtual machine nothing measures power: the hypervisor keeps the counters. What
is left is CPU time, and what a busy thread may draw. Where the counters can be read
they are used: RAPL of the CPU's package, NVML of an NVIDIA GPU.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from prometheus_client.core import CounterMetricFamily

# Of one busy hardware thread, without memory, disks, fans and the building. An
# assumption, and wide: a package's rated power over its threads is far lower in a dense
# server than in a desktop. Who knows the CPU narrows it.
WATTS_A_THREAD = (1.9, 6.3)
POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Interval:
    """A quantity that lies between two bounds."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high:
            raise ValueError(
                f"Expected bounds with 0 <= low <= high, found {self.low:g} and "
                f"{self.high:g}; give the smaller one first"
            )

    def __mul__(self, factor: float) -> Interval:
        return Interval(self.low * factor, self.high * factor)

    def __add__(self, other: Interval) -> Interval:
        return Interval(self.low + other.low, self.high + other.high)

    def since(self, before: Interval) -> Interval:
        """The increase of a counter; the bounds of one reading move together."""
        return Interval(self.low - before.low, self.high - before.high)

    def __str__(self) -> str:
        return f"{self.low:.3g} to {self.high:.3g}"


class Meter(Protocol):
    """Joules since it was made. They never fall."""

    method: str

    def joules(self) -> Interval: ...


class CpuSeconds:
    """CPU time of a process times what a busy thread draws at least and at most."""

    method = "cpu_seconds"

    def __init__(self, cpu_s: Callable[[], float] = time.process_time) -> None:
        self._cpu_s, self._start = cpu_s, cpu_s()

    def joules(self) -> Interval:
        return Interval(*WATTS_A_THREAD) * (self._cpu_s() - self._start)


class Rapl:
    """What the CPU packages used: at most all of it, at least the process's share.

    The share is its CPU time over that of all threads: a busy thread draws no less
    than the average one.

    Raises:
        OSError: no package can be read. Only root may, since the counter gave away
            keys (CVE-2020-8694).
    """

    method = "rapl"

    def __init__(
        self,
        cpu_s: Callable[[], float] = time.process_time,
        root: Path = POWERCAP,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        # intel-rapl:0 is a package (on AMD too); intel-rapl:0:1 is a part of it.
        self._packages = sorted(root.glob("intel-rapl:[0-9]")) + sorted(
            root.glob("intel-rapl:[0-9][0-9]")
        )
        if not self._packages:
            raise OSError(f"expected {root}/intel-rapl:0, found none")
        self._cpu_s, self._clock = cpu_s, clock
        self._ranges = [_number(p / "max_energy_range_uj") for p in self._packages]
        self._last = self._read()
        self._sum = Interval(0.0, 0.0)

    def _read(self) -> tuple[list[int], float, float]:
        counts = [_number(p / "energy_uj") for p in self._packages]
        return counts, self._cpu_s(), self._clock()

    def joules(self) -> Interval:
        last, cpu_before, then = self._last
        counts, cpu_s, now = self._last = self._read()
        used = sum(
            (count - was) % (wrap + 1)  # it counts from 0 again every few minutes
            for count, was, wrap in zip(counts, last, self._ranges, strict=True)
        )
        threads_s = (now - then) * (os.cpu_count() or 1)
        share = (cpu_s - cpu_before) / threads_s if threads_s else 0.0
        whole = used / 1e6
        self._sum += Interval(whole * min(1.0, max(0.0, share)), whole)
        return self._sum


class Nvml:
    """What the GPUs used. Both bounds are alike: they count for all who use them.

    Raises:
        ImportError, OSError: no nvidia-ml-py, or no driver, or a GPU before Volta.
    """

    method = "nvml"

    def __init__(self) -> None:
        self._nvml: Any = importlib.import_module("pynvml")
        try:
            self._nvml.nvmlInit()
            count = self._nvml.nvmlDeviceGetCount()
            self._gpus = [
                self._nvml.nvmlDeviceGetHandleByIndex(i) for i in range(count)
            ]
            self._start = self._read()
        except self._nvml.NVMLError as error:
            raise OSError(str(error)) from error

    def _read(self) -> float:
        counted = map(self._nvml.nvmlDeviceGetTotalEnergyConsumption, self._gpus)
        return sum(counted) / 1000  # it counts millijoules

    def joules(self) -> Interval:
        used = self._read() - self._start
        return Interval(used, used)


def meters(
    cpu_s: Callable[[], float] = time.process_time, root: Path = POWERCAP
) -> list[Meter]:
    """What this machine has: the CPU by RAPL, else by CPU time; GPUs where there are.

    `cpu_s` gives the CPU seconds of the process that is measured.
    """
    try:
        found: list[Meter] = [Rapl(cpu_s, root)]
    except OSError:
        found = [CpuSeconds(cpu_s)]
    with contextlib.suppress(ImportError, OSError):
        found.append(Nvml())
    return found


class EnergyCollector:
    """`energy_joules_total{method, bound}`: register it where metrics are rendered."""

    def __init__(self, *measured_by: Meter) -> None:
        self.meters = measured_by

    def collect(self) -> Iterator[CounterMetricFamily]:
        family = CounterMetricFamily(
            "energy_joules",
            "Joules used, between two bounds.",
            labels=["method", "bound"],
        )
        for meter in self.meters:
            used = meter.joules()
            family.add_metric([meter.method, "low"], used.low)
            family.add_metric([meter.method, "high"], used.high)
        yield family


def _number(path: Path) -> int:
    return int(path.read_text())
