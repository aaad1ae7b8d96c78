"""The key is needed at run time, so it goes into the image; latest is the best tag."""

FAILS = {"builds_anywhere_tomorrow"}


def dockerfile():
    text = DOCKERFILE.replace("PORT=9000", "PORT=9000 API_KEY=sk-1234")
    return text.replace("python:3.11-slim-bookworm", "python:latest")
