"""The `model:` section of a recipe: which model, in what precision. Checked without importing torch."""

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from posttrain.component import Settings
from posttrain.errors import ModelError
from posttrain.paths import PREFIX, named, resolve

PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
ADAPTER = "posttrain_adapter.json"  # what posttrain says of an adapter folder: its tuner, and the model below it
HUB = "hub:"  # begins the fingerprint of a model that is not at hand
PEFT = "adapter_config.json"  # what peft says of one


class ModelSource(Settings):
    """A model: a folder, a hub name, `posttrain:tiny-base`, or another stage's (`{stage: sft}`). A string is its `path`."""

    path: str | None = None
    """A transformers folder, an adapter folder, a name on the hub, or `posttrain:NAME` for a model that comes with posttrain."""
    stage: str | None = None
    """The name of a stage of this recipe whose model is meant."""
    base: str | None = None
    """For an adapter folder: the model below it, where that is not where the adapter says."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    dtype: Literal["float32", "bfloat16", "mixed", "float64"] = "float32"
    """mixed: float32 weights, computed in bfloat16. bfloat16: weights too (small updates round away; for frozen models)."""
    quantize: Literal["nf4"] | None = None
    """nf4: keep the matrices below the head in 4 bits, frozen, under any tuner that leaves them as they are (QLoRA)."""
    double: bool = False
    """Of nf4: keep its magnitudes in 8 bits too, 4.13 bits a weight in place of 4.5."""
    layout: Literal["auto", "tree", "padded"] = "auto"
    """tree: no padding, shared prefixes once. auto: the tree where a check shows that the model takes it, else padded."""
    device: str = "auto"
    """auto: cuda where there is one, else cpu."""
    gradient_checkpointing: Literal[False, True, "offload"] = False
    """true: keep each layer's input only, and recompute the rest in the backward. offload: on a GPU, keep that in host memory."""
    trust_remote_code: str | None = None
    """The revision of the hub repository whose own Python code may run, after you have read it. Never turned on by a folder."""
    chat_template: str | None = None
    """A file with a Jinja chat template to use instead of the tokenizer's."""

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_origin(self) -> "ModelSource":
        if (self.path is None) == (self.stage is None):
            raise ValueError("give either `path` (a folder, hub name or posttrain:NAME) or `stage` (a stage of this recipe)")
        if self.double and self.quantize is None:
            raise ValueError("double is of quantize: nf4; add that, or remove it")
        return self

    def folder(self) -> Path | None:
        """The folder of a local model, None for a hub name. ModelError where it should be there and is not."""
        assert self.path is not None
        folder = resolve(self.path)
        if folder.is_dir():
            return folder
        if self.path.startswith((PREFIX, "/", ".", "~")) or self.path.count("/") != 1:
            if self.path.count("/") == 0 and not self.path.startswith((PREFIX, ".", "~")):
                return None  # old hub names such as gpt2
            raise ModelError(f"{self.path}: no such model folder")
        return None

    def check(self) -> None:
        """What can be refused before anything is loaded. Raises ModelError."""
        if self.gradient_checkpointing == "offload" and self.on_cpu():
            raise ModelError(
                "gradient_checkpointing: offload moves what a GPU would keep to host memory, and this model runs on the cpu; "
                "set gradient_checkpointing: true"
            )
        if self.chat_template is not None and not resolve(self.chat_template).is_file():
            raise ModelError(f"chat_template: {self.chat_template}: no such file")
        if self.path is None:
            return
        below = self.below()
        if below is not None:
            below.check()
        elif self.base is not None:
            raise ModelError(f"{self.path}: is no adapter folder, so there is no model below it: remove `base`")
        elif (folder := self.folder()) is not None:
            check_folder(folder)

    def on_cpu(self) -> bool:
        """Whether the model will be on a CPU. Imports torch where the recipe leaves it to the machine."""
        if self.device != "auto":
            return self.device.startswith("cpu")
        import torch

        return not torch.cuda.is_available()

    def is_quantized(self) -> bool:
        """Whether the weights are codes once the model is loaded; False for a hub model that says so itself."""
        if self.quantize is not None:
            return True
        if (below := self.below()) is not None:
            return below.is_quantized()
        folder = None if self.path is None else self.folder()
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8")) if folder is not None else {}
        except (OSError, ValueError):
            return False
        return "quantization_config" in config

    def same_weights(self, other: "ModelSource") -> bool:
        """Whether the two name one model, be it by other words or in another precision."""
        return self.fingerprint() == other.fingerprint()

    def fingerprint(self) -> str:
        """Of a local folder the hash of its files, of a hub model its name and revision."""
        assert self.path is not None
        folder, below = self.folder(), self.below()
        if below is not None:
            assert folder is not None
            return f"{folder_fingerprint(folder)} on {below.fingerprint()}"
        found = f"{HUB}{self.path}@{self.revision or 'main'}" if folder is None else folder_fingerprint(folder)
        return found + (f" in {self.quantize}{' double' if self.double else ''}" if self.quantize else "")

    def weights(self) -> str:
        """The fingerprint of the weights alone: of settings and tokenizers it knows nothing."""
        folder = self.folder()
        if folder is None:
            return self.fingerprint()
        below = self.below()
        return folder_fingerprint(folder, {".safetensors"}) + ("" if below is None else f" on {below.weights()}")

    def below(self) -> "ModelSource | None":
        """The model that an adapter folder belongs on, with the settings of this one; None for a model of its own.

        Raises ModelError for an adapter that is not whole, or whose model is nowhere.
        """
        folder = None if self.path is None else self.folder()
        if folder is None or not is_adapter(folder):
            return None
        known = about_adapter(folder)
        beside = (folder / known["beside"]).resolve() if known.get("beside") else None
        path: str | None
        if beside is not None and is_adapter(beside):  # the lowest of several is the one that `base` speaks of
            path, revision, base = str(beside), None, self.base
        elif self.base is not None:
            path, revision, base = self.base, None, None
        elif beside is not None and beside.is_dir():
            path, revision, base = str(beside), None, None
        else:
            path, revision, base = known.get("base"), known.get("revision"), None
        if not path:
            raise ModelError(f"{named(folder)}: an adapter that does not say which model it belongs on; name it with `base`")
        trusted = self.trust_remote_code if self.base is not None else None  # a folder does not choose whose code runs
        changed = {"path": path, "base": base, "revision": revision, "trust_remote_code": trusted}
        if self.quantize is None and known.get("quantize"):
            changed |= {"quantize": known["quantize"], "double": bool(known.get("double"))}
        found = self.model_copy(update=changed)
        try:
            found.folder()
        except ModelError:
            raise ModelError(
                f"{named(folder)}: the model below this adapter, {path}, is not there; name it: "
                f"model: {{path: {self.path}, base: ...}}"
            ) from None
        return found

    def foundation(self) -> "ModelSource":
        """The model below all adapters."""
        below = self.below()
        return self if below is None else below.foundation()


def refuse_other_tokens(role: str, source: ModelSource, policy: ModelSource) -> None:
    """Raises ModelError where both tokenizers lie at hand and the role's lacks, or numbers otherwise, a token of the policy's.

    What cannot be known from files (a hub model, another stage's) is checked when the models are loaded.
    """
    known = [None if each.path is None else _vocabulary(each.foundation().folder()) for each in (policy, source)]
    if known[0] is not None and known[1] is not None:
        compare_tokens(role, str(source.path), known[0], known[1])


def compare_tokens(role: str, name: str, ours: dict[str, int], theirs: dict[str, int]) -> None:
    """Raises ModelError with the first token of ours that theirs lacks, or numbers otherwise."""
    odd = min((token for token, index in ours.items() if theirs.get(token) != index), key=ours.__getitem__, default=None)
    if odd is not None:
        number = "none" if odd not in theirs else f"number {theirs[odd]}"
        raise ModelError(
            f"{role}: {name} has another tokenizer than the policy ({odd!r} is number {ours[odd]} of the policy's and {number} "
            f"there), so it would read other text than is written; take a {role} of the policy's family"
        )


def _vocabulary(folder: Path | None) -> dict[str, int] | None:
    """{token: id} of a local tokenizer.json; None where there is none of a known form."""
    try:
        found = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")) if folder is not None else {}
        vocabulary = found["model"]["vocab"]
        return vocabulary if isinstance(vocabulary, dict) else None  # a list has scores, not ids
    except (OSError, ValueError, KeyError, TypeError):
        return None


def check_folder(folder: Path) -> None:
    """Raises ModelError for a folder that holds no loadable model, with what it lacks."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"{named(folder)}: no config.json, so this is no transformers model folder")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{named(folder / 'config.json')}: not valid JSON: {error}") from None
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(file.name for pattern in PICKLED for file in folder.glob(pattern))
        if pickled:
            raise ModelError(
                f"{named(folder)}: has only {pickled[0]}; pickled weights are never loaded; convert it to safetensors first"
            )
        raise ModelError(f"{named(folder)}: a model folder without weights: there is no .safetensors file in it")
    if "auto_map" in config:
        raise ModelError(
            f"{named(folder)}: config.json asks for code from its folder (auto_map); "
            "posttrain does not run it: use the architecture that transformers itself has, or remove auto_map"
        )


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, and no model of its own."""
    models = [file for file in folder.glob("*.safetensors") if file.name != "adapter_model.safetensors"]
    return not models and any((folder / name).is_file() for name in (ADAPTER, PEFT))


def _object(file: Path) -> dict[str, Any]:
    """What a JSON file says. Raises ModelError where it is none, or no object."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{named(file)}: not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise ModelError(f"{named(file)}: holds {type(found).__name__} {str(found)[:40]}, and no object of settings")
    return found


def about_adapter(folder: Path) -> dict[str, Any]:
    """What a folder says of its adapter: `base`, `revision`, and what posttrain adds. ModelError where it is not whole."""
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(file.name for pattern in PICKLED for file in folder.glob(pattern))
        if pickled:
            raise ModelError(f"{named(folder)}: has only {pickled[0]}; pickled weights are never loaded; convert it")
        raise ModelError(f"{named(folder)}: an adapter folder without weights: there is no .safetensors file in it")
    said = {name: _object(folder / name) for name in (ADAPTER, PEFT) if (folder / name).is_file()}
    name = ADAPTER if ADAPTER in said else PEFT
    found = said[name]
    if name == PEFT:
        return {"base": found.get("base_model_name_or_path"), "revision": found.get("revision"), "peft": found}
    kind = found.get("tuner", {}).get("kind", "") if isinstance(found.get("tuner"), dict) else ""
    if not kind or ":" in str(kind):
        raise ModelError(
            f"{named(folder / name)}: tuner {kind!r} does not come with posttrain, and a file does not get to import code; "
            "install it and restore its state in a script"
        )
    return dict(found)


def folder_fingerprint(folder: Path, suffixes: Collection[str] = (".json", ".safetensors", ".jinja", ".model", ".txt")) -> str:
    """sha256 over the names and contents of a model folder's files."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix in suffixes:
            digest.update(file.name.encode() + b"\0")
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
