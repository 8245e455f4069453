"""Models written as files for others: merged folders, peft adapters, GGUF. What was written is read back before it is there."""

import io
import json
import shutil
import warnings
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.compress import gguf
from posttrain.compress.readback import (
    Written,
    ids_of,
    refuse_far,
    refuse_other_stops,
    refuse_other_text,
    report,
    rows_for,
    said,
    staged,
    stop_ids,
    wrong,
)
from posttrain.errors import InputError, ModelError
from posttrain.models import delta, delta_file
from posttrain.models import load as plain
from posttrain.models.load import Loaded, LoadedScalar, resolved, save, stored_dtype, wrap
from posttrain.models.reward import save_reward_model
from posttrain.models.scalar import ScalarLM
from posttrain.models.source import PEFT, ModelSource
from posttrain.paths import free_place
from posttrain.tuners.below import folder_of, kind_of, refuse_codes, refuse_unfoldable, tuner_of
from posttrain.tuners.folder import WEIGHTS, save_adapter
from posttrain.tuners.load import load
from posttrain.tuners.merge import Codes, as_trained, is_scalar, merged
from posttrain.tuners.mix import Mix

FORMATS = ("folder", "peft", "bitdelta", "gguf")
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def merge(source: ModelSource | str | Path, out: str | Path, dtype: str | None = None, codes: Codes | None = None) -> Written:
    """Folds the adapters of a model into its weights, and writes it as a transformers folder, by default in the dtype of the
    model below.

    codes: as for `tuners.merge.merged`. Raises ModelError for what cannot be folded, InputError for an `out` that is there,
    RunError where a check fails; then nothing is left at `out`.
    """
    source, out = _exact(source), Path(out)
    free_place(out)
    chosen = _float(dtype, source)
    want, loaded = _said_and_merged(source, codes)
    return _folder(loaded, want, out, chosen, same=codes != "before")


def merge_several(
    mix: Mix, out: str | Path, adapter: bool = False, rank: int | None = None, dtype: str | None = None,
    codes: Codes | None = None,
) -> Written:  # fmt: skip
    """Writes the model that several LoRAs make together; with `adapter` one LoRA, of `rank`, on the model below them.

    What is measured of method linear is against the adapters side by side, folded into nothing; of the others, which are no sum,
    against the model with their update folded in. Raises as `merge`.
    """
    out, mix = Path(out), replace(mix, sources=[_exact(each) for each in mix.sources])
    mix.check()
    free_place(out)
    if adapter and (dtype is not None or codes is not None):
        raise InputError("dtype and what becomes of codes are of a merged model; an adapter is float32, beside them: remove this")
    if rank is not None and not adapter:
        raise InputError("rank is of an adapter, and a merged model has none: remove it, or ask for an adapter")
    if codes is None and not adapter:
        refuse_codes(mix.sources[0])
    chosen = _float(dtype, mix.below)
    want, loaded = _said_together(mix), mix.load(codes=codes != "before")
    if not adapter:
        mix.fold(loaded.lm.model)
        return _folder(loaded, want, out, chosen, same=codes != "before")
    tuner, cut = mix.as_lora(loaded.lm.model, rank)
    held = said(loaded.lm)
    with staged(out) as stage:
        save_adapter(tuner, loaded.lm.model, stage, mix.below)
        loaded.tokenizer.save_pretrained(stage)
        again = load(ModelSource(path=str(stage), base=mix.below.foundation().path), apart=True)
        refuse_far(held, said(again.lm), out)
        refuse_other_text(loaded.tokenizer, again.tokenizer, out)
        found = report(out, stage, "adapter", "float32", want, held, loaded.tokenizer, stop_ids(loaded))
        return replace(found, cut=cut)


def _said_and_merged(source: ModelSource, codes: Codes | None) -> tuple[Tensor, Any]:
    """(what the model says as it was trained, the model merged)"""
    refuse_unfoldable(source)
    if codes is None:
        refuse_codes(source)
    want = said(as_trained(source).lm)
    return want, merged(source, codes)


def _said_together(mix: Mix) -> Tensor:
    loaded = mix.load()
    if mix.method == "linear":
        with mix.summed(loaded.lm.model):
            return said(loaded.lm)
    mix.fold(loaded.lm.model)
    return said(loaded.lm)


def export(
    source: ModelSource | str | Path, out: str | Path, form: str = "folder", dtype: str | None = None, tokenizer: bool = True,
    codes: Codes | None = None,
) -> Written:  # fmt: skip
    """Writes a model for others: `folder`, as `merge`; `peft`, an adapter as peft reads it; `bitdelta`, a delta as one file;
    `gguf`, a file for llama.cpp.

    dtype: float32, bfloat16, float16; of gguf also q8_0, q5_1, q5_0, q4_1, q4_0. tokenizer=False leaves it out of a gguf file.
    Raises as `merge`.
    """
    if form not in FORMATS:
        raise InputError(f"format {form!r}: there is no such; take one of {', '.join(FORMATS)}")
    if not tokenizer and form != "gguf":
        raise InputError("a tokenizer is left out of a gguf file alone; remove this")
    if form == "folder":
        return merge(source, out, dtype, codes)
    source, out = _exact(source), Path(out)
    free_place(out)
    if form == "gguf":
        return _gguf(source, out, dtype, tokenizer, codes)
    if dtype is not None or codes is not None:
        raise InputError(
            "dtype and what becomes of codes are of a merged model; an adapter is written as it was learned: remove this"
        )
    return _bitdelta(source, out) if form == "bitdelta" else _peft(source, out)


def _folder(loaded: Loaded | LoadedScalar, want: Tensor, out: Path, dtype: str, same: bool) -> Written:
    """same: whether it should say what the model said that `want` is of."""
    lm, stops = loaded.lm, stop_ids(loaded)
    exact = FLOATS[dtype]
    head = lm.head if isinstance(lm, ScalarLM) else None
    for parameter in _parameters(lm, head):  # and no buffers: the angles of rotary embeddings are never rounded
        parameter.data = parameter.data.to(exact).float()
    held = said(lm)
    for parameter in _parameters(lm, head):
        parameter.data = parameter.data.to(exact)
    with staged(out) as stage:
        if isinstance(lm, ScalarLM):
            save_reward_model(lm, loaded.tokenizer, stops, stage)
            again: Loaded | LoadedScalar = plain.load_scalar(stage)
        else:
            if lm.model.generation_config is not None:
                lm.model.generation_config.eos_token_id = stops
            save(lm.model, loaded.tokenizer, stage)
            again = plain.load(stage)
            refuse_other_stops(stops, ids_of(again.lm.model.generation_config.eos_token_id), out)
        got = said(again.lm)
        refuse_far(held, got, out)
        if dtype == "float32" and same:
            refuse_far(want, got, out)
        refuse_other_text(loaded.tokenizer, again.tokenizer, out)
        return report(out, stage, "folder", dtype, want, got, loaded.tokenizer, stops)


def _parameters(lm: Any, but: Any) -> list[Any]:
    kept = set() if but is None else {id(each) for each in but.parameters()}
    return [each for each in lm.model.parameters() if id(each) not in kept]


def _peft(source: ModelSource, out: Path) -> Written:
    below = source.below()
    if below is None:
        raise ModelError(
            f"{source.path}: is no adapter folder, so there is nothing for peft; a stage's is `adapter` beside its model"
        )
    folder = folder_of(source)
    if not (folder / PEFT).is_file():
        instead = "use the folder as it is" + (", or format folder" if tuner_of(source).merges else "")
        raise ModelError(f"{source.path}: peft has no tuner {kind_of(source)}, or none with these settings; {instead}")
    if below.below() is not None:
        raise ModelError(
            f"{source.path}: stands on another adapter, which peft would leave out; merge that one first: {below.path}"
        )
    scores = is_scalar(source)
    loaded = as_trained(source)
    want = said(loaded.lm) - (loaded.lm.shift if isinstance(loaded.lm, ScalarLM) else 0.0)
    config = json.loads((folder / PEFT).read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": str(below.folder() or below.path), "revision": below.revision}
    with staged(out) as stage:
        shutil.copyfile(folder / WEIGHTS, stage / WEIGHTS)
        (stage / PEFT).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        loaded.tokenizer.save_pretrained(stage)
        got = _said_by_peft(stage, below, scores, rows_for(loaded.lm))
        refuse_far(want, got, out)
        refuse_other_text(loaded.tokenizer, AutoTokenizer.from_pretrained(str(stage)), out)
        return report(out, stage, "peft", "as learned", want, got, loaded.tokenizer, stop_ids(loaded))


def _said_by_peft(folder: Path, below: ModelSource, scores: bool, rows: list[list[int]]) -> Tensor:
    """What peft's own model says of the rows: logits of all but the last of their tokens, or a score of each."""
    from peft import PeftModel

    loaded = plain.load_scalar(below, torch.nn.init.zeros_) if scores else plain.load(below)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft calls what transformers has given another name
        model = PeftModel.from_pretrained(loaded.lm.model, str(folder)).eval()
    with torch.no_grad():
        found = [model(input_ids=torch.tensor([row], device=model.device), use_cache=False).logits[0].cpu() for row in rows]
    return torch.cat(found) if scores else torch.cat([each[-len(row) :][:-1] for each, row in zip(found, rows, strict=True)])


def _bitdelta(source: ModelSource, out: Path) -> Written:
    if out.suffix != ".bitdelta":
        raise InputError(f"{out}: format bitdelta is one file: name it with .bitdelta")
    below = source.below()
    if below is None or kind_of(source) != "delta_scale":
        raise ModelError(
            f"{source.path}: is no delta; make one of a fine-tuned model and its base with `posttrain delta FINE BASE`"
        )
    delta_file.read(folder_of(source))  # before models are
    trained = as_trained(source)
    if isinstance(trained, LoadedScalar):
        raise ModelError(
            f"{source.path}: is a reward model's, whose score a .bitdelta file has no place for; use the folder as it is"
        )
    want, again = said(trained.lm), load(below)
    with staged(out, file=True) as stage:
        file = stage / out.name
        delta_file.write_alone(folder_of(source), trained.tokenizer, file)
        again = Loaded(again.lm, delta_file.tokenizer_with(file, again.tokenizer))
        delta_file.add_file(again.lm.model, file, "exported", below)
        delta.switch(again.lm.model, "exported")
        got = said(again.lm)
        refuse_far(want, got, out)
        refuse_other_text(trained.tokenizer, again.tokenizer, out)
        refuse_other_stops(stop_ids(trained), stop_ids(again), out)
        return report(out, file, "bitdelta", "as learned", want, got, trained.tokenizer, stop_ids(trained))


def _gguf(source: ModelSource, out: Path, dtype: str | None, text: bool, codes: Codes | None) -> Written:
    if out.suffix != ".gguf":
        raise InputError(f"{out}: format gguf is one file: name it with .gguf")
    if dtype is not None and dtype not in gguf.DTYPES:
        raise InputError(f"dtype {dtype!r}: a gguf file holds one of {', '.join(gguf.DTYPES)}")
    if is_scalar(source):
        raise ModelError(f"{source.path}: is a reward model, and llama.cpp would not score with it; use format folder")
    want, loaded = _said_and_merged(source, codes)
    stops, chosen = stop_ids(loaded), dtype or _float(None, source)
    with staged(out, file=True) as stage:
        file = stage / out.name
        gguf.write(loaded.lm.model, loaded.tokenizer, stops, file, chosen, text)
        held = said(loaded.lm)
        with redirect_stderr(io.StringIO()):  # a progress bar that cannot be turned off
            again = AutoModelForCausalLM.from_pretrained(str(stage), gguf_file=out.name, dtype=torch.float32)
        got = said(wrap(again.to(loaded.lm.device), ModelSource(path=str(stage))))
        refuse_far(held, got, out)
        if chosen == "float32" and codes != "before":
            refuse_far(want, got, out)
        template, kept = gguf.told(file)
        refuse_other_stops(stops, kept, out)
        if template != loaded.tokenizer.chat_template:
            raise wrong(out, "it has another chat template")
        if text:
            refuse_other_text(loaded.tokenizer, AutoTokenizer.from_pretrained(str(stage), gguf_file=out.name), out)
        return report(out, file, "gguf", chosen, want, got, loaded.tokenizer, stops)


def _exact(source: ModelSource | str | Path) -> ModelSource:
    """The same model in float32: what is written is rounded once."""
    return resolved(source).model_copy(update={"dtype": "float32"})


def _float(dtype: str | None, source: ModelSource) -> str:
    """The precision of what is written: as asked, else as the model below is stored."""
    if dtype is None:
        stored = stored_dtype(source)
        return next((name for name, each in FLOATS.items() if each == stored), "float32")
    if dtype not in FLOATS:
        raise InputError(f"dtype {dtype!r}: a folder holds one of {', '.join(FLOATS)}")
    return dtype
