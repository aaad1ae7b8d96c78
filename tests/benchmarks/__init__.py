"""Benchmarks: one command each, from the repository's root.

    python -m tests.benchmarks.rows           the engine beside llama.cpp, by batch size
    python -m tests.benchmarks.http           the server beside llama-server
    python -m tests.benchmarks.overhead       what the API adds to the bare engine
    python -m tests.benchmarks.prefix         a prompt whose beginning is known
    python -m tests.benchmarks.overload       more requests than the server can answer
    python -m tests.benchmarks.interference   a long prompt among short gaps
    python -m tests.benchmarks.cold_start     what a cold start is made of, how small
    python -m tests.benchmarks.queue          messages a second, and in a storm of kills
    python -m tests.benchmarks.container      the API in its container, and without one
    python -m tests.benchmarks.exactness      the graph beside the weights' own numbers

Each prints its tables and ends with 0, whatever the figures are: a figure is no test.
All take `--quick` and `--json PATH`, and say in `--help` how long they run. None is
part of the tests, because a test must not depend on how busy the machine is.
"""

AFTER_LESSONS = 100  # their place in the report
