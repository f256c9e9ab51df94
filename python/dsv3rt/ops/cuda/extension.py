"""The compiled extension, or a clear error."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

from dsv3rt.errors import BackendUnavailableError


@cache
def load() -> ModuleType:
    """The module `dsv3rt._C`.

    Raises:
        BackendUnavailableError: the package was built without kernels, or they do not load here.
    """
    try:
        return importlib.import_module("dsv3rt._C")
    except ImportError as error:
        raise BackendUnavailableError(
            f"CUDA tensor given, but the kernels of dsv3rt are not available ({error}); `dsv3rt doctor` says what to do"
        ) from error
