"""ENTRYPOINT instead of CMD, its own probe in the image, files named one by one."""

PROBE = (
    "import urllib.request as u; "
    "u.urlopen('http://127.0.0.1:9000/health/ready', timeout=2)"
)


def dockerfile():
    text = DOCKERFILE.replace(
        'CMD ["python", "-m", "model_api"', 'ENTRYPOINT ["python", "-m", "model_api"'
    )
    text = text.replace("COPY deploy/healthcheck.py /app/\n", "")
    return text.replace(
        '["python", "-I", "-S", "/app/healthcheck.py"]', f'["python", "-c", "{PROBE}"]'
    )


def dockerignore():
    return """\
# nothing, but:
**
!/models/*.py
!/course/*.py
!/serving/**
!/deploy/rootfs.py
!/model_api.py
!/requirements-*.lock
**/__pycache__
"""
