"""A plugin of vLLM for a test: the second rank of two has found other times than the first, and chooses otherwise."""


def register() -> None:
    from vllm_gdn_plugin.run import decode, engine

    rows_of, decode_ways_of = engine.rows_of, engine.decode_ways_of

    def other_rows(*known):  # type: ignore[no-untyped-def]
        return rows_of(*known) + 16 * is_second()

    def other_ways(stock, layer, facts, sizes):  # type: ignore[no-untyped-def]
        if not is_second():
            return decode_ways_of(stock, layer, facts, sizes)
        return {n: decode.STOCK if n > 1 else decode.KERNEL for n in sizes}, "kernel at 1 token"

    engine.rows_of, engine.decode_ways_of = other_rows, other_ways


def is_second() -> bool:
    import torch

    return bool(torch.distributed.get_rank())
