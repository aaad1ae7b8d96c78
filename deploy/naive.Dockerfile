# A first Dockerfile: it works, and does nearly everything at a price. The baseline that
# exercise 1 beats. Build it from the repository's root:
#
#   docker build -f deploy/naive.Dockerfile -t model-api:naive .
#
# Most first Dockerfiles start from the full image (BASE=python:3.11), which adds about
# 1 GB. The slim one is the default here, so that all images compare on one system. What
# `COPY . .` takes is bounded by the .dockerignore beside this file, or by the root's,
# which allows less, where the builder is the classic one of `docker build`. Without
# either it would take .git, the virtual environment and every secret in the folder too.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}
LABEL course="hosting-and-deployment"
ARG PIP_INDEX_URL PIP_FIND_LINKS PIP_NO_INDEX
WORKDIR /app
COPY . .
RUN pip install -r requirements-serve.txt -r requirements-build.txt
RUN python -m models
EXPOSE 8000
CMD python model_api.py --serve --host 0.0.0.0
