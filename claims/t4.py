"""T4: what LoRA can learn is what the singular value decomposition says: the best matrix of rank r, and nothing better.

posttrain's tuner `lora` in every linear layer of a tiny Llama in float64; each layer's update is to become a random matrix dW, in
mean squared error over white inputs, which is |scale B A - dW|^2. By Eckart and Young no matrix of rank r comes closer than
sum_{i>r} sigma_i^2. What the layers add is read from their forwards, so scale, factors and their order all count.
"""

import sys
from typing import Any

from claims.claim import Claim, Number, exact, main, number, spread

WITHIN = 0.01
"""Each layer's residual, for each rank and seed, is above sum_{i>r} sigma_i^2 by at most this share of it."""
BELOW = 1e-9
"""And below it by no more than this share (rounding)."""
NOTHING = 1e-6
"""Where r = min(inputs, outputs), the residual is at most this share of |dW|^2."""

CLAIM = Claim(
    "T4",
    "A LoRA of rank r fits an update as well as the best matrix of rank r, and exactly where r is the smaller side",
    "arXiv 2106.09685",
    f"residual within {WITHIN:.0%} of the sum of sigma_i^2 over i > r in every layer, never below it; at most {NOTHING:g} of "
    "|dW|^2 at full rank",
)
SETTINGS: dict[str, Any] = {
    "seeds": [1, 2, 3], "ranks": [1, 2, 4, 8, 16, 32], "layers": 2, "steps": 1500, "rate": 0.03, "processes": 2,
}  # fmt: skip
QUICK = {**SETTINGS, "seeds": [101], "ranks": [16], "layers": 1, "steps": 300, "processes": 1}
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}


def of_seed(seed: int, rank: int, settings: dict[str, Any]) -> dict[str, tuple[float, float, float]]:
    """{layer: (residual, sum of sigma_i^2 beyond the rank, |dW|^2)} after training."""
    import torch
    from torch import Tensor, nn
    from transformers import LlamaConfig, LlamaForCausalLM

    from posttrain import draws
    from posttrain.training.fit import Learner
    from posttrain.training.optim import AdamW
    from posttrain.tuners import LoRA, tuned
    from posttrain.tuners.injected import layers_of

    torch.set_num_threads(1)
    tuner = LoRA(rank=rank, alpha=2.0 * rank)
    with torch.random.fork_rng():
        torch.manual_seed(draws.key(seed, "T4", rank) % 2**63)
        model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=8, num_hidden_layers=settings["layers"], **SHAPE)).double()
        tuner.install(model)
    layers = layers_of(model)
    targets = {}
    for path, layer in layers.items():
        shape = layer.get_base_layer().weight.shape  # type: ignore[union-attr]
        targets[path] = torch.from_numpy(draws.generator(seed, "T4", path).standard_normal(tuple(shape)))

    def added(layer: nn.Module) -> Tensor:
        """What a layer's adapter adds to its weight, from its outputs for each unit vector."""
        base: Any = layer.get_base_layer()  # type: ignore[operator]
        units = torch.eye(base.in_features, dtype=torch.float64)
        return (layer(units) - base(units)).T

    learner = Learner.of(tuned(model), AdamW(learning_rate=settings["rate"], clip=None), tuner)
    for step in range(settings["steps"]):
        sum(((added(layer) - targets[path]) ** 2).sum() for path, layer in layers.items()).backward()  # type: ignore[union-attr]
        learner.step(step, settings["steps"])
    found = {}
    with torch.no_grad():
        for path, layer in layers.items():
            energy = torch.linalg.svdvals(targets[path]) ** 2
            residual = float(((added(layer) - targets[path]) ** 2).sum())
            found[path] = (residual, float(energy[rank:].sum()), float(energy.sum()))
    return found


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Over seeds, for each rank: the layers' mean residual over |dW|^2, and the largest and smallest excess over the bound."""
    work = [(seed, rank, settings) for rank in settings["ranks"] for seed in settings["seeds"]]
    found = dict(zip([(seed, rank) for seed, rank, _ in work], spread(of_seed, work, settings["processes"]), strict=True))
    numbers: dict[str, Number] = {}
    over, full = [], []
    for rank in settings["ranks"]:
        layers = [list(found[seed, rank].values()) for seed in settings["seeds"]]
        numbers[f"r = {rank}: residual / |dW|^2"] = number(
            sum(residual / whole for residual, _, whole in each) / len(each) for each in layers
        )
        numbers[f"r = {rank}: bound / |dW|^2"] = number(
            sum(bound / whole for _, bound, whole in each) / len(each) for each in layers
        )
        flat = [each for row in layers for each in row]
        over += [residual / bound - 1 for residual, bound, whole in flat if bound > 0]
        full += [residual / whole for residual, bound, whole in flat if bound == 0]
    numbers["largest excess over the bound"] = exact(max(over))
    numbers["smallest excess over the bound"] = exact(min(over))
    numbers["largest residual at full rank"] = exact(max(full))
    return {"numbers": numbers, "curves": {"ranks": settings["ranks"]}}


def judge(numbers: dict[str, Number]) -> dict[str, bool]:
    return {
        "as good as the best matrix of its rank": numbers["largest excess over the bound"]["value"] <= WITHIN,
        "never better": numbers["smallest excess over the bound"]["value"] >= -BELOW,
        "exact at full rank": numbers["largest residual at full rank"]["value"] <= NOTHING,
    }


def say(numbers: dict[str, Number]) -> str:
    residuals = {name: each["value"] for name, each in numbers.items() if name.endswith("residual / |dW|^2")}
    parts = [f"{name.removesuffix(' residual / |dW|^2')} {value:.4f}" for name, value in residuals.items()]
    low, high = (numbers[f"{which} excess over the bound"]["value"] for which in ("smallest", "largest"))
    return (
        f"residual over the whole, mean over layers: {', '.join(parts)}; above the bound by {low:.1e} to {high:.1e} of it; "
        f"at full rank at most {numbers['largest residual at full rank']['value']:.0e} of the whole remains"
    )


def draw(figure: Any, found: dict[str, Any]) -> None:
    figure.set_size_inches(5, 3.2)
    axes = figure.subplots()
    ranks, numbers = found["curves"]["ranks"], found["numbers"]
    bound = [numbers[f"r = {rank}: bound / |dW|^2"]["value"] for rank in ranks]
    axes.plot(ranks, bound, color="0.25", label="Eckart and Young: $\\sum_{i>r}\\sigma_i^2$")
    reached = [numbers[f"r = {rank}: residual / |dW|^2"]["value"] for rank in ranks]
    axes.plot(ranks, reached, "o", color="#0072B2", label="LoRA, mean over layers and seeds")
    axes.set(xscale="log", xlabel="rank r", ylabel="residual, share of $|\\Delta W|^2$", ylim=(-0.03, 1))
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.minorticks_off()
    axes.legend(frameon=False)


if __name__ == "__main__":
    main(sys.modules[__name__])
