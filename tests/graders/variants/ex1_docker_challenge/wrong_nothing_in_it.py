"""What is not in it cannot be wrong: a base alone is the smallest and safest image."""

FAILS = {
    "runs_as_the_number",
    "starts_in_exec_form",
    "has_a_healthcheck",
    "packages_before_code",
    "runs_without_build_tools",
    "starts_fast_and_quietly",
    "builds_anywhere_tomorrow",
    "ignore_lets_in",
    "beats_the_naive_image",
    "serves_within_its_limits",
    "limits_hold_inside",
    "probe_notices_silence",
}


def dockerfile():
    return "FROM python:3.11-slim-bookworm"


def dockerignore():
    return "*"
