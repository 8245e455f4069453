"""Every objective under every tuner: on one fixed batch the loss falls, and what moves is what the tuner tunes.

`make test` runs a part in which each tuner and each objective occurs; `make test-all` runs all pairs.
"""

import copy
import hashlib

import pytest
from example_batches import EXAMPLES
from tiny_fits import MADE, Fixed, Watcher, beside, learners, moving, update_of
from tiny_models import make, make_scalar
from tuned_models import CASES, Case, installed, move

from posttrain.errors import RecipeError
from posttrain.models.actor_critic import ActorCritic, ValueHead
from posttrain.models.heads import head_parameters
from posttrain.objectives import Objective
from posttrain.training.fit import Training, fit
from posttrain.training.optim import AdamW
from posttrain.tuners import Tuner

TUNERS = [Case("full", None), *CASES]
FIRSTS = list({(each.kind, each.policy): each for each in reversed(EXAMPLES)}.values())[::-1]
UPDATES = 20
RAISED = {"wpo": "margin", "cispo": "gain", "vespo": "gain"}
NOT_ENCODERS = {  # why not
    "adapter parallel": "BertForSequenceClassification has no module for; take pfeiffer",
    **dict.fromkeys(("prefix", "prefix plain"), "an encoder's attention does not ask for keys of ours"),
}


def pairs():
    for row, example in enumerate(FIRSTS):
        for column, case in enumerate(TUNERS):
            often = row % len(TUNERS) == column or row == 0
            marks = [] if often else [pytest.mark.slow]
            yield pytest.param(case, example, id=f"{case}-{example.name}", marks=marks)


def built(case, example):
    """A model of the sort that the example trains, with the tuner in it (and in its critic), a little way from its beginning."""
    lm = MADE[example.policy]("llama") if example.policy in MADE else make("llama")
    models = [lm]
    if example.policy == "critic":
        critic = make_scalar("llama", seed=1)
        models.append(critic)
    for each in models:
        installed(case, each, "bert" if example.policy == "encoder" else "llama")
        for parameter in head_parameters(each.model).values():
            parameter.requires_grad_(True)
        if case.kind not in {"full", "layers", "head"}:
            move(each, by=0.02)
    if example.policy == "critic":
        return ActorCritic(lm, critic)
    return ActorCritic(lm, ValueHead(lm)) if example.policy == "shared critic" else lm


def marks_of(lm):
    return {name: hashlib.sha256(each.detach().contiguous().numpy().tobytes()).hexdigest() for name, each in parameters(lm)}


def parameters(lm):
    """All parameters of the policy, and of a critic of its own."""
    yield from lm.model.named_parameters()
    if isinstance(lm, ActorCritic):
        inner = lm.critic if isinstance(lm.critic, ValueHead) else lm.critic.model
        yield from ((f"critic.{name}", each) for name, each in inner.named_parameters())


def measure(example, figures):
    """What falls: the loss. The weights of some follow the policy, and their loss with them; there it is what they raise."""
    if example.kind in RAISED:
        return -figures[RAISED[example.kind]]
    return sum(value for name, value in figures.items() if name.startswith("loss/"))


def test_every_objective_and_every_tuner_is_in_the_matrix():
    assert {each.kind for each in FIRSTS} == {kind for kind in Objective.kinds if ":" not in kind}
    assert {case.kind for case in TUNERS} == {kind for kind in Tuner.kinds if ":" not in kind}


@pytest.mark.parametrize(("case", "example"), list(pairs()))
def test_the_loss_falls_and_the_tuner_alone_moves(case, example):
    if example.policy == "encoder" and (refused := NOT_ENCODERS.get(str(case))):
        with pytest.raises(RecipeError, match=refused):
            built(case, example)
        return
    lm = built(case, example)
    before, moves = marks_of(lm), set(moving(lm))
    update, roles = update_of(example, example.batch(lm)), beside(example, copy.deepcopy(make("llama")))
    rate = 4 * case.tuner("llama").learning_rates[1]
    record = Watcher()
    optim = AdamW(learning_rate=rate, schedule="constant", warmup=0.0)
    run = Training(lm, learners(lm, optim), Fixed(update), UPDATES, roles)
    fit(run, record)
    measured = [measure(example, each) for each in record.metrics]
    assert measured[-1] < measured[0]
    after = marks_of(lm)
    assert {name for name in after if after[name] != before[name]} == moves
