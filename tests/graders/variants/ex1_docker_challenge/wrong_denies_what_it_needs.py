"""Deny all, then allow the program; its packages and its lock are forgotten."""

FAILS = {"ignore_lets_in"}


def dockerignore():
    return "*\n!model_api.py\n"
