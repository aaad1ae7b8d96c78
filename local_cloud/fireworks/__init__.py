"""A stand-in for the Fireworks API on loopback, for the real SDK.

It has two planes. The account's: `management` puts together its routes (of
`model_routes`, `deployment_routes`, `datasets`, `batch`, `metrics`), which share
`listing` and `uploads`, over one `state` with its `catalogue` and `deployments`. The
models': `inference` and its HTTP, `completions`, with `dialect` and `schema`. `plane`
is the seam between them, and below both lie `wire` (the SDK's own types), `clock`
(virtual time), `prices` and `faults` (bad days, on demand). `app` makes one app of all
and serves it.

On the client's side: `calls` (one call, read to its end), `asking` (attempts and
waits), `live` (what stands between a program and a bill), `traffic` (a day of calls),
`bills` (what it costs), `hybrid` (a local model beside the cloud), and `trials` (what
the lesson measures).

What it answers comes from the shared model. What it cannot have is emulated and says
so in its data: GPUs, regions, prices, boot times.

Importing any of them starts nothing.
"""
