"""What stages that make a model smaller share: rows to calibrate on and to measure on, and what they report."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from posttrain.data.dataset import Data
from posttrain.errors import RecipeError
from posttrain.models.source import ModelSource
from posttrain.pipeline.libraries import heavy_imports
from posttrain.pipeline.stage import Context, Metrics, Stage, refuse_other_rows
from posttrain.training.settings import HELD_OUT
from posttrain.tuners.below import folds

if TYPE_CHECKING:
    from posttrain.batch import Sequences
    from posttrain.models.load import Loaded


class Smaller(Stage):
    """Makes a model smaller; says by how much, and how far it then is from what it was."""

    makes_model = True

    model: ModelSource
    """What is made smaller."""
    targets: list[str] = Field(default=["*"], min_length=1)
    """Which linear layers of the blocks, by patterns of their paths, such as `*.mlp.*`, or of their last names (`q_proj`); never
    embeddings, norms and heads."""
    data: Data | None = None
    """Calibration rows, on which it is seen what layers are given; 128 of 2,048 tokens are usual."""
    measure: Data | None = None
    """Rows on which the model is compared with what it was, better others than `data`; those by default."""

    def refuse_data(self, method: str, reads: bool) -> None:
        """Raises ValueError where a method lacks its calibration rows, or has some that it would pass over."""
        if reads and self.data is None:
            raise ValueError(f"method {method} looks at what layers are given: give it `data`, a hundred rows of text")
        if not reads and self.data is not None:
            raise ValueError(f"method {method} looks at the weights alone and reads no `data`; rows to measure on are `measure`")

    def check(self) -> None:
        self.model.check()
        if self.model.is_quantized():
            raise RecipeError(f"model: {self.model.path} is quantised already; take the model as it was before")
        if self.model.path is not None and not folds(self.model):
            raise RecipeError(
                f"model: the adapter {self.model.path} cannot be folded into the weights, which are what is made smaller; "
                "name the model below it"
            )
        for data in (self.data, self.measure):
            if data is not None:
                data.check()
                refuse_no_text(data, self.kind)

    def run(self, context: Context) -> Metrics:
        import shutil

        out = context.folder / "model"
        shutil.rmtree(out, ignore_errors=True)  # of a run that ended just after it was written
        return context.resolved(self).make(out, context.say)

    def make(self, folder: Path, say: Callable[[str], None]) -> Metrics:
        """Writes the smaller model to `folder`. Returns its sizes, the distances, and whatever the kind adds."""
        from posttrain.data.render import Template

        with heavy_imports():
            from posttrain.batch import Sequences
            from posttrain.compress.distance import distance
            from posttrain.compress.readback import staged
            from posttrain.models.linears import left_out
            from posttrain.tuners.load import load

        loaded = load(self.model)
        for line in left_out(loaded.lm.model):
            say(line)
        sections = {name: data for name, data in (("data", self.data), ("measure", self.measure)) if data is not None}
        read = {name: data.read() for name, data in sections.items()}
        template = Template(loaded.tokenizer, any(each.needs_chat for each in read.values()))
        rows: dict[str, Any] = {}
        for name, data in sections.items():
            rendered = data.render(read[name], template)
            rendered.refuse_beyond(loaded.lm.context)
            for line in rendered.summary():
                say(f"{name}: {line}")
            rows[name] = Sequences.of(rendered.sequences)
        held_out = rows.get("measure", rows.get("data"))
        with staged(folder) as stage:
            record = self.shrink(loaded, rows.get("data"), stage)
            record["bytes"]["file"] = sum(file.stat().st_size for file in stage.glob("*.safetensors"))
            if held_out is None:
                return {"metrics": {}, **record}
            say(f"measures the model before and after on {len(held_out.tokens):,} tokens")
            after = self.model.model_copy(update={"path": str(stage), "base": None, "revision": None, "trust_remote_code": None})
            figures = distance(load(self.model).lm, load(after).lm, held_out)
            return {"metrics": {name: figure.as_dict() for name, figure in figures.items()}, **record}

    def write(self, loaded: "Loaded", folder: Path) -> None:
        """What is not made smaller is written in the dtype in which it was stored, though computed in the model's."""
        from posttrain.models.load import save, stored_dtype

        stored = stored_dtype(self.model)
        for parameter in loaded.lm.model.parameters():
            parameter.data = parameter.data.to(stored or parameter.dtype)
        save(loaded.lm.model, loaded.tokenizer, folder)

    def shrink(self, loaded: "Loaded", rows: "Sequences | None", folder: Path) -> Metrics:
        """Does it, and writes the model to `folder`. Returns what the record says beside distances."""
        raise NotImplementedError


def sizes(weights: int, others: int, stored: int) -> dict[str, int]:
    """Bytes of a model in 16 bits, and where its `weights` take `stored` bytes in place of 2 each."""
    return {
        "before": 2 * (others + weights), "after": 2 * others + stored, "matrices_before": 2 * weights, "matrices_after": stored,
    }  # fmt: skip


def refuse_no_text(data: Data, kind: str) -> None:
    """Raises RecipeError for rows that a language model is not measured on."""
    refuse_other_rows(data, HELD_OUT, f"stage {kind} reads text: give text, messages or prompt_completion")
