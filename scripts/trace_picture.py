"""Draw what scripts/trace_ranks.py wrote: ranks by computation and communication, coloured by kind of work.

    python scripts/trace_picture.py traces/rank-*.json.gz --out step.png [--from MS] [--to MS] [--title TEXT]

Prints for every rank how much of its communication lies under its own computation. On a GPU the times are the device's;
a kernel that waits for a peer counts as communication, as do receives, which are posted ahead.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from dsv3rt.parallel.pipeline.trace import BUCKETS, CARRIES, COMPUTES, EXCHANGES, MESSAGES, Bar, bars, load, overlap

COLORS = {
    "attention F": "#4c72b0", "attention B": "#9db4d8", "experts F": "#3a7d44", "experts B": "#93c29b",
    "weight gradients": "#dd8452", "head": "#8172b3", "other": "#bbbbbb", "dispatch": "#c44e52", "combine": "#e39a9c",
    "messages": "#333333", "buckets": "#c9a227",
}  # fmt: skip
INK = "#333333"
# Each rank's, by top and height: messages are thin, as most of their time is that of receives posted ahead.
LINES = {(0.0, 0.4): COMPUTES, (0.42, 0.34): (*EXCHANGES, BUCKETS), (0.78, 0.08): (MESSAGES,)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path, nargs="+", help="of one step, a file a rank")
    parser.add_argument("--out", type=Path, help="the PNG; without it only the numbers are printed")
    parser.add_argument("--from", type=float, default=0.0, dest="start", metavar="MS", help="of the picture")
    parser.add_argument("--to", type=float, dest="end", metavar="MS", help="of the picture (default: the step's end)")
    parser.add_argument("--title", default="")
    args = parser.parse_args()
    work = {name_of(path): bars(load(path)) for path in sorted(args.traces, key=lambda path: rank_of(path))}
    print("\n".join(table(work)))
    if args.out is not None:
        draw(work, args.out, (args.start, args.end), args.title)


def rank_of(path: Path) -> int:
    found = re.search(r"(\d+)", path.name)
    return int(found.group(1)) if found else -1


def name_of(path: Path) -> str:
    rank = rank_of(path)
    return path.name if rank < 0 else f"rank {rank}"


def table(work: Mapping[str, Sequence[Bar]]) -> list[str]:
    kinds = {"exchange": EXCHANGES, "messages": (MESSAGES,), "buckets": (BUCKETS,), "all": CARRIES}
    lines = ["in ms, and how much of each communication lies under computation"]
    lines.append("            step  computes" + "".join(f"{kind:>18}" for kind in kinds))
    for name, row in work.items():
        found = {kind: overlap(row, members) for kind, members in kinds.items()}
        cells = "".join(f"{one.carrying / 1e3:10.2f} {one.hidden:7.1%}" for one in found.values())
        lines.append(f"{name:8} {found['all'].length / 1e3:8.2f} {found['all'].computing / 1e3:9.2f}{cells}")
    return lines


def draw(work: Mapping[str, Sequence[Bar]], out: Path, window: tuple[float, float | None], title: str) -> None:
    from matplotlib.figure import Figure  # no pyplot: no global state, no display
    from matplotlib.patches import Patch

    first = min((bar.start for row in work.values() for bar in row), default=0.0)
    last = max((bar.end for row in work.values() for bar in row), default=0.0)
    figure = Figure(figsize=(14, 1.4 + 0.55 * len(work)), dpi=130, layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(work.values()):
        for (top, height), kinds in LINES.items():
            for kind in kinds:
                stretches = [((b.start - first) / 1e3, (b.end - b.start) / 1e3) for b in row if b.kind == kind]
                axes.broken_barh(stretches, (place + top, height), facecolors=COLORS[kind], linewidth=0)
    axes.set_xlim(window[0], (last - first) / 1e3 if window[1] is None else window[1])
    axes.set_ylim(len(work), -0.1)
    axes.set_yticks([place + 0.41 for place in range(len(work))], list(work))
    axes.tick_params(colors=INK, length=0)
    axes.set_xlabel(
        "ms; of each rank: computation, exchange of experts' rows and buckets, messages between stages", color=INK
    )
    axes.set_title(title, loc="left", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    used = {bar.kind for row in work.values() for bar in row}
    handles = [Patch(facecolor=COLORS[kind], label=kind) for kind in (*COMPUTES, *CARRIES) if kind in used]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False, labelcolor=INK)
    figure.savefig(out, format="png")


if __name__ == "__main__":
    main()
