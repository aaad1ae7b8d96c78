"""A fleet of replicas: what balances it, scales it, queues for it, and predicts it.

The rooms of prediction: `policies` (what a policy sees and must answer), `traffic`
(when requests come and how long each takes), `simulator` (a fleet in virtual time),
`theory` (what is known without simulating), `planning` (what a fleet costs, and the
cheapest that keeps a promise), `releases` (who meets a new version, and whether it is
worse), `kubernetes` (manifests from the same policies), `manifest_checks` (what is
wrong with them), `deployment` (all files of `deploy/` that follow from them).

The rooms of machinery: `balancer` (what every balancer can do), `haproxy` and `proxy`
(two that do), `replicas` (processes that come, fail and leave), `standin` (a replica
that waits instead of computing), `loop` (scales by a policy), `regions` (failover and
burst between places), `ray_serve` (the model on a cluster that loses a node; optional).

The rooms of waiting: `jobs` (what a queue can do, and SQLite's), `redis_jobs` (the same
in Redis), `worker` (lease, do, acknowledge), `model_worker` (one with the model, as it
is deployed), `jobs_api` (`/v1/jobs`).

The rooms of reuse: `cache` (exact answers), `ring` (prefix routing), `semantic` (nearly
the same question, and why not).

The lesson's trials: `day` (a simulated one, and its costs), `trials` (balancing, a
stall, a live fleet, two regions), `shapes` (the model, large or many), `peak` (a peak
with and without a queue), `reuse` (the caches, measured), `omission` (the stall
itself).

Importing any of them starts nothing.
"""
