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

# BEGIN SOLUTION
import math

# END SOLUTION
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
    # BEGIN SOLUTION
    return DOCKERFILE
    # END SOLUTION


def dockerignore() -> str:
    """The .dockerignore for it: what may enter the build.

    Checked by its effect on a folder like this repository:
    - every file that your Dockerfile names gets in, and of each folder that it copies
      all Python files;
    - .env, .git, secrets/, models/build/ and __pycache__ stay out, and so does a
      folder that nobody knew of when the file was written.
    """
    # TODO(1b): which is safer, to list what is forbidden or what is allowed?
    # BEGIN SOLUTION
    return DOCKERIGNORE
    # END SOLUTION


def most_rows(need: Need, context: int, memory_bytes: int) -> int:
    """How many callers (rows) a box of this memory can hold, whatever they ask.

    The peak counts with a quarter more. To it come keys and values, when every row
    and every kept prompt holds `context` tokens.

    Checked: the largest number that fits; one row more would not. ValueError where
    not even one row fits.
    """
    # TODO(2a): solve the lesson's formula for the rows.
    # BEGIN SOLUTION
    left = memory_bytes - 1.25 * need.peak_bytes
    rows = math.floor(left / (context * need.bytes_per_token)) - need.kept_prompts
    if rows < 1:
        raise ValueError(f"Expected room for a row, found {left:.0f} bytes in all.")
    return rows
    # END SOLUTION


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
    # BEGIN SOLUTION
    cache = (rows + need.kept_prompts) * context * need.bytes_per_token
    memory = 64 * MIB * math.ceil((1.25 * need.peak_bytes + cache) / (64 * MIB))
    cpus = math.ceil(need.cpu_s_per_token * tokens_per_s * 10) / 10
    return {
        "mem_limit": memory,
        "memswap_limit": memory,
        "nano_cpus": round(cpus * 1e9),
        "pids_limit": 32 * math.ceil(2 * need.threads / 32),
        "read_only": True,
        "tmpfs": {"/tmp": "size=16m,noexec,nosuid"},
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges"],
    }
    # END SOLUTION


# BEGIN SOLUTION
# The stages that build are the course's own, so that an engine which built the lesson's
# images has their layers already. The stage that runs is this box's.
DOCKERFILE = """\
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS base
LABEL course="hosting-and-deployment"
RUN python -m compileall -q -j 0 --invalidation-mode unchecked-hash \\
        -x '/(site-packages|test|idlelib|lib2to3|ensurepip|turtledemo)/' \\
        /usr/local/lib/python3.11

FROM base AS model
ARG PIP_INDEX_URL PIP_FIND_LINKS PIP_NO_INDEX
WORKDIR /work
COPY requirements-build.lock wheelhouse* /wheels/
RUN pip install --no-cache-dir --no-deps --require-hashes --no-compile \\
        --root-user-action=ignore -r /wheels/requirements-build.lock
COPY models/__init__.py models/__main__.py models/build.py models/errors.py \\
     models/graph.py models/sampling.py models/text.py models/weights.py models/
RUN MODEL_DIR=/model python -m models && rm -f /model/.lock

FROM base AS build
ARG PIP_INDEX_URL PIP_FIND_LINKS PIP_NO_INDEX
WORKDIR /work
COPY requirements-serve.lock wheelhouse* /wheels/
RUN python -m venv --without-pip /venv \\
 && pip --python /venv/bin/python install --no-cache-dir --no-deps --require-hashes \\
        --no-compile -r /wheels/requirements-serve.lock
COPY deploy/rootfs.py /work/
RUN python rootfs.py prune /venv \\
 && /venv/bin/python -m compileall -q -j 0 --invalidation-mode unchecked-hash \\
        /venv/lib

FROM base AS edge
COPY --from=model /model /model
COPY --from=build /venv /venv
WORKDIR /app
ENV PATH=/venv/bin:/usr/local/bin:/usr/bin:/bin \\
    MODEL_DIR=/model \\
    PORT=9000 \\
    PYTHONDONTWRITEBYTECODE=1 \\
    ORT_DISABLE_TELEMETRY=1
USER 20001:20001
EXPOSE 9000
HEALTHCHECK --interval=2s --timeout=2s --start-period=60s --retries=3 \\
    CMD ["python", "-I", "-S", "/app/healthcheck.py"]
CMD ["python", "-m", "model_api", "--serve", "--host", "0.0.0.0", "--port", "9000"]
COPY deploy/healthcheck.py /app/
COPY course /app/course
COPY models /app/models
COPY serving /app/serving
COPY model_api.py /app/
"""
DOCKERIGNORE = """\
*
!course
!models
!serving
!deploy/healthcheck.py
!deploy/rootfs.py
!model_api.py
!requirements-build.*
!requirements-serve.*
!wheelhouse
models/build
**/__pycache__
"""


# END SOLUTION
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
