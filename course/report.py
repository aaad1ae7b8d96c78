"""Saved results, and one page that shows them all.

Each lesson leaves `reports/<lesson>.json` and its pictures beside it. The page holds
everything inside itself, pictures too: it can be mailed, and opens without a network.
"""

from __future__ import annotations

import base64
import json
import os
import tempfile
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from course.machine import card_line
from course.show import Table

Record = dict[str, Any]


def folder() -> Path:
    """Where results are kept: REPORTS_DIR, else `reports/` in the repository."""
    chosen = os.environ.get("REPORTS_DIR")
    return Path(chosen) if chosen else Path(__file__).resolve().parents[1] / "reports"


def write(path: Path, text: str) -> None:
    """Writes a whole file or nothing: beside it first, then in its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as beside:
        half = Path(beside) / path.name
        half.write_text(text, encoding="utf-8")
        half.replace(path)


def as_text(record: Record) -> str:
    """A record as JSON text."""
    return json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def save(record: Record) -> Path:
    """Saves a lesson's results; sections that did not run keep their last ones.

    They keep them only from the same machine and device: figures of two machines in
    one table would be read as one.
    """
    path = folder() / f"{record['lesson']}.json"
    old = _read(path) if path.exists() else {}
    ours = {s["title"]: s for s in record["sections"] if s["outcome"] != "interrupted"}
    if (old.get("machine"), old.get("device")) == (record["machine"], record["device"]):
        ours = {s["title"]: s for s in old["sections"]} | ours
    order = [title for title in record["titles"] if title in ours]
    write(path, as_text({**record, "sections": [ours[title] for title in order]}))
    return path


def load() -> list[Record]:
    """All saved results, in the order of the lessons."""
    records = [_read(path) for path in sorted(folder().glob("*.json"))]
    return sorted(records, key=lambda record: (record["number"], record["lesson"]))


def _read(path: Path) -> Record:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not {"lesson", "number", "title", "sections", "machine"} <= record.keys():
            raise ValueError("parts are missing")
    except (ValueError, AttributeError) as problem:
        raise ValueError(
            f"Expected a lesson's results in {path}, found {problem}. Delete the file "
            "and run the lesson again."
        ) from None
    return record


def page(records: Iterable[Record]) -> str:
    """The HTML page of these results."""
    records = list(records)
    links = "".join(
        f'<a href="#{escape(r["lesson"])}">{escape(r["lesson"])}</a>' for r in records
    )
    lessons = "".join(_lesson(record) for record in records)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{TITLE}</title>\n<style>{CSS}</style></head>\n"
        f"<body><h1>{TITLE}</h1>\n<nav>{links}</nav>\n{lessons}</body></html>\n"
    )


def _lesson(record: Record) -> str:
    sections = "".join(_section(section) for section in record["sections"])
    return (
        f'<article id="{escape(record["lesson"])}"><h2>{escape(record["title"])}</h2>\n'
        f'<p class="card">{escape(record["lesson"])}.py on {escape(record["device"])}: '
        f"{escape(card_line(record['machine']))}</p>\n{sections}</article>\n"
    )


def _section(section: Record) -> str:
    quick = ", quick: few repeats" if section["quick"] else ""
    when = f"{section['when']}, {section['seconds']:.1f} s{quick}"
    events = "".join(_event(event) for event in section["events"])
    return (
        f"<section><h3>{escape(section['title'])}</h3>\n"
        f'<p class="when">{escape(when)}</p>\n{events}</section>\n'
    )


def _event(event: Record) -> str:
    match event["kind"]:
        case "table":
            return _table(Table.from_json(event))
        case "picture":
            return _picture(event)
        case "skipped":
            command = f"<code>{escape(event['command'])}</code>"
            return _labelled("skipped", f"{escape(event['text'])} {command}")
        case "say":
            return f"<p>{escape(event['text'])}</p>\n"
        case kind:
            return _labelled(kind, escape(event["text"]))


def _labelled(kind: str, html: str) -> str:
    return f'<p class="{kind} line"><b>{LABELS[kind]}</b><span>{html}</span></p>\n'


def _table(table: Table) -> str:
    sides = [' class="n"' if numeric else "" for numeric in table.numeric()]
    head = "".join(
        f"<th{side}>{escape(column.name)}<small>{escape(column.unit)}</small></th>"
        for column, side in zip(table.headings(), sides, strict=True)
    )
    body = "".join(f"<tr>{_row(cells, sides)}</tr>" for cells in table.cells())
    note = f'<p class="when">{escape(table.note)}</p>\n' if table.note else ""
    return (
        f'<div class="wide"><table><caption>{escape(table.title)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>\n{note}"
    )


def _row(cells: list[str], sides: list[str]) -> str:
    pairs = zip(cells, sides, strict=True)
    return "".join(f"<td{side}>{escape(cell)}</td>" for cell, side in pairs)


def _picture(event: Record) -> str:
    path = folder() / Path(event["file"]).name
    if not path.exists():
        return f'<p class="skipped">The picture {escape(path.name)} is missing.</p>\n'
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    alt = escape(event["text"], quote=True)
    return f'<img alt="{alt}" src="data:image/png;base64,{data}">\n'


TITLE = "Hosting and deploying AI models: what was measured"

LABELS = {
    "predicted": "Prediction",
    "concluded": "Result",
    "fact": "Fact",
    "skipped": "Skipped",
    "failed": "Failed",
}

CSS = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #fff; --soft: #5c6370;
  --line: #d9dce1; --wash: #f4f6f8; --blue: #0b63a5; --green: #04724f; --red: #a33b00 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --paper: #16181c;
  --soft: #9aa3b0; --line: #343a44; --wash: #1f2329; --blue: #6db8f2; --green: #4fcf9f;
  --red: #ff9b66 } img { background: #fff; border-radius: 6px } }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); max-width: 62rem; margin: 2.5rem auto; padding: 0 1.25rem }
h1 { font-size: 1.7rem; margin: 0 0 .5rem }
h2 { font-size: 1.35rem; margin: 3rem 0 .3rem }
h3 { font-size: 1.1rem; margin: 2.2rem 0 0; padding-top: .8rem;
  border-top: 1px solid var(--line) }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem } a { color: var(--blue) }
p { margin: .6rem 0; max-width: 46rem }
.card, .when, small { color: var(--soft); font-size: .85rem }
.predicted b { color: var(--blue) } .concluded b { color: var(--green) }
.failed b, .skipped b { color: var(--red) } .concluded { font-weight: 600 }
.line { display: grid; grid-template-columns: 6.2rem 1fr }
.wide { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
caption { text-align: left; font-weight: 600; padding-bottom: .4rem }
th, td { padding: .3rem 1.4rem .3rem 0; text-align: left; vertical-align: bottom }
th { font-weight: 500; border-bottom: 2px solid var(--line) }
th small { display: block }
td { border-bottom: 1px solid var(--line) } .n { text-align: right }
code { background: var(--wash); padding: .1rem .4rem; border-radius: 4px }
img { max-width: 100%; height: auto; margin: .8rem 0 }
"""
