"""8000 is where everybody serves: the probe asks where this container does not.

So it never becomes healthy.
"""

FAILS = {"serves_within_its_limits", "limits_hold_inside"}


def dockerfile():
    text = DOCKERFILE.replace("PORT=9000", "PORT=8000")
    return text.replace("--start-period=60s", "--start-period=1s")
