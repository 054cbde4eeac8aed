"""Generate, and save the weights as they lie in memory, as vLLM's sharded state, into the directory SAVE_TO.

    python save_sharded.py MODEL OUTPUT.json [the options of generate.py]

On a CPU vLLM packs the weights after loading and drops them, so that nothing is left to save; here they stay, as they
do on a GPU.
"""

from __future__ import annotations

import json
import os

from construct import leave_unpacked
from generate import answers, arguments, engine


def main() -> None:
    from vllm.model_executor.layers import utils

    utils.dispatch_cpu_unquantized_gemm = leave_unpacked
    args = arguments()
    llm = engine(args)
    llm.collective_rpc("save_sharded_state", args=(os.environ["SAVE_TO"],))
    args.output.write_text(json.dumps(answers(llm, args.max_tokens)))


if __name__ == "__main__":
    main()
