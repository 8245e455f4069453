"""What must hold for every objective under every tuner. Registered kinds are found; their examples are in example_batches.py."""

import hashlib
import math
from dataclasses import replace

import pytest
import torch
from example_batches import EXAMPLES, draw, only, rows
from tiny_fits import TUNERS, Fixed, Shuffled, Watcher, build, fitted, objective_of, update_of
from tiny_models import make, twin
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from posttrain.batch import Sequences
from posttrain.models.load import wrap
from posttrain.models.roles import Frozen, Roles
from posttrain.models.source import ModelSource
from posttrain.objectives import GRPO, Objective, OnPolicy
from posttrain.sampling import Sampling
from posttrain.sampling.engine import Engine, Request
from posttrain.text import Grade, Problem, Sample
from posttrain.training.fit import Training, count_units, fit, in_pieces
from posttrain.training.optim import AdamW
from posttrain.training.record import Recorder
from posttrain.training.settings import Checkpoints
from posttrain.training.updates import Item, Update
from posttrain.tuners import LoRA, Tuner, tuned

KINDS = {kind: cls for kind, cls in Objective.kinds.items() if ":" not in kind}
EXACT = {"float64": ("gpt2", 1e-10), "float32": ("llama", 1e-5)}  # gpt2, as the norms of llama go through float32

examples = pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: f"{example.name}-{example.batch.__name__}")
tuners = pytest.mark.parametrize("tuner", TUNERS)


def relative(one, other):
    return float((one - other).norm() / other.norm())


def total_of(lm, update):
    """The loss of a whole update, in one piece."""
    units = count_units(update)
    terms = [
        term / max(1, units[id(item.objective), name])
        for item in update.items
        for name, term in item.objective.loss(lm, item.batch).terms.items()
    ]
    return sum(terms)


def test_every_registered_objective_has_an_example_and_every_tuner_its_settings():
    missing = set(KINDS) - {example.kind for example in EXAMPLES}
    assert not missing, f"add an example batch for {sorted(missing)} to tests/example_batches.py"
    unknown = {kind for kind in Tuner.kinds if ":" not in kind} - set(TUNERS)
    assert not unknown, f"add small settings for the tuners {sorted(unknown)} to TUNERS"


@examples
@tuners
@pytest.mark.parametrize("dtype", EXACT)
def test_splitting_a_batch_does_not_change_the_gradient_or_the_figures(example, tuner, dtype):
    name, exactness = EXACT[dtype]
    lm = build(name, dtype, tuner)
    batch = example.batch(lm)
    assert batch.count == 8
    assert len(set(batch.sequences[0].lengths.tolist())) > 4
    update = update_of(example, batch)
    whole, figures = fitted(lm, update, 10**6)
    assert float(whole.norm()) > 1e-3
    for micro_tokens, pieces in ((1, 8), (45, 3), (80, 2)):
        sizes = [piece.batch.count for piece in in_pieces(update, micro_tokens)]
        assert sum(sizes) == 8
        assert len(sizes) >= pieces
        assert micro_tokens != 45 or len(set(sizes)) > 1, 'of unequal size'
        split, same = fitted(lm, update, micro_tokens)
        assert relative(split, whole) < exactness
        assert same == pytest.approx(figures, rel=1e-9 if dtype == "float64" else 1e-5, abs=1e-6)
    assert relative(fitted(twin(lm, "padded"), update, 45)[0], whole) < exactness


def example(kind, **settings):
    return next(each for each in EXAMPLES if each.kind == kind and settings.items() <= each.settings.items())


def test_sft_is_the_weighted_log_likelihood_of_the_answers_counted_in_trained_tokens():
    lm = make("gpt2", "float64")
    plain = example("sft").batch(lm)
    weights = [1.0, 2.0, 0.5, 3.0, 0.0, 1.0, 0.25, 1.0]
    logp = lm.logprobs(plain).split([3, 0, 3, 9, 9, 0, 5, 5])
    for batch, weight in ((plain, [1.0] * 8), (replace(plain, weight=torch.tensor(weights)), weights)):
        expected = -sum(float(part.detach().sum()) * each for part, each in zip(logp, weight, strict=True))
        item = Item(Objective.lookup("sft")(), batch, [""] * 8)
        assert item.objective.units(batch) == {"nll": 34}
        assert float(total_of(lm, Update((item,))).detach()) == pytest.approx(expected / 34, rel=1e-12)


@pytest.mark.parametrize("aggregate", ["sequence", "token"])
@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_grpo_is_its_formula_token_by_token(aggregate, kl):
    lm = make("gpt2", "float64")
    batch = example("grpo", kl=0.3).batch(lm)
    logp = lm.logprobs(batch.seqs, temperature=batch.temperature).tolist()
    per_row = [[] for _ in range(8)]
    for owner, new, old, ref, good in zip(
        batch.seqs.owner.tolist(),
        logp,
        batch.sampled_logp.tolist(),
        batch.ref_logp.tolist(),
        batch.advantage.tolist(),
        strict=True,
    ):
        ratio = math.exp(new - old)
        gain = min(ratio * good, min(max(ratio, 0.8), 1.28) * good)
        per_row[owner].append(-gain + kl * (math.exp(ref - new) - 1 - (ref - new)))
    by_row = sum(sum(row) / len(row) for row in per_row if row) / 8
    by_token = sum(map(sum, per_row)) / 34
    item = Item(GRPO(aggregate=aggregate, kl=kl, clip_low=0.2, clip_high=0.28), batch, [""] * 8)
    found = float(total_of(lm, Update((item,))).detach())
    assert found == pytest.approx(by_row if aggregate == "sequence" else by_token, rel=1e-10)
    assert abs(by_row - by_token) > 0.01 * abs(by_row)


@examples
def test_the_units_of_the_pieces_add_up_to_those_of_the_update(example):
    update = update_of(example, example.batch(make("llama")))
    pieces = [count_units(Update((piece,))) for piece in in_pieces(update, 45)]
    assert {key: sum(each[key] for each in pieces) for key in pieces[0]} == count_units(update)


@examples
@tuners
def test_the_order_of_the_rows_does_not_matter(example, tuner):
    lm = build("gpt2", "float64", tuner)
    batch = example.batch(lm)
    whole, figures = fitted(lm, update_of(example, batch), 60)
    for order in ([7, 6, 5, 4, 3, 2, 1, 0], [3, 0, 5, 2, 7, 4, 1, 6]):
        other, same = fitted(lm, update_of(example, only(batch, order)), 60)
        assert relative(other, whole) < 1e-10
        assert same == pytest.approx(figures, rel=1e-9)


@examples
@tuners
def test_the_gradient_is_the_finite_difference_of_the_loss(example, tuner):
    lm = build("gpt2", "float64", tuner)
    update = update_of(example, example.batch(lm))
    parameters = list(tuned(lm.model).values())
    exact = torch.autograd.grad(total_of(lm, update), parameters, allow_unused=True)
    start = [value.detach().clone() for value in parameters]
    for seed in range(3):
        draws = torch.Generator().manual_seed(seed)
        direction = [torch.randn(value.shape, generator=draws, dtype=torch.float64) for value in parameters]
        ends = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                for value, first, way in zip(parameters, start, direction, strict=True):
                    value.copy_(first + step * way)
                ends.append(float(total_of(lm, update)))
        slope = sum(float((grad * way).sum()) for grad, way in zip(exact, direction, strict=True) if grad is not None)
        assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(slope, rel=1e-6, abs=1e-7)


@examples
@tuners
def test_a_batch_with_nothing_to_train_gives_a_zero_that_back_propagates(example, tuner):
    lm = build("llama", "float32", tuner)
    batch = only(example.batch(lm), [1, 5])  # the row with nothing trained, and the row of one token
    gradient, figures = fitted(lm, update_of(example, batch), 10**6)
    assert gradient.abs().max() == 0
    assert all(math.isfinite(value) for value in figures.values())
    terms = objective_of(example).loss(lm, batch).terms
    assert {name: float(term.detach()) for name, term in terms.items()} == dict.fromkeys(terms, 0.0)
    assert all(term.requires_grad for term in terms.values())


@examples
@tuners
@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_a_batch_of_no_rows_at_all_gives_a_zero_that_back_propagates_too(example, tuner, layout):
    lm = build("llama", "float32", tuner)
    loss = objective_of(example).loss(twin(lm, layout), example.batch(lm).select([]))
    total = sum(loss.terms.values())
    assert float(total.detach()) == 0.0
    total.backward()
    assert all(value.grad is None or value.grad.abs().max() == 0 for value in tuned(lm.model).values())


@examples
@tuners
def test_frozen_means_frozen_and_the_optimizer_holds_nothing_else(example, tuner, tmp_path):
    lm = build("llama", "float32", tuner)
    parameters = tuned(lm.model)
    frozen = {name: value for name, value in lm.model.state_dict(keep_vars=True).items() if not value.requires_grad}
    before = {name: digest(value) for name, value in {**frozen, **parameters}.items()}
    assert bool(frozen) == (tuner != "full")
    settings = AdamW(learning_rate=1e-2, warmup=0.0, schedule="constant", weight_decay=0.1)
    optimizer = settings.build(parameters)
    held = [id(value) for group in optimizer.param_groups for value in group["params"]]
    assert sorted(held) == sorted(id(value) for value in parameters.values())
    run = Training(lm, parameters, optimizer, settings, Fixed(update_of(example, example.batch(lm))), steps=3, micro_tokens=60)
    fit(run, Recorder(tmp_path, "owner", Checkpoints(every=10)))
    assert {name: digest(value) for name, value in frozen.items()} == {name: before[name] for name in frozen}
    assert all(value.grad is None for value in frozen.values())
    still = [name for name, value in parameters.items() if digest(value) == before[name]]
    assert not still, f"these did not move: {still}"


@examples
@tuners
def test_two_updates_a_resume_and_two_more_are_four_updates_bit_for_bit(example, tuner, tmp_path):
    settings = AdamW(learning_rate=1e-2, warmup=0.3, schedule="linear", weight_decay=0.1)
    batch = example.batch(build("llama", "float32", tuner))

    def trained(folder, stop_at=None):
        lm = build("llama", "float32", tuner)
        parameters = tuned(lm.model)
        run = Training(lm, parameters, settings.build(parameters), settings, Shuffled(example, batch), steps=4, micro_tokens=60)
        record = Recorder(tmp_path / folder, "owner", Checkpoints(every=10))
        record.interrupted = lambda: "SIGTERM" if run.step == stop_at else None
        resumed = record.resume(run)
        fit(run, record)
        return resumed, run.step, {name: digest(value) for name, value in parameters.items()}

    (tmp_path / "whole").mkdir()
    (tmp_path / "broken").mkdir()
    whole = trained("whole")
    assert trained("broken", stop_at=2)[:2] == (False, 2)
    again = trained("broken")
    assert again[:2] == (True, 4)
    assert again[2] == whole[2]


def digest(value):
    return hashlib.sha256(value.detach().contiguous().numpy().tobytes()).hexdigest()


# ---- on policy


def sampled(lm, temperature, version=0):
    """Graded samples of two problems of the policy as it is."""
    engine = Engine(lm, Sampling(max_tokens=6, temperature=temperature), stop_ids=[1, 2, 3, 4, 5], seed=3)
    prompts = {"p": draw(19, 1), "q": draw(4, 2)}
    for name, prompt in prompts.items():
        for index in range(6):
            engine.add(Request(tuple(prompt), (name, index)))
    samples, grades = [], []
    while (done := engine.next()) is not None:
        prompt, (name, index) = done.request.tokens, done.request.address
        marks = (False,) * len(prompt) + (True,) * len(done.tokens)
        samples.append(Sample(Problem(name, ()), index, (*prompt, *done.tokens), marks, tuple(done.logp), done.stop, "", version))
        grades.append(Grade(None, failure="no answer") if (name, index) == ("q", 0) else Grade(float(sum(done.tokens) % 3)))
    return samples, grades


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "mamba"])
@pytest.mark.parametrize("kind", [kind for kind, cls in KINDS.items() if issubclass(cls, OnPolicy)])
def test_in_the_first_update_every_ratio_is_one_and_nothing_is_clipped(kind, name, temperature):
    lm, objective = make(name), Objective.lookup(kind)()
    samples, grades = sampled(lm, temperature)
    batch = objective.credit(samples, grades, Roles(), temperature)
    assert batch.count == 11  # what could not be graded takes no part
    assert {one.stop for one in samples} == {"end", "length"}
    with torch.no_grad():
        gap = lm.logprobs(batch.seqs, temperature=temperature) - batch.sampled_logp
    assert float(gap.abs().max()) < 1e-5
    _, figures = fitted(lm, Update((Item(objective, batch, [""] * batch.count),)), 60)
    assert figures["ratio"] == pytest.approx(1, abs=1e-5)
    assert figures["clip_fraction"] == 0
    assert figures["mismatch"] < 1e-5


@pytest.mark.parametrize("tuner", TUNERS)
def test_before_the_first_update_the_kl_to_the_reference_is_zero(tuner):
    lm, objective = build("llama", "float32", tuner, moved=False), GRPO(kl=0.1)
    settings = Tuner.lookup(tuner)(**TUNERS[tuner])
    switch = (lambda: settings.switched_off(lm.model)) if settings.reversible else None
    reference = Frozen(lm, switch) if switch else Frozen(make("llama"))
    samples, grades = sampled(lm, 0.7)
    batch = objective.credit(samples, grades, Roles(reference), 0.7)
    with torch.no_grad():
        assert torch.equal(batch.ref_logp, lm.logprobs(batch.seqs, temperature=0.7))
    assert fitted(lm, Update((Item(objective, batch, [""] * batch.count),)), 10**6)[1]["kl"] == 0.0


def test_an_update_raises_the_probability_of_what_was_better_than_its_group():
    lm, objective = build("llama", "float32", "full"), GRPO()
    batch = objective.credit(*sampled(lm, 1.0), Roles(), 1.0)
    settings, parameters = AdamW(learning_rate=1e-3, warmup=0.0, schedule="constant"), tuned(lm.model)
    run = Training(
        lm, parameters, settings.build(parameters), settings, Fixed(Update((Item(objective, batch, [""] * 11),))), steps=1
    )
    fit(run, Watcher())
    with torch.no_grad():
        change = lm.logprobs(batch.seqs) - batch.sampled_logp
    assert float((change * batch.advantage).sum()) > 0.1
    assert float(change[batch.advantage > 0].mean()) > 0 > float(change[batch.advantage < 0].mean())


# ---- LoRA


def logp_of(lm):
    with torch.no_grad():
        return lm.logprobs(Sequences.of(rows()))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_lora_changes_nothing_when_it_is_installed_bit_for_bit(name):
    before = logp_of(make(name))
    assert torch.equal(logp_of(build(name, "float32", "lora", moved=False)), before)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_lora_switched_off_is_the_base_and_merged_is_what_it_was(name):
    base, lm, tuner = logp_of(make(name)), build(name, "float32", "lora"), LoRA(**TUNERS["lora"])
    trained = logp_of(lm)
    assert float((trained - base).abs().mean()) > 0.01
    with tuner.switched_off(lm.model):
        assert torch.equal(logp_of(lm), base)
    assert torch.equal(logp_of(lm), trained)
    tuner.merge(lm.model)
    torch.testing.assert_close(logp_of(lm), trained, rtol=0, atol=1e-5)
    assert not [key for key in lm.model.state_dict() if "lora" in key]
    assert set(lm.model.state_dict()) == set(make(name).model.state_dict())


def test_at_first_only_b_has_a_gradient():
    lm = build("llama", "float32", "lora", moved=False)
    fitted_grads = torch.autograd.grad(lm.logprobs(Sequences.of(rows())).sum(), list(tuned(lm.model).values()))
    largest = {key: float(grad.abs().max()) for key, grad in zip(tuned(lm.model), fitted_grads, strict=True)}
    assert all(value == 0 for key, value in largest.items() if "lora_A" in key)
    assert all(value > 0 for key, value in largest.items() if "lora_B" in key)
    assert len(largest) == 2 * 7 * 2


@pytest.mark.parametrize(("rank", "targets", "expected"), [(16, "all-linear", 39_976_960), (8, ["q_proj", "v_proj"], 4_194_304)])
def test_the_number_of_lora_parameters_is_rank_times_inputs_and_outputs(rank, targets, expected):
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        LoRA(rank=rank, targets=targets).install(model)
    assert sum(value.numel() for value in tuned(model).values()) == expected


@pytest.mark.parametrize(("rslora", "scale"), [(False, 4.0), (True, 8.0)])
def test_lora_adds_alpha_over_rank_times_b_a(rslora, scale):
    lm = make("llama")
    before = lm.model.model.layers[1].mlp.up_proj.weight.clone()
    tuner = LoRA(rank=4, alpha=16.0, rslora=rslora, targets=["up_proj"])
    tuner.install(lm.model)
    layer = lm.model.model.layers[1].mlp.up_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    nn.init.normal_(b)
    expected = before + scale * (b @ a)
    tuner.merge(lm.model)
    torch.testing.assert_close(lm.model.model.layers[1].mlp.up_proj.weight, expected, rtol=0, atol=1e-6)


def test_lora_trains_under_gradient_checkpointing_although_the_embeddings_are_frozen():
    found = []
    for saving in (False, True):
        lm = wrap(build("llama", "float32", "lora").model, ModelSource(path="tiny", gradient_checkpointing=saving))
        found.append(
            torch.cat(
                [g.flatten() for g in torch.autograd.grad(lm.logprobs(Sequences.of(rows())).sum(), list(tuned(lm).values()))]
            )
        )
    assert float(found[0].norm()) > 1e-3
    assert relative(found[1], found[0]) < 1e-6
