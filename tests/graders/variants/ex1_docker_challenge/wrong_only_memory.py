"""Only memory kills: CPU, processes and rights can stay as they are. And swap helps."""

FAILS = {
    "memory_is_bounded",
    "cpu_and_processes_are_bounded",
    "may_do_nothing_else",
    "limits_hold_inside",
}


def limits(need, rows, context, tokens_per_s, whole=limits):
    memory = whole(need, rows, context, tokens_per_s)["mem_limit"]
    return {"mem_limit": memory, "memswap_limit": 2 * memory}
