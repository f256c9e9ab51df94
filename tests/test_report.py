"""The performance page says what the result files say; the figures in them are computed as they claim."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import provenance, report, shapes
from benchmarks.timing import Case, Peer, figures


def result(**line: Any) -> dict[str, Any]:
    """A slim pytest-benchmark file with two entries of one op."""
    first = {
        "op": "quantize_1x128", "shape": "4096x7168", "metric": "gbps", "value": 2805.4, "peer": "copy",
        "peer_value": 3010.0, "ratio": 0.9320, "commit": "0123456789ab", **line,
    }  # fmt: skip
    second = {**first, "shape": "4096x2048", "value": 24.68, "ratio": 0.5}
    return {
        "machine_info": {
            "device": "NVIDIA H100 80GB HBM3",
            "driver": "580.65.06",
            "torch": "2.13.0",
            "command": "pytest x",
        },
        "datetime": "2026-11-23T16:44:55.000000+00:00",
        "benchmarks": [{"name": "test_a", "extra_info": first}, {"name": "test_b", "extra_info": second}],
    }


def results_folder(folder: Path, content: dict[str, Any]) -> Path:
    (folder / "h100").mkdir()
    (folder / "h100" / "quant.json").write_text(json.dumps(content))
    return folder


def test_report_shows_every_line_and_where_it_came_from(tmp_path: Path) -> None:
    page = report.render(report.load(results_folder(tmp_path, result())))
    assert "## H100\n" in page
    assert "### quant\n" in page
    assert "NVIDIA H100 80GB HBM3, driver 580.65.06, torch 2.13.0, 2026-11-23, commit 0123456789ab." in page
    assert "Command: `pytest x`" in page
    assert "| quantize_1x128 | 4096x7168 | 2805 GB/s | copy | 3010 GB/s | 0.93 |" in page
    assert "| quantize_1x128 | 4096x2048 | 24.7 GB/s | copy | 3010 GB/s | 0.50 |" in page
    assert "quantize_1x128 over copy: geometric mean 0.68, lowest 0.50, of 2" in page
    assert "- `copy`: the same run's" in page


def test_report_says_where_a_suite_measures_otherwise(tmp_path: Path) -> None:
    folder = results_folder(tmp_path, result())
    assert report.NOTES["memory"] not in report.render(report.load(folder))
    (folder / "h100" / "quant.json").rename(folder / "h100" / "memory.json")
    assert f"\n{report.NOTES['memory']}\n\n| op |" in report.render(report.load(folder))


def test_report_without_results_claims_nothing(tmp_path: Path) -> None:
    page = report.render(report.load(tmp_path))
    assert "Nothing has been measured yet." in page
    assert "|" not in page


def test_report_rejects_a_line_that_is_no_evidence(tmp_path: Path) -> None:
    content = result()
    del content["benchmarks"][1]["extra_info"]["commit"]
    with pytest.raises(ValueError, match=r"quant\.json: test_b must have extra_info commit"):
        report.load(results_folder(tmp_path, content))


def test_report_notices_an_outdated_page(tmp_path: Path) -> None:
    results, page = results_folder(tmp_path, result()), tmp_path / "performance.md"
    assert not report.is_current(results, page)
    report.write(results, page)
    assert report.is_current(results, page)
    page.write_text(page.read_text() + "and twice as fast on Sundays\n")
    assert not report.is_current(results, page)


def test_performance_page_is_what_the_results_say() -> None:
    assert report.is_current(), "run `python -m benchmarks.report`"


@pytest.mark.parametrize(
    ("metric", "work", "value", "ratio"),
    [("tflops", 2e12, 1000.0, 2.0), ("gbps", 2e9, 1.0, 2.0), ("us", 0.0, 2000.0, 2.0)],
)
def test_figures_are_above_one_where_ours_is_faster(metric: Any, work: float, value: float, ratio: float) -> None:
    line = figures(Case("op", "shape", metric, work), 0.002, Peer("copy", lambda: None), 0.004)
    assert line["value"] == pytest.approx(value * (1000 if metric == "gbps" else 1))
    assert line["ratio"] == ratio


def test_figures_use_the_work_of_the_peer() -> None:
    line = figures(Case("op", "shape", "gbps", 1e9), 1.0, Peer("copy", lambda: None, work=4e9), 2.0)
    assert (line["value"], line["peer_value"], line["ratio"]) == (1.0, 2.0, 0.5)


@pytest.mark.parametrize(
    ("device", "folder"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA GeForce RTX 4090", "geforce-rtx-4090"),
    ],
)
def test_folder_of_names_the_gpu_model(device: str, folder: str) -> None:
    assert provenance.folder_of(device) == folder


def test_shapes_count_the_work_that_published_figures_count() -> None:
    """FlashMLA's 128 x 1 x 4096 x 128 row: 0.256 ms is 571 TFLOPS and 2500 GB/s."""
    decode = shapes.DECODES[0]
    assert decode.flops / 0.256e-3 / 1e12 == pytest.approx(571, rel=0.01)
    assert decode.num_bytes / 0.256e-3 / 1e9 == pytest.approx(2500, rel=0.01)
    assert len(shapes.GEMMS) == 13
    assert shapes.ATTENTIONS[0].forward_flops == 2 * 128 * 4096 * 4096 * (192 + 128) // 2
