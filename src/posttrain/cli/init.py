"""posttrain init"""

from pathlib import Path
from typing import Annotated

import typer

STARTER = """\
# A starter recipe: supervised fine-tuning of one model on one file.
#   posttrain run {name} --dry-run      what would happen
#   posttrain run {name}                train; results go to runs/{stem}
#   posttrain kinds objective           what else can stand here
seed: 0
model: posttrain:tiny-base        # a transformers folder or a hub name such as Qwen/Qwen3-0.6B
objective: sft                    # answers only; the mean is over the answer tokens of the whole update
tuner: full                       # or {{kind: lora, rank: 16}}
data:
  sources: posttrain:data/arith_train.jsonl.gz   # your file: .jsonl(.gz), .csv, .parquet; see `posttrain data FILE`
  format: {{kind: prompt_completion, fields: {{completion: solution}}}}
  max_tokens: 512
optim: {{learning_rate: 5.0e-4, schedule: cosine, warmup: 0.05}}   # 1e-5 to 2e-5 for models of billions of parameters
batch: {{rows: 32}}
epochs: 1
validation:
  task: {{kind: arithmetic, limit: 100}}
  evaluation: {{samples: 2, greedy: false, sampling: {{max_tokens: 64}}}}
  every: 50
  best: pass@1
"""


def init(file: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("recipe.yaml")) -> None:
    """Write a commented starter recipe.

    Example: posttrain init my_sft.yaml
    """
    from posttrain.errors import InputError

    if file.exists():
        raise InputError(f"{file}: exists already; name another file")
    if not file.parent.is_dir():
        raise InputError(f"{file.parent}: no such folder; make it first")
    file.write_text(STARTER.format(name=file, stem=file.stem), encoding="utf-8")
    print(f"wrote {file}; next: posttrain run {file} --dry-run")
