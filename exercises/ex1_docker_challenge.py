"""Exercise 1: a container that beats the naive one.

Goal      Pack the model API for a small box at the network's edge: a Dockerfile, what
          may enter its build, and limits that follow from what was measured.
Why       deploy/naive.Dockerfile works, and is twice the size it need be, runs as
          root, cannot be stopped cleanly, and nobody knows whether it is healthy.
Points    25, of which 7 need a Docker engine; without one they stay open
Minutes   60
Before    docker_deployment.py, sections 1 to 3
Check     python -m exercises check 1      (or at each save: watch 1)
Try it    python -m exercises.ex1_docker_challenge

The box is not the lesson's machine: it asks for port 9000 and user 20001, and its
memory is fixed, so the question is how many callers fit, not how much they need.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

PORT = 9000  # where the box expects the API
USER = 20001  # whom the box lets run; it knows no names, only this number
MIB = 2**20


@dataclass(frozen=True)
class Need:
    """What was measured of the API, idle and under load."""

    peak_bytes: int  # resident at most, with short answers in all rows
    bytes_per_token: int  # that a row or a kept prompt holds for each of its tokens
    kept_prompts: int  # for reuse; each may grow to the whole context, as a row may
    threads: int
    cpu_s_per_token: float


MEASURED = Need(390_000_000, 46_080, 16, 14, 0.0045)  # the API on two cores


def dockerfile() -> str:
    """The Dockerfile, built from the repository's root, last stage first to last line.

    Its image serves the API as `python -m model_api --serve --host 0.0.0.0 --port
    9000`, with the model's files inside (`MODEL_DIR=... python -m models` builds them).

    Checked in its text:
    - it runs as user 20001, by number, and starts in exec form, on port 9000;
    - it has a HEALTHCHECK;
    - it installs packages before code, from a lock with hashes, and pip keeps no cache;
    - the stage that runs installs nothing and takes what others built by COPY --from,
      and every COPY names what it takes;
    - bytecode is made in the build, and onnxruntime's telemetry is off;
    - every base has a tag, no secret is in ENV or ARG, and any builder builds it.

    Checked with an engine:
    - with `limits` it becomes healthy and answers a chat, on a read-only root;
    - then: it has at most 75 % of the size of the image of deploy/naive.Dockerfile;
    - its HEALTHCHECK fails where nothing serves.
    """
    # TODO(1a): two stages at least: one that builds, one that runs.
    raise NotImplementedError


def dockerignore() -> str:
    """The .dockerignore for it: what may enter the build.

    Checked by its effect on a folder like this repository:
    - every file that your Dockerfile names gets in, and of each folder that it copies
      all Python files;
    - .env, .git, secrets/, models/build/ and __pycache__ stay out, and so does a
      folder that nobody knew of when the file was written.
    """
    # TODO(1b): which is safer, to list what is forbidden or what is allowed?
    raise NotImplementedError


def most_rows(need: Need, context: int, memory_bytes: int) -> int:
    """How many callers (rows) a box of this memory can hold, whatever they ask.

    The peak counts with a quarter more. To it come keys and values, when every row
    and every kept prompt holds `context` tokens.

    Checked: the largest number that fits; one row more would not. ValueError where
    not even one row fits.
    """
    # TODO(2a): solve the lesson's formula for the rows.
    raise NotImplementedError


def limits(need: Need, rows: int, context: int, tokens_per_s: float) -> dict[str, Any]:
    """Options of docker-py's `containers.run` that bound the container.

    Checked:
    - mem_limit: what `rows` need by the formula of 2a, rounded up by at most 64 MiB;
      memswap_limit the same, which means: no swap;
    - nano_cpus: what `tokens_per_s` cost, rounded up by at most a tenth of a CPU;
    - pids_limit: at least twice the threads, at most four times and 32;
    - read_only, with a tmpfs at /tmp; cap_drop ALL; security_opt no-new-privileges.
    """
    # TODO(2b): memory, CPU, processes; then what the container may not do.
    raise NotImplementedError


if __name__ == "__main__":
    from exercises.tryout import tryout

    raise SystemExit(
        tryout(
            __file__,
            dockerfile=dockerfile,
            dockerignore=dockerignore,
            most_rows=lambda: most_rows(MEASURED, 512, 1024 * MIB),
            limits=lambda: limits(MEASURED, 4, 512, 100),
        )
    )
