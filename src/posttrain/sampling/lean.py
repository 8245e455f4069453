"""A decode step with nothing around its arithmetic, for the architecture that most models share under many names.

Llama, Mistral, Qwen 2 and 3, and models that carry their names, are one decoder: RMS norms before rotary attention and a gated
feed-forward. At one token a row, the modules of such a model cost as much time as what they compute. Whether the step really
computes what the model computes is asked of the model itself, at the first step that it takes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posttrain.models.attention import Scoring
from posttrain.models.head import is_plain
from posttrain.models.lm import LM
from posttrain.models.products import linear, repeated

Attend = Callable[[Tensor, Tensor, Tensor, Scoring], Tensor]
Product = Callable[[Tensor], Tensor]
FAMILIES = {"llama", "mistral", "qwen2", "qwen3"}
PARTS = {
    "": ("embed_tokens", "layers", "norm", "rotary_emb"),
    "layer": ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"),
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj", "act_fn"),
}
NORMS = ("q_norm", "k_norm")  # the only other parts that attention may have


def build(lm: LM) -> "Step | None":
    """The step for this model; None where it is another architecture, has sliding windows, or adapters on it."""
    config = lm.model.config.get_text_config()
    if config.model_type not in FAMILIES or getattr(config, "sliding_window", None) is not None:
        return None
    if lm.layout != "tree" or not _has(lm.backbone, PARTS[""]):
        return None
    for layer in lm.backbone.get_submodule("layers").children():
        if not _has(layer, PARTS["layer"]) or not _has(layer.mlp, PARTS["mlp"]):
            return None
        if not _has(layer.self_attn, PARTS["self_attn"], NORMS):
            return None
        linears = [each for each in layer.modules() if isinstance(each, nn.Linear)]
        if len(linears) != 7 or not all(map(is_plain, linears)):
            return None
    return Step(lm)


def _has(module: Any, parts: Sequence[str], more: Sequence[str] = ()) -> bool:
    found = {name for name, _ in module.named_children()}
    return set(parts) <= found <= {*parts, *more}


class Step:
    """Hidden states of one new token per row. A mixed model's weights are rounded once, here; others are used as they are."""

    def __init__(self, lm: LM) -> None:
        self.backbone: Any = lm.backbone
        self.layers = [_Layer(each, lm.mixed) for each in self.backbone.get_submodule("layers").children()]

    def __call__(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """tokens [A], positions [A] -> [A, D]; attend(query [A, H, d], key [A, K, d], value [A, K, d], scoring) -> [A, H, d]"""
        with torch.autocast(tokens.device.type, enabled=False):
            hidden = self.backbone.embed_tokens(tokens)
            cos, sin = self.backbone.rotary_emb(hidden[None], positions[None])
            half = cos.shape[-1] // 2
            cos, sin = cos[0, :, None, :half], sin[0, :, None, :half]
            for layer in self.layers:
                hidden = layer(hidden, cos, sin, attend)
            return self.backbone.norm(hidden)


class _Layer:
    def __init__(self, layer: Any, half: bool) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.before, self.between = layer.input_layernorm, layer.post_attention_layernorm
        self.qkv = products([attention.q_proj, attention.k_proj, attention.v_proj], half)
        self.out = products([attention.o_proj], half)
        self.gate_up = products([mlp.gate_proj, mlp.up_proj], half)
        self.down = products([mlp.down_proj], half)
        self.act, self.size = mlp.act_fn, attention.head_dim
        self.heads = [each.out_features // self.size for each in (attention.q_proj, attention.k_proj, attention.v_proj)]
        self.q_norm, self.k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self.scoring = Scoring(float(attention.scaling))

    def __call__(self, hidden: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        of_queries, of_keys, of_values = self.heads
        heads = self.qkv(_normed(self.before, hidden)).to(cos.dtype).unflatten(-1, (-1, self.size))
        both, value = heads.split([of_queries + of_keys, of_values], 1)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = both.split([of_queries, of_keys], 1)
            both = torch.cat([self.q_norm(query), self.k_norm(key)], 1)
        query, key = _turned(both, cos, sin).split([of_queries, of_keys], 1)
        hidden = hidden + self.out(attend(query, key, value, self.scoring).flatten(1))
        gate, up = self.gate_up(_normed(self.between, hidden)).chunk(2, -1)
        return hidden + self.down(self.act(gate) * up)


def products(linears: Sequence[nn.Linear], half: bool) -> Product:
    """What some linear layers make of one input, side by side; in bfloat16 as one product of their weights, copied together."""
    if not half:
        if len(linears) == 1:
            return lambda tensor: linear(tensor, linears[0].weight, linears[0].bias)
        return lambda tensor: torch.cat([linear(tensor, each.weight, each.bias) for each in linears], -1)
    weight = torch.cat([each.weight.detach().bfloat16() for each in linears])
    biases = [each.bias for each in linears]
    bias = None if biases[0] is None else torch.cat([each.detach().bfloat16() for each in biases])
    return repeated(weight, bias)


def _normed(norm: Any, hidden: Tensor) -> Tensor:
    eps = getattr(norm, "variance_epsilon", None)
    return norm(hidden) if eps is None else F.rms_norm(hidden, norm.weight.shape, norm.weight, eps)


def _turned(tensor: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [A, heads, d] by the angles of each row's position [A, 1, d/2]."""
    one, two = tensor.chunk(2, -1)
    return torch.cat([(one * cos).addcmul_(two, sin, value=-1), (two * cos).addcmul_(one, sin)], -1)
