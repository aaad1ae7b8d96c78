"""An ignore file lists what must stay out: .git, .env, the virtual environment."""

FAILS = {"ignore_keeps_out"}


def dockerignore():
    return ".git\n.venv\n.env\nsecrets\nmodels/build\n**/__pycache__\n"
