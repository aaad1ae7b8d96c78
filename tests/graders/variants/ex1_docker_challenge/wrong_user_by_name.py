"""A user is a name; and a shell in front does no harm."""

FAILS = {"runs_as_the_number", "starts_in_exec_form"}


def dockerfile():
    text = DOCKERFILE.replace("USER 20001:20001", "USER app")
    head, _, tail = text.partition('CMD ["python", "-m", "model_api"')
    code = tail.partition("\n")[2]
    return f"{head}CMD python -m model_api --serve --host 0.0.0.0 --port 9000\n{code}"
