"""8000 is where everybody serves: the probe asks where this container does not.

So it never becomes healthy; and an image that serves nobody may be small.
"""

FAILS = {
    "beats_the_naive_image",
    "serves_within_its_limits",
    "limits_hold_inside",
}


def dockerfile():
    text = DOCKERFILE.replace("PORT=9000", "PORT=8000")
    return text.replace("--start-period=60s", "--start-period=1s")
