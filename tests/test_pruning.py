"""Weights left out: goldens, exact counts, what must not change a mask, what layers are seen to be given, and zeros that stay."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import make, twin

from posttrain.batch import Sequences
from posttrain.compress.blocks import blocks_of, refuse_odd_inputs
from posttrain.compress.calibration import seen_by
from posttrain.compress.compensation import output_error
from posttrain.compress.pruners import Magnitude, SparseGPT, Wanda
from posttrain.compress.pruning import (
    count_of,
    lowest_of_all,
    lowest_of_groups,
    lowest_of_rows,
    magnitude,
    sparsegpt,
    stored_bytes,
    wanda,
)
from posttrain.errors import RecipeError
from posttrain.models.linears import matrix_of, put
from posttrain.training.fit import Learner
from posttrain.training.optim import AdamW
from posttrain.tuners import Tuner, tuned

F64 = torch.float64
SHARED = [5, 9, 40, 3, 3, 71, 8, 2, 66, 12, 31, 4, 4, 90, 17, 23, 50]
ROWS = Sequences.of([([*SHARED, *end], [False] * 17 + [True] * len(end)) for end in ([7, 8, 9], [60, 61], [33])])


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def moments(columns, rho=0.0, seed=1, rows=2048, sizes=1.0):
    inputs = normal(rows, columns, seed=seed)
    for place in range(1, columns):
        inputs[:, place] = rho * inputs[:, place - 1] + (1 - rho**2) ** 0.5 * inputs[:, place]
    inputs = inputs * sizes
    return 2 * inputs.t() @ inputs / rows


# ---- which


def test_the_golden_example_wanda_keeps_what_has_large_inputs_and_magnitude_what_is_large():
    weight, norms = torch.tensor([[1.0, -2.0, 3.0, -4.0]]), torch.tensor([8.0, 3.0, 1.0, 0.5])
    scores = wanda(weight, norms**2)
    assert scores.tolist() == [[8, 6, 3, 2]]
    assert weight.masked_fill(lowest_of_rows(scores, 0.5), 0).tolist() == [[1, -2, 0, 0]]
    assert weight.masked_fill(lowest_of_rows(magnitude(weight), 0.5), 0).tolist() == [[0, 0, 3, -4]]


@given(st.integers(1, 9), st.integers(1, 40), st.floats(0, 0.999), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_as_many_are_left_out_as_was_asked_for_to_the_weight(rows, columns, share, seed):
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 4, (rows, columns), generator=draw).double()  # many are equal
    assert int(lowest_of_all([scores], share)[0].sum()) == count_of(rows * columns, share)
    assert (lowest_of_rows(scores, share).sum(1) == count_of(columns, share)).all()
    assert sum(int(each.sum()) for each in lowest_of_all([scores, scores[:1]], share)) == count_of((rows + 1) * columns, share)


def test_a_share_whose_product_is_whole_but_for_rounding_is_that_number():
    assert count_of(100, 0.29) == 29  # 28.999999999999996
    assert count_of(10, 0.55) == 5


def test_of_equal_scores_those_that_stand_first_are_left_out():
    assert lowest_of_rows(torch.ones(2, 4), 0.5).tolist() == [[True, True, False, False]] * 2
    assert lowest_of_groups(torch.ones(1, 8), (2, 4)).tolist() == [[True, True, False, False] * 2]


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (4, 8)])
def test_n_of_every_m_consecutive_inputs_stay_and_they_are_the_largest(pattern):
    n, m = pattern
    scores = normal(6, 32).abs()
    kept = (~lowest_of_groups(scores, pattern)).unflatten(1, (-1, m))
    assert (kept.sum(-1) == n).all()
    groups = scores.unflatten(1, (-1, m))
    assert (groups.masked_fill(~kept, torch.inf).amin(-1) > groups.masked_fill(kept, -torch.inf).amax(-1)).all()
    with pytest.raises(ValueError, match="cannot be divided into groups"):
        lowest_of_groups(normal(2, 30), (2, 4))


def test_scaled_inputs_with_unscaled_weights_change_magnitudes_mask_and_never_wandas():
    """Input channel j times c, column j of W over c: the same function."""
    weight, squares = normal(16, 32), normal(32, seed=2) ** 2
    scale = 2.0 ** torch.arange(-8, 8).double().repeat_interleave(2)  # powers of two: the scores are the same bits
    one = lowest_of_rows(wanda(weight, squares), 0.5)
    other = lowest_of_rows(wanda(weight / scale, squares * scale**2), 0.5)
    assert torch.equal(one, other)
    assert not torch.equal(lowest_of_rows(magnitude(weight), 0.5), lowest_of_rows(magnitude(weight / scale), 0.5))


def test_equal_inputs_make_wanda_magnitude_within_rows():
    weight = normal(8, 24)
    assert torch.equal(lowest_of_rows(wanda(weight, torch.full((24,), 3.0, dtype=F64)), 0.3), lowest_of_rows(magnitude(weight), 0.3))


# ---- SparseGPT


@pytest.mark.parametrize(("columns", "share", "block"), [(40, 0.5, 16), (40, 0.33, 128), (24, 0.9, 7), (40, 0.0, 16)])
def test_sparsegpt_leaves_out_exactly_the_share_whatever_its_blocks(columns, share, block):
    weight = normal(5, columns)
    found = sparsegpt(weight, moments(columns, 0.5), share, block=block)
    assert int((found == 0).sum()) == count_of(5 * columns, share)
    if share == 0:
        assert torch.equal(found, weight)


def test_sparsegpt_leaves_n_of_m():
    found = sparsegpt(normal(6, 40), moments(40, 0.5), pattern=(2, 4), block=10)
    assert ((found != 0).unflatten(1, (-1, 4)).sum(-1) == 2).all()
    wide = sparsegpt(normal(3, 40), moments(40, 0.5), pattern=(5, 20), block=16)
    assert ((wide != 0).unflatten(1, (-1, 20)).sum(-1) == 5).all(), "groups longer than a block"


def test_the_last_choice_is_the_optimal_brain_surgeons():
    """Of two weights one is left out: the one with the least w^2 / [H^-1]_jj, and the other moves as least squares says, where it
    comes later."""
    hessian = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=F64)
    found = sparsegpt(torch.tensor([[0.5, 1.0]], dtype=F64), hessian, 0.5, damp=1e-12)
    torch.testing.assert_close(found, torch.tensor([[0.0, 1.25]], dtype=F64))  # + 0.5 * H_12 / H_22


@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_with_inputs_of_very_different_sizes_magnitude_loses_ten_times_as_much(pattern):
    """64 x 128 Gaussian weights, 3 of 128 inputs times 20, half left out: METHODS computes .0760, .0078 and .0063, of other draws."""
    sizes = torch.ones(128, dtype=F64)
    sizes[[7, 50, 101]] = 20.0
    errors = []
    for seed in range(4):
        weight, hessian = normal(64, 128, seed=seed), moments(128, 0.3, seed + 9, 512, sizes)

        def masked(scores, weight=weight):
            return weight.masked_fill(lowest_of_rows(scores, 0.5) if pattern is None else lowest_of_groups(scores, pattern), 0)

        found = masked(magnitude(weight)), masked(wanda(weight, hessian.diagonal())), sparsegpt(weight, hessian, 0.5, pattern)
        errors.append([output_error(each - weight, hessian) / output_error(weight, hessian) for each in found])
    plain, by_inputs, compensated = torch.tensor(errors).mean(0).tolist()
    assert plain > 5 * by_inputs
    assert compensated < 0.9 * by_inputs
    if pattern is None:
        assert 0.05 < plain < 0.1
        assert 0.005 < by_inputs < 0.01


def test_bytes_are_those_of_a_bit_mask_or_of_places_in_groups():
    assert stored_bytes(1024, 512) == 2 * 512 + 1024 // 8
    assert stored_bytes(1024, 512, (2, 4)) == 2 * 1024 * 9 // 16


# ---- what layers are given


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mamba"])
def test_what_a_layer_is_seen_to_be_given_is_what_each_row_alone_gives_it(name):
    lm = make(name, "float64")
    targets = ["*.in_proj", "*.out_proj"] if name == "mamba" else ["*"]
    block = blocks_of(lm.model, targets)[1]
    seen = seen_by(lm, ROWS, block, second=True)
    given_to = {path: [] for path in block.layers}
    hooks = [
        layer.register_forward_pre_hook(lambda _layer, inputs, path=path: given_to[path].append(inputs[0][0]))
        for path, layer in block.layers.items()
    ]
    with torch.no_grad():
        for row in ROWS.rows():
            lm.model(torch.tensor([row]))
    for hook in hooks:
        hook.remove()
    for path, parts in given_to.items():
        inputs = torch.cat(parts)
        assert seen[path].tokens == len(inputs) == 57
        torch.testing.assert_close(seen[path].squares, inputs.square().sum(0))
        torch.testing.assert_close(seen[path].mean_absolute, inputs.abs().mean(0))
        torch.testing.assert_close(seen[path].hessian, 2 * inputs.t() @ inputs / len(inputs))


def test_both_layouts_see_the_same_and_nothing_behind_the_block_is_computed():
    lm = make("llama", "float64")
    block = blocks_of(lm.model)[0]
    later = []
    hook = lm.model.model.layers[1].register_forward_pre_hook(lambda *_: later.append(1))
    tree, padded = (seen_by(each, ROWS, block, second=False, micro_tokens=25) for each in (lm, twin(lm, "padded")))
    hook.remove()
    assert not later
    for path in block.layers:
        torch.testing.assert_close(tree[path].squares, padded[path].squares)


def test_layers_that_read_the_same_share_what_they_have_seen():
    lm = make("llama")
    seen = seen_by(lm, ROWS, blocks_of(lm.model)[0], second=True)
    names = {path.rpartition(".")[2]: each for path, each in seen.items()}
    assert names["q_proj"] is names["k_proj"] is names["v_proj"]
    assert names["gate_proj"] is names["up_proj"]
    assert len({id(each) for each in seen.values()}) == 4


@pytest.mark.parametrize(("name", "count"), [("llama", 7), ("gpt2", 4), ("phi", 6)])
def test_every_linear_layer_of_a_block_and_nothing_else_is_found(name, count):
    model = make(name).model
    blocks = blocks_of(model)
    assert [len(block.layers) for block in blocks] == [count, count]
    whole = {id(parameter) for block in blocks for parameter in block.module.parameters() if parameter.ndim == 2}
    assert {id(layer.weight) for block in blocks for layer in block.layers.values()} == whole


def test_targets_choose_layers_and_a_pattern_without_any_is_refused():
    model = make("llama").model
    (first, second) = blocks_of(model, ["*.mlp.*"])
    assert {path.rpartition(".")[2] for path in first.layers} == {"gate_proj", "up_proj", "down_proj"}
    assert [*blocks_of(model, ["q_proj", "*.mlp.up_proj"])[0].layers] == [f"model.layers.0.{name}" for name in ("self_attn.q_proj", "mlp.up_proj")]
    with pytest.raises(RecipeError, match=r"no linear layer .* matches '\*\.mpl\.\*'"):
        blocks_of(model, ["*.mpl.*"])
    with pytest.raises(RecipeError, match=r"the 32 inputs of .* cannot be divided into groups of 3; take a divisor of 16"):
        refuse_odd_inputs([first, second], 3, "group: 3")


def test_a_transposed_layer_is_read_and_written_as_outputs_by_inputs():
    model = make("gpt2").model
    layer = model.transformer.h[0].mlp.c_fc
    assert matrix_of(layer).shape == (128, 32)
    put(layer, torch.arange(128 * 32).float().view(128, 32))
    inputs = torch.ones(1, 32)
    torch.testing.assert_close(layer(inputs) - layer.bias, inputs @ torch.arange(128 * 32).float().view(128, 32).t())


# ---- models


@pytest.mark.parametrize("method", [Magnitude(), Magnitude(within="global"), Magnitude(within="row"), Wanda(), SparseGPT()], ids=lambda m: f"{m.kind}-{getattr(m, 'within', '')}")
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_pruned_model_has_exactly_the_zeros_that_were_asked_for(name, method):
    lm = make(name)
    before = {key: each.clone() for key, each in lm.model.state_dict().items()}
    blocks = blocks_of(lm.model)
    method.prune(lm, blocks, ROWS, 0.4, None)
    matrices = [matrix_of(layer) for block in blocks for layer in block.layers.values()]
    zeros = [int((each == 0).sum()) for each in matrices]
    if getattr(method, "within", "") == "global":
        assert sum(zeros) == count_of(sum(each.numel() for each in matrices), 0.4)
        assert len({each.numel() - zero for each, zero in zip(matrices, zeros, strict=True)}) > 3
    elif method.kind == "wanda" or getattr(method, "within", "") == "row":
        assert all(((each == 0).sum(1) == count_of(each.shape[1], 0.4)).all() for each in matrices)
    else:
        assert zeros == [count_of(each.numel(), 0.4) for each in matrices]
    changed = {key for key, each in lm.model.state_dict().items() if not torch.equal(each, before[key])}
    inside = {f"{path}.weight" for block in blocks for path in block.layers}
    assert changed == inside, "embeddings, norms, biases and head stay as they are"


def test_a_block_is_pruned_by_what_the_pruned_blocks_before_it_give():
    lm, other = make("llama"), make("llama")
    Wanda().prune(lm, blocks_of(lm.model), ROWS, 0.5, None)
    first, second = blocks_of(other.model)
    Wanda().prune(other, [first], ROWS, 0.5, None)
    seen = seen_by(other, ROWS, second, second=False)
    for path, layer in second.layers.items():
        expected = Wanda().pruned(matrix_of(layer), seen[path], 0.5, None)
        assert torch.equal(lm.model.get_submodule(path).weight, expected), path


def test_nothing_left_out_leaves_the_model_as_it_is():
    for method in (Magnitude(), Wanda(), SparseGPT()):
        lm = make("llama")
        before = {key: each.clone() for key, each in lm.model.state_dict().items()}
        method.prune(lm, blocks_of(lm.model), ROWS, 0.0, None)
        assert all(torch.equal(each, before[key]) for key, each in lm.model.state_dict().items()), method.kind


# ---- zeros that stay


class Restless(torch.optim.Optimizer):
    """Moves every weight at every step, gradient or not: so does an optimizer that mixes the entries of a matrix."""

    def __init__(self, groups):
        super().__init__(groups, {"lr": 0.1})

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data += 0.01


class RestlessOptimizer(AdamW):
    """As a section of a recipe."""

    def build(self, parameters, paces=None):
        return Restless(list(parameters.values()))


def trained(tuner, optim, steps=4):
    """A pruned model after some updates, and where its zeros were."""
    lm = make("llama")
    Wanda().prune(lm, blocks_of(lm.model), ROWS, 0.5, None)
    tuner = Tuner.model_validate(tuner)
    tuner.install(lm.model)
    before = {name: each.detach().clone() for name, each in tuned(lm.model).items()}
    learner = Learner.of(tuned(lm.model), optim, tuner)
    for step in range(steps):
        (-lm.logprobs(ROWS).mean()).backward()
        learner.step(step, steps)
    return before, {name: each.detach() for name, each in tuned(lm.model).items()}


@pytest.mark.parametrize("tuner", [{"kind": "full", "keep_zeros": True}, {"kind": "layers", "train": ["*.mlp.*"], "keep_zeros": True}], ids=lambda t: t["kind"])
@pytest.mark.parametrize("optim", [AdamW(learning_rate=0.01, weight_decay=0.1, clip=None), RestlessOptimizer()], ids=["adamw", "restless"])
def test_what_pruning_left_out_stays_out_under_any_optimizer_and_the_rest_learns(tuner, optim):
    before, after = trained(tuner, optim)
    linear = [name for name, each in before.items() if each.ndim == 2 and "layers." in name]
    assert len(linear) == (14 if tuner["kind"] == "full" else 6)
    for name in linear:
        zeros = before[name] == 0
        assert int(zeros.sum()) == zeros.numel() // 2
        assert (after[name][zeros] == 0).all(), name
        assert (after[name][~zeros] != before[name][~zeros]).all(), name


def test_without_keep_zeros_they_are_trained_back_in_and_where_there_are_none_it_is_refused():
    before, after = trained({"kind": "full"}, AdamW(learning_rate=0.01))
    name = "model.layers.0.mlp.up_proj.weight"
    assert (after[name][before[name] == 0] != 0).any()
    with pytest.raises(RecipeError, match="train a pruned model, or remove keep_zeros"):
        Tuner.model_validate({"kind": "full", "keep_zeros": True}).install(make("llama").model)


def test_what_does_not_learn_counts_in_no_gradient_norm():
    lm = make("llama")
    Wanda().prune(lm, blocks_of(lm.model), ROWS, 0.5, None)
    Tuner.model_validate({"kind": "full", "keep_zeros": True}).install(lm.model)
    (-lm.logprobs(ROWS).mean()).backward()
    weight = lm.model.model.layers[0].self_attn.q_proj.weight
    assert (weight.grad[weight == 0] == 0).all()
    assert (weight.grad[weight != 0] != 0).any()
