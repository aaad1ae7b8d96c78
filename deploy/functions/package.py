"""The folder that becomes the function's zip, and whether Lambda will take it.

    python -m deploy.functions.package FOLDER [--python 3.13]

Lambda unzips at most 250 MiB, layers included. The packages as they come, with the
model, are more than that; pruned as the container images are, they fit.
"""

from __future__ import annotations

import argparse
import compileall
import py_compile
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from deploy.rootfs import NOT_SERVING, elves, remove_all, strip
from models import build

ROOT = Path(__file__).resolve().parents[2]
LOCK = Path(__file__).with_name("requirements.lock")
BUDGET_BYTES = 250 * 2**20
PYTHON = "3.13"  # of the template's runtime
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
# Lambda's runtimes of 3.12 and later are on Amazon Linux 2023: glibc 2.34.
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (34, 28, 27, 17)]
# The runtime brings these itself; a second copy of the hooks would be never called.
IN_RUNTIME = "awslambdaric* simplejson* snapshot_restore_py* runtime_client*"
CODE = (
    "models",
    "deploy/functions/aws.py",
    "deploy/functions/instance.py",
    "serverless_deployment.py",
)


class PackageError(RuntimeError):
    """The folder could not be made."""


@dataclass(frozen=True)
class Weight:
    """What the parts of the folder weigh, in bytes."""

    unpruned: int  # the packages as they come
    packages: int
    model: int
    code: int

    @property
    def total(self) -> int:
        return self.packages + self.model + self.code

    @property
    def fits(self) -> bool:
        return self.total <= BUDGET_BYTES


def package(folder: Path, python: str = PYTHON) -> Weight:
    """Fills a folder, which must be new or empty, with all that the function needs.

    Raises PackageError: the folder is not empty, or a wheel cannot be had.
    """
    if folder.exists() and any(folder.iterdir()):
        raise PackageError(f"Expected {folder} to be empty, found files; remove them.")
    install(folder, python)
    unpruned = size(folder)
    remove_all(folder, [*NOT_SERVING.split(), *IN_RUNTIME.split(), "bin"])
    for library in elves(folder):
        strip(library)
    # /var/task is read-only: without bytecode each cold start compiles everything.
    # Only the interpreter that will run it can write it.
    if python == HERE:
        mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
        compileall.compile_dir(folder, quiet=2, invalidation_mode=mode)
    packages = size(folder)
    copy_model(folder / "model")
    model = size(folder / "model")
    for name in CODE:
        copy_code(ROOT / name, folder / name)
    return Weight(unpruned, packages, model, size(folder) - packages - model)


def install(folder: Path, python: str) -> None:
    """The locked wheels, each checked by its hash, for Lambda's Linux and Python."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--root-user-action=ignore"]
    command += ["--no-compile", "--only-binary=:all:", "--require-hashes"]
    command += ["--implementation=cp", f"--python-version={python}"]
    command += [f"--platform={platform}" for platform in PLATFORMS]
    told = subprocess.run(
        [*command, f"--target={folder}", f"--requirement={LOCK}"],
        capture_output=True,
        text=True,
    )
    if told.returncode:
        raise PackageError(
            f"Expected the wheels of {LOCK.name} for Python {python}, found:\n"
            f"{told.stderr.strip()}\nDo: reach a package index, or set PIP_FIND_LINKS."
        )


def copy_model(folder: Path) -> None:
    """The 4-bit graph, its record and the tokenizer, built first if need be."""
    files = build.ensure("int4")
    folder.mkdir()
    for path in (files.graph, files.graph.with_suffix(".json"), files.tokenizer):
        shutil.copy2(path, folder)


def copy_code(source: Path, target: Path) -> None:
    """Our own sources, without what running left beside them."""
    if source.is_dir():
        unwanted = shutil.ignore_patterns("__pycache__", "build", "quality.np*")
        shutil.copytree(source, target, ignore=unwanted)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)


def size(folder: Path) -> int:
    """Bytes of all files below, as Lambda counts them."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where to put it; made anew")
    parser.add_argument("--python", default=PYTHON, help=f"default: {PYTHON}")
    arguments = parser.parse_args()
    # Beside it first: a folder that is there is a whole one.
    arguments.folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=arguments.folder.parent) as beside:
        try:
            weight = package(Path(beside) / "new", arguments.python)
        except PackageError as problem:
            sys.exit(str(problem))
        shutil.rmtree(arguments.folder, ignore_errors=True)
        (Path(beside) / "new").rename(arguments.folder)
    for part in ("unpruned", "packages", "model", "code", "total"):
        print(f"{part:>10}  {getattr(weight, part) / 1e6:6.1f} MB")
    print(f"{'budget':>10}  {BUDGET_BYTES / 1e6:6.1f} MB")
    if arguments.python != HERE:
        print(
            f"No bytecode: run it with Python {arguments.python} to have starts "
            "that need not compile."
        )
    return 0 if weight.fits else 1


if __name__ == "__main__":
    sys.exit(main())
