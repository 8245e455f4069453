"""The claims' own arithmetic, and a quick run of each: fewer seeds and steps, so the shape of the result and not the claim itself."""

import json
import math

import pytest
import torch

from claims import __main__ as claims
from claims import strings, symbols, t1, t2, t3, t4, t5, t6, t7, t9, t10, t11, t16, t17, t18, t19, t21
from claims.claim import exact, number, run
from posttrain import draws
from posttrain.batch import Sequences
from posttrain.data.render import Template
from posttrain.losses import sequence_sums
from posttrain.tuners.load import load

F64 = torch.float64


def quick(module, folder):
    found = run(module, quick=True, folder=folder)
    written = json.loads((folder / f"{found['name'].lower()}.json").read_text())
    assert written["checks"] == found["checks"]
    assert {"value", "se"} <= set(next(iter(written["numbers"].values())))
    assert (folder / f"{found['name'].lower()}.svg").read_text().startswith("<?xml")
    return found


# ---- quick runs


def test_dpo_collapses_and_ipo_reaches_its_closed_form(tmp_path):
    assert quick(t2, tmp_path)["held"]


def test_kl_estimators_have_the_bias_the_spread_and_the_gradients_of_the_table(tmp_path):
    assert quick(t19, tmp_path)["held"]


@pytest.mark.slow  # quick forms of what `make claims` runs
def test_every_training_climbs_and_none_passes_the_frontier(tmp_path):
    found = quick(t1, tmp_path)
    numbers = found["numbers"]
    assert found["checks"]["no point above the frontier"]
    for method in t1.METHODS:
        assert numbers[f"{method} beta 0.5 kl"]["value"] > 0.001
        assert numbers[f"{method} beta 0.5 reward"]["value"] > numbers["reward of the reference"]["value"]


@pytest.mark.slow  # quick forms of what `make claims` runs
def test_best_of_n_keeps_to_its_bound_and_few_comparisons_lead_astray(tmp_path):
    found = quick(t16, tmp_path)
    checks = found["checks"]
    assert checks["KL at most the bound"]
    assert checks["KL near the bound in a large space"]
    assert checks["drawn samples agree with the exact sums"]
    assert checks["with few pairs gold peaks, then falls"]


@pytest.mark.slow  # quick forms of what `make claims` runs
def test_a_delta_is_small_near_and_nearer_after_its_distillation(tmp_path):
    found = quick(t5, tmp_path)
    checks = found["checks"]
    assert checks["Llama-2-7B by its sizes"]
    assert checks["matrices are smaller"]
    assert checks["distillation brings the logits nearer"]
    assert checks["a normal difference"]
    numbers = found["numbers"]
    assert numbers["32: kl 4 bits"]["value"] < numbers["32: kl signs"]["value"] < numbers["32: kl base"]["value"]


@pytest.mark.slow  # quick forms of what `make claims` runs
def test_lengths_entropies_and_accuracies_are_measured_while_policies_learn(tmp_path):
    assert quick(t9, tmp_path)["checks"]["pass@8 does not fall"] in (True, False)
    assert quick(t10, tmp_path)["numbers"]["growth grpo"]["seeds"]
    found = quick(t11, tmp_path)
    assert found["checks"]["the closed form is 0.5695 and 0.9922"]
    for share in t11.SHARES:
        assert abs(found["numbers"][f"p {share:g}"]["value"] - share) < 0.05


def test_a_token_of_a_short_wrong_answer_weighs_ten_times_one_of_a_long_one_under_grpo_alone():
    assert {kind: round(t10.weight_ratio(kind), 5) for kind in t10.KINDS} == {"grpo": 10.0, "dr_grpo": 1.0, "dapo": 1.0}


def test_a_group_is_mixed_as_often_as_the_closed_form_says():
    assert (round(t11.mixed(0.1), 4), round(t11.mixed(0.5), 4)) == (0.5695, 0.9922)


def test_every_string_is_known_by_its_number():
    for index in (0, 1, 8, 9, 72, 73, 4680, 37448):
        tokens, _ = strings.rendered(index)
        assert strings.number_of(tokens[1:]) == index


def test_a_part_of_a_reward_is_learned_where_its_mean_of_five_is_nearly_the_last():
    assert t9.learned_at([0.0] * 5 + [1.0] * 10) == 10.0  # the mean of updates 6 to 10 is 1, of 5 to 9 it is 0.8
    assert t9.learned_at([1.0] * 9) == 1.0


def test_the_rows_of_the_delta_are_written_again_and_backwards():
    for task, way in (("copy", 1), ("reverse", -1)):
        for row in t5.rows_of(task, 3, 20):
            tokens, marks = row.sequences[0]
            letters = tokens[1:6]
            assert tokens == [t5.END, *letters, t5.EQUALS, *letters[::way]]
            assert marks == [False] * 7 + [True] * 5
    for index, row in enumerate(t5.rows_of("either", 3, 20)):
        tokens, _ = row.sequences[0]
        assert tokens[7:] == tokens[1:6][:: -1 if index % 2 else 1]


@pytest.mark.slow  # quick forms of what `make claims` runs
def test_fewer_bits_cost_more_and_nf4_loses_less_than_equal_steps(tmp_path):
    found = quick(t17, tmp_path)
    numbers = found["numbers"]
    assert numbers["rtn 3 cost"]["value"] > numbers["rtn 4 cost"]["value"]
    assert numbers["gptq 3 cost"]["value"] < numbers["rtn 3 cost"]["value"]
    assert found["checks"]["NF4 and int4 lose what is computed for normal weights"]
    assert found["checks"]["NF4 loses less than int4 of tiny-base's weights"]


@pytest.mark.slow  # quick forms of what `make claims` runs
def test_outlier_features_change_nothing_and_pruning_by_magnitude_suffers_from_them(tmp_path):
    found = quick(t18, tmp_path)
    numbers = found["numbers"]
    assert found["checks"]["the features change nothing"]
    assert found["checks"]["2:4 is worse"]
    assert numbers["magnitude 50% cost"]["value"] > numbers["magnitude 50% cost without features"]["value"]
    assert numbers["magnitude minus wanda 50%"]["value"] > 0


def test_packed_rows_have_the_loss_and_the_gradient_of_padded_ones(tmp_path):
    checks = quick(t21, tmp_path)["checks"]  # speed itself is never a test
    assert checks["the same loss"]
    assert checks["the same gradient"]


def test_a_lora_fits_what_the_best_matrix_of_its_rank_fits_and_no_more(tmp_path):
    assert quick(t4, tmp_path)["held"]


def test_full_and_low_rank_fine_tuning_move_both_losses(tmp_path):
    numbers = quick(t3, tmp_path)["numbers"]
    for method in ("full", "r = 1", "r = 4"):
        assert numbers[f"{method}: A forgotten"]["value"] > 0.01
    assert numbers["r = 1: B learned less than in full"]["value"] > numbers["r = 4: B learned less than in full"]["value"]
    assert 1 <= numbers[t3.EFFECTIVE]["value"] <= 64


def test_soft_tokens_of_each_kind_and_number_are_measured_from_the_same_base(tmp_path):
    numbers = quick(t6, tmp_path)["numbers"]
    losses = [numbers[f"{method} {size}"]["value"] for method in ("prefix", "prompt", "infix") for size in (1, 2)]
    assert len({*losses, numbers["base"]["value"]}) == 7
    assert numbers["prompt over prefix 2"]["value"] == pytest.approx(losses[3] - losses[1])
    assert all(0.5 < loss < 6 for loss in losses)


def test_tuners_are_compared_on_the_same_rows_and_their_parameters_counted(tmp_path):
    numbers = quick(t7, tmp_path)["numbers"]
    assert numbers["full: share of the parameters"]["value"] == 1
    adapters = 6 * 2 * (2 * 192 * 8 + 192 + 8) + 13 * 192  # two in each of six blocks, and the norms
    assert numbers["adapter 8: share of the parameters"]["value"] == pytest.approx(adapters / 2_755_008)
    assert numbers["arithmetic: full"]["value"] > numbers["arithmetic: base"]["value"] == 0


# ---- small tasks


def test_a_row_trains_its_answer_and_its_end():
    tokens, marks = symbols.row("12=", "21")
    assert "".join(symbols.SYMBOLS[token] for token in tokens) == "\n12=21\n"
    assert marks == [False] * 4 + [True] * 3


def test_the_third_task_is_one_of_the_two_others_as_the_first_digit_says():
    for question, answer in (t6.drawn(draws.generator(index, "test"), "+") for index in range(50)):
        string = question[:-1]
        assert answer == (string[::-1] if string[0] in "01234" else "".join(sorted(string)))
    assert t6.drawn(draws.generator(0, "test"), "=")[1] == t6.drawn(draws.generator(0, "test"), "=")[0][:-1][::-1]


def test_the_effective_rank_holds_nine_tenths_of_the_squares():
    assert t3.effective_rank(torch.diag(torch.tensor([3.0, 0.9, 0.1]))) == 1  # 9 of 9.82
    assert t3.effective_rank(torch.diag(torch.tensor([3.0, 1.1, 0.1]))) == 2
    assert t3.effective_rank(torch.eye(10)) == 9


def test_spearmans_correlation_is_that_of_the_orders():
    assert t3.spearman([1, 4, 16, 64], [0.1, 0.2, 0.3, 9.0]) == pytest.approx(1)
    assert t3.spearman([1, 4, 16, 64], [0.1, 0.3, 0.2, 9.0]) == pytest.approx(0.8)
    assert t3.spearman([1, 4, 16, 64], [4.0, 3.0, 2.0, 1.0]) == pytest.approx(-1)


def test_a_choice_is_the_answer_of_the_highest_log_probability_and_writing_is_greedy():
    loaded = load("posttrain:tiny-base")
    template = Template(loaded.tokenizer, chat=False)
    story = "Once upon a time there was a"
    assert t7.accuracy(loaded.lm, [(story, [" xq 7 zz", " little girl"], 1), ("12 + 7 = ", ["19", "84"], 0)], template) == 1
    assert t7.accuracy(loaded.lm, [(story, [" xq 7 zz", " little girl"], 0)], template) == 0
    ids = loaded.tokenizer(story)["input_ids"]
    greedy = loaded.lm.model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)[0, len(ids) :].tolist()
    assert 0 not in greedy  # it goes on, so that no answer here ends as it would
    assert t7.accuracy(loaded.lm, [(story, [loaded.tokenizer.decode(greedy)], 0)], template) == 0


def test_small_adapters_are_those_of_at_most_a_twentieth_of_the_parameters():
    numbers = {
        "adapter 8: share of the parameters": exact(0.015), "adapter 64: share of the parameters": exact(0.11),
        "adapter 8: below full, mean over tasks": number([0.02, 0.01, 0.03]),
        "adapter 64: below full, mean over tasks": number([0.0, 0.0, 0.0]),
        "bitfit below full, few rows": number([0.01, 0.0, 0.02]), "bitfit below full, many rows": number([0.1, 0.12, 0.09]),
    }  # fmt: skip
    checks = t7.judge(numbers)
    assert not checks["a small adapter within a point of full"], "the large one does not count"
    assert checks["biases close to full from few rows"]
    assert checks["biases below full from many rows"]


# ---- the world of strings


def test_the_probabilities_of_all_strings_sum_to_one_and_are_those_of_the_model():
    lm = strings.write_model(5)
    logp = strings.distribution(lm)
    assert len(logp) == sum(strings.LETTERS**length for length in range(strings.LONGEST + 1))
    assert float(logp.exp().sum()) == pytest.approx(1, abs=1e-9)
    some = range(0, len(logp), 997)
    rows = Sequences.of([strings.rendered(index) for index in some])
    with torch.no_grad():
        ours = sequence_sums(lm.logprobs(rows), rows.owner, rows.count)
    torch.testing.assert_close(ours.double(), logp[list(some)], atol=1e-5, rtol=0)


def test_the_frontier_is_where_no_other_policy_is_better():
    logp = torch.tensor([0.2, 0.5, 0.3], dtype=F64).log()
    reward = torch.tensor([1.0, 0.0, -1.0], dtype=F64)
    frontier = t1.Frontier(logp, reward)
    kl, best = frontier.at(0.5)
    policy = torch.tensor([0.7321654, 0.2477195, 0.0201151], dtype=F64)  # METHODS 6.1
    assert best == pytest.approx(float(policy @ reward), abs=1e-6)
    assert best - 0.5 * kl == pytest.approx(0.3511555, abs=1e-6)
    assert frontier.reward(kl) == pytest.approx(best, abs=1e-9)
    draw = torch.Generator().manual_seed(0)
    for _ in range(200):
        other = torch.randn(3, dtype=F64, generator=draw).log_softmax(0)
        assert strings.expected(other, reward) <= frontier.reward(strings.divergence(other, logp)) + 1e-9


def test_the_best_of_n_has_the_distribution_of_the_best_of_n():
    logp = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=F64).log()
    best = t16.BestOf(logp, torch.tensor([2.0, 1.0, 1.0, 0.0], dtype=F64))  # two are tied
    won = [float(each) for each in best.levels(2)]
    assert won == pytest.approx([0.16, 0.9**2 - 0.16, 1 - 0.81])
    values = torch.tensor([0.0, 10.0, 0.0, 0.0], dtype=F64)
    assert best.mean(values, 2) == pytest.approx(10 * (0.81 - 0.16) * 0.4)  # it has 0.2 of the tied 0.5
    assert best.kl(1) == pytest.approx(0, abs=1e-12)
    assert best.kl(2) < t16.bound(2)


def test_gold_falls_and_its_peak_moves_only_beyond_two_standard_errors():
    numbers = {
        "largest KL minus bound": exact(0.0), "largest gap to the bound in a large space": exact(0.01),
        "drawn minus exact, standard errors": exact(1.0), "few: fall from the mean's peak": number([1.0, 1.1, 0.9]),
        "delay of the peak, log2 n": number([4.0, 0.0, -1.0]),
    }  # fmt: skip
    checks = t16.judge(numbers)
    assert checks["with few pairs gold peaks, then falls"]
    assert not checks["more pairs delay the peak"]


def test_a_bin_counts_only_where_both_methods_have_points():
    numbers = {
        "dpo bin 0 to 1": number([0.9]), "dpo bin 1 to 2": number([0.8]), "dpo bin 2 to 3": number([0.7]),
        "ppo true bin 0 to 1": number([0.9]), "ppo true bin 1 to 2": number([0.85]),
        "ppo learned bin 2 to 3": number([0.6]), "dpo long bin 2 to 3": number([0.1]),
    }  # fmt: skip
    assert t1.better(numbers, "dpo", "ppo true") == (1, 2)
    assert t1.better(numbers, "dpo", "ppo learned") == (1, 1)


def test_the_closed_form_of_ipo_is_the_least_squares_solution():
    assert t2.closed_form(0.1) == pytest.approx([0.96437, 0.03440, 0.00123], abs=1e-5)
    assert t2.closed_form(1.0) == pytest.approx([0.44844, 0.32132, 0.23024], abs=1e-5)


def test_the_exact_values_of_the_estimators_are_those_of_numerical_integration():
    for mu in t19.TABLE:
        x = torch.linspace(-12, 12, 400_001, dtype=F64)
        density = (-0.5 * x**2).exp() / math.sqrt(2 * math.pi) * float(x[1] - x[0])
        ratio, kl = -0.5 * x**2 + 0.5 * (x - mu) ** 2, mu**2 / 2
        for name, values in (("k1", ratio), ("k2", 0.5 * ratio**2), ("k3", torch.expm1(-ratio) + ratio)):
            mean = float((density * values).sum())
            deviation = float((density * (values - mean) ** 2).sum()) ** 0.5
            assert (deviation / kl, mean / kl - 1) == pytest.approx(t19.exact_values(mu)[name], abs=1e-6)


# ---- what is written down


def test_a_standard_error_is_that_of_a_mean():
    assert number([1.0, 2.0, 3.0]) == {"value": 2.0, "se": pytest.approx(1 / math.sqrt(3)), "seeds": [1.0, 2.0, 3.0]}


def test_the_table_of_the_docs_is_that_of_the_results():
    text = claims.PAGE.read_text(encoding="utf-8")
    assert claims.page(text) == text, "run: python -m claims --table"


def test_no_result_of_a_quick_run_is_kept():
    for path in claims.RESULTS.glob("*.json"):
        assert not json.loads(path.read_text(encoding="utf-8"))["quick"], path.name
