"""Ray Serve, where it is installed: a node dies, and every request is answered."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from course.process import wait_until
from local_cloud.scaling import ray_serve
from local_cloud.scaling.ray_serve import NoRay, Trial

needs_ray = pytest.mark.skipif(
    not ray_serve.is_installed(), reason=f"needs Ray Serve: {ray_serve.INSTALL}"
)


def of_ray() -> list[str]:
    """Command lines of Ray's processes on this machine."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it ended meanwhile
            continue
        if line.startswith("ray::") or "/raylet" in line or "/gcs_server" in line:
            found.append(line)
    return found


@pytest.mark.ray
@needs_ray
def test_a_node_is_killed_and_every_request_is_answered():
    before, folders = of_ray(), set(Path("/tmp").glob("ray*"))
    found = ray_serve.kill_a_node(Trial(seconds=15))
    assert found.served_before == 2
    assert found.answered == found.sent == 120
    assert found.healthy_s is not None, "no new replica answered"
    assert found.retried <= found.failed_tries == sum(found.reasons.values())
    assert of_ray() == before
    assert set(Path("/tmp").glob("ray*")) == folders


def test_without_ray_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ray_serve, "is_installed", lambda: False)
    with pytest.raises(NoRay, match=r"pip install -r requirements-ray\.txt"):
        ray_serve.kill_a_node()


@pytest.mark.ray
@needs_ray
def test_a_trial_that_takes_too_long_leaves_nothing(monkeypatch: pytest.MonkeyPatch):
    before, folders = of_ray(), set(Path("/tmp").glob("ray*"))
    monkeypatch.setattr(ray_serve, "DEADLINE_S", 8.0)
    with pytest.raises(subprocess.TimeoutExpired):
        ray_serve.kill_a_node()
    wait_until(lambda: of_ray() == before, 10, "Ray's processes to end")
    assert set(Path("/tmp").glob("ray*")) == folders
