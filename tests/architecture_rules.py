"""The rules of docs/architecture.md, one small function each.

A rule takes a `Source` and yields one line per violation, so that a test can feed it the real tree or a bad snippet.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

PACKAGE = "dsv3rt"

# A module imports only from rooms of a lower rank, and from its own room.
FLOW: dict[str, int] = {
    "config": 0, "config_checks": 0, "presets": 0, "errors": 0, "env": 0,
    "_C": 1, "ops": 2, "layers": 3, "model": 4, "parallel": 5, "hf": 6, "infer": 6, "train": 6,
    "__init__": 7, "doctor": 8, "cli": 9, "__main__": 10,
}  # fmt: skip
FOUNDATION = {room for room, rank in FLOW.items() if rank == 0}  # these may import each other

KERNEL_SUFFIXES = {".cu", ".cuh"}
CSRC_SUFFIXES = KERNEL_SUFFIXES | {".h", ".hpp", ".cpp"}
SHARED_CSRC_ROOMS = {"common", "hopper"}
KERNEL_LINES = 500
FILE_LINES = 400
FUNCTION_LINES = 60
PARAMETERS = 8

MUTABLE_NODES = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
MUTABLE_CALLS = {"list", "dict", "set", "bytearray", "defaultdict", "OrderedDict", "Counter", "deque"}
MUTATING_METHODS = {
    "add", "append", "appendleft", "clear", "discard", "extend", "insert", "pop", "popitem", "popleft", "remove",
    "reverse", "setdefault", "sort", "update",
}  # fmt: skip

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """One file: its path relative to the repository, and its text."""

    path: str
    text: str

    @classmethod
    def read(cls, root: Path, file: Path) -> Source:
        return cls(file.relative_to(root).as_posix(), file.read_text(encoding="utf-8"))

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(self.tree))

    @property
    def parts(self) -> tuple[str, ...]:
        return PurePosixPath(self.path).parts

    @property
    def module(self) -> str:
        """python/dsv3rt/ops/types.py -> dsv3rt.ops.types; a package's __init__.py -> the package's own name."""
        names = PurePosixPath(self.path).with_suffix("").parts[1:]
        return ".".join(names[:-1] if names[-1] == "__init__" else names)

    @property
    def room(self) -> str:
        """The part of the package that this file belongs to: the first name below dsv3rt."""
        return room_of(self.module)

    def at(self, node: ast.AST | int, message: str) -> str:
        line = node if isinstance(node, int) else getattr(node, "lineno", 1)
        return f"{self.path}:{line}: {message}"


def room_of(module: str) -> str:
    names = module.split(".")
    return names[1] if len(names) > 1 else "__init__"


def functions(source: Source) -> Iterator[FunctionNode]:
    return (node for node in source.nodes if isinstance(node, FunctionNode))


# Imports


def imports(source: Source) -> Iterator[tuple[ast.AST, str]]:
    """Every module that a file imports, at any depth, also through importlib, as (node, absolute name)."""
    for node in source.nodes:
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(source, node)
            yield from ((node, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and _name(node.func) in {"import_module", "__import__"}:
            yield from ((node, str(item.value)) for item in node.args[:1] if isinstance(item, ast.Constant))


def _absolute(source: Source, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    is_package = source.path.endswith("/__init__.py")
    names = source.module.split(".")
    base = names[: len(names) - node.level + is_package]
    return ".".join(base + ([node.module] if node.module else []))


def _name(node: ast.AST) -> str:
    """The last name of `f` or `a.b.f`."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _is_or_below(module: str, ancestor: str) -> bool:
    return module == ancestor or module.startswith(ancestor + ".")


def _imported_room(module: str) -> str:
    """`dsv3rt.Transformer` names no room: it comes out of the package's __init__.py."""
    room = room_of(module)
    return room if room in FLOW or room.islower() else "__init__"


def flows_left_to_right(source: Source) -> Iterator[str]:
    own = source.room
    if own not in FLOW:
        yield source.at(1, f"room {own!r} has no place in the flow of docs/architecture.md")
        return
    for node, module in imports(source):
        if not _is_or_below(module, PACKAGE) or module == f"{PACKAGE}.__version__":
            continue
        room = _imported_room(module)
        allowed = room == own or FLOW.get(room, 99) < FLOW[own] or (own in FOUNDATION and room in FOUNDATION)
        if not allowed:
            yield source.at(node, f"{own} imports {module}, which stands to its right")


def only_ops_cuda_and_doctor_import_the_extension(source: Source) -> Iterator[str]:
    if _is_or_below(source.module, f"{PACKAGE}.ops.cuda") or source.module == f"{PACKAGE}.doctor":
        return
    for node, module in imports(source):
        if _is_or_below(module, f"{PACKAGE}._C"):
            yield source.at(node, "only ops/cuda and doctor import _C")


def no_torch_distributed_in_layers_and_model(source: Source) -> Iterator[str]:
    if source.room not in {"layers", "model"}:
        return
    for node, module in imports(source):
        if _is_or_below(module, "torch.distributed"):
            yield source.at(node, "layers and model know no torch.distributed")
    for node in source.nodes:
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield source.at(node, "layers and model know no torch.distributed")


def environment_is_read_in_one_place(source: Source) -> Iterator[str]:
    if source.module == f"{PACKAGE}.env":
        return
    message = f"environment variables are read in python/{PACKAGE}/env.py alone"
    names = {"environ", "environb", "getenv", "getenvb"}
    for node, module in imports(source):
        if module in {f"os.{name}" for name in names}:
            yield source.at(node, message)
    for node in source.nodes:
        if isinstance(node, ast.Attribute) and node.attr in names and _name(node.value) == "os":
            yield source.at(node, message)


# State


def _is_mutable(node: ast.AST | None) -> bool:
    return isinstance(node, MUTABLE_NODES) or (isinstance(node, ast.Call) and _name(node.func) in MUTABLE_CALLS)


def _assignments(body: Iterable[ast.stmt]) -> Iterator[tuple[str, ast.expr]]:
    """Plain names bound by the statements of one body, with their values."""
    for node in body:
        if isinstance(node, ast.Assign):
            yield from ((target.id, node.value) for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            yield node.target.id, node.value


def no_mutable_class_state(source: Source) -> Iterator[str]:
    classes = [node for node in source.nodes if isinstance(node, ast.ClassDef)]
    for owner in classes:
        for name, value in _assignments(owner.body):
            if _is_mutable(value):
                yield source.at(value, f"{owner.name}.{name} is mutable state of the class, shared by all its objects")
    names = {owner.name for owner in classes} | {"cls"}
    for function in functions(source):
        for node in ast.walk(function):
            target = _written(node)
            if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id in names:
                yield source.at(node, f"{ast.unparse(target)} is written: state belongs to objects, not to classes")


def no_mutable_module_state(source: Source) -> Iterator[str]:
    mutable = {name for name, value in _assignments(source.tree.body) if _is_mutable(value)}
    for function in functions(source):
        shared = mutable - _local_names(function)
        for node in ast.walk(function):
            if isinstance(node, ast.Global):
                yield source.at(node, f"{function.name} rebinds the module's {', '.join(node.names)}")
            elif (name := _mutated(node)) in shared:
                yield source.at(node, f"{function.name} changes the module's {name}")


def _written(node: ast.AST) -> ast.AST | None:
    if isinstance(node, ast.Assign | ast.Delete):
        return node.targets[0]
    return node.target if isinstance(node, ast.AugAssign | ast.AnnAssign) else None


def _mutated(node: ast.AST) -> str:
    """The name that a node changes in place: `x[k] = v`, `del x[k]`, `x += v`, `x.append(v)`; "" for none."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATING_METHODS:
        return node.func.value.id if isinstance(node.func.value, ast.Name) else ""
    target = _written(node)
    while isinstance(target, ast.Subscript):
        target = target.value
        if isinstance(target, ast.Name):
            return target.id
    return ""


def _local_names(function: FunctionNode) -> set[str]:
    arguments = [node.arg for node in ast.walk(function.args) if isinstance(node, ast.arg)]
    stored = [node.id for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    return {*arguments, *stored}


def no_swallowed_exceptions(source: Source) -> Iterator[str]:
    for node in source.nodes:
        if isinstance(node, ast.ExceptHandler) and all(_does_nothing(statement) for statement in node.body):
            yield source.at(node, "an exception is swallowed: handle it, or let it pass on")


def _does_nothing(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Pass) or (
        isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    )


# Budgets


def file_within_budget(source: Source) -> Iterator[str]:
    budget = KERNEL_LINES if PurePosixPath(source.path).suffix in KERNEL_SUFFIXES else FILE_LINES
    lines = len(source.text.splitlines())
    if lines > budget:
        yield source.at(1, f"{lines} lines, the budget is {budget}")


def functions_within_budget(source: Source) -> Iterator[str]:
    """Lines from `def` to the end; the docstring is free."""
    for function in functions(source):
        lines = function.end_lineno - function.lineno + 1  # type: ignore[operator]
        if ast.get_docstring(function, clean=False) is not None:
            lines -= function.body[0].end_lineno - function.body[0].lineno + 1  # type: ignore[operator]
        if lines > FUNCTION_LINES:
            yield source.at(function, f"{function.name} has {lines} lines, the budget is {FUNCTION_LINES}")


def parameters_within_budget(source: Source) -> Iterator[str]:
    """`self`, `cls` and the `ctx` of an autograd function are free, and so is the __init__ of a dataclass."""
    exempt = {id(member) for owner in source.nodes if _is_dataclass(owner) for member in getattr(owner, "body", [])}
    for function in functions(source):
        if id(function) in exempt and function.name == "__init__":
            continue
        arguments = function.args
        names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
        free = bool(names) and names[0] in {"self", "cls", "ctx"}
        count = len(names) + len(arguments.kwonlyargs) - free
        if count > PARAMETERS:
            yield source.at(function, f"{function.name} has {count} parameters, the budget is {PARAMETERS}")


def _is_dataclass(node: ast.AST) -> bool:
    decorators = node.decorator_list if isinstance(node, ast.ClassDef) else []
    return any(_name(item.func if isinstance(item, ast.Call) else item) == "dataclass" for item in decorators)


# C++ and CUDA


def without_comments(text: str) -> str:
    """The same lines with comments blanked; string literals stay."""
    pattern = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/\*.*?\*/', re.DOTALL)
    return pattern.sub(lambda match: match[0] if match[0][0] == '"' else re.sub(r"[^\n]", " ", match[0]), text)


def includes(source: Source) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(without_comments(source.text).splitlines(), 1):
        match = re.match(r'\s*#\s*include\s*[<"]([^>"]+)[>"]', line)
        if match:
            yield number, match[1]


def no_torch_in_csrc(source: Source) -> Iterator[str]:
    for line, header in includes(source):
        if header.split("/")[0] in {"torch", "ATen", "c10", "caffe2"}:
            yield source.at(line, f"csrc knows no torch, yet includes {header}")


def ptx_only_in_hopper(source: Source) -> Iterator[str]:
    if csrc_room(source.path) == "hopper":
        return
    for number, line in enumerate(without_comments(source.text).splitlines(), 1):
        if re.search(r"\b(asm|__asm|__asm__)\b", re.sub(r'"[^"]*"', '""', line)):
            yield source.at(number, "PTX belongs into csrc/hopper")


def rooms_stay_apart(source: Source, rooms: set[str]) -> Iterator[str]:
    """A room includes itself, common and hopper; common and hopper include no room. Files of csrc itself are free."""
    own = csrc_room(source.path)
    if not own:
        return
    for line, header in includes(source):
        other = included_room(source, header, rooms | SHARED_CSRC_ROOMS)
        if other and other != own and other not in SHARED_CSRC_ROOMS:
            yield source.at(line, f"room {own} includes {header} of room {other}")


def csrc_room(path: str) -> str:
    parts = PurePosixPath(path).parts
    return parts[1] if len(parts) > 2 else ""


def included_room(source: Source, header: str, rooms: set[str]) -> str:
    """`../gemm/params.h` is resolved from the file's folder, `gemm/params.h` and `csrc/gemm/params.h` from the root."""
    parts = list(PurePosixPath(header).parts)
    if ".." in parts:
        folder = list(source.parts[:-1])
        for part in parts:
            folder = folder[:-1] if part == ".." else folder if part == "." else [*folder, part]
        parts = folder
    if parts[0] == "csrc":
        parts = parts[1:]
    return parts[0] if len(parts) > 1 and parts[0] in rooms else ""
