"""What T17 and T18 measure on: tiny-base, and pieces of 256 tokens of the stories that come with posttrain."""

from typing import Any

PIECE = 256
STORIES = 40  # read for one seed: as many for calibration, as many others for measuring


def loaded() -> Any:
    import torch

    from posttrain.models.load import load

    torch.set_num_threads(1)
    return load("posttrain:tiny-base")


def pieces(tokenizer: Any, seed: int, calibrate: int, measure: int) -> tuple[Any, Any]:
    """(rows to calibrate on, rows of other stories to measure on), both spread over the stories of a seed."""
    from posttrain.batch import Sequences
    from posttrain.data.dataset import Data
    from posttrain.data.render import Template

    first = 2 * STORIES * seed
    found = []
    for begin, count in ((first, calibrate), (first + STORIES, measure)):
        source = {"path": "posttrain:data/text_stories.jsonl.gz", "rows": f"{begin}:{begin + STORIES}"}
        data = Data.model_validate({"sources": source, "format": "text", "max_tokens": PIECE})
        rows = data.render(data.read(), Template(tokenizer, chat=False)).sequences
        whole = [row for row in rows if len(row[0]) == PIECE]
        found.append(Sequences.of(whole[:: max(1, len(whole) // count)][:count]))
    return found[0], found[1]
