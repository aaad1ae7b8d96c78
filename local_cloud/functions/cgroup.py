"""What a sandbox may use: memory and CPU, enforced by the kernel where it lets us.

Two ways, and `kind` says which one is at work:

- "cgroup v2" and "cgroup v1": the kernel kills what needs more memory and lets nobody
  run who has used up the share of this period. Needs root, or a delegated group.
- "SIGSTOP and RSS watch": without them a thread looks at the process every 5 ms,
  stops it while it is ahead of its share and kills it when it is too large. It sees
  the function's own process, not what that starts, and up to 5 ms late.

RLIMIT_AS and RLIMIT_DATA would need neither root nor a thread, but limit addresses,
not memory: numpy and onnxruntime reserve far more than they ever touch.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

FULL_CPU_MB = 1769  # the memory at which Lambda gives one full CPU
PERIOD_US = 20_000  # short, so that a throttled call waits little: Lambda's own choice
TICK_S = 0.005
PAGE = os.sysconf("SC_PAGE_SIZE")
MB = 2**20


class Limits:
    """The limits of one sandbox; the subclasses enforce them."""

    kind = ""

    def __init__(self, memory_mb: int):
        self.memory_mb = memory_mb
        self.share = memory_mb / FULL_CPU_MB
        self.pid = 0
        self.oom = False

    @property
    def doors(self) -> list[str]:
        """Files a process writes "0" into to come under these limits."""
        return []

    def command(self, argv: Sequence[str]) -> list[str]:
        """The command that enters the limits first and then becomes `argv`.

        A shell does it before there is an interpreter. Moving the process after its
        start would charge what it touched until then to somebody else.
        """
        if not self.doors:
            return list(argv)
        enter = "".join(f'echo 0 > "${i}" && ' for i in range(1, len(self.doors) + 1))
        script = f'{enter}shift {len(self.doors)} && exec "$@"'
        return ["/bin/sh", "-c", script, "enter", *self.doors, *argv]

    def begin(self, pid: int) -> None:
        """The process with this id is under these limits from now on."""
        self.pid = pid

    def throttle(self) -> None:
        """Limits the CPU from now on.

        The init phase comes before. Lambda does not say so, but gives it more than the
        share: lucvandonkersgoed.com/2022/04/09/when-is-the-lambda-init-phase-free.
        """
        raise NotImplementedError

    def freeze(self) -> None:
        _signal(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        _signal(self.pid, signal.SIGCONT)

    def peak_bytes(self) -> int:
        """The most memory it ever held, by the kernel's own count."""
        raise NotImplementedError

    def killed_for_memory(self) -> bool:
        return self.oom

    def close(self) -> None:
        """Ends what is still running under these limits, and the limits."""


def _signal(group: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number)


class Watched(Limits):
    """Without root: a token bucket of CPU time, and a look at the resident memory."""

    kind = "SIGSTOP and RSS watch"

    def __init__(self, memory_mb: int):
        super().__init__(memory_mb)
        self._peak = 0
        self._throttled = self._stopped = self._frozen = self._closed = False
        self._change = threading.Condition()

    def begin(self, pid: int) -> None:
        super().begin(pid)
        threading.Thread(target=self._watch, name=f"limits-{pid}", daemon=True).start()

    def throttle(self) -> None:
        self._throttled = self.share < (os.cpu_count() or 1)

    def freeze(self) -> None:
        with self._change:
            self._frozen = True
            super().freeze()

    def thaw(self) -> None:
        with self._change:
            self._frozen = self._stopped = False
            super().thaw()
            self._change.notify()

    def peak_bytes(self) -> int:
        with suppress(OSError, StopIteration):
            text = Path(f"/proc/{self.pid}/status").read_text()
            line = next(x for x in text.splitlines() if x.startswith("VmHWM"))
            self._peak = max(self._peak, int(line.split()[1]) * 1024)
        return self._peak

    def close(self) -> None:
        with self._change:
            self._closed = True
            self._change.notify()

    def _watch(self) -> None:
        """Every tick: earn a share of the time passed, pay the CPU time used."""
        tokens, last, used = 0.0, time.monotonic(), self._cpu_s()
        while True:
            with self._change:
                self._change.wait(None if self._frozen else TICK_S)
                if self._closed or self._too_large():
                    return
                now, spent = time.monotonic(), self._cpu_s()
                most = self.share * PERIOD_US / 1e6  # what is not used is lost
                tokens = min(tokens + self.share * (now - last), most) - (spent - used)
                if not self._throttled:
                    tokens = 0.0  # the init phase is not charged
                last, used = now, spent
                in_debt = tokens < 0
                if self._throttled and not self._frozen and in_debt != self._stopped:
                    self._stopped = in_debt
                    _signal(self.pid, signal.SIGSTOP if in_debt else signal.SIGCONT)

    def _too_large(self) -> bool:
        try:
            resident = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        except (OSError, IndexError):
            return True  # gone
        self._peak = max(self._peak, resident * PAGE)
        self.oom = resident * PAGE > self.memory_mb * MB
        if self.oom:
            _signal(self.pid, signal.SIGKILL)
        return self.oom

    def _cpu_s(self) -> float:
        """CPU time of all its threads; Linux makes a process id into a clock so."""
        try:
            return time.clock_gettime((~self.pid << 3) | 2)
        except OSError:
            return 0.0


class Group(Limits):
    """A control group: a folder whose files are the limits and the readings."""

    peak, events = "", ""  # files: the most memory, and the count of kills for it
    door = "cgroup.procs"

    def __init__(self, memory_mb: int, folders: Sequence[Path]):
        super().__init__(memory_mb)
        self.folders = folders
        for folder in folders:
            folder.mkdir()
        self._set_memory(memory_mb * MB)
        self._peak = os.open(folders[0] / self.peak, os.O_RDONLY)

    @property
    def doors(self) -> list[str]:
        return [str(folder / self.door) for folder in self.folders]

    def peak_bytes(self) -> int:
        return int(os.pread(self._peak, 32, 0))

    def killed_for_memory(self) -> bool:
        words = (self.folders[0] / self.events).read_text().split()
        return int(words[words.index("oom_kill") + 1]) > 0

    def close(self) -> None:
        os.close(self._peak)
        for folder in self.folders:
            end_group(folder)

    def _set_memory(self, limit: int) -> None:
        raise NotImplementedError


class GroupV2(Group):
    kind = "cgroup v2"
    peak, events = "memory.peak", "memory.events"

    def _set_memory(self, limit: int) -> None:
        (folder,) = self.folders
        _write(folder / "memory.max", limit)
        _write(folder / "memory.oom.group", 1)  # all of a sandbox dies, or nothing
        if (folder / "memory.swap.max").exists():
            _write(folder / "memory.swap.max", 0)

    def throttle(self) -> None:
        quota = f"{max(1000, round(self.share * PERIOD_US))} {PERIOD_US}"
        _write(self.folders[0] / "cpu.max", quota)


class GroupV1(Group):
    kind = "cgroup v1"
    peak, events = "memory.max_usage_in_bytes", "memory.oom_control"
    # A thread may move itself at once; a whole process waits some 10 ms until the
    # kernel has stopped all forks. Whoever enters here has one thread.
    door = "tasks"

    def _set_memory(self, limit: int) -> None:
        _write(self.folders[0] / "memory.limit_in_bytes", limit)
        with_swap = self.folders[0] / "memory.memsw.limit_in_bytes"
        if with_swap.exists():
            _write(with_swap, limit)

    def throttle(self) -> None:
        cpu = self.folders[1]
        _write(cpu / "cpu.cfs_period_us", PERIOD_US)
        _write(cpu / "cpu.cfs_quota_us", max(1000, round(self.share * PERIOD_US)))


def _write(file: Path, value: object) -> None:
    file.write_text(f"{value}")


def end_group(folder: Path, patience_s: float = 2.0) -> None:
    """Kills what is left in a group, also what left its process group; removes it."""
    end = time.monotonic() + patience_s
    while True:
        try:
            for pid in (folder / "cgroup.procs").read_text().split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            folder.rmdir()
        except FileNotFoundError:
            return
        except OSError:  # busy: the last one is still on its way out
            if time.monotonic() > end:
                return
            time.sleep(0.001)
        else:
            return


class Parent:
    """One platform's part of the control groups, if it may have one.

    `kind` says what limits the sandboxes; `folders` are what must be gone at the end.
    """

    def __init__(self, name: str):
        self.folders: list[Path] = []
        self._group: type[Group] | None = None
        for make, bases in ((GroupV2, _bases_v2()), (GroupV1, _bases_v1())):
            if bases and self._enter(make, [base / name for base in bases]):
                break

    @property
    def kind(self) -> str:
        return (self._group or Watched).kind

    def limits(self, name: str, memory_mb: int) -> Limits:
        """New limits for one sandbox."""
        if self._group is None:
            return Watched(memory_mb)
        return self._group(memory_mb, [folder / name for folder in self.folders])

    def close(self) -> None:
        for folder in self.folders:
            end_group(folder)

    def _enter(self, make: type[Group], folders: list[Path]) -> bool:
        """Makes the parent group and one for trial: permission is found by asking."""
        try:
            for folder in folders:
                folder.mkdir()
                if make is GroupV2:
                    _write(folder / "cgroup.subtree_control", "+memory +cpu")
            trial = make(64, [folder / "trial" for folder in folders])
            trial.throttle()
            subprocess.run(
                trial.command(["/bin/true"]), check=True, stderr=subprocess.DEVNULL
            )
            trial.close()
        except (OSError, subprocess.CalledProcessError):
            for folder in folders:
                end_group(folder / "trial")
                end_group(folder)
            return False
        self.folders, self._group = folders, make
        return True


def _bases_v2() -> list[Path]:
    """Where groups of version 2 can be made: needs both controllers handed down."""
    root = Path("/sys/fs/cgroup")
    own = _own_path("")
    # A group with processes of its own may not hand down controllers, so not in our
    # own group but beside it (a delegated user session), or at the root.
    for base in ((root / own.lstrip("/")).parent, root):
        with suppress(OSError):
            given = (base / "cgroup.subtree_control").read_text().split()
            if {"memory", "cpu"} <= set(given) and os.access(base, os.W_OK):
                return [base]
    return []


def _bases_v1() -> list[Path]:
    """The two hierarchies of version 1, memory first, at our own place in each."""
    bases = []
    for controller in ("memory", "cpu"):
        root = Path("/sys/fs/cgroup") / controller
        place = root / _own_path(controller).lstrip("/")
        bases.append(place if place.is_dir() else root)
    return bases if all(base.is_dir() for base in bases) else []


def _own_path(controller: str) -> str:
    """Our own group of a controller; of version 2 for the empty name."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controller in controllers.split(","):
                return path
    return "/"
