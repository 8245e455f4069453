"""What fits into memory: activations recomputed or kept on the host, and the optimizer's state in 8 bits."""

import importlib.util
import signal
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_layouts import distance, family, gradients
from tiny_models import make, transformer
from tiny_runs import STEPS, TEXTS, marks, parsed, text, train
from torch import nn

from posttrain.batch import Sequences
from posttrain.errors import InputError, ModelError, RecipeError
from posttrain.models.create import create
from posttrain.models.load import checkpoint_activations, load, wrap
from posttrain.models.source import ModelSource
from posttrain.pipeline.run import run
from posttrain.pipeline.stage import Interrupted
from posttrain.training import checkpoint
from posttrain.training.fit import Learner
from posttrain.training.optim import AdamW, Optimizer
from posttrain.training.record import optimizer_tensors, restore_optimizer

# ---- activations


@contextmanager
def kept(found):
    """Collects every tensor that is kept for the backward, but for parameters."""

    def keep(tensor):
        if not isinstance(tensor, nn.Parameter):
            found.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield


def weight(tensors):
    """Bytes of their storages, each once."""
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


def test_checkpointing_keeps_a_third_of_the_memory_or_less():
    seqs, amounts = Sequences.of(family()), {}
    for saving in (False, True):
        lm, found = wrap(transformer("llama"), ModelSource(path="tiny", gradient_checkpointing=saving)), []
        with kept(found):
            lm.hidden(seqs)
        amounts[saving] = weight(found)
    assert amounts[True] < amounts[False] / 3


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "mamba"])
def test_offloading_takes_the_input_of_each_layer_to_the_host_and_nothing_else(name, monkeypatch):
    """With copies where a GPU's memory would be copied to the host: on a CPU torch's own hook has nothing to do."""
    taken, returned = [], []

    def host(pin_memory):
        assert pin_memory == torch.cuda.is_available()
        return torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: taken.append(tensor.shape) or tensor.clone(), lambda tensor: returned.append(1) or tensor
        )

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", host)
    seqs, plain, saving = Sequences.of(family()), make(name), make(name)
    checkpoint_activations(saving.model, offload=True)
    found = saving.logprobs(seqs)
    layers, hidden = 2, 32
    assert [shape[-1] for shape in taken] == [hidden] * layers, "one state of each layer"
    assert not returned
    assert distance(gradients(saving, found.sum()), gradients(plain, plain.logprobs(seqs).sum())) < 1e-6
    assert len(returned) == layers


@pytest.mark.parametrize("device", ["cpu", "cpu:0", "auto"])
def test_offloading_on_a_cpu_is_refused_before_anything_is_read(device, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    source = {"path": str(tmp_path), "gradient_checkpointing": "offload", "device": device}
    with pytest.raises(InputError, match=r"stage train: gradient_checkpointing: offload .* set gradient_checkpointing: true"):
        run(parsed(text(model=source)), tmp_path)
    with pytest.raises(ModelError, match="gradient_checkpointing: offload"):
        load(ModelSource(**source))
    assert not ModelSource(**{**source, "device": "cuda"}).on_cpu()


@pytest.mark.parametrize("wrong", ["disk", "on", None])
def test_what_checkpointing_can_be_is_said(wrong):
    with pytest.raises(RecipeError, match=r"model\.gradient_checkpointing: input should be False, True or 'offload', found"):
        parsed(text(model={"path": "x/y", "gradient_checkpointing": wrong}))


# ---- the optimizer's state


def test_a_state_of_plain_numbers_comes_back_as_the_same_numbers():
    class Counting(torch.optim.SGD):
        def step(self):
            for parameter in self.param_groups[0]["params"]:
                self.state[parameter] = {"step": 3, "scale": 0.1, "mean": torch.ones(2), "count": torch.tensor(4)}

    parameters = {"a.weight": nn.Parameter(torch.zeros(2))}
    learner = Learner(parameters, Counting(parameters.values(), lr=0.1), AdamW())
    learner.optimizer.step()
    expected = dict(learner.optimizer.state[parameters["a.weight"]])
    one = SimpleNamespace(learners={"policy": learner})
    restore_optimizer(one, optimizer_tensors(one))
    found = learner.optimizer.state[parameters["a.weight"]]
    assert {name: type(value) for name, value in found.items()} == {name: type(value) for name, value in expected.items()}
    assert all(torch.equal(torch.as_tensor(found[name]), torch.as_tensor(expected[name])) for name in expected)
    assert found["scale"] == 0.1


def test_without_the_package_a_compact_state_is_refused_with_what_to_install(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("posttrain.training.optim.find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    recipe = text(optim={"state": "8bit"}, model={"path": "no/such-model", "device": "cpu"})
    with pytest.raises(RecipeError, match=r"stage train: optim.state: 8bit needs .* pip install 'posttrain\[bitsandbytes\]'"):
        run(parsed(recipe), tmp_path)
    AdamW().check(ModelSource(path="x/y"))
    Optimizer.lookup("adamw")(state="full").check(ModelSource(path="x/y"))


@pytest.mark.parametrize(
    ("state", "model", "words"),
    [
        ("8bit", {"dtype": "float64"}, "model.dtype is float64"),
        ("paged", {"device": "cpu"}, "runs on the cpu; set optim.state: full or 8bit"),
        ("paged_8bit", {"device": "cpu"}, "runs on the cpu; set optim.state: full or 8bit"),
    ],
)
def test_a_state_that_the_model_cannot_have_is_refused(state, model, words, monkeypatch):
    monkeypatch.setattr("posttrain.training.optim.find_spec", lambda _: True)
    with pytest.raises(RecipeError, match=words):
        AdamW(state=state).check(ModelSource(path="x/y", **model))


def parameters():
    draw = torch.Generator().manual_seed(0)
    shapes = {"embed_tokens.weight": (128, 64), "layer.weight": (96, 64), "layer.odd.weight": (65, 67), "norm.weight": (64,)}
    return {name: nn.Parameter(torch.randn(shape, generator=draw)) for name, shape in shapes.items()}


def stepped(optimizer, given, steps, first=0):
    for number in range(first, first + steps):
        draw = torch.Generator().manual_seed(100 + number)
        for parameter in given.values():
            parameter.grad = torch.randn(parameter.shape, generator=draw)
        optimizer.step()


@pytest.fixture
def bitsandbytes():
    return pytest.importorskip("bitsandbytes")


@pytest.mark.usefixtures("bitsandbytes")
def test_in_8_bits_matrices_have_a_quarter_of_the_state_and_the_rest_is_float32():
    sizes = {}
    for state in ("full", "8bit"):
        given = parameters()
        optimizer = AdamW(state=state).build(given)
        stepped(optimizer, given, 1)
        sizes[state] = {
            name: sum(each.nbytes for what, each in optimizer.state[parameter].items() if what not in {"step", "qmap1", "qmap2"})
            for name, parameter in given.items()
        }
    for name in ("layer.weight", "layer.odd.weight"):
        assert 0.25 <= sizes["8bit"][name] / sizes["full"][name] < 0.26
    for name in ("embed_tokens.weight", "norm.weight"):
        assert sizes["8bit"][name] == sizes["full"][name]


@pytest.mark.usefixtures("bitsandbytes")
def test_8_bits_move_the_weights_as_the_full_state_does():
    found = {}
    for state in ("full", "8bit"):
        given = parameters()
        before = {name: value.detach().clone() for name, value in given.items()}
        stepped(AdamW(state=state, learning_rate=1e-2, weight_decay=0.1).build(given), given, 20)
        found[state] = {name: (value - before[name]).detach() for name, value in given.items()}
    for name in ("embed_tokens.weight", "norm.weight"):  # float32 either way; these are not decayed
        torch.testing.assert_close(found["8bit"][name], found["full"][name], rtol=1e-4, atol=1e-6)
    for name in ("layer.weight", "layer.odd.weight"):
        assert 1e-5 < float((found["8bit"][name] - found["full"][name]).norm() / found["full"][name].norm()) < 0.05


@pytest.mark.usefixtures("bitsandbytes")
@pytest.mark.parametrize("state", ["8bit", "paged", "paged_8bit"])
def test_a_compact_state_that_was_saved_goes_on_as_if_it_had_never_stopped(state, tmp_path):
    """On a CPU a paged state is in ordinary memory, of which bitsandbytes warns; the way through the checkpoint is the same."""
    optim, given = AdamW(state=state, weight_decay=0.1), parameters()
    with pytest.warns(match="not supported on CPU") if optim.paged else nullcontext():
        first = SimpleNamespace(learners={"policy": Learner.of(given, optim)})
        stepped(first.learners["policy"].optimizer, given, 3)
        groups = {"weights": dict(given), "optimizer": optimizer_tensors(first)}
        found = checkpoint.load(checkpoint.save(tmp_path, checkpoint.Checkpoint(3, groups, {}), "mine"), "mine")
        again = {name: nn.Parameter(found.tensors["weights"][name].clone()) for name in given}
        second = SimpleNamespace(learners={"policy": Learner.of(again, optim)})
        restore_optimizer(second, dict(found.tensors["optimizer"]))
    for one in (first, second):
        stepped(one.learners["policy"].optimizer, one.learners["policy"].parameters, 3, first=3)
    assert all(torch.equal(given[name], again[name]) for name in given)
    one, other = optimizer_tensors(first), optimizer_tensors(second)
    assert {name: value.dtype for name, value in one.items()} == {name: value.dtype for name, value in other.items()}
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.usefixtures("bitsandbytes")
@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_a_run_in_8_bits_that_is_stopped_after_any_step_ends_where_the_unbroken_run_ends(tuner, tmp_path):
    wide = {"hidden_size": 64, "layers": 1, "heads": 4, "key_value_heads": 2, "feed_forward": 96, "context": 128}
    create(TEXTS * 4, 320, wide, 0, tmp_path / "base")
    kind = {"kind": "lora", "rank": 64} if tuner == "lora" else "full"
    changes = {"model": str(tmp_path / "base"), "tuner": kind, "optim": {"learning_rate": 1e-2, "state": "8bit"}}
    recipe = text(**changes, checkpoint={"every": 1000})
    folder = train(recipe, tmp_path / "unbroken")
    expected = marks(folder)
    (saved,) = folder.glob("checkpoints/step-*/optimizer.safetensors")
    assert {"uint8", "float32"} <= {str(value.dtype).removeprefix("torch.") for value in load_file(saved).values()}
    for step in range(1, STEPS):
        with pytest.raises(Interrupted):
            train(recipe, tmp_path / f"stopped-{step}", {step: signal.SIGTERM})
        assert marks(train(recipe, tmp_path / f"stopped-{step}")) == expected, f"stopped after step {step}"
