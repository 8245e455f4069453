"""The errors that trainers are known for, each as a change of one line of ours, and the test that must fail because of it.

`old` occurs exactly once in `file`. When that line is rewritten, rewrite the breakage with it.
"""

from dataclasses import dataclass

LOSSES, LAYOUTS, PROPERTIES, SAMPLING = "test_losses.py", "test_layouts.py", "test_properties.py", "test_sampling.py"
ALONE = "test_tree_padded_and_each_sequence_alone_give_the_same_log_probs_and_gradients"
SPLIT = "test_splitting_a_batch_does_not_change_the_gradient_or_the_figures"
PAIRS, TUNERS = "test_preference_objectives.py", "test_tuners.py"
FORMULA = "test_every_objective_on_pairs_is_its_formula_on_the_answers_alone"
CREDIT = "test_ppos_credit_is_its_formula_token_by_token[settings0]"
GRADIENT = "test_policy_gradient.py"
RESUME = "test_two_updates_a_resume_and_two_more_are_four_updates_bit_for_bit"


@dataclass(frozen=True)
class Mutant:
    """`trap`: what a person would say went wrong. `test`: file::name, under tests/."""

    trap: str
    file: str
    old: str
    new: str
    test: str


MUTANTS = [
    Mutant(
        "a mean of the means of micro-batches",
        "training/fit.py",
        "total = sum(term / max(1, units[id(item.objective), name]) for name, term in loss.terms.items())",
        "total = sum(term / max(1, item.objective.units(item.batch)[name]) for name, term in loss.terms.items())",
        f"{PROPERTIES}::{SPLIT}[float64-full-sft-sequences]",
    ),
    Mutant(
        "a mean over the samples of a micro-batch where a sum belongs",
        "objectives/policy_gradient.py",
        "return value / size[part]",
        "return value / size[part] / batch.count",
        f"{PROPERTIES}::{SPLIT}[float64-full-grpo-aggregate=sequence-rollouts]",
    ),
    Mutant(
        "labels shifted by one: a state is asked for the token that it has read",
        "models/layout.py",
        "return [place - 1 for place in at_trained(seqs)]",
        "return [place for place in at_trained(seqs)]",
        f"{LAYOUTS}::{ALONE}[llama-float32]",
    ),
    Mutant(
        "the end-of-turn token is not trained",
        "data/render.py",
        "return len(prefix), stop",
        "return len(prefix), stop - 1",
        "test_render.py::test_exactly_the_answers_and_their_end_tokens_are_trained",
    ),
    Mutant(
        "sampled at a temperature, scored without it",
        "objectives/policy_gradient.py",
        "per_token(logp, logp - before[part], part), batch.temperature)",
        "per_token(logp, logp - before[part], part))",
        f"{PROPERTIES}::test_in_the_first_update_every_ratio_is_one_and_nothing_is_clipped[grpo-llama-0.7]",
    ),
    Mutant(
        "the two sides of the clip range swapped",
        "losses/policy_gradient.py",
        "ratio.clamp(1 - clip_low, 1 + clip_high)",
        "ratio.clamp(1 - clip_high, 1 + clip_low)",
        f"{LOSSES}::test_the_two_sides_are_clipped_by_their_own_settings",
    ),
    Mutant(
        "the sign of the policy gradient turned around",
        "losses/policy_gradient.py",
        "return -torch.minimum(",
        "return torch.minimum(",
        f"{LOSSES}::test_at_a_ratio_of_one_the_gradient_is_minus_the_advantage_so_that_descent_raises_what_was_good",
    ),
    Mutant(
        "the deviation of a group without Bessel's correction",
        "losses/credit.py",
        "(squares / (sizes - 1).clamp(min=1)).sqrt()",
        "(squares / sizes.clamp(min=1)).sqrt()",
        f"{LOSSES}::test_a_groups_advantages_use_the_bessel_deviation_and_1e_minus_4",
    ),
    Mutant(
        "rounding in a group of equal scores taken for a signal",
        "losses/credit.py",
        "torch.where(deviation < EQUAL, torch.zeros_like(centred), centred)",
        "torch.where(deviation < 0, torch.zeros_like(centred), centred)",
        f"{LOSSES}::test_a_group_of_equal_scores_has_an_advantage_of_exactly_zero[group-torch.float64]",
    ),
    Mutant(
        "the reference is the policy itself: the adapter is not switched off",
        "tuners/injected.py",
        "        activate(model, ADAPTER)",
        "        activate(model)",
        f"{PROPERTIES}::test_lora_switched_off_is_the_base_and_merged_is_what_it_was[llama]",
    ),
    Mutant(
        "positions run on through the row instead of restarting with each sequence",
        "models/layout.py",
        "[np.arange(part.depth, part.depth + part.end - part.start) for part in planter.segments]",
        "[np.arange(part.start, part.end) for part in planter.segments]",
        f"{LAYOUTS}::{ALONE}[gpt2-float32]",
    ),
    Mutant(
        "a shared prefix is seen by sequences that do not have it",
        "models/attention.py",
        "own, below = slice(part.start, part.end), slice(part.end, part.tree_end)",
        "own, below = slice(part.start, part.end), slice(part.end, row)",
        f"{LAYOUTS}::{ALONE}[llama-float32]",
    ),
    Mutant(
        "a sequence attends to its siblings",
        "models/attention.py",
        "for each in self.layout.ancestors(part)]",
        "for each in self.layout.segments]",
        f"{LAYOUTS}::test_a_neighbours_tokens_change_nothing_bit_for_bit[mistral]",
    ),
    Mutant(
        "a shared prefix gets no gradient from what follows it",
        "models/attention.py",
        "add(slice(part.end, part.tree_end), own, False)",
        "pass",
        f"{LAYOUTS}::test_a_gradient_reaches_the_shared_prefix_from_every_branch",
    ),
    Mutant(
        "a sliding window that is one token too wide",
        "models/attention.py",
        "(gap >= 0) & (gap < scoring.window)",
        "(gap >= 0) & (gap <= scoring.window)",
        f"{LAYOUTS}::{ALONE}[mistral-float32]",
    ),
    Mutant(
        "the recorded log-probability is not of the distribution that was drawn from",
        "sampling/draw.py",
        "return token, (shaped.gather(1, token[:, None]) - top - total.log().to(shaped.dtype))[:, 0]",
        "return token, logits.log_softmax(-1).gather(1, token[:, None])[:, 0]",
        f"{SAMPLING}::test_the_log_probs_recorded_while_sampling_are_the_trainers[llama-0.7]",
    ),
    Mutant(
        "a draw that forgets the blocks before its own",
        "sampling/draw.py",
        "_first_beyond(inside, wanted - before)",
        "_first_beyond(inside, wanted)",
        SAMPLING + "::test_20000_draws_have_the_distribution_that_their_log_probs_say[{}-128]",
    ),
    Mutant(
        "draws that depend on what else is in the batch",
        "sampling/engine.py",
        'draws.generator(self.seed, "sample", *request.address)',
        'draws.generator(self.seed, "sample", len(self.running))',
        f"{SAMPLING}::test_the_same_seed_gives_the_same_draws_alone_in_a_batch_in_any_order_and_with_any_number_of_rows[llama]",
    ),
    Mutant(
        "a resumed run begins its data anew",
        "data/stream.py",
        'self.drawn = list(state["drawn"])',
        'self.drawn = [0] * len(state["drawn"])',
        f"{PROPERTIES}::{RESUME}[full-sft-sequences]",
    ),
    Mutant(
        "a resumed run forgets the state of its optimizer",
        "training/record.py",
        'restore_optimizer(run, dict(found.tensors["optimizer"]))',
        "pass",
        f"{PROPERTIES}::{RESUME}[lora-sft-sequences]",
    ),
    Mutant(
        "frozen parameters given to the optimizer",
        "tuners/tuner.py",
        "for name, parameter in model.named_parameters() if parameter.requires_grad}",
        "for name, parameter in model.named_parameters()}",
        f"{PROPERTIES}::test_frozen_means_frozen_and_the_optimizer_holds_nothing_else[lora-sft-sequences]",
    ),
    Mutant(
        "samples drawn without the prompt that was learned",
        "sampling/decoder.py",
        "prompts = [soft.placed_prompt(self.lm.model, prompt) for prompt in prompts]",
        "prompts = list(prompts)",
        f"{TUNERS}::test_what_is_sampled_has_the_probabilities_that_training_gives_it[llama-prompt]",
    ),
    Mutant(
        "the keys and values of a prefix left out of attention",
        "models/attention.py",
        "    if plan.given is not None:",
        "    if plan.given is not None and module.layer_idx == 0:",
        f"{TUNERS}::test_a_prefix_of_words_keys_and_values_is_as_good_as_the_words[llama]",
    ),
    Mutant(
        "a LoRA whose beginning was taken out of the weights, stored as if it had not been",
        "tuners/lora.py",
        "torch.cat([each, -before[name]], 1)",
        "torch.cat([each, before[name]], 1)",
        f"{TUNERS}::test_4_what_is_stored_alone_makes_the_same_model_again[llama-lora pissa]",
    ),
    Mutant(
        "an adapter behind the residual sum, from the layer's input",
        "tuners/bottleneck.py",
        "inputs[0] if adapter.parallel else output",
        "inputs[0]",
        f"{TUNERS}::test_an_adapter_stands_before_the_residual_sum[llama]",
    ),
    Mutant(
        "scales of queries trained with those of keys and values",
        "tuners/ia3.py",
        "grad.clone().index_fill_(0, _rows(grad), 0.0)",
        "grad",
        f"{TUNERS}::test_ia3_leaves_the_queries_of_gpt2_alone_in_a_copied_model_too",
    ),
    Mutant(
        "an adapter folded into weights that are not all that a layer computes with",
        "tuners/folder.py",
        "    if exact:",
        "    if state:",
        f"{TUNERS}::test_a_frozen_adapter_that_cannot_be_folded_in_stays_below_a_new_one[lora rslora]",
    ),
    Mutant(
        "answers summed in float32",
        "objectives/preference.py",
        "losses.sequence_sums(logp.double(), seqs.owner, seqs.count)",
        "losses.sequence_sums(logp, seqs.owner, seqs.count)",
        f"{PAIRS}::test_sums_of_long_answers_keep_their_digits",
    ),
    Mutant(
        "a mean over the pairs of a micro-batch",
        "objectives/preference.py",
        'terms = {"preference": value.sum()}',
        'terms = {"preference": value.mean()}',
        f"{PROPERTIES}::{SPLIT}[float64-full-dpo-pairs]",
    ),
    Mutant(
        "the policy's own log-probabilities taken for the reference's",
        "objectives/preference.py",
        "return batch.with_refs(*roles.reference.sums(*batch.sequences))",
        "return batch.with_refs(*replace(roles.reference, lm=policy).sums(*batch.sequences))",
        f"{PAIRS}::{FORMULA}[dpo-pairs]",
    ),
    Mutant(
        "the reference is asked with the policy's weights in place",
        "models/roles.py",
        "with torch.no_grad(), self.switch():",
        "with torch.no_grad():",
        f"{PAIRS}::test_after_an_update_the_reference_still_says_what_it_said",
    ),
    Mutant(
        "the margin with the wrong sign",
        "objectives/preference.py",
        "return self.per_margin(chosen - rejected)",
        "return self.per_margin(rejected - chosen)",
        f"{PAIRS}::{FORMULA}[dpo-pairs]",
    ),
    Mutant(
        "prompt tokens in the log-probability of an answer",
        "data/rows.py",
        "Prompted(prompt + answer, (), where, len(prompt))",
        "Prompted(prompt + answer, (), where, 0)",
        "test_dataset.py::test_an_earlier_answer_in_the_prompt_of_a_pair_belongs_to_the_prompt",
    ),
    Mutant(
        "the reference point of KTO is that of a micro-batch",
        "objectives/unpaired.py",
        "value = self.per_answer(ratio, batch.good, batch.point.to(sums.dtype))",
        "value = self.per_answer(ratio, batch.good, ratio.detach().mean().clamp(min=0))",
        f"{PAIRS}::test_ktos_z_is_that_of_the_whole_update_whatever_the_micro_batches[3]",
    ),
    Mutant(
        "a score is read one token too early",
        "models/layout.py",
        "return [np.array([length - 1]) for length in seqs.lengths.tolist()]",
        "return [np.array([max(0, length - 2)]) for length in seqs.lengths.tolist()]",
        f"{LAYOUTS}::test_scores_values_and_step_scores_are_those_of_the_model_on_each_sequence_alone[llama]",
    ),
    Mutant(
        "the critic is asked about the state after a token, which knows it",
        "models/scalar.py",
        "return self.of(self.hidden(seqs))",
        "return self.step_scores(seqs)",
        f"{PROPERTIES}::test_ppos_loss_is_its_formula_token_by_token",
    ),
    Mutant(
        "the critic's loss is a mean over the tokens of prompts, too",
        "objectives/ppo.py",
        'return {"policy": tokens, "value": tokens}',
        'return {"policy": tokens, "value": len(batch.rollouts.seqs.tokens)}',
        f"{PROPERTIES}::test_ppos_loss_is_its_formula_token_by_token",
    ),
    Mutant(
        "an advantage looks into the next sequence",
        "losses/credit.py",
        "torch.where(last, torch.zeros_like(value), value.roll(-1))",
        "value.roll(-1)",
        f"{PROPERTIES}::{CREDIT}",
    ),
    Mutant(
        "the score of an answer rewards its first token",
        "objectives/ppo.py",
        "earned[seqs.trained_lengths.cumsum(0)[written] - 1] +=",
        "earned[(seqs.trained_lengths.cumsum(0) - seqs.trained_lengths)[written]] +=",
        f"{PROPERTIES}::{CREDIT}",
    ),
    Mutant(
        "a resumed run forgets what its controllers have come to",
        "models/roles.py",
        "self.controls.update(controls)",
        "pass",
        f"{PROPERTIES}::{RESUME}[full-bco-labelled]",
    ),
    Mutant(
        "the baseline of leave-one-out scaled as if the answer itself were among the others",
        "losses/credit.py",
        "centred = centred * (sizes / (sizes - 1).clamp(min=1))[groups]",
        "centred = centred * ((sizes - 1) / sizes)[groups]",
        f"{GRADIENT}::test_leaving_one_out_is_unbiased_and_the_groups_own_mean_is_too_small_by_one_part_in_its_size",
    ),
    Mutant(
        "the ratio of a whole answer grows with its length",
        "objectives/policy_gradient.py",
        'over = losses.sequence_sums if level == "sequence_product" else losses.sequence_means',
        "over = losses.sequence_sums",
        f"{GRADIENT}::test_the_ratio_of_an_answer_is_the_product_or_the_geometric_mean_of_its_tokens",
    ),
    Mutant(
        "a gradient through the weight that CISPO caps",
        "losses/policy_gradient.py",
        "return -log_ratio.detach().clamp(max=LARGEST_LOG_RATIO)",
        "return -log_ratio.clamp(max=LARGEST_LOG_RATIO)",
        f"{GRADIENT}::test_cispo_caps_the_weight_and_keeps_the_gradient",
    ),
    Mutant(
        "the two steepnesses of SAPO swapped",
        "losses/policy_gradient.py",
        "torch.where(advantage > 0, up, down)",
        "torch.where(advantage > 0, down, up)",
        f"{GRADIENT}::test_sapos_gate_is_the_ratio_at_one_and_flat_far_away",
    ),
    Mutant(
        "weights of another sampler without a cap",
        "losses/policy_gradient.py",
        "if mask else weight.clamp(max=cap)",
        "if mask else weight",
        f"{GRADIENT}::test_a_correction_caps_or_leaves_out_what_the_sampler_drew_otherwise",
    ),
    Mutant(
        "dynamic sampling keeps groups that teach nothing",
        "rl/drawing.py",
        "if len({grade.score for _, grade in pairs} - {None}) > 1}",
        "if pairs}",
        f"{GRADIENT}::test_dapo_draws_on_until_every_group_has_mixed_scores",
    ),
    Mutant(
        "the bias of a stale sampler corrected by the wrong way round",
        "objectives/policy_gradient.py",
        "gap = levelled(batch.old_logp - batch.sampled_logp,",
        "gap = levelled(batch.sampled_logp - batch.old_logp,",
        f"{GRADIENT}::test_a_correction_takes_the_bias_of_another_sampler_away",
    ),
    Mutant(
        "what is to go leaves out the reward of the token itself",
        "losses/credit.py",
        "return (running - after).to(reward.dtype)",
        "return (running - after - exact.flip(0)).to(reward.dtype)",
        f"{GRADIENT}::test_what_is_to_go_is_the_sum_from_a_token_to_the_end_of_its_answer",
    ),
    Mutant(
        "what the environment said is learned from",
        "sampling/episodes.py",
        "play.add(following, False)",
        "play.add(following, True)",
        "test_environments.py::test_what_is_trained_is_what_the_policy_said_and_nothing_else[chatml]",
    ),
    Mutant(
        "every turn of an episode draws the same random numbers",
        "sampling/episodes.py",
        "Request(tuple(play.tokens), play.place, len(play.logp), most)",
        "Request(tuple(play.tokens), play.place, 0, most)",
        "test_environments.py::test_the_draws_of_a_second_turn_are_not_those_of_the_first",
    ),
    Mutant(
        "an environment that fails has earned nothing, as if that were a score",
        "sampling/episodes.py",
        'play.failure = f"the environment: {said}"',
        "play.failure = None",
        "test_environments.py::test_an_environment_that_fails_costs_its_own_episode_only",
    ),
    Mutant(
        "solved problems are drawn again and hard ones are not",
        "rl/curriculum.py",
        "known = [(abs(rate - plan.target), turn, place)",
        "known = [(-abs(rate - plan.target), turn, place)",
        "test_curriculum.py::test_those_nearest_to_the_target_are_drawn_again_and_solved_ones_are_not",
    ),
]
