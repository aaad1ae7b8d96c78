"""The int4 graph in the form that opens fastest: mapped, and packed for this CPU.

Two things take time when onnxruntime opens the graph. It reads 109 MB through protobuf,
and it packs every matrix into the order that this CPU's kernels want, in memory of its
own. Here the weights lie in a file beside the graph, which is mapped and not read, and
beside them lie the packed matrices: onnxruntime packs once more, to compare, and then
drops its own copy for the mapped one. So 190 MB of private memory become 30, and all
processes of a machine share the rest.

A packed matrix is right for one kind of CPU and one version of onnxruntime. Both are
in the folder's name: on another machine the name differs, and the folder is made anew.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
from onnxruntime.capi.onnxruntime_pybind11_state import Fail

from models.errors import BuildError

NAME = "smollm2-135m-instruct-int4"
GRAPH, WEIGHTS, RECORD = "graph.onnx", "weights.bin", "record.json"
FORMAT = 1
NEEDED_BYTES = 300e6  # while it is made
# What onnxruntime chooses its kernels by, as the kernel of the system spells it.
EXTENSIONS = ("amx", "asimd", "avx", "f16c", "fma", "i8mm", "sse", "ssse", "sve")


@dataclass(frozen=True)
class Packed:
    """A packed model on disk."""

    graph: Path
    tokenizer: Path
    revision: str  # of the int4 graph it was made of


def find() -> Packed | None:
    """What was packed for this CPU and this onnxruntime; None where there is none.

    Each cold start pays for what happens here. So the files' sizes are checked and not
    their digests, which would take longer than to open the model; `verify` does that
    where they are made.
    """
    folder = _model_folder()
    try:
        source = json.loads((folder / f"{NAME}.json").read_text())
        place = folder / _name(source)
        record = json.loads((place / RECORD).read_text())
        sizes = {name: (place / name).stat().st_size for name in (GRAPH, WEIGHTS)}
        if sizes != record["sizes"] or not (folder / "tokenizer.json").is_file():
            return None
    except (OSError, ValueError, KeyError, TypeError):  # missing, or half of a copy
        return None
    return Packed(place / GRAPH, folder / "tokenizer.json", _revision(source))


def ensure() -> Packed:
    """The packed model, made first if it is missing (a second; the int4 graph too).

    Raises:
        BuildError: the files cannot be made; the message says why.
    """
    if packed := find():
        return packed
    from models import build

    folder = _model_folder()
    with build.workshop(folder):  # first: the graph is not read for a refusal
        build.check_space(folder, NEEDED_BYTES)
    build.ensure("int4")
    with build.workshop(folder):
        if not find():  # another process may have made it while this one waited
            _make(folder)
    packed = find()
    assert packed is not None, "what raised nothing left its files"
    return packed


def verify() -> bool:
    """Whether the packed files are what was written, to the last byte (0.2 s)."""
    packed = find()
    if packed is None:
        return False
    record = json.loads((packed.graph.parent / RECORD).read_text())
    place = packed.graph.parent
    return all(_digest(place / name) == sum for name, sum in record["files"].items())


def _make(folder: Path) -> None:
    from tempfile import TemporaryDirectory

    from models.build import WORKSHOP

    source = json.loads((folder / f"{NAME}.json").read_text())
    with TemporaryDirectory(prefix=WORKSHOP, dir=folder) as temporary:
        place = Path(temporary, _name(source))
        place.mkdir()
        _save(folder / f"{NAME}.onnx", place)
        files = (GRAPH, WEIGHTS)
        record = {
            **_identity(source),
            "files": {name: _digest(place / name) for name in files},
            "sizes": {name: (place / name).stat().st_size for name in files},
        }
        (place / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        _remove_outdated(folder, record)
        os.rename(place, folder / place.name)  # at once, and only when it is whole


def _save(graph: Path, place: Path) -> None:
    """Let onnxruntime write the graph as it holds it: optimized and packed."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it would warn that the file is for this CPU only
    options.intra_op_num_threads = 1
    options.optimized_model_filepath = str(place / GRAPH)
    for name, value in {
        "session.optimized_model_external_initializers_file_name": WEIGHTS,
        "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
        "session.save_external_prepacked_constant_initializers": "1",
    }.items():
        options.add_session_config_entry(name, value)
    try:
        provider = "CPUExecutionProvider"
        onnxruntime.InferenceSession(str(graph), options, providers=[provider])
    except Fail as error:
        raise BuildError(
            f"{place}: expected onnxruntime to write the packed model here, found "
            f"{str(error).strip()}; free some space, or name another folder with "
            "MODEL_DIR"
        ) from error


def _remove_outdated(folder: Path, record: dict[str, Any]) -> None:
    """Drop what this takes the place of, and a damaged folder of the same name.

    What other CPUs made stays: a shared folder may serve several kinds.
    """
    import shutil

    for place in folder.glob(f"{NAME}-packed-*"):
        try:
            cpu = json.loads((place / RECORD).read_text())["cpu"]
        except (OSError, ValueError, KeyError, TypeError):
            cpu = record["cpu"]  # nobody can use it
        if cpu == record["cpu"]:
            shutil.rmtree(place, ignore_errors=True)


def _name(source: dict[str, Any]) -> str:
    key = json.dumps(_identity(source), sort_keys=True)
    return f"{NAME}-packed-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def _identity(source: dict[str, Any]) -> dict[str, Any]:
    """All that the packed files depend on."""
    return {
        "format": FORMAT,
        "source": _revision(source),
        "onnxruntime": onnxruntime.__version__,
        "cpu": cpu(),
    }


def _revision(source: dict[str, Any]) -> str:
    return source["files"][f"{NAME}.onnx"][:12]


def cpu(info: Path = Path("/proc/cpuinfo")) -> str:
    """The CPU's architecture and vector extensions: "x86_64 avx avx2 avx512_vnni …"."""
    flags: list[str] = []
    try:
        with open(info) as file:
            for line in file:
                name, _, value = line.partition(":")
                if name.strip().lower() in ("flags", "features"):
                    flags = value.split()
                    break
    except OSError:  # not Linux: the architecture has to do
        pass
    known = sorted({flag for flag in flags if flag.startswith(EXTENSIONS)})
    return " ".join([os.uname().machine if hasattr(os, "uname") else "", *known])


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _model_folder() -> Path:
    # As `build.model_folder`, whose module brings what only a build needs.
    return Path(os.environ.get("MODEL_DIR") or Path(__file__).parent / "build")
