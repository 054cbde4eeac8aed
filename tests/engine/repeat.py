"""Generate again and again, and count what is left behind: open files and Python objects.

    python repeat.py MODEL OUTPUT.json [the options of generate.py]

Writes how many more there are after `requests` rounds than after the first ones.
"""

from __future__ import annotations

import gc
import json
import os

from generate import answers, arguments, engine

WARM_UP, ROUNDS = 3, 30


def count() -> tuple[int, int]:
    gc.collect()
    return len(os.listdir("/proc/self/fd")), len(gc.get_objects())


def main() -> None:
    args = arguments()
    llm = engine(args)
    for _ in range(WARM_UP):
        answers(llm, args.max_tokens)
    before = count()
    for _ in range(ROUNDS):
        last = answers(llm, args.max_tokens)
    files, objects = (now - then for now, then in zip(count(), before, strict=True))
    grown = {"requests": ROUNDS, "files": files, "objects": objects, "ran": last["ran"]}
    args.output.write_text(json.dumps(grown))


if __name__ == "__main__":
    main()
