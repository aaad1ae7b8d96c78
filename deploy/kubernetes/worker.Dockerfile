# The worker of keda.yaml: the API's image, and what the queue needs.
#
#   docker build --target runtime -t model-api:runtime .
#   docker build -f deploy/kubernetes/worker.Dockerfile -t model-worker:stable .
#
# What it may copy stands in worker.Dockerfile.dockerignore beside it, which BuildKit
# and docker-py read; the classic `docker build` reads the one in the root.

ARG API=model-api:runtime
FROM ${API}
ARG PIP_INDEX_URL PIP_FIND_LINKS PIP_NO_INDEX
USER 0
COPY deploy/kubernetes/worker-requirements.txt wheelhouse* /wheels/
RUN pip --python /venv/bin/python install --no-cache-dir --no-deps --require-hashes \
        --root-user-action=ignore -r /wheels/worker-requirements.txt
USER 10001:10001
COPY local_cloud /app/local_cloud
HEALTHCHECK NONE
CMD ["python", "-m", "local_cloud.scaling.model_worker", "redis://redis:6379/0"]
LABEL org.opencontainers.image.title="model-worker" \
      org.opencontainers.image.description="SmolLM2-135M at work on a queue of jobs"
