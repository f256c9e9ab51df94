"""What configurations require of their fields: a one-line ValueError that names the field, its rule and its value."""

from __future__ import annotations


def require(condition: bool, owner: str, name: str, rule: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{owner}.{name} must {rule}, got {got!r}")


def require_positive(owner: str, config: object, *names: str) -> None:
    for name in names:
        require(getattr(config, name) > 0, owner, name, "be positive", getattr(config, name))


def require_non_negative(owner: str, config: object, *names: str) -> None:
    for name in names:
        require(getattr(config, name) >= 0, owner, name, "not be negative", getattr(config, name))
