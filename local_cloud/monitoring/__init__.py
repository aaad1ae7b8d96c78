"""What watches a service: measures, promises, alarms, pictures, and faults to try them.

The rooms of measuring: `scrape` (what /metrics says, and two of them compared),
`names` (what others call it), `drift`, `energy`, `traces` and `logs`.

The rooms of promises: `objectives` (an SLO as data), `rule_groups` (rules as Prometheus
reads them), `rule_tests` and `mutants` (tests of rules, and wrong rules to test those),
`deployed` (all of it as files).

The rooms of alarms: `stack` (Prometheus and Alertmanager as child processes),
`receivers` (a webhook and a mailbox). Where Prometheus is not installed: `evaluator`
with `samples`, `promql`, `alerting` and `notify`.

The rooms of pictures: `panels` (a dashboard as a table), `live` (a page), `terminal`,
`grafana`.

The rooms of faults: `faults` (an edge that breaks on command), `leak`, `ground` (where
a drill takes place), `drill` (when the alarm was due, and when it came), `light_load`
(something to measure).

Importing any of them starts nothing.
"""
