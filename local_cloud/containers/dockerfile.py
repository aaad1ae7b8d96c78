"""Reads a Dockerfile as data, and checks it for what linters do not know.

A linter such as hadolint knows Docker. The checks here know what this course measured:
what makes an image of a model slow to build, slow to start, heavy, or unsafe. Each
says why it matters.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


class DockerfileError(ValueError):
    """A text that is not a Dockerfile: which line, what was expected."""


@dataclass(frozen=True)
class Instruction:
    """One instruction, its continued lines joined."""

    line: int  # of the file, from 1
    word: str  # in capitals: FROM, RUN, ...
    flags: tuple[str, ...]  # --from=build, ...
    rest: str

    @property
    def exec_form(self) -> bool:
        """Whether it is a list of words and needs no shell."""
        try:
            return isinstance(json.loads(self.rest), list)
        except ValueError:
            return False


@dataclass(frozen=True)
class Stage:
    """From one FROM to the next."""

    name: str
    base: str
    line: int
    instructions: tuple[Instruction, ...]


@dataclass(frozen=True)
class Dockerfile:
    """A parsed file; `path` is only for messages."""

    path: str
    text: str
    arguments: tuple[Instruction, ...]  # ARGs before the first FROM
    stages: tuple[Stage, ...]

    def stage(self, name: str) -> Stage | None:
        return next((s for s in self.stages if s.name == name.lower()), None)

    def chain(self, target: str | None = None) -> list[Stage]:
        """The target (by default the last stage) and the stages it builds on, by FROM.

        These make the image; what a COPY --from takes along is only files.
        """
        stage = self.stage(target) if target else self.stages[-1]
        if stage is None:
            names = ", ".join(s.name for s in self.stages)
            raise DockerfileError(
                f"{self.path}: expected a stage {target!r}, found {names}."
            )
        chain = [stage]
        while below := self.stage(chain[0].base):
            chain.insert(0, below)
        return chain

    def inside(self, target: str | None, *words: str) -> list[Instruction]:
        """The instructions of these kinds that make the target, in order."""
        found = (i for stage in self.chain(target) for i in stage.instructions)
        return [i for i in found if i.word in words]

    def everywhere(self, *words: str) -> list[Instruction]:
        found = (i for stage in self.stages for i in stage.instructions)
        return [i for i in found if i.word in words]


def read(path: Path) -> Dockerfile:
    """Reads and parses a file."""
    try:
        return parse(path.read_text(encoding="utf-8"), path.name)
    except (OSError, UnicodeDecodeError) as error:
        raise DockerfileError(
            f"Expected a Dockerfile at {path}, found {error}."
        ) from None


def parse(text: str, path: str = "Dockerfile") -> Dockerfile:
    """Parses a Dockerfile of the classic, portable kind (no heredocs)."""
    arguments: list[Instruction] = []
    stages: list[tuple[Instruction, list[Instruction]]] = []
    for found in _instructions(text, path):
        if found.word == "FROM":
            stages.append((found, []))
        elif stages:
            stages[-1][1].append(found)
        elif found.word == "ARG":
            arguments.append(found)
        else:
            raise DockerfileError(
                f"{path}:{found.line}: expected FROM (or ARG) first, found "
                f"{found.word}. Correct the order."
            )
    if not stages:
        raise DockerfileError(f"{path}: expected at least one FROM, found none.")
    made = [_stage(i, opening, body) for i, (opening, body) in enumerate(stages)]
    return Dockerfile(path, text, tuple(arguments), tuple(made))


def _stage(number: int, opening: Instruction, body: list[Instruction]) -> Stage:
    base, _, name = re.sub(r"(?i)\s+as\s+", " as ", opening.rest).partition(" as ")
    name = name.strip().lower() or str(number)
    return Stage(name, base.strip(), opening.line, tuple(body))


WORDS = re.compile(
    "ADD|ARG|CMD|COPY|ENTRYPOINT|ENV|EXPOSE|FROM|HEALTHCHECK|LABEL|MAINTAINER|ONBUILD|"
    "RUN|SHELL|STOPSIGNAL|USER|VOLUME|WORKDIR"
)


def _instructions(text: str, path: str) -> list[Instruction]:
    """Joins continued lines; drops comments and empty lines, also among them."""
    found, begun, start = [], "", 0
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        start = start if begun else number
        begun += line
        if begun.endswith("\\"):
            begun = begun[:-1].rstrip() + " "
            continue
        found.append(_instruction(begun, start, path))
        begun = ""
    if begun.strip():  # the file ends in a backslash
        found.append(_instruction(begun, start, path))
    return found


def _instruction(text: str, line: int, path: str) -> Instruction:
    word, _, rest = text.strip().partition(" ")
    if not WORDS.fullmatch(word.upper()):
        raise DockerfileError(
            f"{path}:{line}: expected an instruction such as RUN, found {word!r}."
        )
    flags: list[str] = []
    while flag := re.match(r"\s*(--[a-z]+(?:=\S+)?)\s+", rest):
        flags.append(flag[1])
        rest = rest[flag.end() :]
    return Instruction(line, word.upper(), tuple(flags), rest.strip())


# -- the checks


@dataclass(frozen=True)
class Finding:
    """What one check found: `line` 0 means that something is not there."""

    check: str
    good: bool
    line: int
    why: str

    @property
    def place(self) -> str:
        """Where it is broken, in words; "ok" where it holds."""
        if self.good:
            return "ok"
        return f"line {self.line}" if self.line else "missing"


@dataclass(frozen=True)
class Check:
    """A rule: what to hold to, why, and what finds the lines that break it."""

    name: str
    why: str
    broken: Callable[[Dockerfile, str | None, str], list[int]]


def audit(
    file: Dockerfile, target: str | None = None, ignore: str = ""
) -> list[Finding]:
    """Runs all checks on the image of a target; `ignore` is .dockerignore's text."""
    findings = []
    for check in CHECKS:
        lines = check.broken(file, target, ignore)
        found = [Finding(check.name, False, line, check.why) for line in lines]
        findings += found or [Finding(check.name, True, 0, check.why)]
    return findings


Lines = list[int]


def _bases(file: Dockerfile, target: str | None, _: str) -> Lines:
    default = {}
    for argument in file.arguments:
        name, _, value = argument.rest.partition("=")
        default[name] = value.strip("\"'")
    stages = {s.name for s in file.stages}
    broken = []
    for stage in file.stages:
        base = re.sub(
            r"\$\{?(\w+)(?::-[^}]*)?\}?",
            lambda m: default.get(m[1], ""),
            stage.base.split()[-1],
        )
        if base == "scratch" or base.lower() in stages or "@sha256:" in base:
            continue
        tag = base.rpartition("/")[2].partition(":")[2]
        if tag in ("", "latest"):
            broken.append(stage.line)
    return broken


def _user(file: Dockerfile, target: str | None, _: str) -> Lines:
    users = file.inside(target, "USER")
    if not users:
        return [0]
    name = users[-1].rest.partition(":")[0]
    return [] if name.isdigit() and int(name) else [users[-1].line]


def _exec_form(file: Dockerfile, target: str | None, _: str) -> Lines:
    starts = file.inside(target, "CMD", "ENTRYPOINT")
    if not starts:
        return [0]
    last = {i.word: i for i in starts}
    return [i.line for i in last.values() if not i.exec_form]


def _health(file: Dockerfile, target: str | None, _: str) -> Lines:
    checks = file.inside(target, "HEALTHCHECK")
    if not checks:
        return [0]
    return [checks[-1].line] if checks[-1].rest.upper() == "NONE" else []


def _installs(file: Dockerfile) -> list[Instruction]:
    return [
        i
        for i in file.everywhere("RUN")
        if re.search(
            r"\bpip3?\b.* install\b|"
            r"\buv pip (install|sync)\b",
            i.rest,
        )
    ]


def _order(file: Dockerfile, target: str | None, _: str) -> Lines:
    """Lines where all the code is copied before a pip install of the same stage."""
    broken = []
    for stage in file.stages:
        code = 0
        for step in stage.instructions:
            if _copies_all(step) or (
                step.word in ("COPY", "ADD") and ".py" in step.rest
            ):
                code = code or step.line
            if code and step in _installs(file):
                broken.append(code)
    return sorted(set(broken))


def _copies_all(step: Instruction) -> bool:
    """Whether it copies the whole context; from another stage is another matter."""
    if step.word not in ("COPY", "ADD") or any(
        f.startswith("--from") for f in step.flags
    ):
        return False
    sources = json.loads(step.rest) if step.exec_form else step.rest.split()
    return any(source.rstrip("/") in (".", "") for source in sources[:-1])


def _hashes(file: Dockerfile, target: str | None, _: str) -> Lines:
    return [i.line for i in _installs(file) if "--require-hashes" not in i.rest]


def _pip_cache(file: Dockerfile, target: str | None, _: str) -> Lines:
    off = any("PIP_NO_CACHE_DIR" in i.rest for i in file.everywhere("ENV", "ARG"))
    if off:
        return []
    return [
        i.line
        for i in _installs(file)
        if not re.search(r"--no-cache-dir|--no-cache\b|PIP_NO_CACHE_DIR", i.rest)
    ]


def _builds_inside(file: Dockerfile, target: str | None, _: str) -> Lines:
    tools = r"\bapt(-get)? install\b|\bgcc\b|\bbuild-essential\b|\bpip3? install\b"
    return [i.line for i in file.inside(target, "RUN") if re.search(tools, i.rest)]


def _bytecode(file: Dockerfile, target: str | None, _: str) -> Lines:
    compiled = any("compileall" in i.rest for i in file.everywhere("RUN"))
    return [] if compiled else [0]


SECRET = re.compile(r"(?i)^\w*(api_?key|password|passwd|secret|token)s?$")


def _secrets(file: Dockerfile, target: str | None, _: str) -> Lines:
    """Names that say secret; the path of a file (.._FILE) is none."""
    broken = []
    for step in file.everywhere("ENV", "ARG"):
        names = re.findall(r"(?:^|\s)(\w+)(?==)", step.rest) or step.rest.split()[:1]
        broken += [step.line for name in names if SECRET.match(name)]
    return broken


def _all_of_it(file: Dockerfile, target: str | None, _: str) -> Lines:
    return [i.line for i in file.everywhere("COPY", "ADD") if _copies_all(i)]


def _ignores(file: Dockerfile, target: str | None, ignore: str) -> Lines:
    rules = [x.strip() for x in ignore.splitlines() if x.strip()[:1] not in ("", "#")]
    return [] if rules and rules[0] in ("*", "**", "/*", "**/*") else [0]


def _apt(file: Dockerfile, target: str | None, _: str) -> Lines:
    return [
        i.line
        for i in file.everywhere("RUN")
        if re.search(r"\bapt(-get)? .*install\b", i.rest)
        and not ("--no-install-recommends" in i.rest and "/var/lib/apt/lists" in i.rest)
    ]


def _telemetry(file: Dockerfile, target: str | None, _: str) -> Lines:
    env = file.inside(target, "ENV")
    return [] if any("ORT_DISABLE_TELEMETRY=1" in i.rest for i in env) else [0]


def _portable(file: Dockerfile, target: str | None, _: str) -> Lines:
    flags = ("--mount", "--chmod", "--link", "--security", "--network", "--parents")
    broken = [
        i.line
        for i in file.everywhere("RUN", "COPY", "ADD")
        if any(f.startswith(flags) for f in i.flags) or "<<" in i.rest
    ]
    first = file.text.lstrip().partition("\n")[0]
    return [1, *broken] if re.match(r"#\s*syntax\s*=", first) else broken


CHECKS = (
    Check("bases have a tag that stays", "latest is another image tomorrow", _bases),
    Check(
        "runs as a number that is not 0",
        "root inside is root on the host once it breaks out; Kubernetes can only "
        "verify a number",
        _user,
    ),
    Check(
        "starts in exec form",
        "a shell in between gets SIGTERM and passes none on: every stop becomes a kill",
        _exec_form,
    ),
    Check(
        "has a HEALTHCHECK",
        "a process that lives may still be loading, or stuck; only its answer tells",
        _health,
    ),
    Check(
        "packages before code",
        "a changed layer makes all after it anew: one line of code must not reinstall",
        _order,
    ),
    Check(
        "packages by hash",
        "a name and version can be another file tomorrow; a hash cannot",
        _hashes,
    ),
    Check(
        "pip keeps no cache", "a second copy of every wheel in the layer", _pip_cache
    ),
    Check(
        "the image that runs builds nothing",
        "compilers and pip serve the build alone, then only an intruder",
        _builds_inside,
    ),
    Check(
        "bytecode is made in the build",
        "slim images have none for the standard library, and a read-only container "
        "compiles at every start",
        _bytecode,
    ),
    Check(
        "no secrets in ENV or ARG",
        "docker history and docker inspect show them to whoever has the image",
        _secrets,
    ),
    Check(
        "copies what it names",
        "COPY . takes along what nobody meant: caches, keys, the history",
        _all_of_it,
    ),
    Check(
        ".dockerignore denies all, then allows",
        "the context is sent and hashed whole before the first step",
        _ignores,
    ),
    Check(
        "apt leaves nothing behind",
        "recommended packages and lists that nobody reads again",
        _apt,
    ),
    Check(
        "the runtime's telemetry is off",
        "onnxruntime reports by default, keeps a database and a thread for it",
        _telemetry,
    ),
    Check(
        "builds with any builder",
        "docker-py has the classic one: no --mount, no heredoc, no syntax line",
        _portable,
    ),
)


# -- hadolint, where there is one


def hadolint() -> str | None:
    """The linter's path: of this environment, or of the machine."""
    beside = Path(sys.executable).with_name("hadolint")
    return str(beside) if beside.exists() else shutil.which("hadolint")


def lint(linter: str, path: Path) -> list[tuple[int, str, str]]:
    """What hadolint says of a file: (line, rule, message)."""
    told = subprocess.run(
        [linter, "--no-color", "--format", "json", str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    try:
        said = json.loads(told.stdout)
    except ValueError:
        raise DockerfileError(
            f"Expected a report of {linter}, found exit code {told.returncode}: "
            f"{told.stderr.strip() or told.stdout.strip()}"
        ) from None
    return [(x["line"], x["code"], x["message"]) for x in said]
