"""Benchmarks, from the repository's root: `python -m tests.benchmarks.<name>`.

    rows           the engine beside llama.cpp, by batch size
    http           the server beside llama-server
    overhead       what the API adds to the bare engine
    prefix         a prompt whose beginning is known
    overload       more requests than the server can answer
    interference   a long prompt among short gaps
    exactness      the graph beside the weights' own numbers
    container      the API in its container, and without one
    functions      what the functions platform adds, and whether its reports are true
    cold_start     what a cold start is made of, how small it gets
    queue          messages a second, and in a storm of kills
    constrained    answers forced into a form: valid, and at which speed
    simulator      the simulator beside the theory
    balancer       balancing policies, and replicas that die
    jobs           jobs a second on SQLite and Redis, and in a storm of kills
    cache          an exact cache, prefix routing, a semantic cache's false hits
    ray            the model on two nodes with Ray Serve, one of them killed (optional)
    omission       what a closed loop does not see
    telemetry      what metrics, logs and traces cost a request
    drill          faults injected: when the alarm was due, and when it came
    lessons        all six lessons, and what they leave behind
    watch          what a learner waits for from a save to its verdict
    learner        a learner's path: from a bundle to the first solved exercise

Each prints its tables and ends with 0, whatever the figures are: a figure is no test.
(`lessons` and `learner` end with 1 where a command failed or something is left behind,
`drill` and `telemetry` where a figure is beyond its bar.)
They take `--quick` and `--json PATH`, and say in `--help` how long they run; `watch`
and `learner` do neither. None is part of the tests, because a test must not depend on
how busy the machine is.
"""

AFTER_LESSONS = 100  # their place in the report
