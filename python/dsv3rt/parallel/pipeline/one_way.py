"""1F1B, interleaved 1F1B (Megatron-LM, arXiv 2104.04473) and ZB-H1 (Zero Bubble, arXiv 2401.10241).

The three are one idea. Every rank first runs so many forwards, then a forward and a backward in turn, then the
backwards that are left. They differ in how many forwards come first, and in whether the backward is cut in two: then
the gradients of the weights lag behind by the rank's number, which costs no more memory than rank 0 of 1F1B holds.
"""

from __future__ import annotations

from collections import Counter

from dsv3rt.parallel.pipeline.action import Action, Op, Step


def num_rounds(num_ranks: int, num_micro_batches: int) -> int:
    """Micro-batches pass through a rank's stages in rounds of equal size, one stage after the other."""
    return max(1, num_micro_batches // num_ranks)


def table(kind: str, num_ranks: int, num_micro_batches: int, stages_per_rank: int) -> list[list[Step]]:
    """The steps of every rank; stage s stands on rank s % num_ranks."""
    round_size = num_micro_batches
    if stages_per_rank > 1:
        round_size //= num_rounds(num_ranks, num_micro_batches)
    total = stages_per_rank * num_micro_batches
    steps = []
    for rank in range(num_ranks):
        hops = num_ranks - 1 - rank  # a round trip to the last rank takes two ticks a hop
        lead = (stages_per_rank - 1) * round_size + (2 * hops if kind == "interleaved" else hops)
        walk = [local * num_ranks + rank for local in range(stages_per_rank) for _ in range(round_size)]
        forwards = _in_order("F", walk, total)
        if kind == "zb1p":
            inputs, weights = _in_order("I", walk[::-1], total), _in_order("W", walk[::-1], total)
            steps.append(_merge(forwards, inputs, weights, min(lead, total), lag=rank))
        else:
            steps.append(_merge(forwards, _in_order("B", walk[::-1], total), [], min(lead, total), lag=total))
    return steps


def _in_order(op: Op, walk: list[int], total: int) -> list[Action]:
    """The stages of `walk` over and over, each with its own running micro-batch."""
    counts: Counter[int] = Counter()
    actions = []
    for index in range(total):
        stage = walk[index % len(walk)]
        actions.append(Action(stage, op, counts[stage]))
        counts[stage] += 1
    return actions


def _merge(forwards: list[Action], backwards: list[Action], weights: list[Action], lead: int, lag: int) -> list[Step]:
    """`lead` forwards, then forward and backward in turn; weights follow `lag` backwards behind."""
    steps: list[Step] = list(forwards[:lead])
    for index, backward in enumerate(backwards):
        steps += forwards[lead + index : lead + index + 1]
        steps.append(backward)
        if index >= lag:
            steps += weights[index - lag : index - lag + 1]
    steps += weights[max(0, len(backwards) - lag) :]
    return steps
