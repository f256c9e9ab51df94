"""The house keeps to docs/architecture.md, and every rule is shown to be able to fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

import architecture_rules as rules
from architecture_rules import Source

ROOT = Path(__file__).resolve().parent.parent
Rule = Callable[[Source], Iterator[str]]

PACKAGE_RULES: list[Rule] = [
    rules.flows_left_to_right,
    rules.only_ops_cuda_and_doctor_import_the_extension,
    rules.no_torch_distributed_in_layers_and_model,
    rules.environment_is_read_in_one_place,
    rules.no_mutable_class_state,
    rules.no_mutable_module_state,
]
PYTHON_RULES: list[Rule] = [
    rules.no_swallowed_exceptions,
    rules.file_within_budget,
    rules.functions_within_budget,
    rules.parameters_within_budget,
]
CSRC_RULES: list[Rule] = [rules.no_torch_in_csrc, rules.ptx_only_in_hopper, rules.file_within_budget]


@cache
def package_sources() -> list[Source]:
    return [Source.read(ROOT, file) for file in sorted((ROOT / "python").rglob("*.py"))]


@cache
def python_sources() -> list[Source]:
    folders = ("tests", "benchmarks", "scripts", "examples")
    others = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    return package_sources() + [Source.read(ROOT, file) for file in others]


@cache
def csrc_sources() -> list[Source]:
    files = sorted((ROOT / "csrc").rglob("*"))
    return [Source.read(ROOT, file) for file in files if file.suffix in rules.CSRC_SUFFIXES]


def csrc_rooms() -> set[str]:
    return {room for source in csrc_sources() if (room := rules.csrc_room(source.path))} - rules.SHARED_CSRC_ROOMS


def require(rule: Rule, sources: list[Source]) -> None:
    broken = [line for source in sources for line in rule(source)]
    if broken:
        pytest.fail("\n".join(broken), pytrace=False)


def name_of(rule: object) -> str:
    return getattr(rule, "__name__", "")


def names_of(cases: list[tuple[Rule, str, str]]) -> list[str]:
    return [f"{name_of(rule)}-{path}-{number}" for number, (rule, path, _) in enumerate(cases)]


@pytest.mark.parametrize("rule", PACKAGE_RULES, ids=name_of)
def test_package_obeys(rule: Rule) -> None:
    assert package_sources()
    require(rule, package_sources())


@pytest.mark.parametrize("rule", PYTHON_RULES, ids=name_of)
def test_python_obeys(rule: Rule) -> None:
    require(rule, python_sources())


@pytest.mark.parametrize("rule", CSRC_RULES, ids=name_of)
def test_csrc_obeys(rule: Rule) -> None:
    require(rule, csrc_sources())


def test_csrc_rooms_stay_apart() -> None:
    require(lambda source: rules.rooms_stay_apart(source, csrc_rooms()), csrc_sources())


# Each rule can fail: snippets that it must find, and neighbours that it must leave alone.

BAD: list[tuple[Rule, str, str]] = [
    (rules.flows_left_to_right, "ops/x.py", "from dsv3rt.layers import linear"),
    (rules.flows_left_to_right, "ops/x.py", "from ..model import block"),
    (rules.flows_left_to_right, "ops/__init__.py", "from ..model import block"),
    (rules.flows_left_to_right, "layers/x.py", "def f():\n    from dsv3rt.train.trainer import Trainer"),
    (rules.flows_left_to_right, "infer/x.py", "import dsv3rt.train"),
    (rules.flows_left_to_right, "train/x.py", "from dsv3rt.infer import sampling"),
    (rules.flows_left_to_right, "config.py", "from dsv3rt import ops"),
    (rules.flows_left_to_right, "model/x.py", "from dsv3rt import Transformer"),
    (rules.flows_left_to_right, "ops/x.py", "import importlib\nimportlib.import_module('dsv3rt.layers')"),
    (rules.flows_left_to_right, "attic/x.py", "import torch"),
    (rules.only_ops_cuda_and_doctor_import_the_extension, "ops/x.py", "from dsv3rt import _C"),
    (rules.only_ops_cuda_and_doctor_import_the_extension, "layers/x.py", "from .._C import quantize"),
    (rules.only_ops_cuda_and_doctor_import_the_extension, "layers/x.py", "import dsv3rt._C as kernels"),
    (rules.no_torch_distributed_in_layers_and_model, "layers/x.py", "import torch.distributed as dist"),
    (rules.no_torch_distributed_in_layers_and_model, "model/x.py", "from torch import distributed"),
    (rules.no_torch_distributed_in_layers_and_model, "model/x.py", "import torch\ntorch.distributed.get_rank()"),
    (rules.environment_is_read_in_one_place, "ops/x.py", "import os\nos.environ['A']"),
    (rules.environment_is_read_in_one_place, "ops/x.py", "import os\nos.getenv('A')"),
    (rules.environment_is_read_in_one_place, "ops/x.py", "from os import environ"),
    (rules.no_mutable_class_state, "ops/x.py", "class A:\n    seen = []"),
    (rules.no_mutable_class_state, "ops/x.py", "class A:\n    seen: dict[str, int] = dict()"),
    (rules.no_mutable_class_state, "ops/x.py", "class A:\n    n = 0\n    def f(self):\n        A.n += 1"),
    (rules.no_mutable_class_state, "ops/x.py", "class A:\n    @classmethod\n    def f(cls):\n        cls.n = 1"),
    (rules.no_mutable_module_state, "ops/x.py", "CACHE = {}\ndef f(k):\n    CACHE[k] = 1"),
    (rules.no_mutable_module_state, "ops/x.py", "CACHE: list = []\ndef f(k):\n    CACHE.append(k)"),
    (rules.no_mutable_module_state, "ops/x.py", "CACHE = {}\ndef f(k):\n    del CACHE[k]['a']"),
    (rules.no_mutable_module_state, "ops/x.py", "n = 0\ndef f():\n    global n\n    n = 1"),
    (rules.no_swallowed_exceptions, "ops/x.py", "try:\n    f()\nexcept ImportError:\n    pass"),
    (rules.no_swallowed_exceptions, "ops/x.py", "try:\n    f()\nexcept Exception:\n    ..."),
    (rules.file_within_budget, "ops/x.py", "x = 1\n" * 401),
    (rules.functions_within_budget, "ops/x.py", "def f():\n" + "    x = 1\n" * 60),
    (rules.parameters_within_budget, "ops/x.py", "def f(a, b, c, d, e, f, *, g, h, i): ..."),
    (rules.parameters_within_budget, "ops/x.py", "class A:\n    def __init__(self, a, b, c, d, e, f, g, h, i): ..."),
]

GOOD: list[tuple[Rule, str, str]] = [
    (rules.flows_left_to_right, "layers/x.py", "from dsv3rt import ops\nfrom dsv3rt.config import ModelConfig"),
    (rules.flows_left_to_right, "presets.py", "from .config import ModelConfig"),
    (rules.flows_left_to_right, "ops/__init__.py", "from . import reference\nfrom .types import QuantTensor"),
    (rules.flows_left_to_right, "__init__.py", "from dsv3rt.train import Trainer\nfrom .config import ModelConfig"),
    (rules.flows_left_to_right, "cli.py", "from dsv3rt import Transformer, doctor"),
    (rules.only_ops_cuda_and_doctor_import_the_extension, "ops/cuda/quant.py", "from dsv3rt import _C"),
    (rules.only_ops_cuda_and_doctor_import_the_extension, "doctor.py", "import_module('dsv3rt._C')"),
    (rules.no_torch_distributed_in_layers_and_model, "train/x.py", "import torch.distributed"),
    (rules.environment_is_read_in_one_place, "env.py", "import os\nos.environ['A']"),
    (
        rules.no_mutable_class_state,
        "ops/x.py",
        "class A:\n    names = ('a',)\n    x: list = field(default_factory=list)",
    ),
    (rules.no_mutable_module_state, "ops/x.py", "TABLE = {'a': 1}\ndef f(k):\n    return TABLE[k]"),
    (rules.no_mutable_module_state, "ops/x.py", "rows = []\ndef f():\n    rows = []\n    rows.append(1)"),
    (rules.no_swallowed_exceptions, "ops/x.py", "try:\n    f()\nexcept ImportError as e:\n    raise ValueError from e"),
    (rules.functions_within_budget, "ops/x.py", 'def f():\n    """' + "\n" * 80 + '"""\n' + "    x = 1\n" * 59),
    (rules.parameters_within_budget, "ops/x.py", "class A:\n    def f(self, a, b, c, d, e, f, g, h, **rest): ..."),
    (
        rules.parameters_within_budget,
        "ops/x.py",
        "@dataclass\nclass A:\n    def __init__(self, a, b, c, d, e, f, g, h, i): ...",
    ),
]

BAD_CSRC: list[tuple[Rule, str, str]] = [
    (rules.no_torch_in_csrc, "bindings.cpp", "#include <torch/extension.h>"),
    (rules.no_torch_in_csrc, "quant/launch.cu", '  # include "ATen/ATen.h"'),
    (rules.ptx_only_in_hopper, "quant/sm90_x.cuh", 'asm volatile("fence;");'),
    (rules.ptx_only_in_hopper, "common/math.h", "__asm__(PTX);"),
    (rules.file_within_budget, "quant/sm90_x.cuh", "\n" * 501),
    (rules.file_within_budget, "quant/params.h", "\n" * 401),
]

GOOD_CSRC: list[tuple[Rule, str, str]] = [
    (rules.no_torch_in_csrc, "bindings.cpp", "// #include <torch/extension.h>\n#include <pybind11/pybind11.h>"),
    (rules.ptx_only_in_hopper, "hopper/tma.cuh", 'asm volatile("fence;");'),
    (rules.ptx_only_in_hopper, "quant/sm90_x.cuh", '/* asm */ // asm\nauto s = "asm";'),
    (rules.file_within_budget, "quant/sm90_x.cuh", "\n" * 500),
]

BAD_INCLUDES = [
    ("quant/launch.cu", '#include "../gemm/params.h"'),
    ("quant/instances/a.cu", '#include "../../gemm/params.h"'),
    ("quant/launch.cu", '#include "gemm/params.h"'),
    ("hopper/tma.cuh", '#include "quant/params.h"'),
    ("common/check.h", '#include "csrc/quant/params.h"'),
]

GOOD_INCLUDES = [
    (
        "quant/launch.cu",
        '#include "../common/check.h"\n#include "hopper/tma.cuh"\n#include "quant/params.h"\n#include "params.h"',
    ),
    ("bindings.cpp", '#include "quant/params.h"'),
    ("quant/instances/a.cu", '#include "../params.h"\n#include <gemm>'),
]


def package_source(path: str, text: str) -> Source:
    return Source(f"python/dsv3rt/{path}", text)


@pytest.mark.parametrize(("rule", "path", "text"), BAD, ids=names_of(BAD))
def test_rule_finds(rule: Rule, path: str, text: str) -> None:
    assert list(rule(package_source(path, text)))


@pytest.mark.parametrize(("rule", "path", "text"), GOOD, ids=names_of(GOOD))
def test_rule_allows(rule: Rule, path: str, text: str) -> None:
    assert not list(rule(package_source(path, text)))


@pytest.mark.parametrize(("rule", "path", "text"), BAD_CSRC, ids=names_of(BAD_CSRC))
def test_csrc_rule_finds(rule: Rule, path: str, text: str) -> None:
    assert list(rule(Source(f"csrc/{path}", text)))


@pytest.mark.parametrize(("rule", "path", "text"), GOOD_CSRC, ids=names_of(GOOD_CSRC))
def test_csrc_rule_allows(rule: Rule, path: str, text: str) -> None:
    assert not list(rule(Source(f"csrc/{path}", text)))


@pytest.mark.parametrize(("path", "text"), BAD_INCLUDES, ids=[path for path, _ in BAD_INCLUDES])
def test_rooms_stay_apart_finds(path: str, text: str) -> None:
    assert list(rules.rooms_stay_apart(Source(f"csrc/{path}", text), {"quant", "gemm"}))


@pytest.mark.parametrize(("path", "text"), GOOD_INCLUDES, ids=[path for path, _ in GOOD_INCLUDES])
def test_rooms_stay_apart_allows(path: str, text: str) -> None:
    assert not list(rules.rooms_stay_apart(Source(f"csrc/{path}", text), {"quant", "gemm"}))


def test_every_rule_can_fail() -> None:
    shown = {rule for rule, _, _ in [*BAD, *BAD_CSRC]}
    assert shown == {*PACKAGE_RULES, *PYTHON_RULES, *CSRC_RULES}
