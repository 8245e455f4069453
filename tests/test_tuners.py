"""What every tuner promises, on four architectures; and what single kinds promise beyond it."""

import copy
import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_models import make, transformer
from torch.nn.functional import linear
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM
from tuned_models import ARCHITECTURES, CASES, Case, installed, move

from posttrain.batch import Sequences
from posttrain.errors import DataError, ModelError, RecipeError
from posttrain.models import soft
from posttrain.models.attention import Scoring, TreePlan
from posttrain.models.layout import tree
from posttrain.models.load import wrap
from posttrain.models.roles import Earlier
from posttrain.models.source import ModelSource
from posttrain.sampling import Sampling
from posttrain.sampling.engine import Engine, Request
from posttrain.training.fit import Learner, clip
from posttrain.training.optim import AdamW
from posttrain.tuners import Tuner, tuned
from posttrain.tuners.bottleneck import bottlenecks
from posttrain.tuners.folder import WEIGHTS, load_adapter, save_adapter
from posttrain.tuners.injected import ADAPTER, fold, layers_of

SEQS = Sequences.of(
    [
        ([5, 9, 40, 3, 3, 71, 8, 2, 66, 12, 31], [False] * 4 + [True] * 7),
        ([5, 9, 40, 3, 3, 14, 90], [False] * 5 + [True] * 2),
        ([61, 22, 7], [False, False, True]),
    ]
)
cases = pytest.mark.parametrize("case", CASES, ids=str)
architectures = pytest.mark.parametrize("name", ARCHITECTURES)


def said(lm):
    with torch.no_grad():
        return lm.logprobs(SEQS)


def digest(tensor):
    return hashlib.sha256(tensor.detach().flatten().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """{architecture: a folder with its tiny model}"""
    found = {}
    for name in ARCHITECTURES:
        found[name] = tmp_path_factory.mktemp("base") / name
        transformer(name).save_pretrained(found[name])
    return found


@cases
@architectures
def test_1_at_the_start_it_changes_what_it_promises_to(case, name):
    lm = make(name)
    before = said(lm)
    installed(case, lm, name)
    gap = float((said(lm) - before).abs().max())
    if case.begins is None:
        assert gap > 1e-3
    else:
        assert gap <= case.begins
        if case.kind == "adapter":
            assert gap > 0, "near to nothing, and not nothing"


@cases
@architectures
def test_2_it_trains_as_many_parameters_as_its_formula_says(case, name):
    lm = make(name)
    installed(case, lm, name)
    assert sum(each.numel() for each in tuned(lm.model).values()) == case.count(name)


@cases
@architectures
def test_3_nothing_else_moves_and_everything_tuned_gets_a_gradient(case, name):
    lm = make(name)
    installed(case, lm, name)
    before = {key: digest(each) for key, each in lm.model.named_parameters()}
    optimizer = torch.optim.AdamW(tuned(lm.model).values(), lr=1e-2, weight_decay=0.1)
    with_gradient = set()
    for _ in range(3):
        optimizer.zero_grad()
        loss, _ = lm.weighted_sum(SEQS, -torch.ones(SEQS.trained))
        loss.backward()
        with_gradient |= {key for key, each in lm.model.named_parameters() if each.grad is not None and bool(each.grad.any())}
        optimizer.step()
    changed = {key for key, each in lm.model.named_parameters() if digest(each) != before[key]}
    assert with_gradient == set(tuned(lm.model))
    assert changed == set(tuned(lm.model))


@cases
@architectures
def test_4_what_is_stored_alone_makes_the_same_model_again(case, name, bases, tmp_path):
    lm, base = make(name), ModelSource(path=str(bases[name]))
    tuner = installed(case, lm, name)
    move(lm)
    wanted = said(lm)
    save_adapter(tuner, lm.model, tmp_path, base)
    state = load_file(tmp_path / WEIGHTS)
    if case.note != "pissa" and case.kind not in {"p_tuning", "prefix", "delta_scale"}:  # what is folded in, or stands still
        assert sum(each.numel() for each in state.values()) == case.count(name), "nothing but what was trained"

    again = make(name)
    load_adapter(again.model, tmp_path, base)
    assert not tuned(again.model), "it comes back frozen"
    torch.testing.assert_close(said(again), wanted, rtol=0, atol=0 if not tuner.merges or case.kind in {"layers", "head", "bitfit", "delta_scale"} else 2e-5)

    if case.note != "pissa":
        third = make(name)
        installed(case, third, name, seed=5).restore(third.model, state)
        assert torch.equal(said(third), wanted), "bit for bit"


@cases
@architectures
def test_5_merged_it_says_the_same_or_it_says_that_it_cannot_merge(case, name):
    lm = make(name)
    plain = {key for key, _ in lm.model.named_parameters()}
    tuner = installed(case, lm, name)
    move(lm)
    wanted = said(lm)
    if not tuner.merges:
        with pytest.raises(NotImplementedError):
            tuner.merge(lm.model)
        return
    tuner.merge(lm.model)
    torch.testing.assert_close(said(lm), wanted, rtol=0, atol=2e-5)
    extra = {key for key, _ in lm.model.named_parameters()} - plain
    assert all(key.endswith("bias") for key in extra) or case.kind == "head", "an ordinary model again"


def off(case, lm, tuner, begun):
    """The model as it was: the tuner switched off, or where that cannot be its weights as they were."""
    return tuner.switched_off(lm.model) if tuner.reversible else begun.in_place()


@cases
@architectures
def test_6_and_7_switched_off_it_is_the_base_and_two_of_them_can_take_turns(case, name):
    lm = make(name)
    base = said(lm)
    tuner = installed(case, lm, name)
    begun = Earlier(tuned(lm.model))
    first = said(lm)
    states = []
    for seed in (1, 2):
        move(lm, seed)
        states.append(({key: each.clone() for key, each in tuner.state(lm.model).items()}, said(lm)))
    assert not torch.allclose(states[0][1], states[1][1])
    with off(case, lm, tuner, begun):
        assert torch.equal(said(lm), base if tuner.reversible else first)
    torch.testing.assert_close(said(lm), states[1][1], rtol=0, atol=0)
    if case.note == "pissa":
        return  # its file is of another form than what is in the model
    for state, wanted in (*states, states[0]):
        tuner.restore(lm.model, state)
        assert torch.equal(said(lm), wanted)
    if tuner.reversible:
        with tuner.switched_off(lm.model):
            assert torch.equal(said(lm), base)


@cases
@architectures
def test_8_checkpointed_layers_give_the_same_gradients_through_frozen_embeddings(case, name):
    grads = []
    for checkpointing in (False, True):
        lm = wrap(transformer(name), ModelSource(path="tiny", gradient_checkpointing=checkpointing))
        installed(case, lm, name)
        move(lm)
        loss, _ = lm.weighted_sum(SEQS, -torch.ones(SEQS.trained))
        loss.backward()
        grads.append({key: each.grad for key, each in tuned(lm.model).items()})
    assert all(each is not None for each in grads[1].values())
    for key, each in grads[0].items():
        torch.testing.assert_close(grads[1][key], each, rtol=1e-5, atol=1e-6)


# ---- the sampler


@cases
@architectures
def test_what_is_sampled_has_the_probabilities_that_training_gives_it(case, name):
    lm = make(name)
    installed(case, lm, name)
    move(lm)
    engine = Engine(lm, Sampling(max_tokens=9), [1], seed=3)
    prompts = [(5, 9, 40, 3), (61, 22, 7, 30, 30, 2, 8), (5, 9, 40, 3)]
    for index, prompt in enumerate(prompts):
        engine.add(Request(prompt, (index,)))
    done = [engine.next() for _ in prompts]
    rows = [([*each.request.tokens, *each.tokens], [False] * len(each.request.tokens) + [True] * len(each.tokens)) for each in done]
    with torch.no_grad():
        trained = lm.logprobs(Sequences.of(rows))
    torch.testing.assert_close(torch.tensor([value for each in done for value in each.logp]), trained, rtol=0, atol=2e-5)


# ---- peft


IN_PEFT = [case for case in CASES if case.tuner("llama").peft_type and case.settings.get("at", [0]) == [0]]


def said_by(model):
    """The log-probabilities of SEQS by a transformers or peft model, each sequence alone."""
    found, edges = [], SEQS.starts.tolist()
    for row, start in zip(SEQS.rows(), edges, strict=False):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row])).logits[0, -len(row) :]  # soft tokens stand before the row's own
        logp = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(row[1:])[:, None])[:, 0]
        found.append(logp[SEQS.train[start + 1 : start + len(row)]])
    return torch.cat(found)


@pytest.mark.parametrize("case", IN_PEFT, ids=str)
@architectures
def test_peft_reads_what_is_stored_and_computes_the_same(case, name, bases, tmp_path):
    lm = make(name)
    tuner = installed(case, lm, name)
    move(lm)
    save_adapter(tuner, lm.model, tmp_path, ModelSource(path=str(bases[name])))
    theirs = PeftModel.from_pretrained(transformer(name), tmp_path).eval()
    torch.testing.assert_close(said_by(theirs), said(lm), rtol=0, atol=2e-5)


def of_peft(kind, name):
    """A configuration of peft's own making."""
    from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig

    linear_names = ["c_attn", "c_fc"] if name == "gpt2" else ["q_proj", "down_proj"]
    inner = ["mlp.c_proj"] if name == "gpt2" else ["down_proj"]
    return {
        "lora": LoraConfig(r=4, lora_alpha=7, target_modules=linear_names, task_type="CAUSAL_LM", rank_pattern={linear_names[0]: 2}),
        "dora": LoraConfig(r=4, use_dora=True, use_rslora=True, target_modules=".*(" + "|".join(linear_names) + ")", task_type="CAUSAL_LM"),
        "ia3": IA3Config(
            target_modules=(["c_attn", "mlp.c_proj"] if name == "gpt2" else ["k_proj", "v_proj", "down_proj"]),
            feedforward_modules=inner, task_type="CAUSAL_LM",
        ),
        "prompt": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        "p_tuning": PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=7, task_type="CAUSAL_LM"),
        "prefix": PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    }[kind]  # fmt: skip


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "prompt", "p_tuning", "prefix"])
@architectures
def test_what_peft_has_stored_is_read_and_computes_the_same(kind, name, bases, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(2)
        theirs = get_peft_model(transformer(name), of_peft(kind, name)).eval()
        with torch.no_grad():
            for parameter in theirs.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape))
    theirs.save_pretrained(tmp_path)
    assert not (tmp_path / "posttrain_adapter.json").exists()
    lm = make(name)
    load_adapter(lm.model, tmp_path, ModelSource(path=str(bases[name])))
    torch.testing.assert_close(said(lm), said_by(theirs), rtol=0, atol=2e-5)


# ---- soft tokens


def with_words_before(words):
    """SEQS with real words in front of each sequence."""
    marks, edges = SEQS.train.tolist(), SEQS.starts.tolist()
    rows = [([*words, *row], [False] * len(words) + marks[a : a + len(row)]) for row, a in zip(SEQS.rows(), edges, strict=False)]
    return Sequences.of(rows)


@architectures
def test_a_prompt_of_words_vectors_is_as_good_as_the_words(name):
    lm, words = make(name), [17, 3, 88, 88, 20]
    installed(Case("prompt", None, {"tokens": 5}), lm, name)
    with torch.no_grad():
        soft.all_of(lm.model)[0].encoder.embedding.weight.copy_(lm.model.get_input_embeddings()(torch.tensor(words)))
        torch.testing.assert_close(said(lm), make(name).logprobs(with_words_before(words)), rtol=0, atol=1e-5)


@architectures
def test_a_prefix_of_words_keys_and_values_is_as_good_as_the_words(name, monkeypatch):
    lm, words = make(name), [17, 3, 88, 88, 20]
    monkeypatch.setattr("posttrain.tuners.soft._words", lambda model, text, count: words)
    installed(Case("prefix", None, {"tokens": 5, "projection": None, "text": "words"}), lm, name)
    with torch.no_grad():
        torch.testing.assert_close(said(lm), make(name).logprobs(with_words_before(words)), rtol=0, atol=1e-5)


def test_attention_with_a_prefix_is_a_mixture_of_both_attentions():
    """(1 - l) Attn(q, K, V) + l softmax(q Pk) Pv, l the share of weight that the prefix takes; arXiv 2110.04366."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 3 + 6, 4, generator=draw) for _ in range(3))
    pk, pv = (torch.randn(2, 3, 4, generator=draw) for _ in range(2))
    plan = TreePlan(tree([list(range(9))]))
    found = plan.attend(q, *soft.Given(torch.arange(3), torch.stack([torch.stack([pk, pv])])).put_into(0, k, v), Scoring(0.5))
    for head in range(2):
        for place in range(6):
            own = (q[0, head, 3 + place] @ k[0, head, 3 : 4 + place].T * 0.5).double()
            theirs = (q[0, head, 3 + place] @ pk[head].T * 0.5).double()
            share = theirs.exp().sum() / (theirs.exp().sum() + own.exp().sum())
            wanted = (1 - share) * own.softmax(0) @ v[0, head, 3 : 4 + place].double() + share * theirs.softmax(0) @ pv[head].double()
            torch.testing.assert_close(found[0, 3 + place, head].double(), wanted, rtol=1e-5, atol=1e-6)


def test_soft_tokens_stand_where_they_were_asked_to_stand():
    tokens = soft.SoftTokens(torch.nn.Embedding(5, 2), 5, first=100, at=(0, 2, 3))
    assert tokens.put_into([7, 8, 9], [False, True, True]) == (
        [100, 101, 7, 8, 102, 9, 103, 104], [False, False, False, True, False, True, False, False]
    )  # fmt: skip
    with pytest.raises(DataError, match="ends before number 3, where soft tokens stand"):
        tokens.put_into([7, 8], [False, True])


@architectures
def test_rows_of_one_batch_may_have_different_prompts(name):
    lm = make(name)
    base = said(lm)
    for seed in (1, 2):
        installed(Case("prompt", None, {"tokens": 3 + seed}), lm, name, seed)
    alone = []
    for one, other in ((0, 1), (1, 0)):
        tables = soft.all_of(lm.model)
        tables[one].active, tables[other].active = True, False
        alone.append(said(lm))
    for each in soft.all_of(lm.model):
        each.active = False
    assert torch.equal(said(lm), base)
    marks, edges = SEQS.train.tolist(), SEQS.starts.tolist()
    rows = [(row, marks[a : a + len(row)]) for row, a in zip(SEQS.rows(), edges, strict=False)]
    first, second = soft.all_of(lm.model)
    mixed = Sequences.of([first.put_into(*rows[0]), second.put_into(*rows[1]), rows[2]])
    with torch.no_grad():
        found = lm.logprobs(mixed)
    wanted = [one[SEQS.owner == row] for row, one in enumerate((alone[0], alone[1], base))]
    torch.testing.assert_close(found, torch.cat(wanted), rtol=0, atol=1e-5)


def test_soft_tokens_take_their_part_of_the_context():
    lm = make("llama")
    assert lm.context == 128
    installed(Case("prompt", None, {"tokens": 28}), lm, "llama")
    assert lm.context == 100
    with pytest.raises(RecipeError, match="128 soft tokens leave no place in a context of 128"):
        Tuner.lookup("prompt")(tokens=128).install(make("llama").model)


# ---- goldens


def test_lora_and_dora_compute_their_worked_examples():
    from peft import LoraConfig, inject_adapter_in_model

    class One(torch.nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.linear = torch.nn.Linear(2, 2, bias=False)
            self.linear.weight.data = torch.tensor(weight)

    plain = inject_adapter_in_model(LoraConfig(r=1, lora_alpha=2, target_modules=["linear"]), One([[1.0, 0.0], [0.0, 1.0]]), ADAPTER)
    plain.linear.lora_A[ADAPTER].weight.data = torch.tensor([[1.0, 0.0]])
    plain.linear.lora_B[ADAPTER].weight.data = torch.tensor([[0.5], [1.0]])
    assert plain.linear(torch.tensor([1.0, 2.0])).tolist() == [2.0, 4.0]
    fold(plain)
    assert plain.linear(torch.tensor([1.0, 2.0])).tolist() == [2.0, 4.0]

    turned = inject_adapter_in_model(
        LoraConfig(r=1, lora_alpha=1, use_dora=True, target_modules=["linear"]), One([[3.0, 4.0], [0.0, 2.0]]), ADAPTER
    )
    assert turned.linear.lora_magnitude_vector[ADAPTER].weight.tolist() == [5.0, 2.0]
    turned.linear.lora_A[ADAPTER].weight.data = torch.tensor([[1.0, 0.0]])
    turned.linear.lora_B[ADAPTER].weight.data = torch.tensor([[0.0], [2.0]])
    fold(turned)
    torch.testing.assert_close(turned.linear.weight.data, torch.tensor([[3.0, 4.0], [2**0.5, 2**0.5]]))


@pytest.mark.parametrize(
    ("kind", "settings", "count"),
    [
        ("lora", {"rank": 16}, 39_976_960), ("lora", {"rank": 8, "targets": ["q_proj", "v_proj"]}, 4_194_304), ("ia3", {}, 614_400),
        ("prefix", {"tokens": 20, "projection": None}, 5_242_880),
    ],
)  # fmt: skip
def test_parameters_of_a_llama_of_7_billion(kind, settings, count):
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())  # its sizes are the defaults
    Tuner.lookup(kind)(**settings).install(model)
    assert sum(each.numel() for each in tuned(model).values()) == count


def test_parameters_of_bert():
    with torch.device("meta"):
        model = BertModel(BertConfig())
    Tuner.lookup("bitfit")().install(model)
    assert sum(each.numel() for each in tuned(model).values()) == 102_912
    Tuner.lookup("adapter")(size=64, norms=False).install(model)
    assert sum(each.numel() for each in tuned(model).values()) == 24 * 99_136 == 2_379_264
    assert len(bottlenecks(model)) == 24


@architectures
def test_an_adapter_stands_before_the_residual_sum(name):
    """A(h) = h + W_up gelu(W_down h + b) + b on the output of attention and of the feed-forward layer, written out."""
    lm = make(name)
    installed(CASES[8], lm, name)
    move(lm)
    for path, each in bottlenecks(lm.model).items():
        host, seen = lm.model.get_submodule(path), []
        hook = host.register_forward_hook(lambda _m, inputs, output, seen=seen: seen.append((inputs[0], output)))
        said(lm)
        hook.remove()
        given, found = seen[0]
        plain = given @ host.weight + host.bias if name == "gpt2" else linear(given, host.weight, host.bias)
        inner = torch.nn.functional.gelu(plain @ each.down.T + each.down_bias)
        torch.testing.assert_close(found, plain + inner @ each.up.T + each.up_bias, rtol=1e-5, atol=1e-6)
        assert path.endswith(("o_proj", "down_proj", "attn.c_proj", "mlp.c_proj"))


def test_an_adapter_whose_upper_half_is_zero_does_nothing():
    lm = make("llama")
    before = said(lm)
    installed(CASES[8], lm, "llama")
    with torch.no_grad():
        for each in bottlenecks(lm.model).values():
            each.up.zero_()
    assert torch.equal(said(lm), before)


def test_the_gradient_of_a_bias_is_the_sum_of_its_outputs_gradients():
    lm = make("gpt2")
    installed(Case("bitfit", None), lm, "gpt2")
    host, seen = lm.model.transformer.h[0].mlp.c_fc, []

    def watch(_module, _inputs, output):
        output.register_hook(seen.append)

    host.register_forward_hook(watch)
    lm.weighted_sum(SEQS, -torch.ones(SEQS.trained))[0].backward()
    torch.testing.assert_close(host.bias.grad, seen[0].sum((0, 1)), rtol=1e-5, atol=1e-6)


def test_ia3_scales_keys_values_and_the_inside_and_no_query():
    lm = make("llama")
    installed(Case("ia3", None), lm, "llama")
    names = {path.rpartition(".")[2] for path in layers_of(lm.model)}
    assert names == {"k_proj", "v_proj", "down_proj"}
    block = lm.model.model.layers[0].self_attn
    with torch.no_grad():
        states = torch.randn(3, 32)
        before = block.v_proj(states)
        block.v_proj.ia3_l[ADAPTER].fill_(2.5)
        torch.testing.assert_close(block.v_proj(states), 2.5 * before)


def test_ia3_leaves_the_queries_of_gpt2_alone_in_a_copied_model_too():
    lm = make("gpt2")
    installed(Case("ia3", None), lm, "gpt2")
    for model in (lm, copy.deepcopy(lm)):
        optimizer = torch.optim.SGD(tuned(model.model).values(), lr=1.0)
        model.weighted_sum(SEQS, -torch.ones(SEQS.trained))[0].backward()
        optimizer.step()
        vector = model.model.transformer.h[0].attn.c_attn.ia3_l[ADAPTER].flatten()
        assert torch.equal(vector[:32], torch.ones(32))
        assert not bool((vector[32:] == 1).any())


# ---- paces


def test_deeper_layers_learn_more_slowly_and_begin_later():
    tuner = Tuner.lookup("layers")(rate_decay=0.5, unfreeze=0.4)
    lm = make("llama")
    tuner.install(lm.model)
    paces = tuner.paces(list(tuned(lm.model)))
    assert paces["model.norm.weight"] == (1.0, 0.0)
    assert paces["model.layers.1.mlp.up_proj.weight"] == (0.5, pytest.approx(0.4 / 3))
    assert paces["model.layers.0.mlp.up_proj.weight"] == (0.25, pytest.approx(0.8 / 3))
    assert paces["model.embed_tokens.weight"] == (0.125, pytest.approx(0.4))
    learner = Learner.of(tuned(lm.model), AdamW(learning_rate=0.1, schedule="constant", warmup=0.0), tuner)
    moved = []
    for step in range(10):
        before = {name: each.detach().clone() for name, each in learner.parameters.items()}
        lm.weighted_sum(SEQS, -torch.ones(SEQS.trained))[0].backward()
        clip(learner, step, 10)
        learner.step(step, 10)
        moved.append({name for name, each in learner.parameters.items() if not torch.equal(each, before[name])})
    first = {name: next(step for step, names in enumerate(moved) if name in names) for name in paces}
    assert first["model.norm.weight"] == 0
    assert first["model.layers.1.mlp.up_proj.weight"] == 1
    assert first["model.layers.0.mlp.up_proj.weight"] == 3
    assert first["model.embed_tokens.weight"] == 4


def test_lora_plus_gives_b_a_rate_of_its_own():
    tuner, lm = Tuner.lookup("lora")(b_rate=16.0), make("llama")
    tuner.install(lm.model)
    learner = Learner.of(tuned(lm.model), AdamW(schedule="constant", warmup=0.0), tuner)
    learner.step(0, 10)
    rates = {id(each): group["lr"] for group in learner.optimizer.param_groups for each in group["params"]}
    for name, each in learner.parameters.items():
        assert rates[id(each)] == pytest.approx(3.2e-3 if "lora_B" in name else 2e-4), "2e-4: what is usual for lora"


@pytest.mark.parametrize(("rate", "expected"), [("low", 5e-4), (None, 3e-3), ("high", 3e-2), (0.7, 0.7)])
def test_a_learning_rate_may_be_named_as_an_end_of_what_is_usual_for_the_tuner(rate, expected):
    tuner, lm = Tuner.lookup("ia3")(), make("llama")
    tuner.install(lm.model)
    learner = Learner.of(tuned(lm.model), AdamW(learning_rate=rate, schedule="constant", warmup=0.0), tuner)
    assert learner.optim.peak == expected
    learner.step(0, 10)
    assert {group["lr"] for group in learner.optimizer.param_groups} == {expected}


# ---- refusals


def refusal(kind, settings, model=None):
    with pytest.raises(RecipeError) as caught:
        Tuner.lookup(kind)(**settings).install(transformer("llama") if model is None else model)
    return str(caught.value)


def test_a_tuner_that_does_not_fit_says_so_and_what_to_do():
    assert "has no biases; set add: true" in refusal("bitfit", {})
    assert "knows no further biases" in refusal("bitfit", {"add": True}, transformer("mistral"))
    assert "shares its weights with the embeddings" in refusal("head", {})
    assert "no parameter matches '*.atn.*'" in refusal("layers", {"train": ["*.atn.*"]})
    assert "the head shares its weights with the embeddings" in refusal("layers", {"train": ["lm_head.*"]})
    assert "LlamaForCausalLM has 2 blocks" in refusal("layers", {"last": 3})
    assert "nothing to move" in refusal("layers", {"last": 1, "train": ["*embed_tokens*"]})
    assert "no layer that is known as its attention out" in refusal("adapter", {}, transformer("mamba"))
    assert "queries, keys and values" in refusal("ia3", {}, transformer("gpt_neox"))
    assert "32 is more than the 16 directions of model.layers.0.self_attn.k_proj" in refusal("lora", {"rank": 32, "init": "pissa"})
    assert "no linear layer is called 'q_prj'; did you mean 'q_proj'" in refusal("lora", {"targets": ["q_prj"]})


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("layers", {}, "moves every layer"), ("prompt", {"tokens": 0}, "greater than 0"), ("lora", {"rank": 0}, "greater than 0"),
        ("lora", {"alpha": 0}, "greater than 0"), ("lora", {"b_rate": math.inf}, "finite"), ("lora", {"targets": []}, "at least 1"),
        ("lora", {"alpha": math.nan}, "finite"), ("lora", {"dora": True, "init": "pissa"}, "take one"),
        ("prompt", {"text": "be kind", "init": "random"}, "remove one of them"), ("prompt", {"text": " "}, "is empty"),
        ("prefix", {"text": "be kind"}, "set projection: null"), ("p_tuning", {"at": [3, 1]}, "ascending order"),
        ("p_tuning", {"at": [0, 1], "tokens": 1}, "only 1 tokens"),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other_are_refused(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        Tuner.lookup(kind)(**settings)


def test_an_adapter_of_another_model_is_refused_by_hash_by_names_and_by_shapes(bases, tmp_path):
    lm, base = make("llama"), ModelSource(path=str(bases["llama"]))
    tuner = installed(CASES[8], lm, "llama")
    save_adapter(tuner, lm.model, tmp_path, base)
    with pytest.raises(ModelError, match="made on another model"):
        load_adapter(make("qwen3").model, tmp_path, ModelSource(path=str(bases["qwen3"])))
    known = json.loads((tmp_path / "posttrain_adapter.json").read_text())
    (tmp_path / "posttrain_adapter.json").write_text(json.dumps(known | {"weights": "hub:some/model@main"}))
    with pytest.raises(ModelError, match="made for another model"):
        load_adapter(make("qwen3").model, tmp_path, ModelSource(path=str(bases["qwen3"])))
    with pytest.raises(ModelError, match=r"has no layer|made for another model"):
        load_adapter(make("gpt2").model, tmp_path, ModelSource(path=str(bases["gpt2"])))
    whole = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="the file is not whole"):
        load_adapter(make("llama").model, tmp_path, base)
    (tmp_path / "posttrain_adapter.json").write_text(json.dumps(known | {"tuner": {"kind": "os:path"}}))
    with pytest.raises(ModelError, match="a file does not get to import code"):
        ModelSource(path=str(tmp_path)).check()
    (tmp_path / WEIGHTS).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ModelError, match="pickled weights are never loaded"):
        ModelSource(path=str(tmp_path)).check()


@pytest.mark.parametrize("above", [4, 7], ids=lambda index: str(CASES[index]))
def test_a_frozen_adapter_that_cannot_be_folded_in_stays_below_a_new_one(above, bases, tmp_path):
    """On a model with bottleneck adapters, LoRA is no change of weights: it stays as layers, and so do those that follow."""
    base = ModelSource(path=str(bases["llama"]))
    lm = make("llama")
    for index, folder in ((8, "one"), (3, "two")):
        tuner = installed(CASES[index], lm, "llama")
        move(lm, seed=index)
        save_adapter(tuner, lm.model, tmp_path / folder, base)
        (tmp_path / folder / "posttrain_adapter.json").write_text(
            json.dumps({"tuner": tuner.model_dump(mode="json"), "base": str(base.path if folder == "one" else tmp_path / "one")})
        )
    trained = said(lm)
    again = load_below(tmp_path / "two", "llama")
    assert torch.equal(said(again), trained)
    assert not tuned(again.model)
    tuner = installed(CASES[above], again, "llama", seed=9)
    assert sum(each.numel() for each in tuned(again.model).values()) == CASES[above].count("llama")
    move(again, seed=9)
    moved = said(again)
    assert (moved - trained).abs().max() > 1e-3
    with tuner.switched_off(again.model):
        assert torch.equal(said(again), trained), "off is the model with the frozen ones"
    assert torch.equal(said(again), moved)


def load_below(folder, name):
    """`load` of an adapter folder, on a tiny model without a tokenizer."""
    source = ModelSource(path=str(folder))
    below = source.below()
    if below is None:
        return make(name)
    lm = load_below(Path(below.path), name)
    load_adapter(lm.model, folder, below)
    return lm


def test_what_peft_alone_computes_is_refused_and_no_weight_of_the_model_is_overwritten(bases, tmp_path):
    from peft import LoraConfig

    for name, options, message in (
        ("bias", {"lora_bias": True}, "its lora_bias is something that peft alone computes"),
        ("head", {"modules_to_save": ["lm_head"]}, "merge it with peft first"),
        ("words", {"trainable_token_indices": [3, 4]}, "peft alone computes"),
    ):
        model = transformer("qwen3")
        get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", **options)).save_pretrained(tmp_path / name)
        lm = make("qwen3")
        before = lm.model.lm_head.weight.detach().clone()
        with pytest.raises(ModelError, match=message):
            load_adapter(lm.model, tmp_path / name, ModelSource(path=str(bases["qwen3"])))
        assert torch.equal(lm.model.lm_head.weight, before)


def test_what_peft_does_not_understand_is_said_with_the_file(bases, tmp_path):
    config = of_peft("lora", "llama")
    get_peft_model(transformer("llama"), config).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    good = json.loads(file.read_text())
    for bad, message in (
        (good | {"peft_type": "NOPE"}, "peft does not understand its adapter_config.json: KeyError: 'NOPE'"),
        (good | {"r": "x"}, "peft cannot put this adapter into the model"),
        ([1, 2], r"adapter_config.json: holds list \[1, 2\], and no object of settings"),
        ("{", "adapter_config.json: not valid JSON"),
    ):
        file.write_text(bad if bad == "{" else json.dumps(bad))
        with pytest.raises(ModelError, match=message):
            load_adapter(make("llama").model, tmp_path, ModelSource(path=str(bases["llama"])))


def test_biases_are_added_where_the_architecture_finds_them_again(tmp_path):
    from transformers import GlmConfig, GlmForCausalLM

    config = GlmConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        attention_bias=False, pad_token_id=0,
    )  # fmt: skip
    model = GlmForCausalLM(config)
    Tuner.lookup("bitfit")(add=True).install(model)
    assert tuned(model).keys() == {f"model.layers.0.self_attn.{name}_proj.bias" for name in "qkv"}
    with torch.no_grad():
        for each in tuned(model).values():
            each.fill_(0.3)
    model.save_pretrained(tmp_path)
    again, report = GlmForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["unexpected_keys"]
    assert not report["missing_keys"]
    torch.testing.assert_close(again(torch.tensor([[3, 4, 5]])).logits, model.eval()(torch.tensor([[3, 4, 5]])).logits)


def test_a_mixed_models_soft_tokens_are_stored_as_they_are_trained():
    lm = make("llama")
    lm.mixed = True
    tuner = installed(Case("p_tuning", None, {"tokens": 4}), lm, "llama")
    stored = tuner.state(lm.model)["prompt_embeddings"]
    with torch.no_grad(), lm.arithmetic():
        assert torch.equal(soft.all_of(lm.model)[0].learned(), stored)
