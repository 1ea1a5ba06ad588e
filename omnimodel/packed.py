"""Any vision-language model of transformers, trained on packs: its own class with one more way to be called.

    class_for(config)                      OmniLMM's class, or transformers' own for pictures and text
      model(**inputs, shift_labels=…)      a pack -> loss on its supervised tokens
      model(**inputs)                      as the class always did: generation, its own loss

    input_ids [1, T], position_ids [1, T] or [4, 1, T], cu_seqlens [D + 1], the processor's tensors
      1  the class's base model, documents apart    (omnimodel.attention, omnimodel.mixers)
      2  supervised rows alone through the head      (omnimodel.loss)

Class and parameter names stay as they are, so that files load and save as the class's own.
"""

from __future__ import annotations

import functools
import inspect
import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key
from transformers.modeling_outputs import CausalLMOutputWithPast

from omnimodel import attention, host_known, loss, mixers, patches
from omnimodel.parts import image_tower

# A processor marks its pictures' tokens; models take that under one of these names.
TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")
BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def class_for(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that trains a model of this configuration.

    Raises:
        ValueError: transformers has no class for pictures and text of it.
    """
    if config.model_type == "omnilmm":
        from omnimodel.modeling import OmniLMMForCausalLM

        return OmniLMMForCausalLM
    mapping = AutoModelForImageTextToText._model_mapping
    if type(config) not in mapping:
        raise ValueError(
            f"transformers has no model of type {config.model_type!r} for pictures and text "
            "(AutoModelForImageTextToText)"
        )
    return packed_class(mapping[type(config)])


def config_of(folder: str, **changes: Any) -> Any:
    """A folder's config.json; no code of the folder is ever run."""
    return AutoConfig.from_pretrained(folder, trust_remote_code=False, **changes)


@lru_cache(maxsize=8)
def packed_class(kind: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A subclass of ``kind``, under its name, that can also be called with a pack."""

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, shift_labels: torch.Tensor | None = None, **inputs: Any) -> Any:
        if shift_labels is None:
            return kind.forward(self, *args, **inputs)
        return packed_forward(self, shift_labels=shift_labels, **inputs)

    names = {"forward": forward, "original": kind, "__module__": kind.__module__, "__doc__": kind.__doc__}
    return type(kind.__name__, (_Packed, kind), names)


class _Packed(PreTrainedModel if TYPE_CHECKING else object):  # type: ignore[misc]
    """What every such class adds to transformers' building, loading and saving."""

    connector_name = "connector"
    original: type[PreTrainedModel]

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        text = config.get_text_config()
        names = {name: getattr(config, name, None) for name in config.sub_configs} | {"": config}
        config._attn_implementation = {
            name: attention.NAME if each is text else "sdpa" for name, each in names.items()
        }
        super().__init__(config, *args, **kwargs)
        self.logit_scale = logit_scale(self.config)  # until the class's own loss shows that it has none
        self.mixers = mixers.keep_apart(self.get_decoder())
        self._join_pictures()
        image_tower(self).register_forward_pre_hook(_without_bounds, with_kwargs=True)
        patches.as_products(image_tower(self))
        host_known.tell(self)
        for module in (image_tower(self), self.get_decoder()):
            host_known.leave_out(module)

    def train(self, mode: bool = True) -> Any:
        """As any module's, but norms over a batch keep the statistics that they came with.

        Those of a batch would let documents of a pack see each other.
        """
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def _join_pictures(self) -> None:
        """A tower that knows its pictures' bounds takes them all in one call per layer, as with flash."""
        tower: Any = image_tower(self)
        if any("cu_seqlens" in inspect.signature(each.forward).parameters for each in tower.modules()):
            tower.config._attn_implementation_internal = attention.TOWER_NAME

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers', but missing or left-over names are an error.

        Raises:
            ValueError: the folder's files do not hold this model's weights.
        """
        model, info = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)
        kinds = {
            "missing": "missing_keys",
            "unexpected": "unexpected_keys",
            "of another shape": "mismatched_keys",
        }
        problems = {kind: sorted(map(str, info[name])) for kind, name in kinds.items() if info[name]}
        if problems:
            lines = "; ".join(
                f"{kind} ({len(names)}): {', '.join(names[:8])}" for kind, names in problems.items()
            )
            raise ValueError(f"{path} does not hold the weights of its config.json; {lines}")
        return model

    @torch.no_grad()
    def reset_buffers(self) -> None:
        """Recompute all that is no parameter: after meta -> to_empty it is memory garbage."""
        for module in self.modules():
            if module._buffers:
                module._is_hf_initialized = False
        for parameter in self.parameters():
            parameter._is_hf_initialized = True  # these are read from files
        self.initialize_weights()

    def names_in_files(self, keys: list[str]) -> dict[str, str]:
        """Parameter name here -> its key in the files, for keys that are only named otherwise.

        Raises:
            ValueError: some weights are stored in another form (joined, split or transposed).
        """
        transforms = get_model_conversion_mapping(self)
        keys = [key for key in keys if not self._is_left_out(key)]
        converters = [each for each in transforms if isinstance(each, WeightConverter)]
        renamings = [each for each in transforms if not isinstance(each, WeightConverter)]
        state = self.state_dict()
        names = {}
        for key in keys:
            name, converted = rename_source_key(key, renamings, converters, self.base_model_prefix, state)
            if converted is not None:
                raise ValueError(f"{key} is stored in another form than {name}")
            names[name] = key
        return names

    def _is_left_out(self, key: str) -> bool:
        """Is it one of the weights that the class itself leaves in the files (another head's, say)?"""
        patterns = self._keys_to_ignore_on_load_unexpected or ()
        return any(re.search(pattern, key) for pattern in patterns)


def packed_forward(
    model: Any,
    *,
    input_ids: torch.Tensor,
    shift_labels: torch.Tensor,
    position_ids: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    num_supervised_tokens: int | None = None,
    num_supervised_rows: int | None = None,
    token_type_ids: torch.Tensor | None = None,
    return_hidden: bool = False,
    **images: torch.Tensor,
) -> CausalLMOutputWithPast:
    """Loss of a pack, float32.

    Args:
        model: of a ``packed_class``.
        input_ids: int64 ``[1, T]``.
        shift_labels: int64 ``[1, T]``, what each position must predict, or IGNORE_INDEX.
        position_ids: int64 ``[1, T]``, or M-RoPE's ``[4, 1, T]``.
        cu_seqlens: int32 ``[D + 1]``. This and other integers may be ``HostKnown``: then no class that does
            without values of pixels waits for the GPU.
        max_seqlen: tokens of the longest document.
        num_supervised_tokens: the loss's denominator; None: this pack's own count.
        num_supervised_rows: that count, if the host knows it.
        token_type_ids: int64 ``[1, T]``, 1 at tokens of pictures.
        return_hidden: also the last hidden states ``[1, T, D]``.
        images: the processor's tensors.
    """
    base = model.base_model
    bounds = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens}
    lengths = {"max_length_q": max_seqlen, "max_length_k": max_seqlen}
    with attention.packing(cu_seqlens, max_seqlen), host_known.making(input_ids):
        outputs = base(
            input_ids=input_ids,
            # All ones rather than none: without one transformers looks for documents in the position ids,
            # and waits for the GPU to do so.
            attention_mask=torch.ones_like(input_ids),
            position_ids=position_ids,
            use_cache=False,
            **bounds,
            **lengths,
            **token_types(type(base), token_type_ids),
            **images,
        )
    hidden_BTD = outputs.last_hidden_state
    rows, labels = loss.supervised_rows(hidden_BTD.flatten(0, 1), shift_labels.flatten(), num_supervised_rows)
    count = len(rows) if num_supervised_tokens is None else num_supervised_tokens
    total = loss.summed_loss(model.get_output_embeddings(), rows, labels, scale=model.logit_scale)
    return CausalLMOutputWithPast(
        loss=total / max(count, 1), hidden_states=(hidden_BTD,) if return_hidden else None
    )


def _without_bounds(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """A tower is not told where documents of text begin: it knows its pictures' bounds under those names."""
    return args, {name: value for name, value in kwargs.items() if name not in BOUNDS}


def token_types(base: Any, token_type_ids: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Under the name that the class takes, if it takes them."""
    wanted = [name for name in TOKEN_TYPES if name in _arguments(base)]
    return {wanted[0]: token_type_ids} if wanted and token_type_ids is not None else {}


@lru_cache(maxsize=16)
def _arguments(base: Any) -> frozenset[str]:
    return frozenset(inspect.signature(base.forward).parameters)


def logit_scale(config: PreTrainedConfig) -> loss.LogitScale | None:
    """What the class does to logits after its head, as its text configuration says; None: nothing."""
    text = config.get_text_config()
    cap = getattr(text, "final_logit_softcapping", None)
    divisor, factor = getattr(text, "logits_scaling", None), getattr(text, "logit_scale", None)
    scale = (factor or 1.0) / (divisor or 1.0)
    return None if cap is None and scale == 1.0 else loss.LogitScale(scale, cap)


def own_inputs(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """A pack of one document as the class itself takes it: without positions, with labels.

    Its labels are not shifted: the class does that.
    """
    labels = inputs["shift_labels"].roll(1, dims=1)
    labels[:, 0] = loss.IGNORE_INDEX
    ours = {"shift_labels", "position_ids", "cu_seqlens", "max_seqlen", "token_type_ids", "return_hidden"}
    ours |= {"num_supervised_tokens", "num_supervised_rows"}
    theirs = {name: value for name, value in inputs.items() if name not in ours}
    types = token_types(type(model.base_model), inputs.get("token_type_ids"))
    return theirs | types | {"labels": labels, "attention_mask": torch.ones_like(labels), "use_cache": False}


def is_packed(model: nn.Module) -> bool:
    """Whether the model is a transformers class made for packs here, not OmniLMM."""
    return isinstance(model, _Packed)
