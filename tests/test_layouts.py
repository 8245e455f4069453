"""Every layout gives each sequence what it gets alone. The oracle is the transformers model itself, one sequence at a time."""

import random
from types import SimpleNamespace

import pytest
import torch
from tiny_models import CONFIGS, TREE, VOCABULARY, make, make_scalar, transformer, twin
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from posttrain.batch import Sequences
from posttrain.errors import ModelError
from posttrain.models import head, layout
from posttrain.models.attention import Scoring, TreePlan
from posttrain.models.load import head_gap, takes_the_tree, wrap
from posttrain.models.source import ModelSource
from posttrain.tuners import LoRA, tuned

SOURCE = ModelSource(path="tiny")


def tokens(count, seed):
    return torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def answers(prompt, *rest):
    """A row whose tokens after `prompt` are trained."""
    whole = [*prompt, *(token for part in rest for token in part)]
    return whole, [len(prompt) <= place and place > 0 for place in range(len(whole))]


def family():
    """Two levels of shared prefixes, a row that is the prefix of others, a duplicate, a lone token, an untrained row."""
    root, branch = tokens(20, 1), tokens(18, 2)
    mid = root + branch
    every = [place % 3 > 0 for place in range(45)]
    return [
        answers(mid, tokens(5, 3)),
        answers(tokens(1, 4)),
        answers(root, branch, tokens(7, 5)),
        answers(root, tokens(6, 6)),
        answers(root, branch),
        answers(mid, tokens(5, 3)),
        answers(tokens(12, 7)),
        (tokens(45, 8), every),
    ]


def gradients(lm, total):
    parameters = tuned(lm)
    found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(parameters.items(), found, strict=True)}


def distance(one, other):
    """The relative distance of two gradients, all parameters together."""
    gap = sum(float((one[name] - other[name]).double().square().sum()) for name in other)
    return (gap / sum(float(value.double().square().sum()) for value in other.values())) ** 0.5


def alone(lm, rows, temperature=1.0):
    """log p of each trained token from the model's own logits, one row at a time."""
    found = []
    for row, train in rows:
        if any(train):
            logits = lm.model(input_ids=torch.tensor([row]), use_cache=False).logits[0, :-1]
            logp = (logits / temperature).log_softmax(-1).gather(1, torch.tensor(row[1:])[:, None])[:, 0]
            found.append(logp[torch.tensor(train[1:])])
    return torch.cat(found)


def weights_of(count, dtype):
    return torch.randn(count, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", CONFIGS)
def test_tree_padded_and_each_sequence_alone_give_the_same_log_probs_and_gradients(name, dtype):
    lm, rows = make(name, dtype), family()
    assert lm.layout == ("padded" if name == "mamba" else "tree")
    seqs = Sequences.of(rows)
    expected = alone(lm, rows)
    weight = weights_of(seqs.trained, expected.dtype)
    direct = gradients(lm, (weight * expected).sum())
    for kind in {lm.layout, "padded"}:
        logp = twin(lm, kind).logprobs(seqs)
        assert float((logp - expected).detach().abs().max()) < 1e-5
        assert distance(gradients(lm, (weight * logp).sum()), direct) < 1e-5
    if dtype == "float64" and name in {"gpt2", "gpt_neox", "phi"}:  # those whose norms do not go through float32
        assert float((lm.logprobs(seqs) - expected).detach().abs().max()) < 1e-12


def test_the_shared_prefixes_of_the_family_are_laid_down_once():
    plan = layout.tree([row for row, _ in family()])
    again = 5  # the duplicate shares its first 38 tokens; its last 5 are too few to branch for
    assert again < layout.MIN_SHARED
    assert len(plan.tokens) == 20 + 18 + 5 + again + 7 + 6 + 1 + 12 + 45
    assert max(len(plan.ancestors(part)) for part in plan.segments) == 3
    for (row, _), path in zip(family(), plan.paths, strict=True):
        assert plan.tokens[torch.from_numpy(path)].tolist() == row
        assert plan.positions[torch.from_numpy(path)].tolist() == list(range(len(row)))


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_a_random_forest_gives_each_sequence_what_it_gets_alone(name):
    lm = make(name)
    for seed in range(3):
        draw = torch.Generator().manual_seed(seed)
        rows: list[list[int]] = [tokens(30, 50 + seed)]
        for step in range(11):
            base = rows[int(torch.randint(len(rows), (1,), generator=draw))]
            keep = int(torch.randint(0, len(base) + 1, (1,), generator=draw))
            rows.append([*base[:keep], *tokens(1 + int(torch.randint(0, 20, (1,), generator=draw)), 100 * seed + step)])
        marked = [(row, [False] + [True] * (len(row) - 1)) for row in rows]
        with torch.no_grad():
            assert float((lm.logprobs(Sequences.of(marked)) - alone(lm, marked)).abs().max()) < 1e-5


@pytest.mark.parametrize("budget", [60, 100, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_micro_batches_hold_every_row_once_stay_within_the_budget_and_are_balanced(budget, seed):
    draw = random.Random(seed)
    prompts = [tokens(draw.randrange(20, 30), 10 + seed + place) for place in range(5)]
    rows = [answers(draw.choice(prompts), tokens(draw.randrange(1, 12), 100 + place)) for place in range(40)]
    seqs = Sequences.of(rows)
    groups = layout.micro_batches(seqs, budget)
    assert sorted(row for group in groups for row in group) == list(range(40))
    laid = [len(layout.tree([rows[row][0] for row in group]).tokens) for group in groups]
    assert max(laid) <= budget
    assert len(groups) <= -(-sum(laid) // budget) + 2, "as few as the budget asks for, or nearly"
    assert min(laid) > max(laid) - 2 * 42, "no group is a leftover"


def test_a_row_longer_than_the_budget_goes_alone_and_a_shared_prefix_counts_once():
    prompt = tokens(20, 2)
    group = [answers(prompt, [1, 2, 3]), answers(prompt, [4, 5, 6]), answers(prompt, [7, 8])]
    assert layout.micro_batches(Sequences.of(group), 28) == [[0, 1, 2]]
    assert len(layout.micro_batches(Sequences.of(group), 27)) == 2
    assert [0] in layout.micro_batches(Sequences.of([answers(tokens(50, 1)), *group]), 28)
    assert layout.micro_batches(Sequences.of([]), 28) == []


def test_several_sequences_in_one_call_share_their_prefixes_and_come_back_apart():
    lm, rows = make("llama"), family()
    one, other = Sequences.of(rows[:3]), Sequences.of(rows[3:])
    first, second = lm.logprobs(one, other)
    torch.testing.assert_close(first, lm.logprobs(one), rtol=0, atol=1e-5)
    torch.testing.assert_close(second, lm.logprobs(other), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_neighbours_tokens_change_nothing_bit_for_bit(name):
    """Lengths, order and sharing stay the same: only what the neighbour says after its first own token changes."""
    lm = make(name, layout="padded" if name == "mamba" else "tree")  # asked for, so that the probe of `auto` cannot hide a leak
    root = tokens(18, 1)

    def logp(sibling, stranger):
        rows = [
            answers(root, [5], tokens(9, 2)),
            answers(root, [6], sibling),
            answers([9], tokens(15, 3)),
            answers([8], stranger),
        ]
        seqs = Sequences.of(rows)
        with torch.no_grad():
            return lm.logprobs(seqs)[seqs.trained_tokens([0, 2])]

    before = logp(tokens(9, 4), tokens(11, 5))
    assert torch.equal(before, logp(tokens(9, 14), tokens(11, 5)))
    assert torch.equal(before, logp(tokens(9, 4), tokens(11, 15)))


def test_a_gradient_reaches_the_shared_prefix_from_every_branch():
    lm, root = make("gpt2", "float64"), tokens(20, 1)
    branches = [answers(root, tokens(6, 2)), answers(root, tokens(6, 3)), answers(root, tokens(6, 4))]
    together = gradients(lm, lm.logprobs(Sequences.of(branches)).sum())
    apart = [gradients(lm, lm.logprobs(Sequences.of([row])).sum()) for row in branches]
    summed = {name: sum(each[name] for each in apart) for name in together}
    assert distance(together, summed) < 1e-12
    position = together["model.transformer.wpe.weight"]
    assert float(position[:20].norm()) > 0.1 * float(position[20:26].norm())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("case", ["llama", "gemma3", "gpt2", "phi", "qwen3", "lora on the head", "mamba"])
def test_the_weighted_sum_is_that_of_the_log_probs_in_value_and_gradient(case, temperature, monkeypatch):
    monkeypatch.setitem(head.CHUNK, "cpu", 1)  # 16 rows at a time, so that there are several chunks
    lm = make("qwen3" if case == "lora on the head" else case)
    if case == "lora on the head":
        LoRA(rank=4, targets=["lm_head", "q_proj"]).install(lm.model)
        for parameter in tuned(lm).values():
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
        assert not head.is_plain(lm.head)
    rows = family()
    seqs = Sequences.of(rows)
    weight = weights_of(seqs.trained, torch.float32)
    expected = alone(lm, rows, temperature)
    reference = gradients(lm, (weight * expected).sum())
    total, detached = lm.weighted_sum(seqs, weight, temperature)
    assert not detached.requires_grad
    torch.testing.assert_close(detached, expected.detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(total, (weight * expected).sum(), rtol=1e-5, atol=1e-4)
    assert distance(gradients(lm, 3 * total), {name: 3 * value for name, value in reference.items()}) < 1e-5
    logp = lm.logprobs(seqs, temperature=temperature)
    assert distance(gradients(lm, (weight * logp).sum()), reference) < 1e-5


@pytest.mark.parametrize("name", ["gemma3", "phi"])
def test_over_the_vocabulary_the_entropy_and_its_gradient_are_those_of_the_models_own_logits(name, monkeypatch):
    monkeypatch.setitem(head.CHUNK, "cpu", 1)
    lm, (row, train) = make(name), family()[7]

    def entropy(logits, _targets):
        logp = logits.log_softmax(-1)
        return -(logp.exp() * logp).sum(-1)

    found = lm.over_vocab(Sequences.of([(row, train)]), entropy)
    logits = lm.model(input_ids=torch.tensor([row]), use_cache=False).logits[0, :-1][torch.tensor(train[1:])]
    expected = entropy(logits, None)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert distance(gradients(lm, found.sum()), gradients(lm, expected.sum())) < 1e-5


# ---- models that score


def scored_alone(lm, rows):
    """The score of every token of each row, from the model's own modules, one row at a time."""
    states = [lm.backbone(input_ids=torch.tensor([row]), use_cache=False).last_hidden_state[0] for row, _ in rows]
    return [lm.model.score(each)[:, 0] + 0.75 for each in states]


@pytest.mark.parametrize("name", TREE)
def test_scores_values_and_step_scores_are_those_of_the_model_on_each_sequence_alone(name):
    """A score at the last token, as transformers itself reads it; a value before each trained token; a step's at its end."""
    lm, rows = make_scalar(name), family()
    seqs, marks = Sequences.of(rows), [torch.tensor(train) for _, train in rows]
    with torch.no_grad():
        every = scored_alone(lm, rows)
        score = torch.stack([lm.model(input_ids=torch.tensor([row]), use_cache=False).logits[0, 0] for row, _ in rows]) + 0.75
        value = torch.cat([each[:-1][mark[1:]] for each, mark in zip(every, marks, strict=True)])
        step = torch.cat([each[mark] for each, mark in zip(every, marks, strict=True)])
    assert seqs.trained == len(value) == len(step) > 40
    direct = gradients(lm, torch.stack([each[-1] for each in scored_alone(lm, rows)]).tanh().sum())
    for kind in ("tree", "padded"):
        other = twin(lm, kind)
        other.shift = 0.75
        torch.testing.assert_close(other.scores(seqs), score, rtol=0, atol=2e-5)
        torch.testing.assert_close(other.values(seqs), value, rtol=0, atol=2e-5)
        torch.testing.assert_close(other.step_scores(seqs), step, rtol=0, atol=2e-5)
        assert distance(gradients(lm, other.scores(seqs).tanh().sum()), direct) < 1e-5


def test_scores_of_many_are_the_scores_whatever_is_computed_at_a_time_and_several_batches_come_back_apart():
    lm, rows = make_scalar("llama"), family()
    seqs = Sequences.of(rows)
    with torch.no_grad():
        scores = lm.scores(seqs)
        for micro_tokens in (1, 60, 1000):
            torch.testing.assert_close(lm.scores_of_many(seqs, micro_tokens), scores, rtol=0, atol=2e-5)
        one, other = lm.scores(Sequences.of(rows[:3]), Sequences.of(rows[3:]))
    torch.testing.assert_close(torch.cat([one, other]), scores, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradient_checkpointing_recomputes_each_layer_and_gives_the_same_gradients(name):
    seqs = Sequences.of(family())
    plain = make(name)
    saving = wrap(transformer(name), ModelSource(path="tiny", gradient_checkpointing=True))
    calls = {}
    for label, lm in (("plain", plain), ("saving", saving)):
        layers = next(each for each in lm.model.modules() if isinstance(each, torch.nn.ModuleList) and len(each) == 2)
        calls[label] = []
        inside = next(
            each for each in layers[0].modules() if not list(each.children())
        )  # hooks of the layer itself run only once
        inside.register_forward_pre_hook(lambda *_, seen=calls[label]: seen.append(1))
    found = [gradients(lm, lm.logprobs(seqs).sum()) for lm in (saving, plain)]
    assert distance(*found) < 1e-6
    assert (len(calls["plain"]), len(calls["saving"])) == (1, 2)
    assert not any(isinstance(each, torch.nn.Dropout) and each.training and each.p for each in saving.modules())


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "mamba"])
def test_in_bfloat16_and_mixed_precision_log_probs_are_float32_and_close(name, dtype):
    rows = Sequences.of(family())
    with torch.no_grad():
        exact, rough = make(name).logprobs(rows), make(name, dtype).logprobs(rows)
    assert rough.dtype == torch.float32
    assert 1e-5 < float((exact - rough).abs().mean()) < 0.03
    lm = make(name, dtype)
    assert {value.dtype for value in lm.parameters()} == {torch.bfloat16 if dtype == "bfloat16" else torch.float32}
    close = gradients(lm, lm.logprobs(rows).sum())
    plain = make(name)
    assert distance(close, gradients(plain, plain.logprobs(rows).sum())) < 0.1


def test_in_bfloat16_tree_and_padded_agree_as_closely_as_bfloat16_can():
    seqs, lm = Sequences.of(family()), make("llama", "bfloat16")
    with torch.no_grad():
        assert float((lm.logprobs(seqs) - twin(lm, "padded").logprobs(seqs)).abs().mean()) < 0.02


def test_the_layout_is_chosen_by_what_the_architecture_can_do():
    scaled = {
        "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        "longrope": {
            "rope_type": "longrope", "factor": 2.0, "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
            "original_max_position_embeddings": 64,
        },
        "linear": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    }  # fmt: skip
    assert all(takes_the_tree(transformer(name)) for name in TREE)
    assert not takes_the_tree(transformer("mamba"))
    for kind, rope in scaled.items():
        assert takes_the_tree(transformer("llama", rope_parameters=rope)) == (kind == "linear")


@pytest.mark.parametrize("name", CONFIGS)
def test_the_projection_gives_the_models_own_logits(name):
    assert head_gap(make(name)) < 1e-6


SMALL = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": None}  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        CohereConfig(**SMALL, logit_scale=0.25),
        GraniteConfig(**SMALL, logits_scaling=4.0),
        Gemma2Config(**SMALL, attn_logit_softcapping=2.0, query_pre_attn_scalar=8, sliding_window=8, final_logit_softcapping=3.0),
    ],
    ids=lambda config: config.model_type,
)
def test_scaled_logits_and_capped_attention_are_known(config):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    lm, rows = wrap(model, SOURCE), family()
    assert lm.layout == "tree"
    seqs = Sequences.of(rows)
    with torch.no_grad():
        assert float((lm.logprobs(seqs) - alone(lm, rows)).abs().max()) < 1e-5
        assert float((twin(lm, "padded").logprobs(seqs) - alone(lm, rows)).abs().max()) < 1e-5


class Louder(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = 1.1 * out.logits
        return out


def test_a_model_that_does_something_unknown_to_its_logits_is_refused():
    model = Louder(LlamaConfig(**{name: value for name, value in SMALL.items() if name != "head_dim"}))
    with pytest.raises(ModelError, match=r"tiny: this architecture \(Louder\) does something to its logits .* by 0\.0909"):
        wrap(model, SOURCE)


# ---- attention over a tree, against one softmax over a dense mask


def dense(query, key, value, plan, scoring):
    """Every token against every token it may see, in one softmax."""
    row = query.shape[2]
    allowed = torch.zeros(row, row, dtype=torch.bool)
    for path in plan.paths:
        index = torch.from_numpy(path)
        gap = plan.positions[index][:, None] - plan.positions[index][None]
        allowed[index[:, None], index[None]] |= (gap >= 0) & (gap < (scoring.window or 10**6))
    key, value = (each.repeat_interleave(query.shape[1] // key.shape[1], 1) for each in (key, value))
    scores = query @ key.transpose(2, 3) * scoring.scale
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    weights = scores.masked_fill(~allowed, float("-inf")).exp()
    rest = 0.0 if scoring.sinks is None else scoring.sinks[None, :, None, None].exp()
    return ((weights / (weights.sum(-1, keepdim=True) + rest)) @ value).transpose(1, 2)


@pytest.mark.parametrize("grouped", [1, 2])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 5])
def test_attention_over_a_tree_is_one_softmax_over_what_each_token_may_see(window, softcap, sinks, grouped):
    plan = layout.tree([row for row, _ in family()])
    draw = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64).requires_grad_()

    row = len(plan.tokens)
    query, key, value, sink = random(1, 4, row, 8), random(1, 4 // grouped, row, 8), random(1, 4 // grouped, row, 8), random(4)
    scoring = Scoring(0.4, window, softcap, sink if sinks else None)
    found, expected = TreePlan(plan).attend(query, key, value, scoring), dense(query, key, value, plan, scoring)
    exactness = 1e-12 if softcap is None and not sinks else 1e-5  # the explicit softmax is a float32 one
    torch.testing.assert_close(found, expected, rtol=0, atol=exactness)
    weight, inputs = random(*found.shape).detach(), [query, key, value, *([sink] if sinks else [])]
    for ours, theirs in zip(
        torch.autograd.grad((found * weight).sum(), inputs), torch.autograd.grad((expected * weight).sum(), inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=100 * exactness)


def test_the_merged_and_the_masked_path_of_attention_agree():
    plan = layout.tree([row for row, _ in family()])
    query, key, value = (torch.randn(1, 4, len(plan.tokens), 8, dtype=torch.float64) for _ in range(3))
    tree, scoring = TreePlan(plan), Scoring(0.4)
    torch.testing.assert_close(
        tree.attend(query, key, value, scoring), tree._by_segment(query, key, value, scoring), rtol=0, atol=1e-12
    )


def test_a_sequence_with_nothing_trained_gives_no_value_and_a_gradient_of_zero():
    for name in ("llama", "mamba"):
        lm = make(name)
        logp = lm.logprobs(Sequences.of([answers(tokens(12, 1)), answers(tokens(1, 2))]))
        assert logp.shape == (0,)
        found = gradients(lm, logp.sum())
        assert all(value.abs().max() == 0 for value in found.values())


def test_attention_returns_to_the_models_own_after_a_layout_was_used_even_when_it_failed(monkeypatch):
    lm, row = make("llama"), torch.tensor([tokens(9, 1)])
    before = lm.model(input_ids=row).logits
    monkeypatch.setattr(TreePlan, "attend", lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        lm.logprobs(Sequences.of(family()))
    assert torch.equal(lm.model(input_ids=row).logits, before)
    assert SimpleNamespace(**vars(lm.model.config))._attn_implementation_internal == "sdpa"
