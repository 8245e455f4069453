"""FlexAttention over a tree. On a CPU torch runs it dense and uncompiled, which tests all but the kernels; `gpu` tests those."""

import math
from dataclasses import replace

import pytest
import torch
from tiny_models import make
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from posttrain.batch import Sequences
from posttrain.models import attention, layout
from posttrain.models.attention import BLOCK, Scoring, TreePlan, block_mask, kernel_for

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def differentiable_on_a_cpu(monkeypatch):
    """torch refuses gradients of FlexAttention on a CPU, since no kernel is generated there; its dense form has them."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    torch.compiler.reset()


@pytest.fixture
def compiled(monkeypatch):
    """FlexAttention compiled as for a GPU as far as it goes without one: traced, with its backward, and run uncompiled."""
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(attention, "flex_attention", torch.compile(flex_attention, dynamic=True, fullgraph=True, backend=counter))
    return counter


def tokens(count, seed):
    return torch.randint(0, 97, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def family():
    """Three levels of shared prefixes that begin and end inside of blocks, and a lone sequence: 581 tokens."""
    root, mid = tokens(150, 1), tokens(90, 2)
    return [
        root + mid + tokens(40, 3),
        root + mid + tokens(31, 4),
        root + mid + tokens(20, 5) + tokens(25, 6),
        root + mid + tokens(20, 5) + tokens(17, 7),
        root + tokens(60, 8),
        root,
        tokens(148, 9),
    ]


def flat(lengths):
    """A tree without sharing."""
    return layout.tree([[index, *tokens(length - 1, index)] for index, length in enumerate(lengths)])


FAMILY = layout.tree(family())
CASES = {
    "plain": {},
    "window": {"window": 37},
    "a window that does not bind": {"window": 10**6},
    "cap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "window, cap and sinks": {"window": 37, "softcap": 1.5, "sinks": True},
}
cases = pytest.mark.parametrize("case", CASES)
groups = pytest.mark.parametrize("grouped", [1, 2])


def inputs(row, grouped, case, dtype=torch.float32, device=CPU, dims=(16, 16)):
    """queries, keys, values and sinks, with gradients, and a scoring; laid out in memory as a model gives them."""
    draw = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(device, dtype).requires_grad_()

    query, key, value, sinks = random(1, row, 4, dims[0]), random(1, row, 4 // grouped, dims[0]), random(1, row, 4 // grouped, dims[1]), random(4)  # fmt: skip
    settings = {**CASES[case], "sinks": sinks if CASES[case].get("sinks") else None}
    leaves = [query, key, value, *([sinks] if settings["sinks"] is not None else [])]
    return leaves, [each.transpose(1, 2) for each in leaves[:3]], Scoring(0.4, **settings)


def gradients(out, leaves):
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()  # the same in every dtype
    return torch.autograd.grad((out * weight.to(out)).sum(), leaves)


def distance(one, other):
    """The relative distance of two tensors."""
    one, other = one.detach().double().cpu(), other.detach().double().cpu()
    return float((one - other).norm() / other.norm())


# ---- which way attention goes


def test_which_attention_runs_is_decided_by_device_dtype_row_and_heads():
    float32, bfloat16, heads = torch.float32, torch.bfloat16, (64, 64)
    for row in (1, 10_000):
        assert kernel_for("cpu", float32, row, heads, plain=True) == "flash"
        assert kernel_for("cpu", float32, row, heads, plain=False) == "segments"
        assert kernel_for("cpu", float32, row, (64, 32), plain=True) == "segments"
    for plain in (True, False):
        assert kernel_for("cuda", bfloat16, BLOCK + 1, heads, plain) == "flex"
        assert kernel_for("cuda", float32, BLOCK + 1, (192, 128), plain) == "segments"
        assert kernel_for("cuda", bfloat16, BLOCK + 1, (192, 128), plain) == "flex"
        assert kernel_for("cuda", bfloat16, BLOCK, heads, plain) == "segments"
        assert kernel_for("cuda", bfloat16, 10_000, (8, 8), plain) == "segments"
        assert kernel_for("cuda", bfloat16, 10_000, (512, 512), plain) == "segments"
        assert kernel_for("cuda", torch.float64, 10_000, heads, plain) == "segments"
        assert kernel_for("mps", float32, 10_000, heads, plain) == "segments"


def test_under_autocast_the_dtype_is_that_of_autocast():
    value = torch.zeros(1)
    assert attention._computed_in(value) == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention._computed_in(value) == torch.bfloat16


# ---- what is seen


def dense(tree, window):
    """allowed[q, k], from the paths of the sequences."""
    row = len(tree.tokens)
    allowed = torch.zeros(row, row, dtype=torch.bool)
    for path in tree.paths:
        index = torch.from_numpy(path)
        gap = tree.positions[index][:, None] - tree.positions[index][None]
        allowed[index[:, None], index[None]] |= (gap >= 0) & (gap < (window or 10**6))
    return allowed


def squares(counts, indices):
    """The squares of a block mask as a table of query blocks by key blocks."""
    table = torch.zeros(indices.shape[-2:], dtype=torch.bool)
    for block, (count, listed) in enumerate(zip(counts[0, 0], indices[0, 0], strict=True)):
        table[block, listed[:count].long()] = True
    return table


TREES = {
    "family": FAMILY,
    "one token": flat([1]),
    "one block": flat([128]),
    "whole blocks": flat([256, 128]),
    "ragged": flat([5, 300, 1, 200, 127]),
    "long and deep": layout.tree([tokens(700, 1) + tokens(length, length) for length in (130, 256, 61)]),
}


@pytest.mark.parametrize("window", [None, 1, 37, 128, 200])
@pytest.mark.parametrize("name", TREES)
def test_the_block_mask_says_what_each_token_sees(name, window):
    tree = TREES[name]
    mask, allowed, row = block_mask(tree, window, CPU), dense(tree, window), len(tree.tokens)
    index = torch.arange(row)
    assert torch.equal(mask.mask_mod(0, 0, index[:, None], index[None]), allowed)
    side = -(-row // BLOCK) * BLOCK
    padded = torch.zeros(side, side, dtype=torch.bool)
    padded[:row, :row] = allowed
    seen = padded.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    some, every = seen.any(3).any(1), seen.all(3).all(1)
    partly, wholly = squares(mask.kv_num_blocks, mask.kv_indices), squares(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert torch.equal(wholly, every)
    assert not (some & ~(partly | wholly)).any()
    assert not (partly & wholly).any()
    if window is None:
        assert torch.equal(partly | wholly, some)
    transposed = squares(mask.q_num_blocks, mask.q_indices) | squares(mask.full_q_num_blocks, mask.full_q_indices)
    assert torch.equal(transposed.T, partly | wholly)


def test_the_block_mask_is_the_one_that_torch_makes_from_every_pair():
    ours = block_mask(FAMILY, None, CPU)
    theirs = create_block_mask(ours.mask_mod, 1, 1, *ours.seq_lengths, device="cpu")
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_num_blocks", "q_indices"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))
        assert getattr(ours, name).dtype == getattr(theirs, name).dtype
    assert ours.BLOCK_SIZE == theirs.BLOCK_SIZE
    assert ours.seq_lengths == theirs.seq_lengths


def test_a_window_leaves_out_the_blocks_before_it():
    seen = block_mask(flat([128 * 40]), 128, CPU)
    assert int((seen.kv_num_blocks + seen.full_kv_num_blocks).max()) == 2


def test_a_block_mask_of_a_long_row_takes_little_memory():
    mask = block_mask(flat([1 << 17]), None, CPU)
    assert sum(each.numel() for each in mask.as_tuple() if isinstance(each, torch.Tensor)) < 5 * (1 << 20) + (1 << 18)


def test_a_plan_makes_one_block_mask_per_window_that_binds(monkeypatch):
    made = []
    monkeypatch.setattr(attention, "block_mask", lambda *args: made.append(args[1]) or block_mask(*args))
    plan = TreePlan(FAMILY)
    _, states, _ = inputs(len(FAMILY.tokens), 1, "plain")
    with torch.no_grad():
        for window in (None, 37, 10**6, 37, None):
            plan._by_flex(*states, Scoring(0.4, window))
    assert made == [None, 37]


# ---- values and gradients


@groups
@cases
def test_flex_and_segment_by_segment_agree_in_value_and_gradient(case, grouped):
    leaves, states, scoring = inputs(len(FAMILY.tokens), grouped, case)
    plan = TreePlan(FAMILY)
    assert plan.reach > 37
    assert len(FAMILY.tokens) % BLOCK
    found, expected = plan._by_flex(*states, scoring), plan._by_segment(*states, scoring)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    for ours, theirs in zip(gradients(found, leaves), gradients(expected, leaves), strict=True):
        assert distance(ours, theirs) < 1e-5


@groups
@cases
def test_flex_over_a_tree_gives_each_sequence_what_it_gets_alone(case, grouped):
    leaves, states, scoring = inputs(len(FAMILY.tokens), grouped, case, torch.float64)
    found = TreePlan(FAMILY)._by_flex(*states, scoring)
    total = 0.0
    for path in FAMILY.paths:
        index = torch.from_numpy(path)
        alone = one_softmax(*(each[:, :, index] for each in states), scoring)
        torch.testing.assert_close(found[:, index], alone, rtol=0, atol=1e-9)
        total = total + alone.square().sum()
    ours = torch.autograd.grad(sum(found[:, torch.from_numpy(path)].square().sum() for path in FAMILY.paths), leaves)
    for one, other in zip(ours, torch.autograd.grad(total, leaves), strict=True):
        assert distance(one, other) < 1e-6


def one_softmax(query, key, value, scoring):
    """One sequence, attention as it is defined."""
    length = torch.arange(query.shape[2])
    gap = length[:, None] - length[None]
    key, value = (each.repeat_interleave(query.shape[1] // key.shape[1], 1) for each in (key, value))
    scores = query @ key.transpose(2, 3) * scoring.scale
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    weights = scores.masked_fill((gap < 0) | (gap >= (scoring.window or math.inf)), -math.inf).exp()
    rest = 0.0 if scoring.sinks is None else scoring.sinks[None, :, None, None].exp()
    return ((weights / (weights.sum(-1, keepdim=True) + rest)) @ value).transpose(1, 2)


def test_flex_takes_values_of_another_width_than_keys():
    leaves, states, scoring = inputs(len(FAMILY.tokens), 2, "window", dims=(24, 16))
    plan = TreePlan(FAMILY)
    found, expected = plan._by_flex(*states, scoring), plan._by_segment(*states, scoring)
    assert found.shape[-1] == 16
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    for ours, theirs in zip(gradients(found, leaves), gradients(expected, leaves), strict=True):
        assert distance(ours, theirs) < 1e-5


def test_under_autocast_flex_takes_queries_and_values_of_different_dtypes():
    _, (query, key, value), scoring = inputs(len(FAMILY.tokens), 2, "sinks")
    plan = TreePlan(FAMILY)
    exact = plan._by_flex(query, key, value, scoring)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = plan._by_flex(query, key, value.bfloat16(), scoring)
    assert rough.dtype == torch.bfloat16
    assert 1e-4 < distance(rough, exact) < 2e-2


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_whole_model_under_flex_gives_the_log_probs_and_gradients_of_the_other_way(name, checkpointing, monkeypatch, compiled):
    lm, rows = make(name, max_position_embeddings=512), family()
    if checkpointing:
        from posttrain.models.load import checkpoint_activations

        checkpoint_activations(lm.model)
    seqs = Sequences.of([(row, [place > 0 for place in range(len(row))]) for row in rows])
    parameters = [each for each in lm.parameters() if each.requires_grad]
    found = []
    for kernel in ("segments", "flex"):
        monkeypatch.setattr(attention, "kernel_for", lambda *_, kernel=kernel: kernel)
        logp = lm.logprobs(seqs)
        found.append((logp.detach(), torch.autograd.grad(logp.square().sum(), parameters)))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=1e-5)
    for one, other in zip(found[1][1], found[0][1], strict=True):
        assert distance(one, other) < 1e-5
    assert compiled.frame_count == 1  # for both layers, forward and recomputed, with and without a window


# ---- compiling: what can be seen of it without a GPU


def test_one_compilation_serves_rows_and_windows_of_every_length(compiled):
    for lengths in ([300, 400, 57], [200, 31], [129], [256, 256], [640]):  # first, no dimension of a head is met by accident
        tree = flat(lengths)
        for window in (None, 37, 130):
            leaves, states, scoring = inputs(len(tree.tokens), 2, "plain")
            scoring = replace(scoring, window=window)
            found, expected = TreePlan(tree)._by_flex(*states, scoring), TreePlan(tree)._by_segment(*states, scoring)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
            for ours, theirs in zip(gradients(found, leaves), gradients(expected, leaves), strict=True):
                assert distance(ours, theirs) < 1e-5
    assert compiled.frame_count == 1


def test_scale_and_cap_are_constants_of_what_is_compiled(compiled):
    """Symbols instead of numbers are what the template of the GPU kernel fails on."""
    _, states, _ = inputs(len(FAMILY.tokens), 2, "plain")
    for scale, cap in ((0.4, 20.0), (0.25, 20.0), (0.25, 30.0)):
        TreePlan(FAMILY)._by_flex(*states, Scoring(scale, None, cap))
    nodes = [node for graph in compiled.graphs for node in graph.graph.nodes]
    assert [node.args[5] for node in nodes if str(node.target) == "flex_attention"] == [0.4, 0.25, 0.25]
    held = [node.meta["example_value"] for node in nodes if node.op == "placeholder"]
    assert {each.dtype for each in held if isinstance(each, torch.Tensor)} == {torch.float32, torch.int32}


def test_what_is_compiled_for_a_bfloat16_model_serves_mixed_precision(compiled):
    _, (query, key, value), scoring = inputs(len(FAMILY.tokens), 2, "plain")
    query, key, value = (each.detach() for each in (query, key, value))
    plan = TreePlan(FAMILY)
    whole = plan._by_flex(query.bfloat16(), key.bfloat16(), value.bfloat16(), scoring)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(plan._by_flex(query, key, value.bfloat16(), scoring), whole)
    assert compiled.frame_count == 1


# ---- on a GPU


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@cuda
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@groups
@cases
def test_on_a_gpu_the_kernel_agrees_with_segment_by_segment(case, grouped, dtype):
    device = torch.device("cuda")
    exactness = 1e-5 if dtype == torch.float32 else 3e-2
    for tree, dims in ((FAMILY, (64, 64)), (TREES["ragged"], (80, 80)), (TREES["long and deep"], (128, 128))):
        row = len(tree.tokens)
        leaves, states, scoring = inputs(row, grouped, case, dtype, device, dims)
        exact, wide, precise = inputs(row, grouped, case, torch.float64, device, dims)
        with torch.no_grad():
            for one, other in zip(exact, leaves, strict=True):
                one.copy_(other)
        plan = TreePlan(tree)
        assert kernel_for("cuda", dtype, row, dims, plain=False) == "flex"
        found, expected = plan.attend(*states, scoring), plan._by_segment(*wide, precise)
        assert found.dtype == dtype
        assert distance(found, expected) < exactness
        for ours, theirs in zip(gradients(found, leaves), gradients(expected, exact), strict=True):
            assert distance(ours, theirs) < exactness


@cuda
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "mixed", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_on_a_gpu_a_whole_model_gives_what_it_gives_segment_by_segment(name, checkpointing, dtype, monkeypatch):
    lm = make(name, dtype, max_position_embeddings=512, head_dim=16)
    lm.model.to("cuda")
    if checkpointing:
        from posttrain.models.load import checkpoint_activations

        checkpoint_activations(lm.model)
    seqs = Sequences.of([(row, [place > 0 for place in range(len(row))]) for row in family()])
    parameters, found = [each for each in lm.parameters() if each.requires_grad], []
    for way in (kernel_for, lambda *_: "segments"):
        monkeypatch.setattr(attention, "kernel_for", way)
        logp = lm.logprobs(seqs)
        grads = torch.autograd.grad(logp.sum(), parameters)
        found.append((logp.detach(), torch.cat([each.float().flatten() for each in grads])))
    assert float((found[0][0] - found[1][0]).abs().mean()) < (1e-5 if dtype == "float32" else 0.03)
    assert distance(found[0][1], found[1][1]) < (1e-4 if dtype == "float32" else 0.15)


@cuda
@pytest.mark.gpu
def test_on_a_gpu_rows_of_every_length_are_compiled_for_once():
    torch._dynamo.utils.counters.clear()
    for length in (1000, 129, 200, 256, 300, 1024, 4097):
        tree = flat([length, 40])
        _, states, scoring = inputs(len(tree.tokens), 2, "plain", torch.bfloat16, torch.device("cuda"), (64, 64))
        TreePlan(tree).attend(*states, scoring).sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
