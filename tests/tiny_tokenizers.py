"""Tokenizers made on the spot: a byte-level BPE of some hundred tokens with chat templates of the well-known shapes.

`make("llama3")` gives a fast tokenizer of transformers; `SHAPES` are those from which an honest mask can be made.
`lead` is what a template puts before an answer inside its trained span, `end` the token that ends a turn, `trims` whether it
strips content.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

SENTENCES = [
    "The cat sat on the mat and the dog sat on the log.",
    "What is 12 + 30? 12 + 30 = 42.\n\nSam has 18 shells and buys 6 more. How many shells does Sam have now?",
    "Name a letter. Once upon a time there was a little girl who lived near the wood.",
    "{'name': 'weather', 'arguments': {'city': 'Oslo'}} system user assistant tool think",
]


@dataclass(frozen=True)
class Shape:
    template: str | None
    controls: tuple[str, ...]
    end: str
    lead: str = ""
    trims: bool = False
    bos: str | None = None
    eos: str | None = None
    pad: str | None = None


CHATML = """\
{%- if tools %}<|im_start|>system
Tools: {{ tools | tojson }}<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>

{{ message.content | trim }}<|eot_id|>
{%- endfor %}
{%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""

GEMMA = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}
{{ message.content | trim }}<end_of_turn>
{% endfor %}
{%- if add_generation_prompt %}<start_of_turn>model
{% endif %}"""

MISTRAL = """\
{{- bos_token }}
{%- for message in messages %}
{%- if (message.role == 'assistant') == (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate user and assistant') }}
{%- endif %}
{%- if message.role == 'user' %}[INST] {{ message.content }} [/INST]
{%- elif message.role == 'assistant' %} {{ message.content }}</s>
{%- endif %}
{%- endfor %}"""

QWEN = """\
{%- set ns = namespace(last=0) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.role == 'assistant' and loop.index0 < ns.last %}{{ message.content.split('</think>')[-1] }}
{%- else %}{{ message.content }}{% endif %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

IM = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
KINDS = {
    "chatml": Shape(CHATML, IM, "<|im_end|>", eos="<|endoftext|>", pad="<|endoftext|>"),
    "llama3": Shape(
        LLAMA3,
        ("<|begin|>", "<|end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
        trims=True,
        bos="<|begin|>",
        eos="<|end|>",
    ),
    "gemma": Shape(
        GEMMA, ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<end_of_turn>", trims=True, bos="<bos>", eos="<eos>"
    ),
    "mistral": Shape(MISTRAL, ("<s>", "</s>", "[INST]", "[/INST]"), "</s>", lead=" ", bos="<s>", eos="</s>"),
    "pad_is_eos": Shape(CHATML, IM, "<|im_end|>", eos="<|im_end|>", pad="<|im_end|>"),
    "no_eos": Shape(CHATML, IM, "<|im_end|>"),
    "qwen": Shape(QWEN, IM, "<|im_end|>", eos="<|im_end|>", pad="<|endoftext|>"),
    "no_template": Shape(None, ("<|endoftext|>",), "<|endoftext|>", eos="<|endoftext|>"),
    "no_generation_prompt": Shape(CHATML.split("{%- if add_generation_prompt")[0], IM, "<|im_end|>", eos="<|im_end|>"),
    "no_end": Shape(CHATML.replace("<|im_end|>", "###"), IM, "", eos="<|im_end|>"),
    "opens_otherwise": Shape(
        CHATML.replace("assistant\n{% endif", "assistant\n<think>{% endif"), IM, "<|im_end|>", eos="<|im_end|>"
    ),
    "deaf": Shape(QWEN.replace(" and loop.index0 < ns.last", ""), IM, "<|im_end|>", eos="<|im_end|>"),
}
SHAPES = ("chatml", "llama3", "gemma", "mistral", "pad_is_eos", "no_eos", "qwen")


@cache
def _trained() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    return tokenizer.to_str()


def make(kind: str, add_bos: bool = False) -> Any:
    """A tokenizer of one of KINDS; `add_bos` makes it put its begin token before plain text, as many do."""
    from tokenizers import AddedToken, Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    shape = KINDS[kind]
    inner = Tokenizer.from_str(_trained())
    inner.add_special_tokens([AddedToken(token, normalized=False) for token in shape.controls])
    if add_bos and shape.bos:
        inner.post_processor = processors.TemplateProcessing(
            single=f"{shape.bos} $A", special_tokens=[(shape.bos, inner.token_to_id(shape.bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=shape.bos, eos_token=shape.eos, pad_token=shape.pad, chat_template=shape.template
    )
