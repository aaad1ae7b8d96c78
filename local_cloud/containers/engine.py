"""A Docker engine through docker-py: build, run, measure, and take everything down.

    with engine.connect() as docker:
        docker.build("demo:1", target="runtime")
        with docker.container("demo:1", port=8000, mem_limit="512m") as box:
            box.wait_healthy(30)
            print(box.url, box.stats().memory_bytes)

All that is made here carries the label `course=hosting-and-deployment`. What a block
started ends with the block, whatever ended the block; what was built stays, because
building again is slow, until `docker.clean()`.
"""

from __future__ import annotations

import itertools
import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LABEL, COURSE = "course", "hosting-and-deployment"
RUN_LABEL = "course.run"  # tells the containers of this process from another's
ROOT = Path(__file__).resolve().parents[2]
INSTALL = "https://docs.docker.com/engine/install"
CONNECT_S = 5.0
POLL_S = 0.02
LOG_LINES = 12  # of a container that an error shows

Advance = Callable[[int, int, str], None]  # step, steps, instruction


class EngineError(RuntimeError):
    """Docker could not do it: what was expected, what was found, what to do."""


class NoEngine(EngineError):
    """There is no engine to talk to; `command` is what would get one."""

    def __init__(self, reason: str, command: str) -> None:
        super().__init__(f"{reason}\nDo: {command}")
        self.reason, self.command = reason, command


class ImageError(EngineError):
    """An image that could not be built or found."""


class ContainerError(EngineError):
    """A container that did not start, or did not become what it should."""


@contextmanager
def connect(base_url: str | None = None) -> Iterator[Engine]:
    """Gives the engine of DOCKER_HOST (or of `base_url`) for the length of the block.

    Raises NoEngine, saying what is missing, before anything is made.
    """
    try:
        import docker.errors
    except ModuleNotFoundError:
        command = "pip install -r requirements.txt"
        raise NoEngine("The package docker is missing.", command) from None
    address = base_url or os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
    try:
        _knock(address)
        client = docker.DockerClient(base_url=address, timeout=120)
    except (docker.errors.DockerException, OSError) as error:
        raise _no_engine(address, error) from None
    with closing(client):
        engine = Engine(client)
        try:
            yield engine
        finally:
            engine.end()


def _knock(address: str) -> None:
    """Opens a local socket once: its error tells no engine from no right to use it."""
    if address.startswith("unix://"):
        with socket.socket(socket.AF_UNIX) as door:
            door.settimeout(CONNECT_S)
            door.connect(address.removeprefix("unix://"))


def _no_engine(address: str, error: Exception) -> NoEngine:
    """No engine and no right to use it look alike; what to do about them does not."""
    if isinstance(error, PermissionError):
        reason = f"Expected the right to use the engine at {address}, found none."
        return NoEngine(reason, 'sudo usermod -aG docker "$USER", then log in again')
    reason = f"Expected a Docker engine at {address}, found none that answers."
    start = "sudo systemctl start docker" if _installed() else f"open {INSTALL}"
    return NoEngine(reason, start)


def _installed() -> bool:
    from shutil import which

    return bool(which("dockerd"))


class Engine:
    """An engine that answers; made by `connect`."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self.run_id = secrets.token_hex(6)
        self.labels = {LABEL: COURSE, RUN_LABEL: self.run_id}

    # -- images

    def build(
        self,
        tag: str,
        *,
        folder: Path = ROOT,
        dockerfile: str = "Dockerfile",
        target: str | None = None,
        arguments: Mapping[str, str] | None = None,
        changed: Mapping[str, str] | None = None,
        network: str | None = None,
        on_step: Advance | None = None,
    ) -> str:
        """Builds an image from a folder, as its .dockerignore allows; gives its id.

        Args:
            tag: the image's name.
            arguments: the build's arguments, as ARG names them.
            changed: files of the context, by path, with another text than they have.
            on_step: called with every step of the Dockerfile as it begins.

        Raises ImageError with the last lines of the step that failed.
        """
        running: list[str] = []
        context = _context(folder, dockerfile, changed or {})
        with closing(context):
            messages = self.client.api.build(
                fileobj=context,
                custom_context=True,
                dockerfile=dockerfile,
                tag=tag,
                target=target,
                buildargs=dict(arguments or {}),
                labels={LABEL: COURSE},
                network_mode=network,
                rm=True,
                forcerm=True,  # also the container of a step that failed
                decode=True,
            )
            try:
                with _explained(f"a build of {tag}"), closing(messages):
                    _follow(messages, tag, on_step or (lambda *_: None), running)
            except BaseException:
                self._remove_by_id(running)  # the engine would, but some time later
                raise
        return self.image(tag).id

    def image(self, tag: str) -> Any:
        """The image of this name; raises ImageError when it is not here."""
        import docker.errors

        try:
            return self.client.images.get(tag)
        except docker.errors.ImageNotFound:
            raise ImageError(
                f"Expected the image {tag} on this machine, found none.\n"
                f"Do: build it (python docker_deployment.py 3) or docker pull {tag}"
            ) from None

    def has(self, tag: str) -> bool:
        """Whether an image of this name is on this machine."""
        return bool(self.client.images.list(name=tag))

    def untag(self, tag: str) -> None:
        """Removes an image by name, if it is there; layers in use elsewhere stay."""
        import docker.errors

        with suppress(docker.errors.ImageNotFound):
            self.client.images.remove(tag, force=True)

    # -- containers

    @contextmanager
    def container(
        self,
        image: str,
        *,
        port: int | None = None,
        host_port: int | None = None,
        start: bool = True,
        **options: Any,
    ) -> Iterator[Container]:
        """Runs an image for the length of the block; `options` are docker-py's.

        Args:
            port: the container's port, published on a free port of 127.0.0.1.
            host_port: that very port instead of a free one.
            start: False only creates it: `.start()` is yours.
        """
        if port:
            options["ports"] = {f"{port}/tcp": ("127.0.0.1", host_port)}
        self.image(image)  # or docker-py would go looking in a registry
        with _explained(f"a container of {image}"):
            made = self.client.containers.create(image, labels=self.labels, **options)
        box = Container(made, port)
        try:
            if start:
                box.start()
            yield box
        finally:
            _remove(made)

    def end(self) -> None:
        """Removes what this process started and did not end."""
        self.remove(f"{RUN_LABEL}={self.run_id}")

    def remove(self, label: str) -> None:
        """Removes all containers with this label."""
        mine = {"label": label}
        for container in self.client.containers.list(all=True, filters=mine):
            _remove(container)

    def _remove_by_id(self, ids: Iterable[str]) -> None:
        import docker.errors

        for id in ids:
            with suppress(docker.errors.NotFound):
                _remove(self.client.containers.get(id))

    def having(self, label: str) -> list[str]:
        """Names of the containers, networks and volumes with this label."""
        kinds = self.client.containers, self.client.networks, self.client.volumes
        found = [
            kind.list(filters={"label": label}, **more)
            for kind, more in zip(kinds, ({"all": True}, {}, {}), strict=True)
        ]
        return [thing.name for thing in itertools.chain(*found)]

    def leftovers(self) -> list[str]:
        """What this process started and what is still here."""
        return self.having(f"{RUN_LABEL}={self.run_id}")

    def clean(self) -> list[str]:
        """Removes everything of the course, images too; gives the names."""
        course = {"label": f"{LABEL}={COURSE}"}
        gone = self.having(course["label"])
        self.remove(course["label"])
        for network in self.client.networks.list(filters=course):
            network.remove()
        for volume in self.client.volumes.list(filters=course):
            volume.remove(force=True)
        gone += self._remove_images(course)
        return gone

    def _remove_images(self, course: Mapping[str, str]) -> list[str]:
        """Removes images, those that others build on after them."""
        import docker.errors

        gone: list[str] = []
        while found := self.client.images.list(filters=course):
            before = len(gone)
            for image in found:
                try:
                    self.untag(image.id)
                    gone += image.tags or [image.short_id]
                except docker.errors.APIError as error:
                    if error.status_code != 409:  # 409: another one still needs it
                        raise
            if len(gone) == before:
                break
        return gone


def _remove(container: Any) -> None:
    import docker.errors

    with suppress(docker.errors.NotFound):
        try:
            container.remove(force=True, v=True)
        except docker.errors.APIError as error:
            if error.status_code != 409:  # 409: its removal is under way already
                raise


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turns the engine's complaint into one that says what to do."""
    import docker.errors

    try:
        yield
    except docker.errors.APIError as error:
        text = error.explanation or str(error)
        kind = ImageError if what.startswith("a build") else ContainerError
        raise kind(explain(what, text)) from None


CURES = {  # a word of the engine's complaint: what to do about it
    r"port is already allocated|address already in use": "stop what holds the port "
    "(docker ps, ss -ltnp), or choose another one",
    r"no space left on device": "docker system df shows what fills the disk, "
    "python docker_deployment.py --clean removes what the course built",
    r"no such host|lookup |i/o timeout|connection refused|TLS handshake": "check the "
    "network and the registry's name; an image that is here already needs neither",
    r"pull access denied|manifest unknown|not found|does not exist": "correct the "
    "image's name, or docker pull it where the registry allows it",
    r"permission denied": "check the permissions of the files that it names",
}


def explain(what: str, complaint: str) -> str:
    """Says what was expected, what the engine said, and what to do."""
    cures = (do for words, do in CURES.items() if re.search(words, complaint, re.I))
    do = next(cures, "read the lines above; the last one tells where it stopped")
    return f"Expected {what}, found: {complaint.strip()}\nDo: {do}."


# -- building


def _context(folder: Path, dockerfile: str, changed: Mapping[str, str]) -> Any:
    """Packs the files that .dockerignore lets through, with some texts replaced."""
    from docker.utils.build import create_archive, exclude_paths

    if not (folder / dockerfile).is_file():
        raise ImageError(f"Expected a Dockerfile at {folder / dockerfile}, found none.")
    patterns = ignored(folder, dockerfile)
    files = sorted(exclude_paths(str(folder), patterns, dockerfile=dockerfile))
    if lost := set(changed) - set(files):
        raise ImageError(f"Expected {sorted(lost)} in the build context, found not.")
    return create_archive(str(folder), files, extra_files=list(changed.items()))


def ignored(folder: Path, dockerfile: str = "Dockerfile") -> list[str]:
    """The patterns that keep files out of the context of a Dockerfile.

    One may have an ignore file of its own beside it, as in BuildKit.
    """
    files = folder / f"{dockerfile}.dockerignore", folder / ".dockerignore"
    file = next((file for file in files if file.exists()), None)
    lines = file.read_text(encoding="utf-8").splitlines() if file else []
    return [x.strip() for x in lines if x.strip() and not x.startswith("#")]


STEP = re.compile(r"^Step (\d+)/(\d+) : (.*)")
RUNNING = re.compile(r"^ ---> Running in ([0-9a-f]+)")


def _follow(
    messages: Iterator[dict[str, Any]], tag: str, on_step: Advance, running: list[str]
) -> None:
    """Reads a build's messages to the end; raises ImageError with the last lines.

    `running` then holds the id of the container that ran the last step.
    """
    said: list[str] = []
    for message in messages:
        text = message.get("stream", "")
        said = [*said, *text.splitlines()][-LOG_LINES:]
        if step := STEP.match(text):
            said = [text.strip()]
            on_step(int(step[1]), int(step[2]), step[3])
        if begun := RUNNING.match(text):
            running[:] = [begun[1]]
        if complaint := message.get("error"):
            lines = "\n".join("    " + line for line in said if line.strip())
            raise ImageError(f"{lines}\n{explain(f'a build of {tag}', complaint)}")


# -- running


@dataclass(frozen=True)
class Stats:
    """What a container uses now, by its cgroup."""

    memory_bytes: int  # without the page cache that can be dropped
    cpu_s: float  # since its start
    periods: int  # of the CPU quota, 0.1 s each, in which it wanted to run
    throttled_periods: int  # in which it used up its quota and had to wait
    pids: int

    @classmethod
    def read(cls, told: Mapping[str, Any]) -> Stats:
        """Reads the engine's statistics of cgroup v1 and of v2: the names differ."""
        memory, cpu = told["memory_stats"], told["cpu_stats"]
        parts = memory.get("stats", {})
        cache = parts.get("total_inactive_file", parts.get("inactive_file", 0))
        throttling = cpu.get("throttling_data", {})
        return cls(
            memory_bytes=max(0, memory.get("usage", 0) - cache),
            cpu_s=cpu["cpu_usage"]["total_usage"] / 1e9,
            periods=throttling.get("periods", 0),
            throttled_periods=throttling.get("throttled_periods", 0),
            pids=told.get("pids_stats", {}).get("current", 0),
        )


class Container:
    """A container of ours; made by `Engine.container`."""

    def __init__(self, made: Any, port: int | None = None) -> None:
        self.made, self.port = made, port
        self.started = 0.0  # time.perf_counter()

    def start(self) -> None:
        """Starts it; `started` is the moment before."""
        self.started = time.perf_counter()
        with _explained(f"the start of {self.made.name}"):
            self.made.start()

    @property
    def state(self) -> dict[str, Any]:
        """The engine's account: Status, ExitCode, OOMKilled, Health."""
        self.made.reload()
        return self.made.attrs["State"]

    def inspect(self) -> dict[str, Any]:
        """All that the engine tells whoever may ask it."""
        return self.made.client.api.inspect_container(self.made.id)

    @property
    def url(self) -> str:
        """Its address on this machine, for as long as it runs."""
        if not (bound := self.made.ports.get(f"{self.port}/tcp")):
            self.made.reload()
            bound = self.made.ports.get(f"{self.port}/tcp")
        if not bound:
            raise ContainerError(self._words(f"port {self.port} to be published"))
        return f"http://127.0.0.1:{bound[0]['HostPort']}"

    @property
    def own_url(self) -> str:
        """Its own address, as another container reaches it, where this machine can.

        The port published on loopback is served by a process more, docker-proxy, which
        copies every byte: what is measured through it is measured with it.
        """
        (network, *_) = self.inspect()["NetworkSettings"]["Networks"].values()
        try:
            socket.create_connection((network["IPAddress"], self.port), 1.0).close()
        except OSError:  # an engine in a virtual machine, or without root
            return self.url
        return f"http://{network['IPAddress']}:{self.port}"

    def wait_healthy(self, deadline_s: float) -> float:
        """Waits for its HEALTHCHECK; gives the seconds since its start."""
        return self._wait(lambda s: _health(s) == "healthy", "healthy", deadline_s)

    def wait_ready(self, path: str, deadline_s: float) -> float:
        """Waits until this path answers 200; gives the seconds since its start.

        Sharper than `wait_healthy`: the engine runs a HEALTHCHECK only now and then.
        """
        from course.process import answers

        def ready(_: dict[str, Any]) -> bool:
            return answers(self.url + path)

        return self._wait(ready, f"{path} to answer 200", deadline_s)

    def wait_exit(self, deadline_s: float) -> int:
        """Waits for its end; gives its exit code."""
        end = time.monotonic() + deadline_s
        while (state := self.state)["Status"] not in ("exited", "dead"):
            if time.monotonic() > end:
                raise ContainerError(self._words(f"its end in {deadline_s:g} s"))
            time.sleep(POLL_S)
        return state["ExitCode"]

    def run(self, *command: str, user: str = "") -> tuple[int, str]:
        """Runs a command inside; gives its exit code and what it wrote."""
        told = self.made.exec_run(list(command), user=user)
        return told.exit_code, told.output.decode("utf-8", "replace").strip()

    def logs(self, lines: int | str = "all") -> str:
        """What it wrote."""
        return self.made.logs(tail=lines).decode("utf-8", "replace").strip()

    def stats(self) -> Stats:
        """What it uses now."""
        api, more = self.made.client.api, {}
        if tuple(map(int, api.api_version.split("."))) >= (1, 41):
            more = {"one_shot": True}  # else the engine samples for a second or two
        return Stats.read(api.stats(self.made.id, stream=False, **more))

    def _wait(
        self, true: Callable[[dict[str, Any]], bool], what: str, deadline_s: float
    ) -> float:
        end = self.started + deadline_s
        while True:
            state = self.state
            if state["Status"] == "running" and true(state):
                return time.perf_counter() - self.started
            if state["Status"] in ("exited", "dead"):
                raise ContainerError(self._words(f"{what}"))
            if time.perf_counter() > end or _health(state) == "unhealthy":
                raise ContainerError(self._words(f"{what} within {deadline_s:g} s"))
            time.sleep(POLL_S)

    def _words(self, expected: str) -> str:
        """An error: how it is, what its probe said, the last lines it wrote."""
        state = self.state
        found = f"{state['Status']}, exit code {state['ExitCode']}"
        if state["OOMKilled"]:
            found = "killed (137) for using more memory than its limit"
        if state["Status"] == "running" and (health := state.get("Health")):
            said = [probe["Output"].strip() for probe in health["Log"] or []]
            found += f", health {health['Status']} ({said[-1] if said else 'no probe'})"
        lines = "\n".join("    " + x for x in self.logs(LOG_LINES).splitlines())
        return (
            f"Expected {self.made.name} ({self.made.attrs['Config']['Image']}) "
            f"{expected}, found it {found}. It wrote last:\n{lines or '    (nothing)'}"
        )


def _health(state: Mapping[str, Any]) -> str:
    return state.get("Health", {}).get("Status", "none")
