"""A matrix of small integers: codes, and for each group of a row's weights a scale and perhaps a zero.

Stored as compressed-tensors stores it ("pack-quantized"): the codes of a row as one stream of bits, the lowest first, cut into
words of 32; of 4 bits that is eight codes a word. Where there is no zero, a code is 2^(bits - 1) above what it stands for.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int32, UInt8
from torch import Tensor

WORD = 32


@dataclass(frozen=True, slots=True)
class Integers:
    """weight[m, k] = (codes[m, k] - zero[m, k // group]) * scale[m, k // group].

    R is M, or 1 where all rows share their scales. zero: None where the grid is symmetric, which is a zero of 2^(bits - 1)
    everywhere. The last group may be shorter.
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
        return groups.repeat_interleave(self.group, 1)[:, : self.codes.shape[1]]

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
        """From what `packed` gives. group: the inputs that share a scale; all of a row's, where they do."""
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
    stream = np.unpackbits(words.cpu().contiguous().numpy().view(np.uint8), axis=-1, count=columns * bits, bitorder="little")
    codes = np.packbits(stream.reshape(len(words), columns, bits), axis=-1, bitorder="little")
    return torch.from_numpy(codes[..., 0]).to(words.device)
