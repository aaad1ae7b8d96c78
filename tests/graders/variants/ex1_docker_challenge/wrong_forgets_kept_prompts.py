"""Memory is peak plus rows: what is kept for reuse, and the quarter, are forgotten."""

FAILS = {
    "most_rows_fill_the_memory",
    "most_rows_refuse_too_little",
    "memory_is_bounded",
}


def most_rows(need, context, memory_bytes):
    left = memory_bytes - need.peak_bytes
    return round(left / (context * need.bytes_per_token))


def limits(need, rows, context, tokens_per_s, whole=limits):
    memory = need.peak_bytes + rows * context * need.bytes_per_token
    return {**whole(need, rows, context, tokens_per_s), "mem_limit": memory}
