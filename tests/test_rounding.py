"""Rounding to integers: goldens, what must hold for any numbers, and the bits as compressed-tensors stores them."""

import itertools

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import make

from posttrain.batch import Sequences
from posttrain.compress.blocks import blocks_of
from posttrain.compress.calibration import seen_by
from posttrain.compress.compensation import compensated, inverse_factor, output_error
from posttrain.compress.folding import folds_of
from posttrain.compress.rounders import AWQ, GPTQ, Nearest
from posttrain.compress.rounding import awq_scale, awq_shrink, gptq, grid, nearest
from posttrain.errors import RunError
from posttrain.models.integers import Integers, from_words, to_words
from posttrain.models.linears import matrix_of

F64 = torch.float64
BITS = (2, 3, 4, 8)
GROUPS = (16, "channel", "tensor")
EACH = list(itertools.product(BITS, GROUPS))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def moments(columns, rho=0.0, seed=1, rows=2048):
    """2 X^T X / n of inputs whose neighbours correlate."""
    noise = normal(rows, columns, seed=seed)
    inputs = noise.clone()
    for place in range(1, columns):
        inputs[:, place] = rho * inputs[:, place - 1] + (1 - rho**2) ** 0.5 * noise[:, place]
    return 2 * inputs.t() @ inputs / rows


def whole(_column, rest):
    return rest[:, 0].round()


# ---- to the nearest


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), EACH)
def test_the_error_is_at_most_half_a_step(bits, group, symmetric):
    weight = normal(5, 40) * normal(5, 1).exp()
    found = nearest(weight, bits, group, symmetric)
    step = found.spread(found.scale).expand_as(weight)
    assert ((found.dense() - weight).abs() <= step / 2 * (1 + 1e-12)).all()
    assert int(found.codes.max()) < 2**bits


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), EACH)
def test_what_lies_on_the_grid_stays(bits, group, symmetric):
    once = nearest(normal(5, 40), bits, group, symmetric)
    again = nearest(once.dense(), bits, group, symmetric)
    torch.testing.assert_close(again.dense(), once.dense(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", GROUPS)
def test_more_bits_and_smaller_groups_lose_less(group, symmetric):
    weight = normal(8, 64)
    errors = [float((nearest(weight, bits, group, symmetric).dense() - weight).norm()) for bits in BITS]
    assert errors == sorted(errors, reverse=True)
    sizes = [float((nearest(weight, 4, size, symmetric).dense() - weight).norm()) for size in (8, 32, "channel", "tensor")]
    assert sizes == sorted(sizes)


def test_halves_go_to_even_and_zero_is_an_integer():
    found = nearest(torch.tensor([[-7.0, -2.5, -1.5, 0.5, 1.5, 7.0]], dtype=F64), 4, "channel")
    assert found.dense().tolist() == [[-7, -2, -2, 0, 2, 7]]
    scale, zero = grid(torch.tensor([[-0.875, 0.1, 2.875]], dtype=F64), 4, "channel", False)
    assert float(scale) == pytest.approx(0.25)
    assert float(zero) == 4  # round(3.5)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_group_of_equal_weights_is_exact_and_zeros_have_a_step_of_one(symmetric):
    found = nearest(torch.tensor([[0.7] * 4 + [0.0] * 4 + [-0.3] * 4], dtype=F64), 4, 4, symmetric)
    torch.testing.assert_close(found.dense(), torch.tensor([[0.7] * 4 + [0.0] * 4 + [-0.3] * 4], dtype=F64))
    assert float(found.scale[0, 1]) == 1.0


def test_scales_are_rounded_to_the_dtype_of_the_weights_before_anything_is_rounded_to_them():
    weight = normal(4, 32).bfloat16()
    found = nearest(weight, 4, 16)
    assert found.scale.dtype == torch.bfloat16
    step = found.spread(found.scale).double()
    codes = (weight.double() / step).round() + 8
    assert ((found.codes.double() - codes).abs() <= 1e-9).all()


def test_int4_of_gaussian_weights_loses_what_is_computed_for_it():
    weight = normal(400, 640)
    error = float(((nearest(weight, 4, 64).dense() - weight) ** 2).mean())
    assert error == pytest.approx(0.01165, rel=0.02)  # METHODS' figure: symmetric int4, blocks of 64


# ---- GPTQ


def test_the_golden_example_of_two_weights():
    hessian = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=F64)
    weight = torch.tensor([[0.6, 0.6]], dtype=F64)

    def error(found):
        return float((found - weight) @ hessian @ (found - weight).t())

    found = compensated(weight, inverse_factor(hessian, 0.0), whole, [0, 2])
    assert found.tolist() == [[1, 0]]
    assert error(found) == pytest.approx(0.56)
    assert error(weight.round()) == pytest.approx(0.96)


def test_what_one_column_loses_the_others_make_good_as_least_squares_would():
    hessian, weight = moments(6, 0.7), normal(3, 6)
    fixed = weight[:, 0].round()

    def first_only(column, rest):
        return fixed if column == 0 else rest[:, 0]

    found = compensated(weight, inverse_factor(hessian, 0.0), first_only, [0, 6])
    shift = torch.linalg.solve(hessian[1:, 1:], hessian[1:, 0])
    torch.testing.assert_close(found[:, 1:], weight[:, 1:] - (fixed - weight[:, 0])[:, None] * shift)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize("group", GROUPS)
def test_with_inputs_that_do_not_correlate_it_is_rounding_to_the_nearest(group, order, symmetric):
    weight = normal(5, 40)
    found, plain = gptq(weight, torch.eye(40, dtype=F64), 3, group, symmetric, order=order), nearest(weight, 3, group, symmetric)
    assert torch.equal(found.codes, plain.codes)
    assert torch.equal(found.scale, plain.scale)


@given(st.integers(0, 10_000), st.sampled_from([1, 5, 16, 24, 64]), st.booleans())
@settings(max_examples=12, deadline=None)
def test_blocks_are_a_matter_of_speed(seed, block, order):
    weight, hessian = normal(3, 40, seed=seed), moments(40, 0.8, seed=seed, rows=128)
    lazy, plain = (gptq(weight, hessian, 3, 16, False, order=order, block=size) for size in (block, 40))
    assert torch.equal(lazy.codes, plain.codes)
    torch.testing.assert_close(lazy.scale, plain.scale)


@pytest.mark.parametrize(("rho", "nearest_error", "gptq_error"), [(0.9, 0.0496, 0.0095), (0.5, 0.0487, 0.0356), (0.0, 0.0481, 0.0465)])
def test_correlated_inputs_lose_what_is_computed_for_them(rho, nearest_error, gptq_error):
    """3 bits, 64 x 128 Gaussian weights, one grid a row: the errors of METHODS, of other draws."""
    errors = []
    for seed in range(4):
        weight, hessian = normal(64, 128, seed=seed + 50), moments(128, rho, seed)
        scale = output_error(weight, hessian)
        errors.append([
            output_error(found.dense() - weight, hessian) / scale
            for found in (nearest(weight, 3, "channel", False), gptq(weight, hessian, 3, "channel", False))
        ])  # fmt: skip
    plain, better = torch.tensor(errors).mean(0).tolist()
    assert plain == pytest.approx(nearest_error, rel=0.12)
    assert better == pytest.approx(gptq_error, rel=0.12)
    assert better < plain


def test_the_order_of_columns_helps_where_inputs_differ_in_size():
    sizes = torch.linspace(2, -2, 64, dtype=F64).flip(0).exp()
    hessian = moments(64, 0.9) * sizes[:, None] * sizes
    errors = [
        sum(output_error(gptq(normal(16, 64, seed=seed), hessian, 3, "channel", order=order).dense() - normal(16, 64, seed=seed), hessian)
            for seed in range(3))
        for order in (False, True)
    ]  # fmt: skip
    assert errors[1] < errors[0]


def test_weights_on_inputs_that_are_always_zero_become_zero():
    hessian, weight = moments(8, 0.5), normal(3, 8)
    hessian[2], hessian[:, 2] = 0.0, 0.0
    found = gptq(weight, hessian, 4, "channel").dense()
    assert (found[:, 2] == 0).all()
    assert (found[:, 3].abs() > 0).any()


def test_the_damping_grows_until_there_is_an_inverse_and_what_has_none_is_refused():
    hessian = torch.diag(torch.tensor([1.0, 1.0, -0.2], dtype=F64))  # rounding can make it so
    damped = inverse_factor(hessian, 0.01)
    torch.testing.assert_close((damped.t() @ damped).inverse(), hessian + torch.eye(3, dtype=F64) * 0.6)  # 100 times 0.01 of 0.6
    with pytest.raises(RunError, match="look at the calibration data"):
        inverse_factor(torch.full((3, 3), float("nan"), dtype=F64))


# ---- AWQ


def outliers(columns=64):
    size = torch.ones(columns, dtype=F64)
    size[[3, 40]] = 30.0
    hessian = moments(columns) * size[:, None] * size
    return hessian, size * (2 / torch.pi) ** 0.5


@pytest.mark.parametrize("symmetric", [True, False])
def test_scaled_columns_of_large_inputs_lose_less(symmetric):
    weight, (hessian, absolute) = normal(16, 64), outliers()
    scale = awq_scale([weight, normal(8, 64, seed=5)], absolute, hessian, 3, 32, symmetric)
    assert float(scale[3]) > 2 * float(scale[0])
    assert float(scale.max() * scale.min()) == pytest.approx(1)
    plain = output_error(nearest(weight, 3, 32, symmetric).dense() - weight, hessian)
    scaled = output_error(nearest(weight * scale, 3, 32, symmetric).dense() / scale - weight, hessian)
    assert scaled < 0.5 * plain


def test_equal_inputs_need_no_scale():
    scale = awq_scale([normal(16, 64)], torch.ones(64, dtype=F64), moments(64), 4, 32)
    assert torch.equal(scale, torch.ones(64, dtype=F64))


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_range_that_is_cut_off_loses_less_where_one_weight_sticks_out(symmetric):
    weight = normal(16, 80)
    weight[:, 5] *= 4
    hessian = moments(80, 0.3)
    shrink = awq_shrink(weight, hessian, 3, 32, symmetric)
    assert shrink.shape == (16, 3)
    assert float(shrink.min()) >= 0.5
    assert float(shrink.max()) <= 1
    cut, plain = (nearest(weight, 3, 32, symmetric, each).dense() - weight for each in (shrink, 1.0))
    diagonal = torch.block_diag(*(hessian[start : start + 32, start : start + 32] for start in (0, 32, 64)))
    assert output_error(cut, diagonal) < output_error(plain, diagonal)


# ---- the bits


@given(st.sampled_from(BITS), st.integers(1, 70), st.integers(1, 5), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_words_are_those_of_compressed_tensors_and_give_back_the_codes(bits, columns, rows, seed):
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    signed = (codes.int() - 2 ** (bits - 1)).to(torch.int8)
    words = to_words(codes, bits)
    assert torch.equal(words, pack_to_int32(signed, bits))
    assert torch.equal(from_words(words, bits, columns), codes)


def test_four_bits_are_eight_codes_a_word_the_first_in_the_lowest_bits():
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 9]], dtype=torch.uint8)
    assert to_words(codes, 4).tolist() == [[0x87654321 - 2**32, 0x9]]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), EACH)
def test_what_is_packed_is_as_large_as_it_says_and_comes_back(bits, group, symmetric):
    found = nearest(normal(7, 40).float(), bits, group, symmetric)
    packed = found.packed()
    assert found.bytes == sum(each.numel() * each.element_size() for each in packed.values())
    assert ("weight_zero_point" in packed) == (not symmetric)
    again = Integers.unpacked(packed, bits, found.group)
    assert torch.equal(again.dense(), found.dense())
    assert again.bytes == found.bytes
    if not symmetric and group != "tensor":
        signed = (found.zero.int() - 2 ** (bits - 1)).to(torch.int8)
        assert torch.equal(packed["weight_zero_point"], pack_to_int32(signed, bits, packed_dim=0))


# ---- models


SEQS = Sequences.of([([5, 9, 40, 3, 3, 71, 8, 2, 66, 12, 31, 17, 60], [False] * 4 + [True] * 9), ([61, 22, 7, 80], [False] * 2 + [True] * 2)])
GRID = {"bits": 4, "group": 16, "symmetric": False}


@pytest.mark.parametrize(
    ("name", "folds"),
    [
        ("llama", {"q_proj k_proj v_proj", "gate_proj up_proj", "down_proj"}),
        ("qwen3", {"q_proj k_proj v_proj", "gate_proj up_proj", "down_proj"}),
        ("gemma3", {"q_proj k_proj v_proj", "gate_proj up_proj", "down_proj"}),
        ("gpt2", {"c_attn", "c_fc"}),
        ("phi", {"q_proj k_proj v_proj fc1"}),
        ("olmo2", {"down_proj"}),  # its norms come after
    ],
)
def test_a_scale_is_folded_in_wherever_the_architecture_allows_it_and_the_model_stays_what_it_was(name, folds):
    lm = make(name, "float64")
    with torch.no_grad():
        before = lm.logprobs(SEQS)
    found = [(block, folds_of(lm, block, SEQS)) for block in blocks_of(lm.model)]
    draw = torch.Generator().manual_seed(0)
    for _, each in found:
        assert {" ".join(path.rpartition(".")[2] for path in fold.readers) for fold in each} == folds
        for fold in each:
            columns = matrix_of(next(iter(fold.readers.values()))).shape[1]
            fold.fold((2 * torch.rand(columns, dtype=F64, generator=draw) - 1).exp())
    with torch.no_grad():
        gap = float((lm.logprobs(SEQS) - before).abs().max())
    assert gap < (1e-5 if name == "gemma3" else 1e-10)  # whose norms compute in float32


def test_values_are_folded_into_the_output_of_attention_where_each_reaches_one_place_of_it():
    lm = make("llama", "float64", num_key_value_heads=4)
    (block, _) = blocks_of(lm.model)
    readers = {" ".join(path.rpartition(".")[2] for path in fold.readers) for fold in folds_of(lm, block, SEQS)}
    assert "o_proj" in readers


@pytest.mark.parametrize("method", [Nearest(), GPTQ(), GPTQ(order=True), AWQ()], ids=lambda each: f"{each.kind}{getattr(each, 'order', '')}")
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_models_weights_become_those_of_its_codes(name, method):
    lm = make(name)
    blocks = blocks_of(lm.model)
    found = method.quantize(lm, blocks, SEQS if method.reads else None, GRID)
    assert set(found) == {path for block in blocks for path in block.layers}
    for block in blocks:
        for path, layer in block.layers.items():
            assert torch.equal(matrix_of(layer), found[path].dense())
            assert int(found[path].codes.max()) < 16


def test_gptq_loses_less_than_the_nearest_on_what_it_was_calibrated_on():
    """Summed over layers; each block is given what the rounded blocks before it give."""
    draw = torch.Generator().manual_seed(0)
    rows = Sequences.of([(torch.randint(2, 97, (40,), generator=draw).tolist(), [False] + [True] * 39) for _ in range(12)])
    errors = {}
    for method in (Nearest(), GPTQ(), AWQ()):
        lm, plain = make("llama", "float64"), make("llama", "float64")
        block = blocks_of(lm.model)[0]
        seen = seen_by(lm, rows, block, second=True)
        method.quantize(lm, [block], rows if method.reads else None, {**GRID, "bits": 3})
        with torch.no_grad():
            errors[method.kind] = float((lm.hidden(rows) - plain.hidden(rows)).square().mean())
        if method.kind != "awq":  # which changes the inputs, too
            errors[f"{method.kind} layers"] = sum(
                output_error(matrix_of(layer) - plain.model.get_submodule(path).weight.detach(), seen[path].hessian)
                for path, layer in block.layers.items()
            )
    assert errors["gptq layers"] < errors["rtn layers"]
    assert errors["gptq"] < errors["rtn"]
    assert errors["awq"] < errors["rtn"]
