"""The kernel in Triton's interpreter (TRITON_INTERPRET=1), or compiled for a GPU: skipped, with the reason, without."""

import importlib.util
import os

import pytest


def _missing() -> str | None:
    for name in ("torch", "triton"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    import torch

    return None if torch.cuda.is_available() else "there is no GPU, and TRITON_INTERPRET=1 is not set"


MISSING = _missing()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if MISSING:
        for item in items:
            if "tests/kernel" in str(item.path):
                item.add_marker(pytest.mark.skip(reason=MISSING))
