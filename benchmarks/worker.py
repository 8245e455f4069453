"""One measurement in a process of its own: `python -m benchmarks.worker sft trl '{"shape": "4k", "steps": 12}'` prints JSON."""

import json
import os
import sys
import time

os.environ.setdefault("BENCHMARK_BEGAN", str(time.time()))

if __name__ == "__main__":
    import importlib

    module, engine, options = sys.argv[1:]
    stdout, sys.stdout = sys.stdout, sys.stderr
    found = getattr(importlib.import_module(f"benchmarks.{module}"), engine)(**json.loads(options))
    print(json.dumps(found), file=stdout)
