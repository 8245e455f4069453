"""A process that imports the libraries once, and forks a child for each test that it is asked to run on a copy of the source.

Reads lines {"source": folder, "test": file::name, "log": file} and answers each with {"status": exit status}. It never imports
posttrain itself, so that each child imports the copy.
"""

import json
import os
import sys
import traceback

import beartype  # noqa: F401
import hypothesis.strategies  # noqa: F401
import jaxtyping  # noqa: F401
import peft  # noqa: F401
import pydantic  # noqa: F401
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel  # noqa: F401
from transformers.models.gpt2 import modeling_gpt2  # noqa: F401
from transformers.models.llama import modeling_llama  # noqa: F401

OPTIONS = ["-x", "-m", "", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:randomly", "--tb=line", "--assert=plain"]
CRASHED = 70


def child(source: str, test: str, log: str) -> None:
    """Runs one test with `source` first on the path; ends the process."""
    status = CRASHED
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.environ["PYTHONPATH"] = source
        sys.path.insert(0, source)
        import posttrain

        assert posttrain.__file__ is not None
        assert posttrain.__file__.startswith(source), f"imported {posttrain.__file__} instead of the copy"
        status = int(pytest.main([*OPTIONS, test]))
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main() -> None:
    assert not any(name.split(".")[0] == "posttrain" for name in sys.modules)
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    for line in sys.stdin:
        asked = json.loads(line)
        process = os.fork()
        if process == 0:
            child(**asked)
        _, status = os.waitpid(process, 0)
        print(json.dumps({"status": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    main()
