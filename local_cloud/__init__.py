"""The machinery a cloud would run for you, on this machine and on loopback.

One folder a lesson: `containers` (a Docker engine, images, Compose) and `functions` (a
FaaS platform: runtime API, sandboxes, snapshots, queues, events).

Importing any of them starts nothing.
"""
