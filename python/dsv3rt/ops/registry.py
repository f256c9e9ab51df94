"""Registration of ops with torch.library, by the path with the least overhead a call.

`torch.library.custom_op` wraps every call in checks that take longer than a small kernel runs; a plain definition with
one implementation a device does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("dsv3rt", "DEF")


def register(schema: str, *, cpu: Callable[..., Any], cuda: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define `dsv3rt::<schema>` with a body for each device and one that only knows shapes; returns the callable op."""
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, cpu, "CPU")
    LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"dsv3rt::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.dsv3rt, name).default
