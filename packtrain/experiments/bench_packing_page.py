"""The page of the packing benchmark: tables of what `bench_packing` found."""

from __future__ import annotations

from collections.abc import Iterator

from packtrain.training.summary import name_machine


def markdown(found: dict) -> str:
    """results/packing/README.md from the contents of bench.json."""
    lines = ["# Packing", ""]
    if found["packers"]:
        lines += [*_packers([row for part in found["packers"].values() for row in part["rows"]]), ""]
    if found["balance"]:
        lines += [*_balance([row for part in found["balance"].values() for row in part["rows"]]), ""]
    if path := found.get("data_path"):
        lines += [
            "## Data path",
            "",
            f"Fetch and collate {path['documents']} documents ({path['tokens']:,.0f} tokens): {path['fetch_us']:,.0f} us;",
            f"row by row with DataCollatorWithFlattening {path['flattening_us']:,.0f} us: {path['fetch_ratio']:.1f}x.",
            f"A plan of 100,000 rows: {path['plan_s'] * 1e3:,.1f} ms; `trl.pack_dataset` (bfd) of the same rows",
            f"{path['trl_s']:,.2f} s: {path['plan_ratio']:.0f}x.",
            "",
        ]
    if scale := found.get("billion"):
        lines += [*_scale(scale), ""]
    return "\n".join(lines + list(_commands(found))) + "\n"


def _packers(rows: list[dict]) -> Iterator[str]:
    yield "One epoch into packs. *Above the bound*: over the fewest packs that `optimal` proves possible. *Ids*: ours"
    yield "answers with patterns, from which an update's packs are computed; writing all ids down takes this much more."
    yield "With numba installed `bfd` is compiled from 8,192 distinct lengths on (long_1m); the row *compiled* always is."
    yield "TRL's time is that of `pack_dataset`, on rows whose tokens are nulls, so that it has none to copy; it was"
    yield "not asked for long_1m, which keeps it for many minutes. Ratios count our ids, as all others write theirs down; in"
    yield "brackets without."
    yield "gsm8k: the `lengths.npy` that `packtrain plan recipes/gsm8k_local.yaml` leaves in the cache."
    yield ""
    yield "| data | packer | ms | ids, ms | packs | above the bound |"
    yield "|---|---|---:|---:|---:|---:|"
    for row in rows:
        ids = f"{row['listing_seconds'] * 1e3:,.1f}" if "listing_seconds" in row else ""
        yield (
            f"| {row['data']} | {row['packer']} | {row['seconds'] * 1e3:,.1f} | {ids} | {row['packs']:,} | "
            f"{row['gap']:.3%} |"
        )
    yield ""
    for data in dict.fromkeys(row["data"] for row in rows):
        own = {row["packer"]: row for row in rows if row["data"] == data}
        peers = [name for name in own if not name.startswith("packtrain")]
        parts = [
            f"{ours.removeprefix('packtrain ')} {_times(own[peer], own[ours])} as fast as {peer}"
            for peer in peers
            for ours in ("packtrain bfd", "packtrain bfd, compiled")
            if ours in own
        ]
        if peers:
            fewest = min(own[peer]["packs"] for peer in peers)
            more = own["packtrain optimal"]["packs"] - fewest
            yield f"- {data}: {'; '.join(parts)}. `optimal` against the best peer: {more:+,} packs."


def _times(peer: dict, ours: dict) -> str:
    listed = ours["seconds"] + ours["listing_seconds"]
    return f"{peer['seconds'] / listed:,.1f}x ({peer['seconds'] / ours['seconds']:,.1f}x)"


def _balance(rows: list[dict]) -> Iterator[str]:
    yield "## Balance"
    yield ""
    yield "Mean rank / slowest rank of each micro-step (1 is perfect), accumulation in brackets; *step*: modelled time of a"
    yield "7B Llama whose ranks meet in every micro-step. *Spread*: how much the mean length of an update varies, over what"
    yield "random updates would (1 is the mix of a shuffle). *Possible*: no layout of these"
    yield "updates does better, as the longest document takes its time and the other ranks lack the memory for more work."
    yield ""
    yield "| data | strategy | ranks | tokens | attention | step | possible | examples per update | spread | dropped |"
    yield "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|"
    for row in rows:
        examples = "{:,} / {:,.0f} / {:,}".format(*row["examples_per_update"])
        shares = f"{row['tokens']:.3f} | {row['attention']:.3f} | {row['efficiency']:.4f} | {row['possible']:.4f}"
        yield (
            f"| {row['data']} | {row['strategy']} | {row['ranks']} ({row['accumulation']}) | {shares} | {examples} | "
            f"{row['spread']:.2f} | {row['dropped']} |"
        )


def _scale(found: dict) -> Iterator[str]:
    yield "## Scale"
    yield ""
    yield f"{found['examples']:,} lengths in a memory-mapped file of 16-bit integers, packs of 2,048 tokens:"
    yield f"{found['packs']:,} packs, {found['gap']:.3%} above the bound;"
    yield f"{found['updates']:,} updates of {found['world_size']} ranks."
    yield ""
    yield "| stage | seconds | peak memory so far, GiB |"
    yield "|---|---:|---:|"
    for stage, seconds in found["seconds"].items():
        yield f"| {stage} | {seconds:,.2f} | {found['peak_gib'][stage]:.2f} |"


def _commands(found: dict) -> Iterator[str]:
    parts = [*found["packers"].values(), *found["balance"].values(), found.get("data_path"), found.get("billion")]
    ran = {part["command"]: part for part in parts if part}
    for command, part in ran.items():
        machine, packages = part["machine"], part["packages"]
        yield f"    {command}"
        yield ""
        yield f"on {name_machine(machine)}; {', '.join(f'{name} {packages[name]}' for name in packages)}."
        yield ""
