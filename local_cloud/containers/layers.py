"""What an image weighs, layer by layer, and what it holds.

The engine gives an image as a tar of layer tars. Each is read once: counted, gzipped
as a registry would store it, and searched for packages. A layer's content is its name
(a digest), so what was found is kept and another image with that layer costs nothing.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import tarfile
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any

from course import report

MODEL = re.compile(r"^model/|(^|/)models/build/")  # its files, in any image of ours
GZIP_LEVEL = 6  # what docker push uses
COPY_BYTES = 1 << 20


@dataclass(frozen=True)
class Layer:
    """One layer: sizes in bytes, the model's files apart from the rest."""

    digest: str
    bytes: int  # of all files but the model's
    gzipped: int
    model_bytes: int
    debs: int | None  # packages its dpkg records name, None where it has no records
    python: int  # distributions with metadata
    shell: bool  # a shell to break in with


FIELDS = [field.name for field in fields(Layer)]


@dataclass(frozen=True)
class Weight:
    """An image: its layers with the instruction that made each, base first."""

    layers: tuple[tuple[str, Layer], ...]

    @property
    def bytes(self) -> int:
        """Without the model."""
        return sum(layer.bytes for _, layer in self.layers)

    @property
    def gzipped(self) -> int:
        """Without the model."""
        return sum(layer.gzipped for _, layer in self.layers)

    @property
    def model_bytes(self) -> int:
        return sum(layer.model_bytes for _, layer in self.layers)

    @property
    def debs(self) -> int:
        """Debian packages by the last word in the matter."""
        return next((x.debs for _, x in reversed(self.layers) if x.debs), 0)

    @property
    def python(self) -> int:
        return sum(layer.python for _, layer in self.layers)

    @property
    def shell(self) -> bool:
        return any(layer.shell for _, layer in self.layers)


def weigh(image: Any, progress: Callable[[], None] = lambda: None) -> Weight:
    """Weighs an image of docker-py; a layer never seen before takes some seconds."""
    known = _load()
    if image.id not in known["images"]:
        _read_image(image, known, progress)
        _save(known)
    steps = known["images"][image.id]
    return Weight(
        tuple((name, Layer(**known["layers"][digest])) for name, digest in steps)
    )


def _read_image(
    image: Any, known: dict[str, Any], progress: Callable[[], None]
) -> None:
    """Adds to what is known the image's instructions, and its layers if new."""
    with tempfile.NamedTemporaryFile(prefix="image-") as saved:
        for chunk in image.save(chunk_size=COPY_BYTES):
            saved.write(chunk)
            progress()
        saved.flush()
        with tarfile.open(saved.name) as outer:
            listing = json.load(_open(outer, "manifest.json"))[0]
            config = json.load(_open(outer, listing["Config"]))
        digests = config["rootfs"]["diff_ids"]
        paths = dict(zip(digests, listing["Layers"], strict=True))
        new = [digest for digest in paths if digest not in known["layers"]]

        def read(digest: str) -> Layer:
            with tarfile.open(saved.name) as outer:
                return _read_layer(digest, _open(outer, paths[digest]), progress)

        with ThreadPoolExecutor(2) as pool:  # zlib lets go of the interpreter's lock
            for layer in pool.map(read, new):
                known["layers"][layer.digest] = asdict(layer)
    history = [h for h in config["history"] if not h.get("empty_layer")]
    names = [step.get("created_by", "?") for step in history]
    if len(names) != len(digests):  # squashed or imported: nobody knows
        names = ["?"] * len(digests)
    known["images"][image.id] = list(zip(names, digests, strict=True))


def _open(outer: tarfile.TarFile, name: str) -> IO[bytes]:
    file = outer.extractfile(name)
    assert file, f"{name} is no file in the saved image"
    return file


class _Count(io.RawIOBase):
    """Counts what is written to it, and keeps nothing."""

    size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.size += len(data)
        return len(data)


def _read_layer(digest: str, file: IO[bytes], progress: Callable[[], None]) -> Layer:
    """Reads every member once; the gzipped size leaves the model's files out."""
    count, total, model, python, shell = _Count(), 0, 0, 0, False
    debs: int | None = None
    with (
        tarfile.open(fileobj=file, mode="r|*") as layer,
        gzip.GzipFile(fileobj=count, mode="wb", compresslevel=GZIP_LEVEL) as zipped,
        tarfile.open(fileobj=zipped, mode="w|") as kept,
    ):
        for member in layer:
            progress()
            name = member.name.removeprefix("./")
            if MODEL.search(name):
                model += member.size
                continue
            total += member.size
            python += name.endswith(".dist-info/METADATA")
            shell |= name in ("bin/sh", "usr/bin/sh")
            data = layer.extractfile(member) if member.isreg() else None
            if data and re.match(r"var/lib/dpkg/status(\.d/[^.]+)?$", name):
                text = data.read()
                debs = (debs or 0) + len(re.findall(rb"(?m)^Package: ", text))
                data = io.BytesIO(text)
            kept.addfile(member, data)
    return Layer(digest, total, count.size, model, debs, python, shell)


def _kept() -> Path:
    return report.folder() / "layers.cache"


def _load() -> dict[str, Any]:
    """What is known; nothing yet, or of another day, is no error: it is read anew."""
    nothing: dict[str, Any] = {"fields": FIELDS, "layers": {}, "images": {}}
    try:
        known = json.loads(_kept().read_text())
        return known if known["fields"] == FIELDS else nothing
    except (OSError, ValueError, TypeError, KeyError):
        return nothing


def _save(known: dict[str, Any]) -> None:
    report.write(_kept(), json.dumps(known))
