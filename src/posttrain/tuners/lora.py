"""LoRA: low-rank updates of linear layers; parameters and file format are peft's."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from posttrain.component import did_you_mean
from posttrain.errors import RecipeError
from posttrain.tuners.tuner import Tuner

if TYPE_CHECKING:
    from pathlib import Path

    from peft import LoraConfig
    from transformers import PreTrainedModel

ADAPTER = "default"
PREFIX = "base_model.model."  # of every weight in peft's files: the model inside of a PeftModel


def has_score(model: "PreTrainedModel") -> bool:
    """Whether the model has a score head, which is trained in full beside any tuner."""
    return model.get_output_embeddings() is None and hasattr(model, "score")


class LoRA(Tuner, kind="lora"):
    """y = W x + (alpha / rank) B A x with W frozen, B = 0 at the start. arXiv 2106.09685.

    peft's layers and files. Dropout is 0, so that ratios and references are exact. Learning rates are about 10 times those of
    full fine-tuning (1e-4 to 5e-4).
    """

    rank: PositiveInt = 16
    """r, the rank of the update."""
    alpha: PositiveFloat = 32.0
    """The update is scaled by alpha / rank (alpha / sqrt(rank) with rslora)."""
    targets: Literal["all-linear"] | list[str] = Field(default="all-linear")
    """Names of linear layers (the last part, such as q_proj), or all of them but the vocabulary head."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank): arXiv 2312.03732."""

    reversible = True

    def install(self, model: "PreTrainedModel") -> None:
        """Raises RecipeError where a target names no linear layer of this model."""
        from peft import inject_adapter_in_model

        self._check_targets(model)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="fan_in_fan_out")  # peft corrects it by itself (GPT-2's Conv1D)
                inject_adapter_in_model(self._config("SEQ_CLS" if has_score(model) else "CAUSAL_LM"), model, ADAPTER)
        except ValueError as error:
            first = str(error).splitlines()[0]
            raise RecipeError(f"tuner.targets: this architecture does not take LoRA there: {first}; name other layers") from None

    def _config(self, task: str) -> "LoraConfig":
        from peft import LoraConfig

        return LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=self.targets, use_rslora=self.rslora, task_type=task)

    def _check_targets(self, model: "PreTrainedModel") -> None:
        if self.targets == "all-linear":
            return
        from torch import nn
        from transformers.pytorch_utils import Conv1D

        if has_score(model) and "score" in self.targets:
            raise RecipeError("tuner.targets: score is trained in full beside any tuner; leave it out")
        head = model.get_output_embeddings()
        if head is not None and head.weight is model.get_input_embeddings().weight:
            tied = next(path.rpartition(".")[2] for path, module in model.named_modules() if module is head)
            if tied in self.targets:
                raise RecipeError(
                    f"tuner.targets: {tied} shares its weights with the embeddings, so merging would change both; leave it out"
                )
        names = {path.rpartition(".")[2] for path, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
        for target in self.targets:
            if target not in names:
                raise RecipeError(f"tuner.targets: no linear layer is called {target!r}{did_you_mean(target, names)}")

    def merge(self, model: "PreTrainedModel") -> None:
        """W + (alpha / rank) B A, computed in at least float32; the LoRA layers are replaced by plain ones."""
        import torch
        from peft.tuners.lora import LoraLayer

        for path, layer in list(model.named_modules()):
            if isinstance(layer, LoraLayer):
                base = layer.get_base_layer()
                with torch.no_grad():
                    delta = layer.get_delta_weight(ADAPTER)
                    wide = torch.promote_types(base.weight.dtype, torch.float32)
                    base.weight.copy_((base.weight.to(wide) + delta.to(wide)).to(base.weight.dtype))
                parent, _, name = path.rpartition(".")
                setattr(model.get_submodule(parent), name, base)
        if hasattr(model, "peft_config"):
            del model.peft_config
        model._hf_peft_config_loaded = False

    def save_adapter(self, model: "PreTrainedModel", folder: "Path", base: str) -> None:
        """A folder that `PeftModel.from_pretrained` loads onto the base model."""
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        state = get_peft_model_state_dict(model, adapter_name=ADAPTER)
        state = {f"{PREFIX}{name}": tensor.contiguous() for name, tensor in state.items()}
        if has_score(model):
            state[f"{PREFIX}score.weight"] = model.get_submodule("score").weight.detach().contiguous()
        save_file(state, folder / "adapter_model.safetensors")
        config = model.peft_config[ADAPTER]
        config.base_model_name_or_path, config.inference_mode = base, True
        config.modules_to_save = ["score"] if has_score(model) else None
        config.target_modules = sorted(config.target_modules)  # a set has another order in every process
        config.save_pretrained(str(folder))

    @contextmanager
    def switched_off(self, model: "PreTrainedModel") -> Iterator[None]:
        from peft.tuners.lora import LoraLayer

        layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        for layer in layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in layers:
                layer._disable_adapters = False
