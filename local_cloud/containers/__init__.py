"""Containers on a real Docker engine.

The rooms: `engine` (a Docker engine: images, containers, an end for everything),
`layers` (what an image weighs and holds), `ladder` (images beside each other),
`compose` (several containers from one file), `trials` (what is done to one that runs),
`dockerfile` (reads Dockerfiles and checks them), `packages` (what locks hold),
`scanners` (what other programs say of an image).

Importing any of them does nothing else. docker-py is imported when an engine is asked
for: who has none can still read and check.
"""
