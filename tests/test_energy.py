"""Joules: never one number, never falling, never invented."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from local_cloud.monitoring import energy, light_load
from local_cloud.monitoring.energy import Interval
from local_cloud.monitoring.scrape import parse
from monitoring_setup import sci
from serving import trials


class Clock:
    """Any quantity that only grows when told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def packages(root: Path, *microjoules: int, wrap: int = 1_000_000) -> Path:
    """The kernel's folder of counters, with a part of a package that is no package."""
    for number, count in enumerate(microjoules):
        for name in (f"intel-rapl:{number}", f"intel-rapl:{number}:0"):
            folder = root / name
            folder.mkdir(exist_ok=True)
            (folder / "energy_uj").write_text(f"{count}\n")
            (folder / "max_energy_range_uj").write_text(f"{wrap - 1}\n")
    return root


def test_cpu_time_gives_an_interval_of_joules():
    cpu = Clock()
    meter = energy.CpuSeconds(cpu)
    cpu.now = 10.0
    assert (meter.joules().low, meter.joules().high) == (19.0, 63.0)


def test_packages_are_added_their_parts_are_not(tmp_path: Path):
    cpu, clock = Clock(), Clock()
    meter = energy.Rapl(cpu, packages(tmp_path, 100, 200), clock)
    packages(tmp_path, 400_100, 500_200)
    clock.now = 1.0
    assert meter.joules().high == pytest.approx(0.9)


def test_a_counter_that_wrapped_around_went_on(tmp_path: Path):
    meter = energy.Rapl(Clock(), packages(tmp_path, 900_000), Clock())
    packages(tmp_path, 100_000)
    assert meter.joules().high == pytest.approx(0.2)
    assert meter.joules().high == pytest.approx(0.2)  # read again: nothing more


def test_of_a_package_a_process_owes_at_least_its_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    cpu, clock = Clock(), Clock()
    meter = energy.Rapl(cpu, packages(tmp_path, 0), clock)
    packages(tmp_path, 800_000)
    cpu.now, clock.now = 2.0, 2.0  # one of four threads, all the time
    assert meter.joules().low == pytest.approx(0.2)
    packages(tmp_path, 900_000)
    clock.now = 3.0  # idle: the sum must not fall
    assert meter.joules().low == pytest.approx(0.2)


def test_where_nothing_measures_cpu_time_is_used(tmp_path: Path):
    cpu, *_ = energy.meters(root=tmp_path)
    assert cpu.method == "cpu_seconds"
    cpu, *_ = energy.meters(root=packages(tmp_path, 1))
    assert cpu.method == "rapl"


def test_a_gpu_counts_millijoules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The arithmetic only, on a stand-in of the driver: here is no GPU to ask."""
    counts = [1_000, 5_000]
    driver = SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetTotalEnergyConsumption=lambda gpu: counts[gpu],
    )
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    meter = energy.meters(root=tmp_path)[-1]
    counts[:] = [2_500, 5_500]
    assert meter.method == "nvml"
    assert meter.joules() == Interval(2.0, 2.0)

    def no_driver() -> None:
        raise RuntimeError("driver not loaded")

    driver.nvmlInit = no_driver
    assert [m.method for m in energy.meters(root=tmp_path)] == ["cpu_seconds"]


def test_the_counter_names_its_method_and_both_bounds():
    cpu, registry = Clock(), CollectorRegistry()
    registry.register(energy.EnergyCollector(energy.CpuSeconds(cpu)))
    cpu.now = 1.0
    seen = parse(generate_latest(registry).decode())
    for bound, joules in (("low", 1.9), ("high", 6.3)):
        labels = {"method": "cpu_seconds", "bound": bound}
        assert seen.total("energy_joules_total", **labels) == pytest.approx(joules)


@pytest.mark.parametrize("bounds", [(2.0, 1.0), (-1.0, 1.0), (float("nan"), 1.0)])
def test_an_interval_has_a_lower_and_an_upper_bound(bounds: tuple[float, float]):
    with pytest.raises(ValueError, match="Expected bounds"):
        Interval(*bounds)


def test_carbon_is_energy_times_intensity_plus_what_making_it_emitted():
    kwh = Interval(3.6e6, 7.2e6)
    free = sci(kwh, thread_s=0, intensity=400)
    assert (free.low, free.high) == pytest.approx((400, 800))
    held = sci(Interval(0, 0), thread_s=3600)
    assert 0 < held.low < held.high
    assert sci(kwh, thread_s=3600, intensity=400).low == pytest.approx(400 + held.low)


def test_a_batch_of_the_real_model_needs_less_a_token():
    def ask() -> light_load.Body:
        return trials.small_talk(3, 16)

    with trials.running_server("cpu", TTFT_TARGET_MS="60000") as url:
        meter = energy.CpuSeconds(light_load.cpu_seconds(url))
        alone, together = light_load.in_turns(url, ask, meter, 8, 2)
    assert light_load.ratio(alone, together).value > 1.2
