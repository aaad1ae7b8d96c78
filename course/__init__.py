"""How a lesson runs, measures, makes load, prints, draws and reports.

The rooms: `lesson` (sections and the command line), `measure` (times and their
certainty), `machine` (what it was measured on), `request` (one request over HTTP),
`load` (many of them), `process` (child processes), `show` (the terminal), `draw`
(pictures), `report` (saved results and their page).

Importing any of them does nothing else and needs only the standard library: rich,
matplotlib and httpx are imported by the functions that use them, because production
imports this package too and has none of the three.
"""
