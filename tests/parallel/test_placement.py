"""Who holds what: balanced stages, shares that cover every parameter once, groups that all ranks agree on."""

from __future__ import annotations

import tomllib
from itertools import combinations, combinations_with_replacement, pairwise
from pathlib import Path

import pytest
from fleet import configuration

from dsv3rt import cli, presets
from dsv3rt.config import LayerCosts, ParallelConfig
from dsv3rt.model.flops import layer_costs, train_flops_per_token
from dsv3rt.parallel.build import outline, parameter_shapes
from dsv3rt.parallel.mesh import Mesh
from dsv3rt.parallel.placement import Layout, balanced, balanced_in_pairs, chunk
from dsv3rt.train import config_file

LAYOUTS = [
    ParallelConfig(),
    ParallelConfig(dp=4, ep=2),
    ParallelConfig(pp=4, dp=2, ep=2),
    ParallelConfig(pp=2, dp=4, ep=4, schedule="dualpipev"),
    ParallelConfig(pp=4, dp=2, ep=1, schedule="dualpipe"),
    ParallelConfig(pp=2, dp=3, schedule="interleaved"),
]


@pytest.mark.parametrize("parallel", LAYOUTS, ids=str)
def test_shares_cover_every_parameter_once(parallel: ParallelConfig) -> None:
    """The ranks' rows of each whole parameter are a partition; who names a group is in it, and all name the same."""
    config = configuration({"model": {"num_layers": 5}})
    layout = Layout(config.model, parallel, config.train.seq_len)
    shapes = parameter_shapes(config.model)
    rows: dict[str, list[int]] = {name: [] for name in shapes}
    groups = layout.share_groups(shapes)
    for rank in range(parallel.num_processes):
        mesh = Mesh(parallel, rank)
        for name, parameter in outline(layout, mesh.pp_rank, mesh.ep_rank).named_parameters():
            share = layout.share(name, shapes[name], rank)
            assert rank in share.ranks
            assert share.ranks in groups
            assert share.rows.stop <= parameter.shape[0]
            rows[name] += range(share.first_row, share.first_row + share.rows.stop - share.rows.start)
    for name, shape in shapes.items():
        assert sorted(rows[name]) == list(range(shape[0])), name


def test_balanced_is_the_best_cut() -> None:
    """Against all cuts, and a tail that fills the last stage by itself."""
    costs, tail, stages = (3, 1, 4, 1, 5, 9, 2), 6, 3
    found = balanced(costs, tail, stages)
    assert [layer for part in found for layer in part] == list(range(len(costs)))

    def worst(cuts: tuple[int, ...]) -> int:
        ends = (0, *cuts, len(costs))
        sums = [sum(costs[a:b]) for a, b in pairwise(ends)]
        return max(*sums[:-1], sums[-1] + tail)

    assert worst((found[0].stop, found[1].stop)) == min(
        worst(cuts) for cuts in combinations(sorted([*range(8), *range(8)]), 2)
    )
    assert balanced((1, 1), 10, 3) == (range(1), range(1, 2), range(2, 2))


@pytest.mark.parametrize("stages", [2, 4, 6])
def test_balanced_in_pairs_is_the_best_cut(stages: int) -> None:
    """Against all cuts: the costliest pair, then the squares of pairs and stages."""
    costs, tail = (3, 1, 4, 1, 5, 9, 2), 6
    found = balanced_in_pairs(costs, tail, stages)
    assert [layer for part in found for layer in part] == list(range(len(costs)))

    def worth(cuts: tuple[int, ...]) -> tuple[int, int]:
        sums = [sum(costs[a:b]) for a, b in pairwise((0, *cuts, len(costs)))]
        sums[-1] += tail
        pairs = [sums[i] + sums[-1 - i] for i in range(stages // 2)]
        return max(pairs), sum(x * x for x in (*sums, *pairs))

    assert worth(tuple(part.stop for part in found[:-1])) == min(
        worth(cuts) for cuts in combinations_with_replacement(range(8), stages - 1)
    )


def test_stages_go_by_the_costs_given() -> None:
    """Blocks before the dense ones' end cost `dense`; a costly head pushes blocks away from the last stage."""
    model = configuration({"model": {"num_layers": 8, "num_dense_layers": 4, "mtp_depth": 1}}).model

    def sizes(**costs: float) -> list[int]:
        parallel = ParallelConfig(pp=4, layer_costs=LayerCosts(**costs))
        return [len(part) for part in Layout(model, parallel, 32).stages]

    assert sizes(dense=1.0, moe=1.0, head=0.01, mtp=0.01) == [2, 2, 2, 2]
    assert sizes(dense=1.0, moe=3.0, head=0.01, mtp=0.01) == [3, 2, 2, 1]
    assert sizes(dense=1.0, moe=1.0, head=1.0, mtp=2.0) == [2, 3, 3, 0]


def test_plan_stages_measures_what_it_cuts_by(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The line that it prints, put into the configuration, gives the same stages."""
    path = tmp_path / "run.toml"
    path.write_text(config_file.to_toml(configuration({"train": {"micro_batch_size": 2}, "parallel": {"pp": 2}})))
    assert cli.main(["plan", "stages", str(path), "--measure"]) == 0
    first, *stages = capsys.readouterr().out.splitlines()
    key, _, value = first.partition(" = ")
    costs = tomllib.loads(first)["layer_costs"]
    assert set(costs) == {"dense", "moe", "head", "mtp"}
    assert cli.main(["plan", "stages", str(path), f"--parallel.{key}", value.partition("#")[0]]) == 0
    again = capsys.readouterr().out.splitlines()
    assert [line.split("%")[0][:-6] for line in again] == [line.split("%")[0][:-6] for line in stages]
    assert cli.main(["plan", "stages", str(path), "--parallel.layer_costs", "{dense = 0.0}"]) == 2


def test_deepseek_v3_in_a_v_leaves_rank_0_few_blocks() -> None:
    layout = Layout(presets.model("671b"), ParallelConfig(pp=16, dp=128, ep=64, schedule="dualpipev"), 4096)
    blocks = [sum(len(layout.stages[stage]) for stage in layout.stages_on(rank)) for rank in range(16)]
    assert sum(blocks) == 61
    assert blocks[0] == min(blocks) == 1
    assert max(blocks) == 4
    assert layout.stages_on(0) == (0, 31)


def test_layer_costs_sum_to_the_flops() -> None:
    config = presets.model("671b")
    costs = layer_costs(config, 4096)
    assert 6 * (sum(costs.layers) + costs.tail) == train_flops_per_token(config, 4096, with_mtp=True)


def test_chunk_is_torchs() -> None:
    for count in range(9):
        for parts in (1, 2, 3, 4):
            pieces = [chunk(count, parts, index) for index in range(parts)]
            assert [row for piece in pieces for row in range(count)[piece]] == list(range(count))


def test_neighbours_share_experts_and_pipelines_are_far_apart() -> None:
    parallel = ParallelConfig(pp=2, dp=4, ep=2)
    layout = Layout(configuration({}).model, parallel, 32)
    assert layout.expert_groups() == [(0, 1), (2, 3), (4, 5), (6, 7)]
    mesh = Mesh(parallel, 6)
    assert (mesh.pp_rank, mesh.dp_rank, mesh.ep_rank, mesh.pipeline_peer(0)) == (1, 2, 0, 2)
