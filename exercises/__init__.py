"""Exercises to solve, checked on your machine.

    python -m exercises list          what there is, and how far you are
    python -m exercises watch 1       check again whenever you save

The rooms: `catalogue` (which there are), `runner` (grades a file in a process of its
own), `results` (what came of it, as data), `exporters` (the same for other systems),
`progress` (what you reached, and backups), `watch`, `doctor` (what this machine has),
`starter` (makes the files you begin with), `tryout` (runs one by itself),
`unknown_server`, `expenses` and `load_shapes` (what exercises 2, 4 and 5 are tried on),
`locustfile` (load for any model API).
"""
