"""Containers on a real Docker engine.

The rooms: `engine` (a Docker engine: images, containers, an end for everything),
`layers` (what an image weighs and holds), `compose` (several containers from one
file), `dockerfile` (reads Dockerfiles and checks them).

Importing any of them does nothing else. docker-py is imported when an engine is asked
for: who has none can still read and check.
"""
