"""From scratch, like the course's smallest image; limits as text; rows by search."""


def dockerfile():
    head, _, tail = DOCKERFILE.partition("FROM base AS edge\n")
    fill = "FROM build AS rootfs\nRUN python rootfs.py fill /venv /rootfs\n\n"
    tail = tail.replace("COPY --from=build /venv /venv", "COPY --from=rootfs /rootfs /")
    return f"{head}{fill}FROM scratch AS edge\n{tail}"


def most_rows(need, context, memory_bytes):
    def fits(rows):
        full = (rows + need.kept_prompts) * context * need.bytes_per_token
        return need.peak_bytes * 1.25 + full <= memory_bytes

    if not fits(1):
        raise ValueError("no room")
    rows = 1
    while fits(rows + 1):
        rows += 1
    return rows


def limits(need, rows, context, tokens_per_s):
    tokens = (rows + need.kept_prompts) * context
    mebibytes = -(-(need.peak_bytes * 5 // 4 + tokens * need.bytes_per_token) // MIB)
    return dict(
        mem_limit=f"{mebibytes}m",
        memswap_limit=f"{mebibytes}m",
        nano_cpus=int(need.cpu_s_per_token * tokens_per_s * 1e9) + 1,
        pids_limit=3 * need.threads,
        read_only=True,
        tmpfs={"/tmp": ""},
        cap_drop=["all"],
        security_opt=["no-new-privileges:true"],
    )
