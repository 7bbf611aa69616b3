"""What a result of the GPU suite says: what failed, a table per shape, and the targets met or missed."""

from __future__ import annotations


def targets(record: dict) -> list[tuple[str, float, float]]:
    """(what, measured, at most), of the shapes that were measured."""
    found = []
    for shape in record["shapes"]:
        groups = {name: {row["name"]: row for row in group["rows"]} for name, group in shape.get("groups", {}).items()}
        name = f"({shape['N']}, {shape['V']}, {shape['H']}) {shape['dtype']}"
        forward, step = groups.get("forward", {}), groups.get("step", {})
        if "fastdpo" in forward:
            found.append((f"{name}: forward over torch.mm", forward["fastdpo"]["over unit"], 1.10))
        logits = groups.get("logits", {})
        for part, unit in (("forward", "copy of half"), ("backward", "copy")):
            if f"fastdpo, {part}" in logits and unit in logits:
                ratio = logits[f"fastdpo, {part}"]["median"] / logits[unit]["median"]
                found.append((f"{name}: logits to logps, {part}, over a {unit}", ratio, 1.10))
        for kernel, (took, _) in shape.get("loss kernels", {}).items():
            found.append((f"{name}: microseconds of {kernel}, 64 sequences", took * 1e3, 15))
        routing = [row["ms"] for row in shape.get("kernels", {}).get("routed", []) if row["kernel"].startswith("list_")]
        if "torch.mm" in forward and routing and None not in routing:
            found.append((f"{name}: routing over torch.mm", sum(routing) / forward["torch.mm"]["median"], 0.03))
        if "fastdpo routed" not in step or "fastdpo exact" not in step:
            continue
        routed, exact = step["fastdpo routed"], step["fastdpo exact"]
        found.append((f"{name}: routed step over two torch.mm", routed["over unit"], 1.25))
        peers = [row for key, row in step.items() if not key.startswith("fastdpo") and key != "two torch.mm"]
        if peers:
            fastest = min(peers, key=lambda row: row["median"])
            found.append((f"{name}: exact step over {fastest['name']}", exact["median"] / fastest["median"], 1.0))
            found.append((f"{name}: routed step over {fastest['name']}", routed["median"] / fastest["median"], 1.0))
        for row in (routed, exact):
            if row["extra_mib"] is not None:
                limit = 128 + shape["N"] * 256 / 2**20
                found.append((f"{name}: MiB beyond inputs and gradients, {row['name']}", row["extra_mib"], limit))
    return found


def summary(record: dict) -> str:
    lines = [record["title"], f"{record['device']['name']}, {record['date']}, commit {record['commit']}"]
    for name, stage in record["stages"].items():
        why = (stage.get("why") or "").strip().splitlines()
        lines.append(f"{name:12} {stage['state']}{': ' + why[-1][:300] if why else ''}")
    lines += [f"{name}: {record[name]}" for name in ("tests", "ceilings", "sanitizers", "compile") if name in record]
    for shape in record["shapes"]:
        lines += ["", *_of_shape(shape)]
    lines.append("")
    for name in ("forwards", "tune"):
        lines += [f"{name}:", *(f"  {line}" for line in record[name])] if name in record else []
    for what, value, limit in [] if record["device"]["name"] == "none" else targets(record):
        lines.append(f"{'ok  ' if value <= limit else 'MISS'} {what}: {value:.3f} (at most {limit:.2f})")
    return "\n".join(lines)


def _of_shape(shape: dict) -> list[str]:
    lines = [f"(N, V, H) = ({shape['N']}, {shape['V']}, {shape['H']}), {shape['dtype']}"]
    for what, failure in shape["failed"].items():
        lines.append(f"  FAILED {what}: {failure['why']}")
    for what, (error, limit) in shape.get("errors", {}).items():
        lines.append(f"  {'ok   ' if error <= limit else 'WRONG'} {what}: {error:.3g} (at most {limit:g})")
    if "live blocks per token" in shape:
        lines.append(f"  live blocks per token (dhidden, dweight): {shape['live blocks per token']}")
    for name, group in shape["groups"].items():
        lines.append(f"  {name:34} {'ms':>9} {'over unit':>9} {'floor ms':>9} {'MiB':>8} {'launches':>8}")
        for row in group["rows"]:
            launches = next((f"{row[key]:.0f}" for key in ("launches", "launches counted") if row[key] is not None), "")
            floor = "" if row["floor ms"] is None else f"{row['floor ms']:.3f}"
            extra = "" if row["extra_mib"] is None else f"{row['extra_mib']:.0f}"
            times = f"{row['median']:9.3f} {row['over unit']:9.3f} {floor:>9}"
            lines.append(f"    {row['name']:32} {times} {extra:>8} {launches:>8}")
    for name, found in shape["first figures"].items():
        lines.append(f"  {name}, one run each (the group did not end)")
        lines += [f"    {contender:32} {took:9.3f}" for contender, took in found.items()]
    for backward, rows in shape.get("kernels", {}).items():
        lines.append(f"  kernels of a {backward} step{'ms':>26} {'floor ms':>9} {'launches':>8}")
        for row in rows:
            took = "" if row["ms"] is None else f"{row['ms']:.3f}"
            floor = f"{row['floor ms']:.3f}" if "floor ms" in row else ""
            lines.append(f"    {row['kernel']:32} {took:>9} {floor:>9} {row['launches']:8.0f}")
    left_out = {(name.partition("/")[2], why): None for name, why in shape["left out"].items()}
    return lines + [f"  left out: {name}: {why}" for name, why in left_out]
