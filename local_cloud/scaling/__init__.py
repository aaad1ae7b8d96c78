"""A fleet of replicas: what balances it, scales it, queues for it, and predicts it.

The rooms of prediction: `policies` (what a policy sees and must answer), `traffic`
(when requests come and how long each takes), `simulator` (a fleet in virtual time),
`theory` (what is known without simulating), `kubernetes` (manifests from the same
policies), `manifest_checks` (what is wrong with them).

The rooms of machinery: `balancer` (what every balancer can do), `haproxy` and `proxy`
(two that do), `replicas` (processes that come, fail and leave), `standin` (a replica
that waits instead of computing), `loop` (scales by a policy), `regions` (failover and
burst between places).

Importing any of them starts nothing.
"""
