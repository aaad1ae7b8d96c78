"""What the tests with containers share: the engine, small images, the real one.

Loaded by conftest.py as a plugin, so that a test names what it needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import docker_deployment
from local_cloud.containers import compose, engine, scanners
from local_cloud.containers.engine import Engine, ImageError, NoEngine
from local_cloud.containers.ladder import Rung

BASE = "python:3.11-slim-bookworm"
SERVE = """
import http.server, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
print("serving")
http.server.HTTPServer(("", 8000), http.server.SimpleHTTPRequestHandler).serve_forever()
"""
SMALL = f"""
FROM {BASE}
WORKDIR /app
COPY serve.py .
HEALTHCHECK --interval=1s --timeout=10s --start-period=60s --retries=2 \\
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000')"]
CMD ["python", "serve.py"]
"""


@pytest.fixture(scope="session")
def docker_engine() -> Iterator[Engine]:
    """The engine, or a skip that says how to get one."""
    try:
        with engine.connect() as answers:
            yield answers
    except NoEngine as missing:
        pytest.skip(f"{missing.reason} To run it: {missing.command}")


@pytest.fixture
def docker(docker_engine: Engine) -> Iterator[Engine]:
    """The engine; what a test leaves on it is removed, and fails the test."""
    before = set(docker_engine.leftovers())  # what fixtures of wider scope run
    yield docker_engine
    left = set(docker_engine.leftovers()) - before
    remove(docker_engine, left)
    assert left == set()


def remove(docker: Engine, names: set[str]) -> None:
    """Remove these of this process's containers, networks and volumes."""
    ours = {"label": f"{engine.RUN_LABEL}={docker.run_id}"}
    client = docker.client
    for container in client.containers.list(all=True, filters=ours):
        if container.name in names:
            container.remove(force=True, v=True)
    for kind in (client.networks, client.volumes):
        for thing in kind.list(filters=ours):
            if thing.name in names:
                thing.remove()


def small_context(folder: Path) -> Path:
    """Write a small context: a Dockerfile of our kind and a server."""
    (folder / "Dockerfile").write_text(SMALL)
    (folder / "serve.py").write_text(SERVE)
    (folder / ".dockerignore").write_text("*\n!serve.py\n")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return small_context(tmp_path)


@pytest.fixture(scope="session")
def small(
    docker_engine: Engine, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """An image of a small server, removed after all tests."""
    tag = f"course-test:small-{docker_engine.run_id}"  # a test may run tests
    docker_engine.build(tag, folder=small_context(tmp_path_factory.mktemp("small")))
    yield tag
    docker_engine.untag(tag)


def attempt(docker: Engine, tag: str, folder: Path, **options: str) -> str:
    """A build that must fail; what it says."""
    with pytest.raises(ImageError) as failed:
        docker.build(tag, folder=folder, **options)  # type: ignore[arg-type]
    return str(failed.value)


def build(docker: Engine, rung: Rung) -> str:
    docker.build(rung.tag, dockerfile=rung.file, target=rung.target)
    return rung.tag


@pytest.fixture(scope="session")
def image(docker_engine: Engine) -> str:
    """The smallest image of the real API; the first build takes a minute."""
    return build(docker_engine, docker_deployment.DISTROLESS)


@pytest.fixture(scope="session")
def runtime_image(docker_engine: Engine) -> str:
    """The same API on slim Debian."""
    return build(docker_engine, docker_deployment.RUNTIME)


@pytest.fixture
def composing(docker: Engine) -> None:
    """Skips the test where there is no Compose."""
    try:
        compose.find()
    except NoEngine as missing:
        pytest.skip(f"{missing.reason} To run it: {missing.command}")


def program(name: str) -> str:
    """A program of this environment or of the machine, or a skip."""
    if found := scanners.find(name):
        return found
    pytest.skip(f"{name} is missing. To run it: pip install {name}")
