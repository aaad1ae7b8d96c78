"""Slim base and flags are enough: compilers and spare files stay in the image.

It also checks its health with a command that always holds.
"""

FAILS = {
    "runs_without_build_tools",
    "beats_the_naive_image",
    "probe_notices_silence",
}


def dockerfile():
    heavy = "RUN gcc --version; head -c 80000000 /dev/zero > /cache\n"
    text = DOCKERFILE.replace("USER 20001", f"{heavy}USER 20001")
    probe = '["python", "-I", "-S", "/app/healthcheck.py"]'
    return text.replace(probe, '["python", "-c", "pass"]')
