"""What an exercise's file does when it is run by itself: calls what you wrote."""

from __future__ import annotations

import asyncio
import inspect
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from course import show
from exercises.catalogue import find


def tryout(file: str, **calls: Callable[[], Any]) -> int:
    """Prints what each call gives, or that it is not started; then how to check.

    Args:
        file: the exercise's `__file__`.
        calls: by name what to call; a coroutine is run, a `Table` printed as one.

    Returns:
        0 if all calls came back, else 1: an exit status.
    """
    exercise = find(Path(file).stem)
    show.heading(f"Exercise {exercise.number}: {exercise.title}", f"in {file}")
    good = [_one(name, call) for name, call in calls.items()]
    show.say(
        f"Check it: python -m exercises check {exercise.number}\n"
        f"or at each save: python -m exercises watch {exercise.number}"
    )
    return int(not all(good))


def _one(name: str, call: Callable[[], Any]) -> bool:
    try:
        value = call()
        if inspect.iscoroutine(value):
            value = asyncio.run(value)
    except NotImplementedError:
        show.labelled("open", f"{name}: not started", "yellow")
        return False
    except Exception:  # the learner's own, shown whole: this is where they debug
        show.labelled("error", f"{name}:\n{traceback.format_exc()}", "red")
        return False
    if isinstance(value, show.Table):
        show.table(value)
    else:
        text = str(value)
        between = "\n" if "\n" in text else " "
        show.labelled("ok", f"{name}:{between}{text}", "green")
    return True
