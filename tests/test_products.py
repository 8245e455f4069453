"""Products by oneDNN are torch's own products, values and gradients, wherever they are used."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import make, transformer
from torch import nn

from posttrain.batch import Sequences
from posttrain.models import products
from posttrain.models.load import wrap
from posttrain.models.source import ModelSource
from posttrain.tuners import LoRA

ROWS = Sequences.of([([3, 5, 7, *range(20, 20 + size)], [False] * 3 + [True] * size) for size in (9, 30, 17)])


@pytest.fixture
def asked(monkeypatch):
    """Every product is asked of oneDNN, however small; the (rows, matrix) of each."""
    if not products._has_onednn():
        pytest.skip("needs a CPU with AVX-512")
    real, seen = torch.ops.mkldnn._linear_pointwise, []

    def spy(rows, matrix, *more):
        seen.append((rows, matrix))
        return real(rows, matrix, *more)

    monkeypatch.setattr(products, "by_onednn", lambda: True)
    monkeypatch.setattr(products, "SMALLEST", 1)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", spy)
    return seen


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def close(found, expected):
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=1e-5, atol=1e-4)


VIEWS = {
    "as they are": lambda: (random(70, 48), random(33, 48)),
    "a transposed matrix": lambda: (random(70, 48), random(48, 33).t()),
    "both transposed": lambda: (random(48, 70).t(), random(48, 33).t()),
    "parts of larger ones": lambda: (random(90, 60)[7:77, 3:51], random(50, 60)[2:35, 5:53]),
    "parts of larger ones, transposed": lambda: (random(60, 90).t()[7:77, 3:51], random(60, 50).t()[2:35, 5:53]),
}


@pytest.mark.parametrize("views", VIEWS)
@pytest.mark.parametrize("biased", [False, True])
def test_a_product_is_that_of_float64_and_its_matrix_never_one_that_only_the_reference_kernel_reads(asked, views, biased):
    rows, matrix = VIEWS[views]()
    bias = random(33) if biased else None
    close(products.product(rows, matrix, bias), F.linear(rows.double(), matrix.double(), None if bias is None else bias.double()))
    ((_, given),) = asked
    assert given.is_contiguous() or given.t().is_contiguous()


@pytest.mark.parametrize("views", VIEWS)
def test_a_long_sum_is_added_up_in_parts_where_its_matrix_is_a_transposed_one(asked, views, monkeypatch):
    monkeypatch.setattr(products, "LONG", 20)
    rows, matrix = VIEWS[views]()
    bias = random(33)
    close(products.product(rows, matrix, bias), F.linear(rows.double(), matrix.double(), bias.double()))
    parts = [20, 20, 8] if matrix.t().is_contiguous() else [48]
    assert [given.shape[1] for _, given in asked] == parts
    assert all(given.is_contiguous() or given.t().is_contiguous() for _, given in asked)


@pytest.mark.parametrize("count", [10, 80])
def test_a_sum_of_products_grows_by_each_block_by_block(asked, count, monkeypatch):
    monkeypatch.setattr(products, "BLOCK", 100)
    left, right, total = random(count, 330), random(count, 24), random(330, 24)
    expected = total.double() + left.double().t() @ right.double()
    products.add_product(total, left, right)
    close(total, expected)
    assert len(asked) == (4 if count >= products.FEW else 0)


@pytest.mark.parametrize("frozen", ["", "weight", "tensor"])
def test_a_linear_layer_has_the_gradients_of_torchs_own(asked, frozen):
    def gradients(linear):
        given = {"tensor": random(3, 20, 48), "weight": random(33, 48), "bias": random(33)}
        for name, each in given.items():
            each.requires_grad_(name != frozen)
        out = linear(*given.values())
        (out * random(3, 20, 33)).sum().backward()
        return [out.detach(), *(each.grad for each in given.values() if each.grad is not None)]

    ours, theirs = gradients(products.linear), gradients(F.linear)
    assert asked
    assert len(ours) == len(theirs) == (4 if frozen == "" else 3)
    for one, other in zip(ours, theirs, strict=True):
        close(one, other)


def test_small_products_other_types_and_other_machines_are_left_to_torch(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", None, raising=False)
    monkeypatch.setattr(products, "by_onednn", lambda: True)
    close(products.linear(random(4, 8), random(5, 8)), random(4, 8) @ random(5, 8).t())
    monkeypatch.setattr(products, "SMALLEST", 1)
    for dtype in (torch.float64, torch.bfloat16):
        assert products.linear(random(4, 8).to(dtype), random(5, 8).to(dtype)).dtype == dtype
    monkeypatch.setattr(products, "by_onednn", lambda: False)
    close(products.linear(random(4, 8), random(5, 8)), random(4, 8) @ random(5, 8).t())


def learned(lm):
    """log-probs, and the gradient of their sum by everything that learns."""
    logp = lm.logprobs(ROWS)
    logp.sum().backward()
    return [logp.detach(), *(each.grad for each in lm.model.parameters() if each.grad is not None)]


MODELS = {
    "tree": lambda: make("qwen3"),
    "padded": lambda: make("mamba"),
    "checkpointed": lambda: wrap(transformer("llama"), ModelSource(path="tiny", gradient_checkpointing=True)),
    "padded, checkpointed": lambda: wrap(transformer("mamba"), ModelSource(path="tiny", gradient_checkpointing=True)),
    "adapted": lambda: adapted(make("llama")),
}


def adapted(lm):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LoRA(rank=2).install(lm.model)
        for name, each in lm.model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(each, std=0.1)
    return lm


@pytest.mark.parametrize("model", MODELS)
def test_a_model_learns_the_same_by_either(asked, model, monkeypatch):
    ours = learned(MODELS[model]())
    used = len(asked)
    monkeypatch.setattr(products, "by_onednn", lambda: False)
    theirs = learned(MODELS[model]())
    assert used > 6
    assert len(asked) == used
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


def test_a_checkpointed_layer_is_computed_again_by_the_products_that_it_was_computed_by(asked):
    lm = MODELS["checkpointed"]()
    logp = lm.logprobs(ROWS)
    before = len(asked)
    logp.sum().backward()
    head, layers = 2, 2 * 7  # the head's sum over 56 rows is too thin
    assert len(asked) - before == head + layers + 2 * layers, "the head; the layers again; the gradients of input and weight"


def test_a_weight_that_is_laid_out_once_gives_the_product_of_the_weight():
    weight, bias = random(96, 64).bfloat16(), random(96).bfloat16()
    for biased in (None, bias):
        product = products.repeated(weight, biased)
        for rows in (1, 7, 300):
            tensor = random(rows, 64)
            torch.testing.assert_close(product(tensor), F.linear(tensor.bfloat16(), weight, biased), rtol=1e-2, atol=1e-2)


def test_modules_are_themselves_again_afterwards_even_when_it_failed():
    linear = nn.Linear(2, 2)

    def fails(tensor):
        assert products.taken() == [(linear, fails)]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), products.replaced([(linear, fails)]):
        linear(torch.ones(2))
    assert linear(torch.ones(2)).shape == (2,)
    assert not products.taken()


def test_a_forward_that_someone_gave_a_module_is_neither_replaced_nor_lost(asked):
    mine, other = nn.Linear(2, 2), nn.Linear(2, 2)
    mine.forward = torch.zeros_like
    both = nn.ModuleList([mine, other])
    assert [module for module, _ in products.of_layers(both)] == [other]
    with products.replaced([(mine, torch.ones_like)]):
        assert mine(torch.zeros(2)).tolist() == [1, 1]
    assert mine(torch.ones(2)).tolist() == [0, 0]


@pytest.mark.parametrize("frozen", ["weight", "tensor"])
def test_a_layer_keeps_for_the_backward_no_more_than_it_reads(asked, frozen):
    tensor, weight = random(20, 48).requires_grad_(frozen != "tensor"), random(33, 48).requires_grad_(frozen != "weight")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each.shape) or each, lambda each: each):
        products.linear(tensor, weight)
    assert kept == [weight.shape if frozen == "weight" else tensor.shape]


def test_models_of_other_types_keep_their_own_products(asked):
    for dtype in ("float64", "bfloat16"):
        assert not products.of_layers(make("llama", dtype).backbone)
    assert len(products.of_layers(make("llama").backbone)) == 14
