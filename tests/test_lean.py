"""The lean decode step gives what the model's own modules give, or is not used."""

import pytest
import torch
from test_sampling import STOP, completed, prompt, requests
from tiny_models import CONFIGS, GROUPED, make, transformer
from transformers import AutoModelForCausalLM, GraniteConfig, Qwen2Config

from posttrain.batch import Sequences
from posttrain.models.load import wrap
from posttrain.models.source import ModelSource
from posttrain.sampling import lean
from posttrain.sampling.decoder import CachedDecoder
from posttrain.sampling.engine import Engine
from posttrain.sampling.settings import Sampling
from posttrain.tuners import LoRA

QWEN2 = Qwen2Config(**GROUPED)
GRANITE = GraniteConfig(**GROUPED, residual_multiplier=0.5, embedding_multiplier=3.0)


def of(config, dtype="float32"):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return wrap(model, ModelSource(path="tiny", dtype=dtype))


def lms():
    yield "llama", make("llama")
    yield "qwen3", make("qwen3")
    yield "mistral", make("mistral", sliding_window=None)
    yield "qwen2", of(QWEN2)


def stepped(lm, by_model, steps=6):
    """Logits of some steps of five rows, two of which share their prompt, two of which leave on the way."""
    decoder = CachedDecoder(lm)
    if by_model:
        decoder.step = None
    found = [decoder.admit([prompt(1, 9), prompt(2, 20), prompt(3, 1)], [2, 2, 1], steps)]
    draws = torch.Generator().manual_seed(0)
    for step in range(steps):
        found.append(decoder.advance(torch.randint(0, 90, (len(found[-1]) if step else 5,), generator=draws)))
        if step == 2:
            decoder.drop([0, 3])
            found[-1] = found[-1][:3]
    assert (decoder.step is None) == by_model
    return torch.cat(found)


@torch.no_grad()
@pytest.mark.parametrize(("name", "lm"), [pytest.param(name, lm, id=name) for name, lm in lms()])
def test_its_logits_are_those_of_the_models_own_modules(name, lm):
    torch.testing.assert_close(stepped(lm, by_model=False), stepped(lm, by_model=True), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_in_mixed_precision_too_as_closely_as_bfloat16_can(name):
    lm = wrap(transformer(name), ModelSource(path="tiny", dtype="mixed"))
    one, other = stepped(lm, by_model=False), stepped(lm, by_model=True)
    assert (one - other).norm() < 0.02 * other.norm()
    assert (one - stepped(make(name), by_model=True)).norm() > 1e-4 * other.norm(), "it really is bfloat16"


def test_another_architecture_a_window_or_an_adapter_is_left_to_the_model():
    for name in set(CONFIGS) - {"llama", "qwen3"}:
        assert lean.build(make(name)) is None, name
    adapted = make("llama")
    LoRA(rank=2).install(adapted.model)
    assert lean.build(adapted) is None


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "mixed"])
def test_a_model_that_only_looks_the_same_is_found_out_at_the_first_step(dtype, monkeypatch):
    """Granite has the same parts by the same names, and multiplies what they give."""
    monkeypatch.setattr(lean, "FAMILIES", {"granite"})
    lm = of(GRANITE, dtype)
    assert lean.build(lm) is not None
    decoder = CachedDecoder(lm)
    decoder.admit([prompt(1, 9)], [1], 4)
    logits = decoder.advance(torch.tensor([5]))
    assert decoder.step is None
    marked = Sequences.of([([*prompt(1, 9), 5, 0], [False] * 10 + [True])])
    torch.testing.assert_close(logits, lm.project(lm.hidden(marked)), rtol=1e-5, atol=1e-5 if dtype == "float32" else 0.5)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_mixed_model_is_sampled_with_the_weights_that_it_has_when_the_engine_is_opened(name):
    lm = wrap(transformer(name), ModelSource(path="tiny", dtype="mixed"))
    asked, sampling = requests(12), Sampling(max_tokens=8)
    before = completed(lm, asked, sampling)
    for done in before.values():
        row = [*done.request.tokens, *done.tokens]
        marks = [place >= len(done.request.tokens) for place in range(len(row))]
        with torch.no_grad():
            again = lm.logprobs(Sequences.of([(row, marks)]))
        assert (again - torch.tensor(done.logp)).abs().max() < 0.3
        assert (again - torch.tensor(done.logp)).abs().mean() < 0.05
    with torch.no_grad():
        for parameter in lm.model.parameters():
            parameter.mul_(-1.5)
    after = completed(lm, asked, sampling)
    assert [each.tokens for each in after.values()] != [each.tokens for each in before.values()]


def test_rows_that_share_nothing_with_a_step_do_not_change_it():
    lm, asked, sampling = make("qwen3"), requests(24), Sampling(max_tokens=8)
    together = {key: done.tokens for key, done in completed(lm, asked, sampling).items()}
    engine = Engine(lm, sampling, STOP, 5, rows=3)
    for request in asked:
        engine.add(request)
    while (done := engine.next()) is not None:
        assert done.tokens == together[done.request.address]
