"""A TrainConfig from a TOML file and `--section.key value` overrides, and back to TOML.

Every error is a ValueError of one line that names the key.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import TypeAdapter, ValidationError

from dsv3rt import presets
from dsv3rt.config import MixturePhase, ModelConfig, Segment, TrainConfig

Override = tuple[str, str]  # dotted key, value as text
_NONE = "none"  # TOML has no null
_UNION_BRANCHES = {"int", "float", "str", "YarnConfig", "LayerCosts"}  # pydantic puts these into an error's location


def load(path: str | Path, overrides: Sequence[Override] = ()) -> TrainConfig:
    """Read a file, apply the overrides in order, and check everything."""
    return from_dict(_apply(_read(Path(path)), overrides))


def from_dict(data: Mapping[str, Any]) -> TrainConfig:
    """A TrainConfig from nested dictionaries as TOML gives them."""
    _check_keys(data)
    normal = _normalise(TrainConfig, data)
    if "model" in normal:
        normal["model"] = _with_preset(normal["model"])
    try:
        # JSON mode is pydantic's strict mode that still takes lists for tuples and tables for dataclasses.
        return TypeAdapter(TrainConfig).validate_json(json.dumps(normal, default=str), strict=True)
    except ValidationError as error:
        raise ValueError(_one_line(error)) from None


def to_dict(config: TrainConfig) -> dict[str, dict[str, Any]]:
    """The nested dictionaries that `from_dict` turns back into the same configuration."""
    sections = ((field.name, getattr(config, field.name)) for field in dataclasses.fields(config))
    return {name: _table(section) for name, section in sections}


def to_toml(config: TrainConfig) -> str:
    """The whole configuration, every key written out."""
    return tomli_w.dumps(to_dict(config))


def flat(config: TrainConfig) -> dict[str, Any]:
    """Dotted key -> value, for comparing two configurations."""
    return {f"{section}.{key}": value for section, table in to_dict(config).items() for key, value in table.items()}


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a UTF-8 text file") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not valid TOML: {error}") from None


def _apply(data: dict[str, Any], overrides: Sequence[Override]) -> dict[str, Any]:
    for key, text in overrides:
        table = data
        *parents, last = key.split(".")
        for parent in parents:
            table = table.setdefault(parent, {})
            if not isinstance(table, dict):
                raise ValueError(f"{key}: {parent} is a value, it has no keys")
        table[last] = _parse(key, text)
    return data


def _parse(key: str, text: str) -> Any:
    """The text as a TOML value where it is one (and where the key takes more than text), else as a string."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    value = parsed["value"] if parsed.keys() == {"value"} else text
    takes_text_alone = _leaf_types().get(key) is str
    return text if takes_text_alone and not isinstance(value, str) else value


@cache
def _fields(owner: type) -> dict[str, Any]:
    """Field name -> type of a dataclass, annotations resolved."""
    return typing.get_type_hints(owner)


def _dataclass_in(hint: Any) -> type | None:
    """The dataclass that a field of this type holds as a table, if any (`YarnConfig | None` -> YarnConfig)."""
    for option in typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,):
        if isinstance(option, type) and dataclasses.is_dataclass(option):
            return option
    return None


def _item_in(hint: Any) -> type | None:
    """The dataclass that a field of this type holds a list of, if any."""
    return Segment if hint == tuple[Segment, ...] else MixturePhase if hint == tuple[MixturePhase, ...] else None


def _walk(owner: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, hint in _fields(owner).items():
        yield prefix + name, hint
        if (inner := _dataclass_in(hint)) is not None:
            yield from _walk(inner, f"{prefix}{name}.")


@cache
def _leaf_types() -> dict[str, Any]:
    """Every dotted key of a configuration file -> its type."""
    return {**dict(_walk(TrainConfig)), "model.preset": str}


def _check_keys(data: Mapping[str, Any], prefix: str = "") -> None:
    known = _leaf_types()
    for name, value in data.items():
        key = prefix + name
        if key not in known:
            raise ValueError(f"{key}: unknown key{_suggestion(key)}")
        if _dataclass_in(known[key]) is not None and isinstance(value, Mapping):
            _check_keys(value, f"{key}.")
        if (item := _item_in(known[key])) is not None and isinstance(value, list):
            _check_item_keys(key, list(_fields(item)), value)


def _check_item_keys(key: str, names: list[str], tables: list[Any]) -> None:
    for index, table in enumerate(tables):
        for name in table if isinstance(table, Mapping) else ():
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f"did you mean {near[0]}?" if near else f"allowed are {', '.join(names)}"
                raise ValueError(f"{key}[{index}].{name}: unknown key, {hint}")


def _suggestion(key: str) -> str:
    known = list(_leaf_types())
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    if not near:  # the right name in the wrong section, or no section
        lasts = {candidate.rsplit(".", 1)[-1]: candidate for candidate in reversed(known)}
        near = [lasts[name] for name in difflib.get_close_matches(key.rsplit(".", 1)[-1], lasts, n=1, cutoff=0.75)]
    return f", did you mean {near[0]}?" if near else f"; the sections are {', '.join(_fields(TrainConfig))}"


def _normalise(owner: type, data: Mapping[str, Any]) -> dict[str, Any]:
    """Spell out the short forms: a number for a schedule, weights for a mixture, one string for several, "none"."""
    return {name: _normal_value(_fields(owner).get(name), value) for name, value in data.items()}


def _normal_value(hint: Any, value: Any) -> Any:
    inner = _dataclass_in(hint)
    if inner is not None and isinstance(value, Mapping):
        return _normalise(inner, value)
    if hint == tuple[Segment, ...] and isinstance(value, int | float) and not isinstance(value, bool):
        return [{"value": value}]
    if hint == tuple[MixturePhase, ...] and _are_numbers(value):
        return [{"weights": value}]
    if hint == tuple[str, ...] and isinstance(value, str):
        return [value]
    if value == _NONE and type(None) in typing.get_args(hint):
        return None
    return value


def _are_numbers(value: Any) -> bool:
    """Whether it is a list of one number or more."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, int | float) for item in value)


def _with_preset(model: Any) -> Any:
    if not isinstance(model, Mapping) or "preset" not in model:
        return model
    fields = dict(model)
    name = fields.pop("preset")
    if not isinstance(name, str):
        raise ValueError(f"model.preset: must be a string, got {name!r}")
    try:
        base: ModelConfig = presets.model(name)
    except ValueError as error:
        raise ValueError(f"model.preset: {error}") from None
    base_fields = dataclasses.asdict(base)
    for key, value in fields.items():  # tables within (yarn) are merged as well
        merges = isinstance(value, Mapping) and isinstance(base_fields[key], Mapping)
        base_fields[key] = {**base_fields[key], **value} if merges else value
    return base_fields


def _one_line(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    message = " ".join(first["msg"].split())
    key = ""
    for part in first["loc"]:
        key += f"[{part}]" if isinstance(part, int) else f".{part}" if part not in _UNION_BRANCHES else ""
    key = key.lstrip(".")
    if first["type"] == "value_error":  # our own, from __post_init__: all but those in lists know their key
        message = message.removeprefix("Value error, ")
        owner, dot, rest = message.partition(".")
        return f"{key}.{rest}" if dot and owner in ("segment", "phase") else message
    message = message.removeprefix("Input should ").removeprefix("be ")
    for pydantic_word, word in (("a valid array", "a list"), ("an object", "a table"), ("a valid int", "an int")):
        message = message.replace(pydantic_word, word)
    if first["type"] == "tuple_type" and (item := _item_in(_leaf_types().get(key))) is not None:
        message = "a number or a list of segments" if item is Segment else "a list of weights or of phases"
    return f"{key}: must be {message}, got {_short(first['input'])}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _table(section: Any) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if value is not None or field.default is not None:
            table[field.name] = _plain(value)
    return table


def _plain(value: Any) -> Any:
    if value is None:
        return _NONE
    if isinstance(value, tuple) and value and isinstance(value[0], Segment):
        first = value[0]
        return first.value if value == (Segment(first.value),) else [_table(segment) for segment in value]
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return _table(value) if dataclasses.is_dataclass(value) else value
