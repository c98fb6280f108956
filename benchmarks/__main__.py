"""Speed beside the peers, as ratios measured in one run: `python -m benchmarks` or `python -m benchmarks core`."""

from __future__ import annotations

import sys

from benchmarks import core, lab

PARTS = {"core": core.main, "lab": lab.main}

names = [sys.argv[1]] if len(sys.argv) > 1 else list(PARTS)
if names[0] not in PARTS:
    sys.exit(f"unknown benchmark {names[0]!r}; there are: {', '.join(PARTS)}")
for name in names:
    print(f"== {name}", flush=True)
    PARTS[name](sys.argv[2:])
