"""The figures of images that are built, started and asked beside each other."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any, TypeVar

from course import report
from course.draw import COLOURS
from course.lesson import Run
from local_cloud.containers import layers, trials
from local_cloud.containers.engine import ROOT, Engine
from local_cloud.containers.layers import Weight

MB = 1e6
PAIRS = 2  # answers from inside and outside, in turns, each time a container starts

T = TypeVar("T")


@dataclass(frozen=True)
class Rung:
    """One way to build the same service."""

    name: str
    file: str
    target: str | None
    slow: bool = False  # takes half a minute: built and rebuilt only once

    @property
    def tag(self) -> str:
        return f"model-api:{self.name}"


@dataclass(frozen=True)
class Measured:
    """One image's figures; lists hold one value a turn."""

    weight: Weight
    rebuild_s: list[float]
    start_s: list[float] = field(default_factory=list)
    rate: list[float] = field(default_factory=list)  # tokens/s of one caller
    outside: list[float] = field(default_factory=list)  # the same, without a container

    def row(self, name: str) -> list[Any]:
        weight = self.weight
        times = map(median, (self.rebuild_s, self.start_s, self.rate))
        packages = [weight.debs, weight.python, weight.shell]
        return [name, weight.bytes / MB, weight.gzipped / MB, *times, *packages]

    @property
    def share(self) -> float:
        """Tokens/s inside, of those outside: the median of all pairs."""
        pairs = zip(self.rate, self.outside, strict=True)
        return median(inside / outside for inside, outside in pairs)


def built(run: Run, docker: Engine, rung: Rung) -> str:
    """Build what is new; gives the image's name. The baseline is built only once."""
    known = docker.has(rung.tag)
    if not known:
        run.say(f"Building {rung.tag} for the first time. That takes a minute or two.")
    if not (known and rung.slow):
        build(run, docker, rung, rung.tag)
    return rung.tag


def build(run: Run, docker: Engine, rung: Rung, tag: str, **changed: str) -> float:
    """Build with a bar; gives the seconds. `changed` replaces files by others."""
    start = time.perf_counter()
    with run.progress(f"building {tag}", total=100) as advance:
        docker.build(
            tag,
            dockerfile=rung.file,
            target=rung.target,
            arguments=dict(getattr(run.arguments, "build_arg", None) or []),
            changed=changed,
            on_step=lambda step, steps, text: advance(100 / steps),
        )
    return time.perf_counter() - start


def measure(run: Run, docker: Engine, rung: Rung, turns: int) -> Measured:
    """Build, weigh, and build again after one line of code has changed."""
    image = docker.image(built(run, docker, rung))
    with run.progress(f"weighing {rung.tag}") as advance:
        weight = layers.weigh(image, advance)
    # The naive one takes half a minute: measured once, and told as such in the note.
    rebuild = partial(time_rebuild, run, docker, rung)
    if rung.slow:
        return Measured(weight, [once(image.id, rebuild)])
    return Measured(weight, [rebuild() for _ in range(turns)])


def time_rebuild(run: Run, docker: Engine, rung: Rung) -> float:
    """Build with one more line in the code; gives the seconds, keeps nothing."""
    code = (ROOT / "model_api.py").read_text() + f"\n# {secrets.token_hex(8)}\n"
    changed = f"{rung.tag}-changed"
    try:
        return build(run, docker, rung, changed, **{"model_api.py": code})
    finally:
        docker.untag(changed)


def start_in_turns(
    docker: Engine,
    images: dict[str, Measured],
    turns: int,
    advance: Callable[[], None],
) -> float:
    """Starts and asks each image, turn by turn, beside the same API without one.

    Each answer from inside is paired with one from outside, so that what else the
    machine does weighs on both. Gives the seconds that the API outside took to start.
    """
    key = secrets.token_urlsafe(32)
    with trials.api_outside(key) as (url, _, seconds):
        trials.ask(url, key, tokens=4)
        for image, measured in list(images.items()) * turns:
            env = {"API_KEYS": key}
            with docker.container(image, port=trials.PORT, environment=env) as box:
                measured.start_s.append(box.wait_ready(trials.READY, trials.START_S))
                trials.ask(box.url, key, tokens=4)  # the first is slower
                for _ in range(PAIRS):
                    measured.rate.append(trials.tokens_per_s(box.own_url, key))
                    measured.outside.append(trials.tokens_per_s(url, key))
            advance()
    return seconds


def once(name: str, measure: Callable[[], T]) -> T:
    """What was measured under this name before, or is now: for what takes long.

    Args:
        name: of what and of which image, by its id: another image is measured anew.
        measure: gives what JSON can hold.
    """
    kept = report.folder() / "measured.cache"
    try:
        known = json.loads(kept.read_text())
    except (OSError, ValueError):  # none yet, or broken: measure anew
        known = {}
    if name not in known:
        known[name] = measure()
        report.write(kept, json.dumps(known))
    return known[name]


# -- a picture of layers


def draw_layers(weights: dict[str, Weight], ax: Any) -> None:
    """One bar an image: its layers side by side, base first, the model hatched."""
    for place, weight in enumerate(weights.values()):
        left, parts = 0.0, [x for x in weight.layers if x[1].bytes > 5e5]
        for i, (step, layer) in enumerate(parts):
            width = layer.bytes / MB
            ax.barh(place, width, left=left, color=COLOURS[i % 6], edgecolor="white")
            if width > 40:
                label = f"{short(step)}\n{width:.0f}"
                ax.text(
                    left + width / 2,
                    place,
                    label,
                    ha="center",
                    va="center",
                    fontsize=9,
                    color="white",
                )
            left += width
        model = weight.model_bytes / MB
        ax.barh(place, model, left=left, color="none", edgecolor="#888", hatch="//")
        ax.text(
            left + model + 6,
            place,
            f"{weight.bytes / MB:.0f} + model {model:.0f}",
            va="center",
        )
    ax.set_yticks(range(len(weights)), list(weights))
    ax.invert_yaxis()
    ax.margins(x=0.18)
    ax.grid(visible=False)
    ax.set_xlabel("MB, uncompressed; one colour a layer, the model hatched")
    ax.set_title("What the layers weigh")


def short(step: str, most: int = 18) -> str:
    """An instruction in few characters: the builder's own words dropped."""
    words = step.replace("/bin/sh -c", "").replace("#(nop)", "").split()
    words = [
        w for w in words if not w.startswith(("--", "file:", "dir:", "|", "multi:"))
    ]
    text = " ".join(words).replace("COPY in /", "COPY /").replace("?", "base")
    return text if len(text) <= most else text[: most - 1] + "…"
