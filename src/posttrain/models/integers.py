"""A matrix of small integers: codes, and for each group of a row's weights a scale and perhaps a zero.

Stored as compressed-tensors stores it ("pack-quantized"): the codes of a row as one stream of bits, the lowest first, cut into
words of 32; of 4 bits that is eight codes a word. Where there is no zero, a code is 2^(bits - 1) above what it stands for.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int32, UInt8
from torch import Tensor, nn

from posttrain.models.products import wide
from posttrain.models.quantized import Quantized

WORD, BYTE = 32, 8
WHOLE_ROW = 1 << 31  # a group of any row


@dataclass(frozen=True, slots=True)
class Integers:
    """weight[m, k] = (codes[m, k] - zero[m, k // group]) * scale[m, k // group].

    R is M, or 1 where all rows share their scales. zero: None where the grid is symmetric, which is a zero of 2^(bits - 1)
    everywhere. group: consecutive inputs, or WHOLE_ROW; the last may be shorter.
    """

    codes: UInt8[Tensor, "M K"]
    scale: Float[Tensor, "R G"]
    zero: UInt8[Tensor, "R G"] | None
    bits: int
    group: int

    def dense(self) -> Float[Tensor, "M K"]:
        """The matrix, in the dtype of the scales."""
        middle = 1 << (self.bits - 1) if self.zero is None else self.spread(self.zero).to(self.scale.dtype)
        return (self.codes.to(self.scale.dtype) - middle) * self.spread(self.scale)

    def spread(self, groups: Tensor) -> Tensor:
        """[R, K]: what belongs to a group, at each of its weights."""
        columns = self.codes.shape[1]
        return groups.repeat_interleave(min(self.group, columns), 1)[:, :columns]

    @property
    def bytes(self) -> int:
        """Of the tensors that `packed` gives, to the byte."""
        (rows, columns), (shared, groups) = self.codes.shape, self.scale.shape
        words = rows * -(-columns * self.bits // WORD)
        if self.zero is not None:
            words += groups * -(-shared * self.bits // WORD)
        return 4 * words + self.scale.numel() * self.scale.element_size() + 2 * 8

    def packed(self) -> dict[str, Tensor]:
        """`weight_packed` [M, words], `weight_scale` [R, G], `weight_shape` [2]; with zeros `weight_zero_point` [words, G]."""
        found = {
            "weight_packed": to_words(self.codes, self.bits),
            "weight_scale": self.scale,
            "weight_shape": torch.tensor(self.codes.shape),
        }
        if self.zero is not None:
            found["weight_zero_point"] = to_words(self.zero.t(), self.bits).t().contiguous()
        return found

    @classmethod
    def unpacked(cls, tensors: dict[str, Tensor], bits: int, group: int) -> "Integers":
        """From what `packed` gives."""
        scale, (_, columns) = tensors["weight_scale"], tensors["weight_shape"].tolist()
        zero = tensors.get("weight_zero_point")
        if zero is not None:
            zero = from_words(zero.t().contiguous(), bits, len(scale)).t().contiguous()
        return cls(from_words(tensors["weight_packed"], bits, columns), scale, zero, bits, group)


def to_words(codes: UInt8[Tensor, "M K"], bits: int) -> Int32[Tensor, "M W"]:
    """The codes of each row as one stream of bits, filled up with zeros to whole words."""
    rows, columns = codes.shape
    stream = np.unpackbits(codes.cpu().numpy()[..., None], axis=-1, count=bits, bitorder="little").reshape(rows, -1)
    filled = np.pad(stream, ((0, 0), (0, -columns * bits % WORD)))
    return torch.from_numpy(np.packbits(filled, axis=-1, bitorder="little").view("<i4")).to(codes.device)


def from_words(words: Int32[Tensor, "M W"], bits: int, columns: int) -> UInt8[Tensor, "M K"]:
    """The first `columns` codes of each row."""
    stream = words.contiguous().view(torch.uint8)
    if BYTE % bits:  # eight codes lie in `bits` bytes
        parts = F.pad(stream, (0, -stream.shape[1] % bits)).unflatten(1, (-1, bits)).long()
        stream = (parts << BYTE * torch.arange(bits, device=words.device)).sum(-1)
    shifts = bits * torch.arange(BYTE if BYTE % bits else BYTE // bits, device=words.device, dtype=stream.dtype)
    codes = (stream[..., None] >> shifts) & ((1 << bits) - 1)
    return codes.flatten(1)[:, :columns].to(torch.uint8)


class Whole(Quantized):
    """Integers of 2, 3, 4 or 8 bits with a scale, and perhaps a zero, for each group of a row's weights.

    4.25 bits a weight with float32 scales of groups of 128, 4.125 with those of 16 bits.
    """

    @classmethod
    def of(cls, integers: Integers, bias: nn.Parameter | None) -> "Whole":
        return cls(integers.packed(), bias, integers.bits, integers.group)

    def __init__(self, tensors: dict[str, Tensor], bias: nn.Parameter | None, bits: int, group: int) -> None:
        outputs, inputs = tensors["weight_shape"].tolist()
        super().__init__(inputs, outputs, bias)
        self.bits, self.group, self.symmetric = bits, group, "weight_zero_point" not in tensors
        for name, each in tensors.items():
            self.register_buffer(name, each)

    def stored(self) -> dict[str, Tensor]:
        return dict(self.named_buffers(recurse=False))

    def dense(self) -> Float[Tensor, "M K"]:
        return wide(Integers.unpacked(self.stored(), self.bits, self.group).dense())

    def configuration(self, left: list[str]) -> dict[str, Any]:
        whole = self.group == WHOLE_ROW
        weights = {
            "num_bits": self.bits, "type": "int", "symmetric": self.symmetric, "strategy": "channel" if whole else "group",
            "group_size": None if whole else self.group, "dynamic": False,
        }  # fmt: skip
        return {
            "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed", "ignore": left,
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        }  # fmt: skip

    @classmethod
    def grid_of(cls, configuration: dict[str, Any]) -> tuple[int, int] | None:
        """(bits, group) of what config.json says; None for what is not integers as this class has them."""
        groups = list(configuration.get("config_groups", {}).values())
        if configuration.get("format") != "pack-quantized" or len(groups) != 1 or groups[0].get("input_activations"):
            return None
        weights = groups[0].get("weights") or {}
        strategy, bits = weights.get("strategy"), weights.get("num_bits")
        if weights.get("type") != "int" or strategy not in {"channel", "group"} or bits not in {2, 3, 4, 8}:
            return None
        if weights.get("actorder") not in {None, "static", "weight"}:
            return None
        return int(bits), int(weights["group_size"]) if strategy == "group" else WHOLE_ROW
