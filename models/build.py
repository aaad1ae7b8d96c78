"""Builds the model's files once, and finds them every time after.

A build is all or nothing: it works in a folder of its own beside the result, and each
finished file is moved into place by one rename. Two processes that start together
share one lock: the second waits and finds the work done.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from models.errors import BuildError, ModelError
from models.weights import GGUF_SHA256, Report, Weights, digest, fetch_gguf

NAME = "smollm2-135m-instruct"
WORKSHOP = ".building-"  # how the folder of an unfinished build is called
FORMAT = 1  # of the graph: raise it and every machine builds again
REFUSALS = tuple(
    getattr(errno, name)
    for name in ["ENOSPC", "EDQUOT", "EACCES", "EPERM", "EROFS", "ENOTDIR", "EEXIST"]
)
NEEDED_BYTES = {"int4": 450e6, "float16": 700e6, "float32": 1_000e6}  # while building


@dataclass(frozen=True)
class Files:
    """A built model on disk."""

    graph: Path  # the ONNX file
    tokenizer: Path  # tokenizer.json
    precision: str
    revision: str  # the first 12 digits of the graph's SHA-256


def model_folder() -> Path:
    """Where built files live: `MODEL_DIR`, or `models/build` beside this file."""
    return Path(os.environ.get("MODEL_DIR") or Path(__file__).parent / "build")


def ensure(
    precision: str = "int4", *, rebuild: bool = False, report: Report | None = None
) -> Files:
    """The model's files, built first if they are missing. Takes 10 to 60 s then."""
    if precision not in NEEDED_BYTES:
        raise ModelError(
            f"graph: expected one of {', '.join(NEEDED_BYTES)}, found {precision!r}; "
            "choose one of them"
        )
    folder = model_folder()
    if not rebuild and (files := find(folder, precision)):
        return files
    with workshop(folder):
        # Another process may have built it while this one waited.
        if not rebuild and (files := find(folder, precision)):
            return files
        check_space(folder, NEEDED_BYTES[precision])
        with _progress(report) as report:
            _build(folder, precision, report)
    files = find(folder, precision)
    assert files is not None, "a build that raised nothing left its files"
    return files


def find(folder: Path, precision: str) -> Files | None:
    """The built files, checked byte for byte; None where there are none.

    Raises:
        BuildError: a file is damaged.
    """
    try:
        record = json.loads(_record(folder, precision).read_text())
        expected = {name: record["files"][name] for name in _names(precision)}
        current = record["format"] == FORMAT and record["source"] == GGUF_SHA256
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError) as error:
        path = _record(folder, precision)
        raise BuildError(
            f"{path}: expected the record of a build, found {error!r}; "
            f"build again: {_command(precision)}"
        ) from error
    if not current:
        return None
    for name, sha256 in expected.items():
        if not (folder / name).is_file():
            return None
        if digest(folder / name) != sha256:
            raise BuildError(
                f"{folder / name}: expected SHA-256 {sha256[:12]}…, found other "
                f"contents: the file is damaged; build again: {_command(precision)}"
            )
    graph, tokenizer = expected
    return Files(folder / graph, folder / tokenizer, precision, expected[graph][:12])


def _command(precision: str) -> str:
    which = "" if precision == "int4" else f" --precision {precision}"
    return f"python -m models --rebuild{which}"


def _names(precision: str) -> tuple[str, str]:
    return f"{NAME}-{precision}.onnx", "tokenizer.json"


def _record(folder: Path, precision: str) -> Path:
    return folder / f"{NAME}-{precision}.json"


def _build(folder: Path, precision: str, report: Report) -> None:
    from models.text import Tokenizer

    graph, tokenizer = _names(precision)
    with TemporaryDirectory(prefix=WORKSHOP, dir=folder) as temporary:
        inside = Path(temporary)
        weights = Weights(fetch_gguf(inside, report))
        report("building the graph", 0, 3)
        _save_graph(weights, precision, inside / graph)
        report("building the tokenizer", 2, 3)
        types = weights.field("tokenizer.ggml.token_type")
        Tokenizer.from_gguf(
            weights.field("tokenizer.ggml.tokens"),
            weights.field("tokenizer.ggml.merges"),
            [id for id, type in enumerate(types) if type == 3],  # 3: control token
        ).save(inside / tokenizer)
        record = _record(inside, precision)
        sums = {name: digest(inside / name) for name in (graph, tokenizer)}
        content = {"format": FORMAT, "source": GGUF_SHA256, "files": sums}
        record.write_text(json.dumps(content, indent=2) + "\n")
        # The record last: with it, the build counts as done.
        for path in (inside / graph, inside / tokenizer, record):
            os.replace(path, folder / path.name)
    report("model built", 3, 3)


def _save_graph(weights: Weights, precision: str, path: Path) -> None:
    try:
        import onnx
    except ImportError as error:
        raise BuildError(
            f"building the model: expected the package onnx, found {error}; "
            "install it: pip install -r requirements.txt"
        ) from error
    from models import graph

    onnx.save(graph.build(weights, precision), path)


@contextmanager
def workshop(folder: Path):
    """The one process that builds in `folder`, which it finds tidied up.

    Raises:
        BuildError: the folder cannot be written, or another process never ends.
    """
    with _writable(folder), _lock(folder):
        for leftover in folder.glob(f"{WORKSHOP}*"):  # of a build that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        yield


@contextmanager
def _writable(folder: Path):
    """Turns the operating system's refusals into a message with a way on."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        raise BuildError(
            f"{folder}: expected to write the model's files here, found: "
            f"{error.strerror}; free some space, or name another folder with MODEL_DIR"
        ) from error


@contextmanager
def _lock(folder: Path):
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock", timeout=600)
    try:
        with lock:
            yield
    except Timeout as error:
        raise BuildError(
            f"{folder}: expected another process's build to end within 600 s, found "
            "it still running; end that process and try again"
        ) from error


def check_space(folder: Path, needed: float) -> None:
    """Raise BuildError unless so many bytes are free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise BuildError(
            f"{folder}: expected {needed / 1e6:.0f} MB of free disk to build the "
            f"model, found {free / 1e6:.0f} MB; free some, or name another folder "
            "with MODEL_DIR"
        )


@contextmanager
def _progress(report: Report | None):
    """A bar on the terminal; one line a task where there is none."""
    if report is not None:
        yield report
        return
    started, told = time.monotonic(), set()

    def show(what: str, done: int, total: int) -> None:
        share = done / total
        elapsed = time.monotonic() - started
        if sys.stderr.isatty():
            bar = "━" * round(30 * share) + " " * (30 - round(30 * share))
            line = f"\r{what:<24} {bar} {share:4.0%} {elapsed:4.0f} s"
            print(line, end="", file=sys.stderr, flush=True)
        elif what not in told:
            told.add(what)
            print(f"{what} ({elapsed:.0f} s)", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        if sys.stderr.isatty():
            print(file=sys.stderr)
