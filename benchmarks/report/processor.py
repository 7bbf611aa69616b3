"""Tables of what one processor's kernels take: batches of every size, cycles of each fold, threads."""

from __future__ import annotations

from benchmarks.report.markdown import table


def batches(record: dict) -> list[str]:
    header = ["H", "tokens", "default, ms", "exact, ms", "eager's, ms", "default / exact", "default / eager"]
    rows = []
    for row in record["rows"]:
        times = (f"{row[f'{path} ms']:.1f}" for path in ("default", "exact", "eager"))
        ratios = (f"{row[f'default / {path}']:.2f}" for path in ("exact", "eager"))
        rows.append([str(row["H"]), str(row["tokens"]), *times, *ratios])
    return table(header, rows)


def folds(record: dict) -> list[str]:
    cycles = {(row["isa"], row["fold"], row["logits"]): row["cycles"] for row in record["rows"]}
    isas, names = (list(dict.fromkeys(row[column] for row in record["rows"])) for column in ("isa", "fold"))
    places = {(isas[0], "cached"): f"{isas[0]}, cached", **{(isa, "tile"): isa for isa in isas}}
    rows = []
    for name in names:
        of_fold = (cycles.get((isa, name, place)) for isa, place in places)
        rows.append([name, *("" if found is None else f"{found:.2f}" for found in of_fold)])
    return table(["cycles per logit", *places.values()], rows)


def threads(record: dict) -> list[str]:
    header = ["backward", "threads", "barriers", "busy"]
    rows = [[r["backward"], str(r["threads"]), str(r["barriers"]), f"{r['busy']:.2f}"] for r in record["rows"]]
    return table(header, rows)
