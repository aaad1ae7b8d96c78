"""Costs decide: the cheaper one is chosen, and the reason is that it is cheaper."""

FAILS = {"compare_chooses", "compare_gives_reasons"}


def compare(function, container, sizes, slo_s, whole=compare):
    from dataclasses import replace

    told = whole(function, container, sizes, slo_s)
    cheaper = min(told.usd_per_month, key=told.usd_per_month.get)
    return replace(told, choice=cheaper, reasons={f"the {cheaper} costs less"})
