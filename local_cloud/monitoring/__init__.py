"""What watches a service: Prometheus and Alertmanager, an edge that fails on demand.

Importing any of it starts nothing.
"""
