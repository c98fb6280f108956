"""Speed as ratios measured in one run: `python -m benchmarks`, `python -m benchmarks core`, `... peers`.

Without a name: what the house costs, and the lab in a browser. `peers`: the methods beside the libraries that people
would use otherwise, in an environment that has those (`make bench-peers`).
"""

from __future__ import annotations

import importlib
import sys

OURS = ("core", "lab")
PEERS = ("offline", "neighbours", "language", "diffusion", "transport")

name, words = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
if name not in ("", "peers", *OURS, *PEERS):
    sys.exit(f"unknown benchmark {name!r}; there are: peers, {', '.join((*OURS, *PEERS))}")
for part in {"": OURS, "peers": PEERS}.get(name, (name,)):
    print(f"== {part}", flush=True)
    importlib.import_module(f"benchmarks.{part}").main(words)
