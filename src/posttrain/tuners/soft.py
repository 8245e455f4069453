"""Soft prompts: the model stays as it is, and learned tokens stand in front of every text. Parameters and files are peft's.

Where they stand in a row, and how they are attended to, is the layout's matter (`models/soft.py`).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from posttrain.errors import RecipeError
from posttrain.tuners.injected import task_of
from posttrain.tuners.tuner import Tuner, in_dtype_of, refuse_misfit

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor
    from transformers import PreTrainedModel

    from posttrain.models.soft import SoftTokens

KEY = "prompt_embeddings"  # what peft's files hold: for each token what is learned for it, an encoder folded in


class SoftTuner(Tuner):
    """What the kinds share."""

    merges = False
    begins_apart = True
    tokens: PositiveInt = 20
    """How many soft tokens. They count as tokens of the context."""

    @property
    def reversible(self) -> bool:
        return True

    def soft_tokens(self, model: "PreTrainedModel") -> "SoftTokens":
        """New ones of this kind, as they begin."""
        raise NotImplementedError

    def install(self, model: "PreTrainedModel") -> None:
        from posttrain.models import soft

        self._refuse_long(model)
        model.requires_grad_(False)
        made = self.soft_tokens(model).to(model.device, in_dtype_of(model))
        if _inside(model):
            made.at = tuple(max(1, place) for place in made.at)  # its head reads the first token, which stays the text's own
        soft.add(model, made)

    def _refuse_long(self, model: "PreTrainedModel") -> None:
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if context is not None and self.tokens >= context:
            raise RecipeError(f"tuner.tokens: {self.tokens} soft tokens leave no place in a context of {context} tokens")

    @contextmanager
    def switched_off(self, model: "PreTrainedModel") -> Iterator[None]:
        from posttrain.models import soft

        newest = soft.all_of(model)[-1]
        newest.active = False
        try:
            yield
        finally:
            newest.active = True

    def state(self, model: "PreTrainedModel") -> "dict[str, Tensor]":
        import torch

        from posttrain.models import soft

        with torch.no_grad():
            return {KEY: soft.all_of(model)[-1].learned().contiguous()}

    def restore(self, model: "PreTrainedModel", state: "Mapping[str, Tensor]") -> None:
        """With the encoder folded in: the tokens are what they were, and no encoder is made again."""
        from torch import nn

        from posttrain.models import soft

        newest = soft.all_of(model)[-1]
        refuse_misfit(state, {KEY: newest.learned().shape})
        newest.encoder = nn.Embedding.from_pretrained(state[KEY].to(model.device, in_dtype_of(model)), freeze=False)

    def _shared(self, model: "PreTrainedModel") -> dict[str, Any]:
        """Settings of peft's configuration that all kinds have."""
        text = model.config.get_text_config()
        return {
            "task_type": task_of(model), "num_virtual_tokens": self.tokens,
            "num_transformer_submodules": 1, "num_layers": text.num_hidden_layers, "token_dim": text.hidden_size,
            "num_attention_heads": text.num_attention_heads,
        }  # fmt: skip


class Prompt(SoftTuner, kind="prompt"):
    """Prompt tuning: learned vectors in front of every text; arXiv 2104.08691. tokens x width parameters.

    Begins with the vectors of words drawn from the vocabulary, or of a text. Learning rates are high, 1e-2 to 0.3.
    """

    peft_type = "PROMPT_TUNING"
    learning_rates = (1e-3, 3e-2, 0.5)
    init: Literal["vocabulary", "random"] = "vocabulary"
    """vocabulary: vectors of random words. random: normal draws of the vocabulary's deviation."""
    text: str | None = None
    """Begin with the vectors of these words, repeated or cut to `tokens`."""

    @model_validator(mode="after")
    def _one_beginning(self) -> Self:
        if self.text is not None and self.init == "random":
            raise ValueError("the tokens begin with `text`, or as `init` says; remove one of them")
        if self.text is not None and not self.text.strip():
            raise ValueError("text: is empty; name words to begin with, or leave it out")
        return self

    def peft_config(self, model: "PreTrainedModel") -> "PeftConfig | None":
        return None if _inside(model) else self._config(model)

    def _config(self, model: "PreTrainedModel") -> "PeftConfig":
        from peft import PromptTuningConfig

        return PromptTuningConfig(prompt_tuning_init="RANDOM", **self._shared(model))

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self:
        return cls(tokens=config["num_virtual_tokens"])

    def soft_tokens(self, model: "PreTrainedModel") -> "SoftTokens":
        import torch
        from peft.tuners.prompt_tuning import PromptEmbedding

        from posttrain.models import soft

        config, table = self._config(model), model.get_input_embeddings()
        encoder = PromptEmbedding(config, table)
        with torch.no_grad():
            if self.text is not None:
                chosen = torch.tensor(_words(model, self.text, self.tokens), device=model.device)
                encoder.embedding.weight.copy_(table(chosen))
            elif self.init == "vocabulary":
                chosen = torch.randint(0, table.weight.shape[0], (self.tokens,)).to(model.device)
                encoder.embedding.weight.copy_(table(chosen))
            else:
                some = table(torch.arange(min(1000, table.weight.shape[0]), device=model.device))
                encoder.embedding.weight.mul_(some.float().std().cpu())
        return soft.SoftTokens(encoder, self.tokens, soft.next_id(model))


class PTuning(SoftTuner, kind="p_tuning"):
    """P-tuning: soft tokens anywhere in the text, their vectors made by a small network; arXiv 2103.10385.

    The network is trained and then folded into the vectors that it makes.
    """

    peft_type = "P_TUNING"
    learning_rates = (1e-5, 1e-3, 1e-2)
    at: list[NonNegativeInt] = Field(default=[0])
    """Where they stand: before the text's token number 0, 5, ...; they are dealt out evenly. peft reads files with [0] alone."""
    encoder: Literal["mlp", "lstm"] = "mlp"
    """mlp: three layers with ReLU between. lstm: two bidirectional layers and a head with ReLU, as in the paper."""
    hidden: PositiveInt | None = None
    """Width of the network; by default the model's."""

    @model_validator(mode="after")
    def _places(self) -> Self:
        if not self.at or sorted(set(self.at)) != self.at:
            raise ValueError(f"at: {self.at}: give one place or more, each once, in ascending order")
        if len(self.at) > self.tokens:
            raise ValueError(f"at: {len(self.at)} places, but only {self.tokens} tokens to stand there")
        return self

    def peft_config(self, model: "PreTrainedModel") -> "PeftConfig | None":
        return self._encoder_config(model) if self.at == [0] and not _inside(model) else None

    def _encoder_config(self, model: "PreTrainedModel") -> "PeftConfig":
        from peft import PromptEncoderConfig

        shared = self._shared(model)
        width = self.hidden or shared["token_dim"]
        return PromptEncoderConfig(encoder_reparameterization_type=self.encoder.upper(), encoder_hidden_size=width, **shared)

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self:
        return cls(tokens=config["num_virtual_tokens"], hidden=1)  # the network that made the stored vectors is gone

    def soft_tokens(self, model: "PreTrainedModel") -> "SoftTokens":
        from peft.tuners.p_tuning import PromptEncoder

        from posttrain.models import soft

        return soft.SoftTokens(PromptEncoder(self._encoder_config(model)), self.tokens, soft.next_id(model), self.at)


class Prefix(SoftTuner, kind="prefix"):
    """Prefix tuning: learned keys and values before the text, in every layer; arXiv 2101.00190.

    Made by a small network while training, which is folded in afterwards. 2 x layers x tokens x key-value width numbers remain.
    The text's positions begin behind them; where a layer has a sliding window, they leave it as any token does. Needs the tree
    layout.
    """

    peft_type = "PREFIX_TUNING"
    learning_rates = (5e-5, 1e-3, 1e-1)
    tokens: PositiveInt = 10
    """How many keys and values a layer. They count as tokens of the context."""
    projection: PositiveInt | None = 512
    """Width of the network that makes them; null learns them as they are."""
    init: Literal["random", "zero"] = "random"
    """zero: keys and values begin with zero, which still takes some of the attention."""
    text: str | None = None
    """Begin with the keys and values of these words, repeated or cut to `tokens`; needs projection: null."""

    @model_validator(mode="after")
    def _one_beginning(self) -> Self:
        if self.text is not None and self.projection is not None:
            raise ValueError("text gives the keys and values themselves; set projection: null")
        if self.text is not None and self.init == "zero":
            raise ValueError("the prefix begins with `text`, or as `init` says; remove one of them")
        return self

    def peft_config(self, model: "PreTrainedModel") -> "PeftConfig":
        from peft import PrefixTuningConfig

        text = model.config.get_text_config()
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return PrefixTuningConfig(
            prefix_projection=self.projection is not None, encoder_hidden_size=self.projection,
            init_weights="zero" if self.init == "zero" else None,
            **self._shared(model) | {"token_dim": heads * size, "num_attention_heads": heads},
        )  # fmt: skip

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self:
        return cls(tokens=config["num_virtual_tokens"], projection=None)  # what is stored are the keys and values

    def soft_tokens(self, model: "PreTrainedModel") -> "SoftTokens":
        import torch
        from peft.tuners.prefix_tuning import PrefixEncoder

        from posttrain.models import soft

        if _inside(model):
            raise RecipeError("tuner prefix: an encoder's attention does not ask for keys of ours; take tuner prompt or p_tuning")
        config = self.peft_config(model)
        encoder = PrefixEncoder(config)
        found = soft.PrefixTokens(encoder, self.tokens, soft.next_id(model), config.num_layers, config.num_attention_heads)
        if self.text is not None:
            with torch.no_grad():
                encoder.embedding.weight.copy_(_keys_and_values(model, _words(model, self.text, self.tokens)))
        return found


def _inside(model: "PreTrainedModel") -> bool:
    """Whether soft tokens stand behind the first token of a text, where peft knows no place for them."""
    from posttrain.models.heads import is_encoder

    return is_encoder(model)


def _words(model: "PreTrainedModel", text: str, count: int) -> list[int]:
    """The first `count` token ids of a text that repeats itself as often as it takes."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [ids[index % len(ids)] for index in range(count)]


def _keys_and_values(model: "PreTrainedModel", words: list[int]) -> "Tensor":
    """[words, layers * 2 * K * d]: those that the model computes for words at the start of a text."""
    import torch

    from posttrain.models import layout
    from posttrain.models.attention import KeepingPlan
    from posttrain.models.backbone import Backbone

    tree = layout.tree([words])
    plan = KeepingPlan(tree)
    Backbone(model).states(tree, plan)
    kept = torch.stack([torch.stack(pair) for pair in plan.kept])  # [layers, 2, K, words, d]
    return kept.movedim(3, 0).flatten(1)
