"""The stage that evaluates classifiers."""

from typing import Any

from posttrain.data.dataset import Data
from posttrain.models.source import ModelSource
from posttrain.pipeline.libraries import heavy_imports
from posttrain.pipeline.stage import Context, Metrics, Stage, refuse_other_rows


class EvaluateClasses(Stage, kind="evaluate_classes"):
    """What a classifier says of texts: accuracy, F1 and Matthews' correlation, or Pearson's and Spearman's, with 95% intervals.

    `predictions.jsonl` holds for each text its label, what was said, and with which probabilities.
    """

    model: ModelSource
    """The classifier."""
    data: Data
    """Texts with labels (format classified)."""

    def check(self) -> None:
        self.model.check()
        self.data.check()
        refuse_other_rows(self.data, {"Classified"}, "this stage needs texts with labels; name them so: data.format: classified")

    def run(self, context: Context) -> Metrics:
        import json

        from posttrain.evaluation.classes import class_figures

        with heavy_imports():
            from posttrain.pipeline.scoring import told_apart

        asked = context.resolved(self)
        classes, texts, told, summary = told_apart(asked.model, asked.data)
        for line in summary:
            context.say(line)
        with (context.folder / "predictions.jsonl").open("w", encoding="utf-8") as stream:
            for text, each in zip(texts, told, strict=True):
                stream.write(json.dumps({**about(text), **said(classes, each)}, ensure_ascii=False) + "\n")
        figures = class_figures(classes, told, context.seed)
        return {"metrics": {name: each.as_dict() for name, each in figures.items()}, "texts": len(told)}


def about(row: Any) -> dict[str, Any]:
    """A text as people read it."""
    found: dict[str, Any] = {"where": row.where}
    found |= {"messages": [each.as_dict() for each in row.messages]} if row.messages else {"text": row.text}
    return found | ({} if row.second is None else {"second": row.second}) | {"label": row.label}


def said(classes: Any, told: Any) -> dict[str, Any]:
    """What a model says of a text: the likeliest class, the labels that are likelier than not, or the number."""
    import math

    if classes.problem == "regression":
        return {"predicted": told.logits[0]}
    top = max(told.logits)
    if classes.problem == "single":
        weights = [math.exp(each - top) for each in told.logits]
        shares = [each / sum(weights) for each in weights]
        predicted: Any = classes.labels[told.logits.index(top)]
    else:
        shares = [1 / (1 + math.exp(-max(each, -700.0))) for each in told.logits]
        predicted = [label for label, each in zip(classes.labels, told.logits, strict=True) if each > 0]
    return {"predicted": predicted, "probabilities": dict(zip(classes.labels, shares, strict=True))}
