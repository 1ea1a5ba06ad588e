"""Tokenizers of the benchmark: vocabularies that packages ship, under five common chat templates.

    python benchmarks/maskbench/templates.py DIR     # DIR/qwen, DIR/llama3, DIR/mistral, DIR/zephyr, DIR/gemma

Each template is written once, with ``{% generation %}`` around what the assistant writes; ``plain`` takes those
tags out again. Contestants that need the tags are given them, the others get the template without.

    qwen            ChatML on Qwen's own vocabulary (package dashscope), tools and reasoning as Qwen3 prints them
    llama3, gemma   their markers and templates on the same vocabulary: their own is not in any package
    mistral         [INST] on Mistral's own vocabulary (package mistral-common)
    zephyr          <|role|> on the same
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

QWEN = r"""{%- if tools %}{{- '<|im_start|>system\n' }}{%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
{{- '# Tools\n\n<tools>' }}{%- for tool in tools %}{{- '\n' }}{{- tool | tojson }}{%- endfor %}{{- '\n</tools><|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{%- endif %}
{%- for message in messages %}{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- elif message.role == 'tool' %}{{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}
{%- elif message.role == 'assistant' %}{{- '<|im_start|>assistant\n' }}{% generation %}
{%- if message.reasoning_content %}{{- '<think>\n' + message.reasoning_content + '\n</think>\n\n' }}{%- endif %}{{- message.content }}
{%- for call in message.tool_calls or [] %}{{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}{{- call.function.arguments | tojson }}{{- '}\n</tool_call>' }}{%- endfor %}
{{- '<|im_end|>' }}{% endgeneration %}{{- '\n' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""

LLAMA3 = r"""{{- bos_token }}{%- for message in messages %}{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}
{%- if message.role == 'assistant' %}{% generation %}{{- message.content | trim + '<|eot_id|>' }}{% endgeneration %}
{%- else %}{{- message.content | trim + '<|eot_id|>' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""

GEMMA = r"""{{- bos_token }}{%- if messages[0].role == 'system' %}{{- raise_exception('System role not supported') }}{%- endif %}
{%- for message in messages %}{%- if message.role == 'assistant' %}{{- '<start_of_turn>model\n' }}{% generation %}
{{- message.content | trim + '<end_of_turn>' }}{% endgeneration %}{{- '\n' }}
{%- else %}{{- '<start_of_turn>' + message.role + '\n' + message.content | trim + '<end_of_turn>\n' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{%- endif %}"""

MISTRAL = r"""{%- if messages[0].role == 'system' %}{%- set system = messages[0].content + '\n\n' %}{%- set turns = messages[1:] %}
{%- else %}{%- set system = '' %}{%- set turns = messages %}{%- endif %}{{- bos_token }}{%- for message in turns %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('turns must alternate, a user first') }}{%- endif %}
{%- if message.role == 'user' %}{{- '[INST] ' + (system if loop.first else '') + message.content + ' [/INST]' }}
{%- else %}{% generation %}{{- ' ' + message.content + eos_token }}{% endgeneration %}{%- endif %}{%- endfor %}"""

ZEPHYR = r"""{%- for message in messages %}{{- '<|' + message.role + '|>\n' }}
{%- if message.role == 'assistant' %}{% generation %}{{- message.content + eos_token }}{% endgeneration %}
{%- else %}{{- message.content + eos_token }}{%- endif %}{{- '\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{%- endif %}"""

QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Template:
    """A chat template of the benchmark; ``name`` is the tokenizer's folder."""

    name: str
    text: str  # with {% generation %}
    end: str  # the token that ends a turn
    specials: tuple[str, ...]
    opening: str  # what stands before a reply, blanks left out
    system: str  # what stands before a system turn
    bos: str | None = None
    family: str = "qwen"  # whose vocabulary
    thought: str | None = None  # how it prints reasoning; None: it does not
    call: str | None = None  # how it prints a call of a tool

    @property
    def plain(self) -> str:
        """Without {% generation %}."""
        return re.sub(r"\{% (end)?generation %\}", "", self.text)


TEMPLATES = (
    Template(
        "qwen", QWEN, "<|im_end|>", ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        "<|im_start|>assistant", "<|im_start|>system",
        thought="<think>\n{}\n</think>\n\n", call="<tool_call>\n{}\n</tool_call>",
    ),
    Template(
        "llama3", LLAMA3, "<|eot_id|>",
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|start_header_id|>assistant<|end_header_id|>", "<|start_header_id|>system", "<|begin_of_text|>",
    ),
    Template(
        "gemma", GEMMA, "<end_of_turn>",
        ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"), "<start_of_turn>model", "<start_of_turn>system",
        "<bos>",
    ),
    Template("mistral", MISTRAL, "</s>", (), "[/INST]", "[SYSTEM]", "<s>", "mistral"),
    Template("zephyr", ZEPHYR, "</s>", (), "<|assistant|>", "<|system|>", "<s>", "mistral"),
)  # fmt: skip


@cache
def qwen_merges() -> tuple[Any, Any]:
    """Vocabulary and merges of Qwen's own tokenizer, as the package dashscope ships them."""
    from importlib.util import find_spec

    from transformers.convert_slow_tokenizer import TikTokenConverter

    ranks = Path(find_spec("dashscope").origin).parent / "resources" / "qwen.tiktoken"
    return TikTokenConverter(vocab_file=str(ranks)).extract_vocab_merges_from_model(str(ranks))


def qwen_backend(specials: tuple[str, ...]) -> Any:
    """Qwen's vocabulary as the package dashscope ships it, as a fast tokenizer."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocab, merges = qwen_merges()
    backend = Tokenizer(models.BPE(vocab, merges))
    backend.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"), byte_level]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    # Qwen3's own: content that the model writes, added but not special
    backend.add_tokens(
        [AddedToken(f"<{slash}{name}>", special=False, normalized=False)
         for name in ("think", "tool_call", "tool_response") for slash in ("", "/")]
    )  # fmt: skip
    return backend


def mistral_tokenizer() -> Any:
    """Mistral 7B's vocabulary as the package mistral-common ships it, as a fast tokenizer."""
    import mistral_common

    from omnidata.text.sentencepiece_bpe import tokenizer_from_model

    return tokenizer_from_model(Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1")


def write_tokenizers(out: Path, templates: tuple[Template, ...] = TEMPLATES) -> None:
    """A folder per template: tokenizer.json, its config, the plain template."""
    from transformers import PreTrainedTokenizerFast

    for template in templates:
        folder = out / template.name
        if template.family == "mistral":
            tokenizer = mistral_tokenizer()
        else:
            tokenizer = PreTrainedTokenizerFast(
                tokenizer_object=qwen_backend(template.specials), eos_token=template.end,
                pad_token=template.specials[0], **({"bos_token": template.bos} if template.bos else {}),
            )  # fmt: skip
        tokenizer.chat_template = template.plain
        tokenizer.save_pretrained(folder)
        (folder / "generation.jinja").write_text(template.text, encoding="utf-8")


if __name__ == "__main__":
    write_tokenizers(Path(sys.argv[1]))
