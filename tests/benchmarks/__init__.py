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
    drill          faults on purpose: when somebody was due to hear, and did
    omission       what a closed loop does not see
    telemetry      what metrics, logs and traces cost a request
    drill          faults injected: when the alarm was due, and when it came
    lessons        all six lessons, and what they leave behind

Each prints its tables and ends with 0, whatever the figures are: a figure is no test.
All take `--quick` and `--json PATH`, and say in `--help` how long they run. None is
part of the tests, because a test must not depend on how busy the machine is.
"""

AFTER_LESSONS = 100  # their place in the report
