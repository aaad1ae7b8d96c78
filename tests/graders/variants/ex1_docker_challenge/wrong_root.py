"""A container is a sandbox, so root inside does no harm."""

FAILS = {"runs_as_the_number"}


def dockerfile():
    return DOCKERFILE.replace("USER 20001:20001", "USER 0")
