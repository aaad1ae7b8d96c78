"""Exercises to solve, checked on your machine.

    python -m exercises list          what there is, and how far you are
    python -m exercises watch 1       check again whenever you save

The rooms: `catalogue` (which there are), `runner` (grades a file in a process of its
own), `results` (what came of it, as data), `exporters` (the same for other systems),
`progress` (what you reached, and backups), `watch`, `doctor` (what this machine has),
`starter` (makes the files you begin with), `tryout` (runs one by itself),
`unknown_server` and `expenses` (what exercises 2 and 4 are tried on).
"""
