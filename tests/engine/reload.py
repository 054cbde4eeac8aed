"""Generate, give the running engine the weights of another checkpoint, generate again.

    python reload.py MODEL OUTPUT.json [the options of generate.py]

RELOAD_FROM names the other checkpoint. With RELOAD_ONLY, a regular expression, only the matching weights of it are
handed over, as a trainer would, instead of the whole file. Writes generate.py's answers as `before` and `after`.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from generate import answers, arguments, engine


def main() -> None:
    from safetensors.torch import load_file

    args = arguments()
    llm = engine(args)
    before = answers(llm, args.max_tokens)
    path = os.environ["RELOAD_FROM"]
    only = os.environ.get("RELOAD_ONLY")
    if only is None:
        llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
    else:
        weights = load_file(Path(path) / "model.safetensors").items()
        chosen = [(name, tensor) for name, tensor in weights if re.search(only, name)]
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(chosen)})
    llm.reset_prefix_cache()
    args.output.write_text(json.dumps({"before": before, "after": answers(llm, args.max_tokens)}))


if __name__ == "__main__":  # spawned workers import this file again
    main()
