# One API, two images from one recipe:
#
#   docker build --target runtime -t model-api:runtime .   slim Debian: has a shell
#   docker build -t model-api .                            from scratch: has none
#
# Every instruction is in the subset that all builders read: docker-py's, Compose's and
# BuildKit. Hence no RUN --mount, no COPY --chmod, no heredoc, no syntax line.
#
# What changes least comes first: the model (107 MB), the packages, then the code, so
# that a changed line of code builds and ships one small layer.
#
# Build arguments: BASE (the image to start from), REVISION (a commit, for the label),
# and pip's own PIP_INDEX_URL, PIP_FIND_LINKS and PIP_NO_INDEX. Without a network, put
# the wheels into wheelhouse/ and pass PIP_FIND_LINKS=/wheels PIP_NO_INDEX=1.

ARG BASE=python:3.11-slim-bookworm

# ## What every stage starts from
FROM ${BASE} AS base
LABEL course="hosting-and-deployment"
# The slim image ships the standard library without bytecode, and a container that is
# not root, or read-only, can never write it: each start would compile it all again.
# Pitfall: a clean small image starts twice as slowly. Cure: compile in the build.
# unchecked-hash: nobody edits a file in an image, so nobody need look whether one did.
RUN python -m compileall -q -j 0 --invalidation-mode unchecked-hash \
        -x '/(site-packages|test|idlelib|lib2to3|ensurepip|turtledemo)/' \
        /usr/local/lib/python3.11

# ## The model: its own stage, so that `docker build` alone is enough
FROM base AS model
ARG PIP_INDEX_URL PIP_FIND_LINKS PIP_NO_INDEX
WORKDIR /work
COPY requirements-build.lock wheelhouse* /wheels/
RUN pip install --no-cache-dir --no-deps --require-hashes --no-compile \
        --root-user-action=ignore -r /wheels/requirements-build.lock
# Only the files that build: a change of the engine must not build the model again.
COPY models/__init__.py models/__main__.py models/build.py models/errors.py \
     models/graph.py models/sampling.py models/text.py models/weights.py models/
RUN MODEL_DIR=/model python -m models && rm -f /model/.lock

# ## The packages: locked, hashed, without what never serves, compiled
FROM base AS build
ARG PIP_INDEX_URL PIP_FIND_LINKS PIP_NO_INDEX
WORKDIR /work
COPY requirements-serve.lock wheelhouse* /wheels/
# --no-deps: the lock is complete, and leaves out what tokenizers asks for to fetch
# files from a hub (20 MB), which nothing here does.
RUN python -m venv --without-pip /venv \
 && pip --python /venv/bin/python install --no-cache-dir --no-deps --require-hashes \
        --no-compile -r /wheels/requirements-serve.lock
COPY deploy/rootfs.py /work/
RUN python rootfs.py prune /venv \
 && /venv/bin/python -m compileall -q -j 0 --invalidation-mode unchecked-hash \
        /venv/lib

# ## The code, gathered so that both targets get it as one layer
# Not compiled: that would save each start less than 0.1 s, and cost each build 0.5 s.
FROM scratch AS code
LABEL course="hosting-and-deployment"
COPY deploy/healthcheck.py /app/
COPY course /app/course
COPY models /app/models
COPY serving /app/serving
COPY model_api.py /app/

# ## Target runtime: small Debian, for those who want a shell at hand
FROM base AS runtime
RUN groupadd --gid 10001 app \
 && useradd --uid 10001 --gid app --no-create-home --home-dir /app \
        --shell /usr/sbin/nologin app
COPY --from=model /model /model
COPY --from=build /venv /venv
WORKDIR /app
# ORT_DISABLE_TELEMETRY: onnxruntime would report its use and write a database.
ENV PATH=/venv/bin:/usr/local/bin:/usr/bin:/bin \
    MODEL_DIR=/model \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    ORT_DISABLE_TELEMETRY=1
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
# A raw socket, no HTTP library: it runs every two seconds for as long as we serve.
HEALTHCHECK --interval=2s --timeout=2s --start-period=60s --retries=3 \
    CMD ["python", "-I", "-S", "/app/healthcheck.py"]
# Exec form: Python is process 1 and gets SIGTERM itself. A shell would swallow it.
CMD ["python", "-m", "model_api", "--serve", "--host", "0.0.0.0", "--port", "8000"]
ARG REVISION=unknown
LABEL org.opencontainers.image.title="model-api" \
      org.opencontainers.image.description="SmolLM2-135M behind an OpenAI API" \
      org.opencontainers.image.licenses="MIT AND Apache-2.0" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=code /app /app

# ## What a system needs to run this one program
FROM build AS rootfs
RUN python rootfs.py fill /venv /rootfs

# ## Target distroless: the same from scratch; no shell, no package manager
FROM scratch AS distroless
COPY --from=model /model /model
COPY --from=rootfs /rootfs /
WORKDIR /app
ENV PATH=/venv/bin:/usr/local/bin \
    LANG=C.UTF-8 \
    SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt \
    MODEL_DIR=/model \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    ORT_DISABLE_TELEMETRY=1
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=2s --timeout=2s --start-period=60s --retries=3 \
    CMD ["python", "-I", "-S", "/app/healthcheck.py"]
CMD ["python", "-m", "model_api", "--serve", "--host", "0.0.0.0", "--port", "8000"]
ARG REVISION=unknown
LABEL course="hosting-and-deployment" \
      org.opencontainers.image.title="model-api" \
      org.opencontainers.image.description="SmolLM2-135M behind an OpenAI API" \
      org.opencontainers.image.licenses="MIT AND Apache-2.0" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=code /app /app
