"""It works, so it is a Dockerfile: one stage, everything copied, then installed."""

FAILS = {
    "runs_as_the_number",
    "starts_in_exec_form",
    "has_a_healthcheck",
    "packages_before_code",
    "runs_without_build_tools",
    "starts_fast_and_quietly",
}


def dockerfile():
    return """\
FROM python:3.11-slim-bookworm
WORKDIR /app
COPY . .
RUN pip install -r requirements-serve.txt -r requirements-build.txt
RUN python -m models
CMD python model_api.py --serve --host 0.0.0.0
"""
