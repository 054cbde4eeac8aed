"""What was compiled is launched again, and nothing else. Triton's interpreter compiles nothing: stand-ins count."""

from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")


def counted(lookups: list[str]) -> Any:
    """A kernel whose look-ups, and what they give, write down their names."""

    class Compiled:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *arguments: lookups.append("again")

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *arguments, num_warps: lookups.append("found") or Compiled()

    return Kernel()


def test_only_the_same_kind_at_aligned_addresses_is_launched_again() -> None:
    from vllm_gdn_plugin.run.launch import ALIGNED, Kept

    lookups: list[str] = []
    launch = Kept(counted(lookups), warps=2)
    for pointers, kind in ((0, "a"), (ALIGNED, "a"), (1, "a"), (0, "a"), (0, "a"), (0, "b"), (0, "b"), (0, "a")):
        launch((1, 1, 1), (), pointers, kind)
    assert lookups == ["found", "again", "found", "found", "again", "found", "again", "found"]


def test_rows_of_another_stride_are_another_kind_of_reordering() -> None:
    from test_reorder import DIM, projections

    from vllm_gdn_plugin.run.launch import Kept
    from vllm_gdn_plugin.run.reorder import Reorder

    lookups: list[str] = []
    reorder = Reorder(2, 4, DIM)
    reorder.launch = Kept(counted(lookups), warps=2)
    for tokens, padding in ((4, 0), (9, 0), (4, 32), (4, 32), (4, 0)):
        reorder(*projections(tokens, 2, 2, padding))
    assert lookups == ["found", "again", "found", "again", "found"]
