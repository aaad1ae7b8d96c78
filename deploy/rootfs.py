"""Makes the file system of the smallest image: one interpreter, one environment.

    python rootfs.py prune VENV         remove from VENV what no server needs
    python rootfs.py fill VENV ROOT     copy Python, VENV and what they link to

Runs inside the image's build, on Debian, with the standard library alone. What leaves
no trace cannot be scanned: for every file taken from a Debian package, the package's
record goes along, so that scanners find glibc and OpenSSL and their known holes.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"
TAG = sys.implementation.cache_tag  # cpython-311: part of a bytecode file's name
PREFIX = Path("/usr/local")
USER = 10001

# Below site-packages. onnxruntime carries its runtime twice: libonnxruntime.so is for
# C programs only, Python has its own copy in the extension module.
NOT_SERVING = """
    onnxruntime/capi/libonnxruntime.so* onnxruntime/quantization onnxruntime/tools
    onnxruntime/transformers onnxruntime/datasets
    numpy/**/tests numpy/_core/include numpy/_core/lib numpy/random/lib numpy/distutils
    numpy/f2py numpy/_pyinstaller numpy/_core/_simd.* numpy/_core/*_tests.*
    **/*.pyi **/*.pyx **/*.pxd **/*.c **/*.h wrapt-stubs
"""
# Of the standard library: what develops, draws windows, installs packages or speaks
# protocols of the past. Python 3.13 leaves out most of the last two lines.
NOT_RUNNING = """
    config-* ensurepip idlelib lib2to3 pydoc_data site-packages test tkinter turtledemo
    unittest venv distutils sqlite3 curses dbm xmlrpc __phello__
    antigravity.py bdb.py cProfile.py doctest.py pdb.py profile.py pstats.py pyclbr.py
    pydoc.py rlcompleter.py this.py trace.py turtle.py webbrowser.py
    _pydecimal.py _pyio.py _osx_support.py _aix_support.py
    lib-dynload/_test* lib-dynload/_ctypes_test* lib-dynload/_tkinter* lib-dynload/xx*
    lib-dynload/_xx* lib-dynload/_curses* lib-dynload/readline* lib-dynload/_dbm*
    lib-dynload/_gdbm* lib-dynload/_sqlite3* lib-dynload/nis* lib-dynload/audioop*
    aifc.py asynchat.py asyncore.py cgi.py cgitb.py chunk.py crypt.py ftplib.py
    imaplib.py imghdr.py imp.py mailbox.py mailcap.py nntplib.py pipes.py poplib.py
    smtpd.py sndhdr.py sunau.py telnetlib.py uu.py xdrlib.py
"""
# Files that no link names, and the packages they come from.
SYSTEM_FILES = [
    "/etc/debian_version",
    "/etc/nsswitch.conf",
    "/etc/os-release",
    "/etc/services",
    "/etc/ssl/certs/ca-certificates.crt",
    "/usr/lib/os-release",
]
CERTIFICATES = "ca-certificates"  # their bundle is generated: no package owns it


def prune(venv: Path) -> None:
    """Remove what never serves."""
    packages = venv / "lib" / PYTHON / "site-packages"
    remove_all(packages, NOT_SERVING.split())
    remove_all(venv, ["bin/[Aa]ctivate*"])
    for path in elves(packages):
        strip(path)


def remove_all(folder: Path, patterns: Iterable[str]) -> None:
    """Remove what matches; what a release no longer has need not be removed."""
    for pattern in patterns:
        for path in list(folder.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def strip(path: Path) -> None:
    """Cut off what follows a library's last loaded byte: symbols for debuggers.

    What `strip` of binutils does, which the slim image lacks. The loader reads program
    headers and the segments they name; the table of sections, at the end, is for
    linkers. uvloop alone carries 12 MB of it. The fields are those of 64-bit ELF.
    """
    content = bytearray(path.read_bytes())
    (headers,) = struct.unpack_from("<Q", content, 32)
    size, count = struct.unpack_from("<HH", content, 54)
    end = headers + size * count
    for header in range(headers, end, size):
        offset, length = struct.unpack_from("<8xQ16xQ", content, header)
        end = max(end, offset + length)
    struct.pack_into("<Q", content, 40, 0)  # no table of sections:
    struct.pack_into("<HHH", content, 58, 0, 0, 0)  # its sizes and its names
    path.write_bytes(content[:end])


def fill(venv: Path, root: Path) -> None:
    """Copy everything one Python program needs to `root`."""
    copy_python(root)
    shutil.copytree(venv, root / venv.relative_to("/"), symlinks=True)
    system = set(linked_by(elves(root))) | set(map(Path, SYSTEM_FILES))
    for path in sorted(system):
        copy_with_links(path, root)
    record_packages(system, root)
    make_skeleton(root)


def copy_python(root: Path) -> None:
    """The interpreter and its library, as installed in /usr/local."""
    library = PREFIX / "lib" / PYTHON
    target = root / library.relative_to("/")
    shutil.copytree(library, target, symlinks=True)
    remove_all(target, NOT_RUNNING.split())
    drop_sources(target)
    for path in [PREFIX / "bin" / PYTHON, *PREFIX.glob("lib/libpython*.so*")]:
        copy_with_links(path, root)
    for name in ("python", "python3"):
        (root / "usr/local/bin" / name).symlink_to(PYTHON)


def drop_sources(library: Path) -> None:
    """Keep the bytecode alone: half the size.

    The price: tracebacks name the standard library's lines but cannot quote them. Our
    own code and the packages keep their sources.
    """
    for source in list(library.rglob("*.py")):
        compiled = source.parent / "__pycache__" / f"{source.stem}.{TAG}.pyc"
        if compiled.exists():
            compiled.rename(source.with_suffix(".pyc"))
            source.unlink()
    remove_all(library, ["**/__pycache__"])


def elves(root: Path) -> Iterator[Path]:
    """Programs and libraries below `root`."""
    for path in root.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                if file.read(4) == b"\x7fELF":
                    yield path


def linked_by(files: Iterable[Path]) -> Iterator[Path]:
    """The system's libraries that the files load, the loader itself included."""
    for file in files:
        told = subprocess.run(["ldd", file], text=True, capture_output=True).stdout
        if missing := re.findall(r"(\S+) => not found", told):
            sys.exit(f"{file}: expected all its libraries, not found: {missing}")
        for name in re.findall(r"(/\S+) \(0x", told):
            if not name.startswith((str(PREFIX), "/venv", "/rootfs")):
                yield Path(name)


def copy_with_links(path: Path, root: Path) -> None:
    """Copy a file, and on the way to it the links that lead there."""
    target = root / path.relative_to("/")
    if target.exists() or target.is_symlink():
        return
    make_folder(path.parent, root)
    shutil.copy2(path, target, follow_symlinks=False)
    if path.is_symlink():
        copy_with_links(path.parent / path.readlink(), root)


def make_folder(folder: Path, root: Path) -> None:
    """Make a folder, or the link that stands in its place, such as /lib."""
    if folder == Path("/"):
        root.mkdir(exist_ok=True)
        return
    make_folder(folder.parent, root)
    target = root / folder.relative_to("/")
    if folder.is_symlink():
        make_folder(folder.parent / folder.readlink(), root)
        if not target.is_symlink():
            target.symlink_to(folder.readlink())
    else:
        target.mkdir(exist_ok=True)


def record_packages(files: Iterable[Path], root: Path) -> None:
    """Write the records of all packages that own the files, and their licenses."""
    records = root / "var/lib/dpkg/status.d"
    records.mkdir(parents=True)
    for package in sorted({CERTIFICATES, *filter(None, map(owner, files))}):
        status = ask_dpkg("--status", package)
        (records / package.split(":")[0]).write_text(status)
        name = package.split(":")[0]
        license = Path("/usr/share/doc", name, "copyright")
        if license.exists():
            copy_with_links(license, root)


def owner(path: Path) -> str | None:
    """The package that installed a file; it may know it by either name of /usr."""
    real = path.resolve()
    for name in (path, real, Path("/", *real.parts[2:])):
        told = ask_dpkg("--search", str(name))
        if told:
            return told.split(": ")[0]
    return None


def ask_dpkg(*question: str) -> str:
    command = ["dpkg-query", *question]
    return subprocess.run(command, text=True, capture_output=True).stdout


def make_skeleton(root: Path) -> None:
    """What programs expect of any system: a user, a place for temporary files."""
    (root / "etc/passwd").write_text(
        f"root:x:0:0::/:/sbin/nologin\napp:x:{USER}:{USER}::/app:/sbin/nologin\n"
    )
    (root / "etc/group").write_text(f"root:x:0:\napp:x:{USER}:\n")
    (root / "tmp").mkdir()
    (root / "tmp").chmod(0o1777)
    # -X: links exist. The folder holds libpython; the others are known to the loader.
    subprocess.run(["ldconfig", "-X", "-r", root, "/usr/local/lib"], check=True)
    remove_all(root, ["var/cache"])


if __name__ == "__main__":
    verb, *folders = sys.argv[1:]
    {"prune": prune, "fill": fill}[verb](*map(Path, folders))
