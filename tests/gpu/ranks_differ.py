"""A plugin of vLLM for a test: the second rank of two has found other times than the first, and chooses otherwise."""

WAYS = ({1: "kernel"}, {1: "kernel", 2: "stock"})


def register() -> None:
    from vllm_gdn_plugin.run import engine

    rows_of = engine.rows_of

    def other_rows(*known):  # type: ignore[no-untyped-def]
        return rows_of(*known) + 16 * is_second()

    def other_ways(stock, layer, facts, sizes):  # type: ignore[no-untyped-def]
        return WAYS[is_second()], "kernel at 1 token and more"

    engine.rows_of, engine.decode_ways_of = other_rows, other_ways


def is_second() -> bool:
    import torch

    return bool(torch.distributed.get_rank())
