"""GGUF files: what transformers reads from them is the model that was written, weight by weight and token by token."""

import json
import sys
from pathlib import Path
from typing import Any

import gguf as library
import pytest
import torch
from adapters import adapter, base, logits
from tiny_models import CONFIGS, transformer
from tiny_tokenizers import make as tokenizer
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from typer.testing import CliRunner

import posttrain
from posttrain.cli.app import app
from posttrain.compress import gguf, vocabulary
from posttrain.compress.gguf import ARCHITECTURES, DTYPES, rotated
from posttrain.data.render import Template
from posttrain.errors import InputError, ModelError, RunError
from posttrain.models.load import load
from posttrain.tuners.load import load as load_any

CHANGES: dict[str, dict[str, Any]] = {  # to the tiny models, so that transformers finds what it takes for granted
    "llama": {}, "mistral": {"sliding_window": None}, "qwen2": {}, "qwen3": {"head_dim": 128}, "gpt2": {"n_positions": 1024},
    "gemma3": {
        "head_dim": 256, "query_pre_attn_scalar": 256, "final_logit_softcapping": None, "num_hidden_layers": 6,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
    },
}  # fmt: skip
TINY = "posttrain:tiny-base"


@pytest.fixture(scope="module", autouse=True)
def qwen2() -> Any:
    """Biases on queries, keys and values, as no other of the tiny models has them."""
    CONFIGS["qwen2"] = lambda: Qwen2Config(**{key: value for key, value in CONFIGS["llama"]().to_dict().items() if key in KEPT})
    yield
    del CONFIGS["qwen2"]


KEPT = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "eos_token_id",
}  # fmt: skip


def read(file: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)


def written(tmp_path: Path, name: str, dtype: str = "float32", shape: str = "chatml", **changes: Any) -> tuple[Any, Any, Path]:
    """(the model as it was, as it is left, the file) of a tiny model."""
    words = tokenizer(shape)
    fields = {"vocab_size": len(words) + 5, **CHANGES[name], **changes}
    before, model = transformer(name, **fields), transformer(name, **fields)
    file = tmp_path / f"{name}.gguf"
    gguf.write(model, words, [words.convert_tokens_to_ids("<|im_end|>"), words.eos_token_id], file, dtype)
    return before, model, file


@pytest.mark.parametrize("name", CHANGES)
def test_transformers_reads_the_model_that_was_written(name: str, tmp_path: Path) -> None:
    model, left, file = written(tmp_path, name)
    found = read(file)
    wanted = logits(model)
    torch.testing.assert_close(logits(found), wanted, rtol=0, atol=1e-5)
    assert torch.equal(logits(left), wanted), "in float32 nothing is rounded"
    assert wanted.std() > 0.3
    ours, theirs = model.state_dict(), found.state_dict()
    for key, each in theirs.items():
        torch.testing.assert_close(each, ours[key], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [each for each in DTYPES if each != "float32"])
def test_what_is_rounded_is_read_as_it_was_rounded(dtype: str, tmp_path: Path) -> None:
    """The model is left with what the file holds, so that both say exactly the same; and each block is as near as it can be."""
    steps = {"float16": 2**-11, "bfloat16": 2**-8, "q8_0": 1 / 254, "q5_0": 1 / 16, "q5_1": 1 / 62, "q4_0": 1 / 8, "q4_1": 1 / 30}
    for name in ("llama", "gpt2") if dtype in {"bfloat16", "q4_0"} else ("llama",):
        before, left, file = written(tmp_path, name, dtype)
        found = read(file)
        assert torch.equal(logits(found), logits(left))
        held = {each.name: each.tensor_type.name for each in library.GGUFReader(file).tensors}
        assert held["blk.0.ffn_up.weight"] == held["token_embd.weight"] == DTYPES[dtype]
        assert held["blk.0.attn_norm.weight"] == "F32"
        assert held.get("position_embd.weight", "F32") == "F32"
        for key, each in left.named_parameters():
            was = before.get_parameter(key)
            gap = (each - was).abs()
            if each.ndim == 1 or key.endswith("wpe.weight"):
                assert not gap.any()
            else:
                bound = was.abs().max() * 2 if dtype.endswith("_1") else was.abs().max()
                assert 0 < gap.max() <= 1.05 * steps[dtype] * bound


def test_rows_that_are_no_whole_blocks_are_stored_in_float16(tmp_path: Path) -> None:
    before, left, file = written(tmp_path, "llama", "q8_0")
    held = {each.name: each.tensor_type.name for each in library.GGUFReader(file).tensors}
    assert held["blk.0.ffn_down.weight"] == "F16", "its rows have 48 values, and a block 32"
    down = before.model.layers[0].mlp.down_proj.weight
    assert torch.equal(left.model.layers[0].mlp.down_proj.weight, down.half().float())


def test_llamas_queries_and_keys_lie_as_llama_cpp_pairs_them() -> None:
    """Two heads of four rows: the halves 0 1 | 2 3 of a head become the neighbours 0 2, 1 3."""
    rows = torch.arange(8)[:, None].expand(8, 3).numpy()
    form = rotated(2)
    assert form.there(rows)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert (form.back(form.there(rows)) == rows).all()


def test_a_weight_that_lies_wrongly_is_found_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "rotated", lambda heads: gguf.Form())
    with pytest.raises(RunError, match=r"its logits are up to .* nothing is left there"):
        posttrain.export(TINY, tmp_path / "out.gguf", "gguf", tokenizer=False)
    assert not list(tmp_path.iterdir())


# ---- the tokenizer


@pytest.mark.parametrize("shape", ["chatml", "llama3", "qwen", "no_template"])
def test_the_tokenizer_the_template_and_the_stop_tokens_are_read_as_they_were(shape: str, tmp_path: Path) -> None:
    words = tokenizer(shape)
    ends = sorted(Template(words, words.chat_template is not None).stop_ids)
    gguf.write(transformer("llama", vocab_size=len(words) + 5), words, ends, tmp_path / "out.gguf", "float32")
    found = AutoTokenizer.from_pretrained(tmp_path, gguf_file="out.gguf")
    for text in ("It's 12 + 30.\n\n  Über 日本 🙂", f"{words.eos_token}the cat{words.eos_token}", " x", "a  b\tc\r\n"):
        assert found(text).input_ids == words(text).input_ids
        assert found.decode(words(text).input_ids) == words.decode(words(text).input_ids)
    assert found.chat_template == words.chat_template
    assert (found.eos_token_id, found.bos_token_id) == (words.eos_token_id, words.bos_token_id)
    fields = library.GGUFReader(tmp_path / "out.gguf").fields
    assert fields["tokenizer.ggml.eos_token_id"].contents() == words.eos_token_id
    further = [fields[key].contents() for key in fields if key.endswith("eot_token_id")]
    assert sorted([*further, words.eos_token_id]) == ends
    assert gguf.told(tmp_path / "out.gguf") == (words.chat_template, [words.eos_token_id, *further])
    kinds = fields["tokenizer.ggml.token_type"].contents()
    assert kinds[words.eos_token_id] == library.TokenType.CONTROL
    assert kinds[words("the").input_ids[0]] == library.TokenType.NORMAL
    assert kinds[len(words) :] == [library.TokenType.UNUSED] * (len(kinds) - len(words)), "of embeddings without a token"


def test_a_begin_token_that_the_tokenizer_adds_is_in_the_file(tmp_path: Path) -> None:
    words = tokenizer("llama3", add_bos=True)
    model = transformer("llama", vocab_size=len(words))
    gguf.write(model, words, [words.eos_token_id], tmp_path / "out.gguf", "float32")
    fields = library.GGUFReader(tmp_path / "out.gguf").fields
    assert fields["tokenizer.ggml.add_bos_token"].contents() is True
    found = AutoTokenizer.from_pretrained(tmp_path, gguf_file="out.gguf")
    assert found("the cat").input_ids == words("the cat").input_ids
    gguf.write(model, tokenizer("llama3"), [words.eos_token_id], tmp_path / "out.gguf", "float32")
    assert library.GGUFReader(tmp_path / "out.gguf").fields["tokenizer.ggml.add_bos_token"].contents() is False


def test_the_ways_of_splitting_text_are_those_that_transformers_knows_by_the_same_names() -> None:
    assert {name: split for split, name in vocabulary.SPLITS.items()} == {
        name: GGUF_PRE_TOKENIZER_SPLITS[name] for name in vocabulary.SPLITS.values()
    }


def split_by(*parts: Any, ignore_merges: bool = False, normalizer: Any = None) -> Any:
    inner = json.loads(tokenizer("chatml").backend_tokenizer.to_str())
    inner["model"]["ignore_merges"] = ignore_merges
    backend = Tokenizer.from_str(json.dumps(inner))
    backend.pre_tokenizer = parts[0] if len(parts) == 1 else pre_tokenizers.Sequence(list(parts))
    if normalizer is not None:
        backend.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


@pytest.mark.parametrize("name", vocabulary.SPLITS.values())
def test_a_known_way_of_splitting_text_is_read_back(name: str, tmp_path: Path) -> None:
    pattern = pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[name]), "isolated")
    words = split_by(pattern, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    gguf.write(transformer("llama", vocab_size=len(words)), words, [1], tmp_path / "out.gguf", "float32")
    found = AutoTokenizer.from_pretrained(tmp_path, gguf_file="out.gguf")
    for text in ("What is 12345 + 30? It's 42, don't\n\n\nask  why", "HTTPServer CamelCase\t12,000 ÄÖ"):
        assert found(text).input_ids == words(text).input_ids
    assert library.GGUFReader(tmp_path / "out.gguf").fields["tokenizer.ggml.pre"].contents() == name


def test_other_tokenizers_are_refused_by_name() -> None:
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    qwen = pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS["qwen2"]), "isolated")
    unigram = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("a", 0.0)])))
    for words, said in (
        (unigram, "is a Unigram"),
        (split_by(pre_tokenizers.Split(Regex(r"\d+"), "isolated"), level), r"no name for \(\\d\+\)"),
        (split_by(pre_tokenizers.Digits(), level), r"no name for \(Digits\)"),
        (split_by(pre_tokenizers.ByteLevel(add_prefix_space=True)), "puts a blank before every text"),
        (split_by(qwen, level, ignore_merges=True), "ignore_merges"),
        (split_by(qwen, level, normalizer=normalizers.Lowercase()), r"normalises text \(Lowercase\)"),
    ):
        with pytest.raises(ModelError, match=said):
            vocabulary.Vocabulary.of(words)
    assert vocabulary.Vocabulary.of(split_by(qwen, level, normalizer=normalizers.NFC())).split == "qwen2"


def test_more_stop_tokens_than_places_are_refused(tmp_path: Path) -> None:
    words = tokenizer("chatml")
    with pytest.raises(ModelError, match=r"4 tokens end an answer .* places for 3"):
        gguf.write(transformer("llama", vocab_size=len(words)), words, [1, 2, 3], tmp_path / "out.gguf", "float32")


# ---- what cannot be said


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("phi", {}, r"PhiForCausalLM \(phi\) cannot be written as GGUF: posttrain writes llama, mistral"),
    ("llama", {"attention_bias": True}, "attention_bias is True in this model, and a GGUF file of llama is read as False"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act is gelu"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_parameters is .*'linear'"),
    ("mistral", {"sliding_window": 8}, "sliding_window is 8"),
    ("qwen3", {"head_dim": 8}, "head_dim is 8 .* is read as 128"),
    ("gpt2", {"n_positions": 128}, "n_positions is 128 .* is read as 1024"),
    ("gemma3", {"final_logit_softcapping": 3.0}, "final_logit_softcapping is 3.0"),
    ("gemma3", {"query_pre_attn_scalar": 8}, "query_pre_attn_scalar is 8"),
]


@pytest.mark.parametrize(("name", "change", "said"), REFUSED, ids=lambda one: one if isinstance(one, str) else next(iter(one), ""))
def test_what_the_format_or_its_reader_has_no_place_for_is_refused(
    name: str, change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    words = tokenizer("chatml")
    model = transformer(name, vocab_size=len(words), **CHANGES.get(name, {}) | change)
    with pytest.raises(ModelError, match=said):
        gguf.write(model, words, [1], tmp_path / "out.gguf", "float32")


def test_settings_and_models_that_are_no_gguf_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on = base(tmp_path / "base")
    with pytest.raises(InputError, match=r"name it with .gguf"):
        posttrain.export(on, tmp_path / "out", "gguf")
    with pytest.raises(InputError, match="a gguf file holds one of float32, float16"):
        posttrain.export(on, tmp_path / "out.gguf", "gguf", dtype="q2_k")
    with pytest.raises(InputError, match="left out of a gguf file alone"):
        posttrain.export(on, tmp_path / "out", tokenizer=False)
    with pytest.raises(ModelError, match=r"splits text into words in a way that llama.cpp has no name for"):
        posttrain.export(TINY, tmp_path / "out.gguf", "gguf")
    with pytest.raises(ModelError, match=r"tuner prompt .* cannot be merged"):
        posttrain.export(adapter(on, tmp_path / "a", kind="prompt", tokens=2), tmp_path / "out.gguf", "gguf")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "gguf", None)
        with pytest.raises(ModelError, match=r"pip install 'posttrain\[gguf\]'"):
            posttrain.export(on, tmp_path / "out.gguf", "gguf")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a", "base"]


# ---- whole


def test_the_shipped_model_is_written_without_its_tokenizer(tmp_path: Path) -> None:
    told = posttrain.export(TINY, tmp_path / "whole.gguf", "gguf", tokenizer=False)
    assert told.difference < 1e-4
    assert (told.dtype, told.chat_template, told.stop_ids) == ("float32", True, [0, 1])
    small = posttrain.export(TINY, tmp_path / "small.gguf", "gguf", tokenizer=False, dtype="q8_0")
    assert small.bytes < 0.28 * told.bytes
    assert 1e-5 < small.divergence < 1e-3
    wanted = load(TINY).lm.model
    torch.testing.assert_close(logits(read(tmp_path / "whole.gguf")), logits(wanted), rtol=0, atol=1e-5)
    assert 0.01 < (logits(read(tmp_path / "small.gguf")) - logits(wanted)).abs().max() < 0.5


def test_saved_loaded_merged_and_exported_it_is_one_model(tmp_path: Path) -> None:
    """Invariant e of the design, from an adapter on an adapter to a file for llama.cpp."""
    first = adapter(base(tmp_path / "base"), tmp_path / "first", 3, rank=2)
    second = adapter(first, tmp_path / "second", 4, "ia3")
    wanted = logits(load_any(second, apart=True).lm.model)
    posttrain.merge(second, tmp_path / "merged")
    posttrain.export(tmp_path / "merged", tmp_path / "folder")
    found = CliRunner().invoke(app, ["export", str(second), str(tmp_path / "out.gguf"), "--format", "gguf", "--json"])
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["difference"] < 2e-5
    assert json.loads(found.stdout)["bytes"] == (tmp_path / "out.gguf").stat().st_size
    for model in (load(tmp_path / "merged").lm.model, load(tmp_path / "folder").lm.model, read(tmp_path / "out.gguf")):
        torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-5)


def test_the_command_says_what_was_written(tmp_path: Path) -> None:
    on = base(tmp_path / "base")
    parts = [str(adapter(on, tmp_path / name, seed, rank=2)) for seed, name in enumerate("ab")]
    asked = ["merge", *parts, "--weight", "0.5", "--weight", "0.5", "--method", "ties", "--density", "0.5"]
    found = CliRunner().invoke(app, [*asked, "--out", str(tmp_path / "out")])
    assert found.exit_code == 0, found.output
    assert "folder, float32" in found.stdout
    assert "chat template kept, stop tokens [1, 401, 402] kept" in found.stdout
    wrong = CliRunner().invoke(app, ["merge", *parts, "--method", "mean", "--out", str(tmp_path / "other")])
    assert isinstance(wrong.exception, InputError)
    assert "take one of linear, ties" in str(wrong.exception)


def test_every_architecture_that_is_written_is_tried() -> None:
    assert {CONFIGS[name]().model_type for name in CHANGES} == set(ARCHITECTURES)
