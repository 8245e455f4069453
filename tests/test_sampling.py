"""Sampling: every draw is addressed, and recorded with the log-probability of the distribution that it came from."""

import numpy as np
import pytest
import torch
from tiny_models import TREE, VOCABULARY, make

from posttrain.batch import Sequences
from posttrain.sampling import decoder
from posttrain.sampling.cache import Stems
from posttrain.sampling.draw import draw
from posttrain.sampling.engine import Engine, Request
from posttrain.sampling.settings import Sampling

NAMES = ["llama", "gemma3", "gpt2", "mamba"]
STOP = (3, 7, 11)


def prompt(seed, length=None):
    draws = torch.Generator().manual_seed(seed)
    length = int(torch.randint(1, 24, (1,), generator=draws)) if length is None else length
    return tuple(torch.randint(0, VOCABULARY, (length,), generator=draws).tolist())


def requests(count, per_prompt=4):
    return [Request(prompt(index // per_prompt), ("problem", index // per_prompt, index % per_prompt)) for index in range(count)]


def completed(lm, asked, sampling, rows=256, stop=STOP, seed=5):
    """{address: completion} of all requests, from an engine of its own."""
    engine = Engine(lm, sampling, stop, seed, rows)
    for request in asked:
        engine.add(request)
    found = {}
    while (done := engine.next()) is not None:
        found[done.request.address] = done
    assert len(found) == len(asked)
    return found


def spoken(found):
    return {address: (tuple(done.tokens), done.stop) for address, done in found.items()}


# ---- the same draws whatever the batching


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_draws_alone_in_a_batch_in_any_order_and_with_any_number_of_rows(name):
    lm, asked, sampling = make(name), requests(64), Sampling(max_tokens=10)
    together = spoken(completed(lm, asked, sampling))
    assert len(set(together.values())) > 60
    assert spoken(completed(lm, asked[::-1], sampling)) == together
    assert spoken(completed(lm, asked, sampling, rows=7)) == together
    for request in asked[::8]:
        assert spoken(completed(lm, [request], sampling)) == {request.address: together[request.address]}


@pytest.mark.parametrize("rows", [256, 7])
@pytest.mark.parametrize("name", TREE)
def test_a_prompt_that_is_kept_once_for_all_its_rows_gives_what_copies_of_it_give(name, rows, monkeypatch):
    """Windows are 8 tokens, prompts up to 23; with 7 rows at a time prompts come and go, and most groups are cut."""
    lm, asked, sampling = make(name), requests(40), Sampling(max_tokens=12)
    asked += [Request(prompt(100 + index), ("alone", index)) for index in range(6)]
    found, used, real = [], [], Stems.together
    monkeypatch.setattr(Stems, "together", lambda stems, tensor: used.append(stems.count) or real(stems, tensor))
    for shared in (0, 10**9):
        monkeypatch.setattr(decoder, "SHARED", shared)
        found.append(completed(lm, asked, sampling, rows))
        if shared == 0:
            assert max(used) == 10 if rows == 256 else {1, 2} <= set(used)
            used.clear()
    assert not used
    assert spoken(found[0]) == spoken(found[1])
    for one in found[0].values():
        assert one.logp == pytest.approx(found[1][one.request.address].logp, abs=1e-5)


@torch.no_grad()
def test_a_shared_prompt_is_forgotten_when_its_last_row_has_left(monkeypatch):
    monkeypatch.setattr(decoder, "SHARED", 0)
    lm = make("llama")
    grown = decoder.CachedDecoder(lm)
    grown.admit([prompt(1, 9), prompt(2, 20), prompt(3, 5)], [2, 3, 1], 8)
    assert grown.stems.lengths == [9, 20]
    assert len(grown.prompts[0].values) == 2
    grown.drop([0, 2])
    assert grown.stems.lengths == [9, 20]
    grown.drop([1])
    assert grown.stems.lengths == [20]
    assert len(grown.prompts[0].values) == 1
    grown.admit([prompt(4, 30)], [2], 8)
    logits = grown.advance(torch.tensor([5] * 5))
    rows = [prompt(3, 5), prompt(2, 20), prompt(2, 20), prompt(4, 30), prompt(4, 30)]
    order = sorted(range(5), key=lambda row: grown.lengths[row].item())
    for place, row in zip(order, rows, strict=True):
        marked = Sequences.of([([*row, 5, 0], [False] * (len(row) + 1) + [True])])
        torch.testing.assert_close(logits[place], lm.project(lm.hidden(marked))[0], rtol=1e-4, atol=1e-4)


def test_at_least_99_of_100_samples_are_the_same_under_another_batching():
    lm, asked, sampling = make("gemma3"), requests(1000, 8), Sampling(max_tokens=8)
    order = np.random.default_rng(0).permutation(1000)
    one = spoken(completed(lm, asked, sampling))
    other = spoken(completed(lm, [asked[index] for index in order], sampling, rows=60))
    assert sum(one[address] == other[address] for address in one) >= 990


def test_another_seed_or_another_address_gives_other_draws():
    lm, sampling = make("llama"), Sampling(max_tokens=10)
    same = [Request(prompt(1, 6), ("problem", index)) for index in range(20)]
    found = spoken(completed(lm, same, sampling))
    assert len(set(found.values())) == 20
    other = spoken(completed(lm, same, sampling, seed=6))
    assert all(found[address] != other[address] for address in found)


# ---- what is recorded is what was drawn from


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", NAMES)
def test_the_log_probs_recorded_while_sampling_are_the_trainers(name, temperature):
    lm, sampling = make(name), Sampling(max_tokens=20, temperature=temperature)
    found = list(completed(lm, requests(40), sampling, rows=9).values())
    assert {done.stop for done in found} == {"end", "length"}
    assert max(len(done.request.tokens) + len(done.tokens) for done in found) > 3 * 8  # far beyond the sliding window
    marked = [
        ([*done.request.tokens, *done.tokens], [False] * len(done.request.tokens) + [True] * len(done.tokens)) for done in found
    ]
    with torch.no_grad():
        expected = lm.logprobs(Sequences.of(marked), temperature=temperature)
    recorded = torch.tensor([value for done in found for value in done.logp])
    assert float((recorded - expected).abs().max()) < 1e-5


def test_greedy_takes_the_likeliest_token_and_records_its_plain_log_prob():
    lm, asked = make("llama"), requests(6, 1)
    for address, done in completed(lm, asked, Sampling(max_tokens=8, temperature=0), stop=()).items():
        row = list(done.request.tokens)
        for token, value in zip(done.tokens, done.logp, strict=True):
            with torch.no_grad():
                logits = lm.model(input_ids=torch.tensor([row])).logits[0, -1]
            assert token == int(logits.argmax()), address
            assert value == pytest.approx(float(logits.log_softmax(-1)[token]), abs=1e-5)
            row.append(token)


# ---- how a completion ends


@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_a_completion_ends_with_its_first_stop_token_or_at_the_budget(name):
    found = completed(make(name), requests(60), Sampling(max_tokens=15))
    for done in found.values():
        assert len(done.tokens) == len(done.logp) <= 15
        assert not set(done.tokens[:-1]) & set(STOP)
        assert (done.stop == "end") == (done.tokens[-1] in STOP)
        assert done.stop == "end" or len(done.tokens) == 15
    assert {done.stop for done in found.values()} == {"end", "length"}


def test_a_stop_token_that_is_the_last_of_the_budget_still_ends_the_completion():
    lm = make("llama")
    asked = [Request(prompt(2, 5), ("again", index)) for index in range(200)]
    found = completed(lm, asked, Sampling(max_tokens=1)).values()
    assert {done.stop for done in found if done.tokens[0] in STOP} == {"end"}
    assert {done.stop for done in found if done.tokens[0] not in STOP} == {"length"}


def test_finished_rows_leave_and_waiting_ones_enter():
    lm, sampling, asked, often = make("llama"), Sampling(max_tokens=12), requests(10, 2), tuple(range(20))
    engine = Engine(lm, sampling, often, 5, rows=3)
    for request in asked:
        engine.add(request)
    ages, finished = [], {}
    while engine.waiting or engine.running:
        engine._step()
        ages.append([len(row.tokens) for row in engine.running])
        assert len(engine.running) <= 3
        while engine.finished:
            done = engine.finished.popleft()
            finished[done.request.address] = done
    assert engine.next() is None
    assert any(len(set(age)) > 1 for age in ages)  # rows that entered at different times run together
    assert len(ages) < 10 * 12 / 3  # no row waits for the longest of its batch
    assert spoken(finished) == spoken(completed(lm, asked, sampling, rows=64, stop=often))


def test_a_request_added_while_others_run_joins_them():
    lm, sampling = make("gpt2"), Sampling(max_tokens=9)
    first, second = requests(2, 1)
    engine = Engine(lm, sampling, (), 5)
    engine.add(first)
    for _ in range(4):
        engine._step()
    engine.add(second)
    engine._step()
    assert [len(row.tokens) for row in engine.running] == [5, 1]
    found = [engine.next(), engine.next()]
    assert [done.request for done in found] == [first, second]
    assert spoken({done.request.address: done for done in found}) == spoken(completed(lm, [first, second], sampling, stop=()))


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_of_one_token_is_continued(name):
    lm = make(name)
    (done,) = completed(lm, [Request((42,), ("short",))], Sampling(max_tokens=5), stop=()).values()
    with torch.no_grad():
        expected = lm.logprobs(Sequences.of([([42, *done.tokens], [False] + [True] * 5)]))
    torch.testing.assert_close(torch.tensor(done.logp), expected, rtol=0, atol=1e-5)


def test_sampling_follows_the_weights_as_they_are():
    lm, asked, sampling = make("llama"), requests(20), Sampling(max_tokens=6)
    before = spoken(completed(lm, asked, sampling))
    with torch.no_grad():
        for value in lm.parameters():
            value.mul_(1.5)
    assert spoken(completed(lm, asked, sampling)) != before


# ---- one draw


def one_position(seed=0, vocabulary=40):
    return 1.5 * torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(seed))


def chi_square(tokens, probability):
    """The statistic and its degrees of freedom; classes expected fewer than 5 times are put together."""
    count = len(tokens)
    seen, expected = np.bincount(tokens, minlength=len(probability)), count * probability
    assert (seen[probability == 0] == 0).all()
    order = np.argsort(expected)[::-1]
    large = order[expected[order] >= 5]
    small = order[(expected[order] < 5) & (expected[order] > 0)]
    seen = np.append(seen[large], seen[small].sum())
    expected = np.append(expected[large], expected[small].sum())
    kept = expected > 0
    return float(((seen - expected)[kept] ** 2 / expected[kept]).sum()), int(kept.sum()) - 1


TRUNCATIONS = [
    {},
    {"temperature": 0.7},
    {"top_k": 6},
    {"top_p": 0.6},
    {"min_p": 0.1},
    {"top_k": 12, "top_p": 0.8, "temperature": 1.3},
]


def truncated(logits, top_k=0, top_p=1.0, min_p=0.0, temperature=1.0):
    """The distribution by its definition, over a sorted list."""
    p = torch.softmax(logits.double() / temperature, -1)[0].numpy()
    order = list(np.argsort(p)[::-1])
    if top_k:
        order = order[:top_k]
    order = [token for token in order if p[token] >= min_p * p.max()]
    kept, total = [], 0.0
    for token in order:
        if total >= top_p * p[order].sum():
            break
        kept.append(token)
        total += p[token]
    found = np.zeros_like(p)
    found[kept] = p[kept] / p[kept].sum()
    return found


@pytest.mark.parametrize("vocabulary", [40, 128, 200])
@pytest.mark.parametrize("settings", TRUNCATIONS, ids=str)
def test_20000_draws_have_the_distribution_that_their_log_probs_say(settings, vocabulary):
    """Within one block of the running sum, over two whole ones, and over four of which the last is not full."""
    logits, count = one_position(vocabulary=vocabulary), 20_000
    uniform = torch.from_numpy(np.random.default_rng(1).random(count))
    tokens, logp = draw(logits.expand(count, -1), uniform, Sampling(**settings))
    probability = truncated(logits, **settings)
    np.testing.assert_allclose(logp.exp().numpy(), probability[tokens.numpy()], rtol=1e-4)
    assert set(tokens.tolist()) <= set(np.flatnonzero(probability))
    statistic, freedom = chi_square(tokens.numpy(), probability)
    assert freedom >= 2
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5
    wrong, _ = chi_square(tokens.numpy(), np.where(probability > 0, 1 / (probability > 0).sum(), 0))
    assert wrong > 10 * statistic


@pytest.mark.parametrize("settings", [*TRUNCATIONS, {"temperature": 0}], ids=str)
def test_a_row_is_drawn_the_same_alone_and_among_others(settings):
    logits, uniform = torch.cat([one_position(seed) for seed in range(6)]), torch.linspace(0, 0.999, 6, dtype=torch.float64)
    tokens, logp = draw(logits, uniform, Sampling(**settings))
    for row in range(6):
        token, value = draw(logits[row : row + 1], uniform[row : row + 1], Sampling(**settings))
        assert int(token[0]) == int(tokens[row])
        assert float(value[0]) == pytest.approx(float(logp[row]), abs=1e-6)


def test_the_likeliest_token_always_stays():
    for settings in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 0.999}):
        tokens, logp = draw(one_position().expand(50, -1), torch.linspace(0, 0.99, 50, dtype=torch.float64), Sampling(**settings))
        assert set(tokens.tolist()) == {int(one_position().argmax())}
        assert logp.abs().max() < 1e-6


@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.05}], ids=str)
def test_rounding_never_draws_a_token_outside_of_the_support(settings):
    """At the ends of [0, 1), or where a number rounded up to 1, with tokens of no probability on both sides of the others."""
    logits = torch.full((400, 50), -1e4)
    logits[:, 20:25] = torch.randn(400, 5, generator=torch.Generator().manual_seed(0))
    for uniform in (0.0, 2.0**-60, 0.5, 1 - 2.0**-24, 1 - 2.0**-53, 1.0):
        tokens, logp = draw(logits, torch.full((400,), uniform, dtype=torch.float64), Sampling(**settings))
        assert int(tokens.min()) >= 20
        assert int(tokens.max()) < 25
        assert bool(logp.isfinite().all())
        assert float(logp.min()) > -20
