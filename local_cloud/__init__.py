"""The machinery a cloud would run for you, on this machine and on loopback.

One folder a lesson: `containers` (a Docker engine, images, Compose), `functions` (a
FaaS platform: runtime API, sandboxes, snapshots, queues, events), `fireworks` (a
stand-in of the Fireworks API), `scaling` (balancer, replicas, job queues, caches),
`monitoring` (Prometheus, alarms, dashboards, and faults on purpose). `passing` is what
the two of them that pass requests on have in common.

Importing any of them starts nothing.
"""
