"""NF4: four bits a weight, by the quantiles of a normal distribution; arXiv 2305.14314.

A tensor is read row by row in blocks of 64; each is divided by its largest magnitude, and every weight becomes the number of the
nearest of 16 values. Codes and values are those of bitsandbytes, bit for bit; where that package is installed, its kernels
compute them. (Its CPU kernel for magnitudes in 8 bits misses the nearest value in one case of 600: those are always ours.)
"""

import json
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from posttrain.errors import ModelError

BLOCK, OUTER = 64, 256  # weights that share a magnitude; magnitudes that share one of their own
ZERO = 7  # the code of 0
VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@cache
def has_bitsandbytes() -> bool:
    return find_spec("bitsandbytes") is not None


@cache
def codebook(device: torch.device) -> Float[Tensor, " 16"]:
    return torch.tensor(VALUES, device=device)


@cache
def _pairs(device: torch.device) -> Float[Tensor, "256 2"]:
    """The two values that each byte stands for, the high half first."""
    return torch.cartesian_prod(codebook(device), codebook(device))


@cache
def dynamic_map(device: torch.device) -> Float[Tensor, " 256"]:
    """256 values between -1 and 1 in 8 bits: a sign, a decimal exponent from 0 to -6, and a fraction of the bits left.

    arXiv 1511.04561, as bitsandbytes has it.
    """
    found = [0.0, 1.0]
    for exponent in range(7):
        bounds = torch.linspace(0.1, 1, 2**exponent + 1)
        means = (10.0 ** (exponent - 6) * ((bounds[:-1] + bounds[1:]) / 2)).tolist()
        found += [*means, *(-each for each in means)]
    return torch.tensor(sorted(found), device=device)


def quantize(weight: Tensor) -> tuple[UInt8[Tensor, " bytes"], Float[Tensor, " blocks"]]:
    """(codes, two a byte, the first in the high half; the largest magnitude of each block) of a tensor of any shape."""
    flat = weight.detach().reshape(-1).float()
    if has_bitsandbytes():
        import bitsandbytes  # noqa: F401  # brings its operations

        packed, largest = torch.ops.bitsandbytes.quantize_4bit(flat, BLOCK, "nf4", torch.uint8)
        return packed.reshape(-1), largest
    codes, largest = _nearest(flat, BLOCK, codebook(flat.device))
    codes = F.pad(codes, (0, len(codes) % 2), value=ZERO)
    return (codes[::2] << 4) | codes[1::2], largest


def dequantize(codes: UInt8[Tensor, " bytes"], largest: Float[Tensor, " blocks"], shape: torch.Size) -> Float[Tensor, "..."]:
    """The float32 tensor that `quantize` has made codes of, as they have it."""
    if has_bitsandbytes():
        import bitsandbytes  # noqa: F401

        found: Tensor = torch.ops.bitsandbytes.dequantize_4bit(codes[:, None], largest, BLOCK, "nf4", shape, torch.float32)
        return found.reshape(shape)  # of one row it makes a matrix
    values = F.embedding(codes.int(), _pairs(codes.device)).reshape(-1)[: shape.numel()]
    return _scaled(values, largest, BLOCK).reshape(shape)


def quantize_magnitudes(largest: Float[Tensor, " blocks"]) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantisation: (8-bit codes of each magnitude less their mean, the largest of each 256, the mean [])."""
    mean = largest.mean()
    codes, outer = _nearest(largest - mean, OUTER, dynamic_map(largest.device))
    return codes, outer, mean


def dequantize_magnitudes(
    codes: UInt8[Tensor, " blocks"], outer: Float[Tensor, " outer"], mean: Float[Tensor, ""]
) -> Float[Tensor, " blocks"]:
    return _scaled(F.embedding(codes.int(), dynamic_map(codes.device)[:, None])[:, 0], outer, OUTER) + mean


def _nearest(flat: Tensor, block: int, values: Tensor) -> tuple[Tensor, Tensor]:
    """(number of the nearest of ascending values to each element over its block's largest magnitude, those magnitudes)."""
    rows = F.pad(flat, (0, -len(flat) % block)).reshape(-1, block)
    largest = rows.abs().amax(1)
    scaled = (rows * (1.0 / largest.clamp(min=1e-38))[:, None]).clamp(-1, 1)
    return torch.bucketize(scaled.reshape(-1)[: len(flat)], (values[:-1] + values[1:]) / 2).to(torch.uint8), largest


def _scaled(values: Tensor, largest: Tensor, block: int) -> Tensor:
    rows = F.pad(values, (0, -len(values) % block)).reshape(-1, block)
    return (rows * largest[:, None]).reshape(-1)[: len(values)]


def stored(
    codes: Tensor, magnitudes: Tensor, outer: Tensor | None, mean: Tensor | None, shape: tuple[int, int]
) -> dict[str, Tensor]:
    """{ending: tensor} as bitsandbytes keeps them in a file, so that transformers reads it with that package."""
    about = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": "float32", "shape": list(shape)}
    found = {"weight": codes[:, None], "weight.absmax": magnitudes, "weight.quant_map": codebook(codes.device)}
    if outer is not None and mean is not None:
        about |= {"nested_blocksize": OUTER, "nested_dtype": "float32", "nested_offset": mean.item()}
        found |= {"weight.nested_absmax": outer, "weight.nested_quant_map": dynamic_map(codes.device)}
    blob = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)
    return {name: each.clone() for name, each in found.items()} | {"weight.quant_state.bitsandbytes__nf4": blob}


def read(found: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, tuple[int, int]]:
    """What `stored` gives: (codes, magnitudes, outer, mean, shape). Raises ModelError for other block sizes."""
    about = json.loads(bytes(found["weight.quant_state.bitsandbytes__nf4"].cpu().numpy()))
    if about["blocksize"] != BLOCK or about.get("nested_blocksize", OUTER) != OUTER:
        raise ModelError(f"NF4 in blocks of {about['blocksize']}: posttrain knows blocks of {BLOCK}")
    codes, magnitudes = found["weight"].reshape(-1).view(torch.uint8), found["weight.absmax"]
    if "nested_offset" not in about:
        return codes, magnitudes, None, None, tuple(about["shape"])
    mean = torch.tensor(about["nested_offset"], dtype=torch.float32, device=codes.device)
    return codes, magnitudes, found["weight.nested_absmax"], mean, tuple(about["shape"])
