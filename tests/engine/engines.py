"""Generate with one engine after another in one process.

    python engines.py MODEL OUTPUT.json [the options of generate.py]

ENGINES lists them, as JSON: `ours`, or `theirs` where the other plugin's class is in vLLM's registry meanwhile.
"""

from __future__ import annotations

import json
import os

from generate import answers, arguments, engine


def main() -> None:
    import other_plugin
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.model_executor.custom_op import op_registry_oot

    args = arguments()
    found = []
    for whose in json.loads(os.environ["ENGINES"]):
        op_registry_oot.clear()
        if whose == "theirs":
            other_plugin.take()
        llm = engine(args)
        found.append(answers(llm, args.max_tokens))
        del llm
        cleanup_dist_env_and_memory()
    args.output.write_text(json.dumps({"engines": found}))


if __name__ == "__main__":
    main()
