"""OmniLMM: a Mistral language model that reads images.

    input_ids   [B, T]          … <im_start> <im_patch> x num_query <im_end> …
    images      [N, 3, S, S]    in placeholder order over the batch
      1  vision tower, once for all images          -> OmniLMMModel.encode_images
      2  resampler: num_query features an image
      3  features take the places of <im_patch>     -> OmniLMMModel.splice
      4  Mistral layers; packed documents stay apart (omnimodel.attention)
      5  lm_head and loss on supervised positions   -> OmniLMMForCausalLM.forward

Parameter names are those of the published OmniLMM-12B checkpoint. Nothing in a training forward reads a value
back from the GPU: shapes and counts come from the host, and checks of ids run on the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import MistralForCausalLM, MistralModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.mistral.modeling_mistral import MistralPreTrainedModel, MistralRotaryEmbedding
from transformers.utils import can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg

from omnimodel import attention, loss, vision
from omnimodel.config import OmniLMMConfig
from omnimodel.parts import freeze
from omnimodel.resampler import Resampler

Images = torch.Tensor | list[torch.Tensor]

if TYPE_CHECKING:  # a mixin, beside a class of transformers
    from transformers import PreTrainedModel as _Mixed
else:
    _Mixed = object

# What the original samples with: ``model.generate(..., do_sample=True, **SAMPLING)``.
SAMPLING = {"temperature": 0.6, "top_k": 30, "top_p": 0.9, "repetition_penalty": 1.1}


class _OmniLMM(_Mixed):
    """What both classes below add to transformers' loading and initialisation.

    A mixin of both on purpose: transformers initialises each part with the innermost model's
    ``_init_weights``; on the outer class alone it would leave the resampler's queries uninitialised.
    """

    config_class = OmniLMMConfig
    connector_name = "resampler"  # among omnimodel.parts

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Resampler):
            module.reset_parameters()
        elif type(module).__module__.startswith("timm."):
            vision.init_tower_module(module)
        else:
            super()._init_weights(module)

    def get_correct_attn_implementation(self, requested: str | None, is_init_check: bool = False) -> str:
        """Default to our attention, which keeps packed documents apart, instead of plain sdpa."""
        return super().get_correct_attn_implementation(requested or attention.NAME, is_init_check)

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As transformers', but missing or left-over names are an error, and frozen parts stay frozen."""
        model, info = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)
        _refuse_mismatch(path, info, has_head=hasattr(model, "lm_head"))
        # transformers has set requires_grad on every parameter
        freeze(model, model.config.frozen)
        return (model, info) if output_loading_info else model

    @torch.no_grad()
    def reset_buffers(self) -> None:
        """Recompute all that is no parameter: after meta -> to_empty it is memory garbage."""
        for module in self.modules():
            if isinstance(module, Resampler):
                module.reset_buffers()
            elif isinstance(module, MistralRotaryEmbedding):
                with torch.device("cpu"):
                    fresh = MistralRotaryEmbedding(module.config)
                for name, buffer in fresh.named_buffers():
                    module.get_buffer(name).copy_(buffer)
            elif isinstance(module, OmniLMMModel):
                vision.reset_tower_buffers(module.vision_tower)


class OmniLMMModel(_OmniLMM, MistralModel):
    """Tower, resampler and Mistral layers: token ids and images in, hidden states out."""

    image_chunk_size: int = 0  # images a tower call, to save memory; 0 = all of them
    num_image_chunks: int = 0  # tower calls a forward; 0 = as needed. Must be equal on sharded ranks

    def __init__(self, config: OmniLMMConfig) -> None:
        super().__init__(config)
        self.vision_tower = vision.build_vision_tower(config.mm_vision_tower, config.vision_kwargs)
        assert config.resampler_heads is not None, "the configuration resolves it when it is made"
        self.resampler = Resampler(
            config.query_grid, config.hidden_size, config.resampler_heads, self.vision_tower.num_features
        )
        self.post_init()

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")  # as the class that this one extends
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        *,
        pixel_values: Images | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states ``[B, T, D]``. ``cu_seqlens`` int32 ``[D+1]`` marks the documents of a pack."""
        if inputs_embeds is None:
            assert input_ids is not None, "either input_ids or inputs_embeds"
            is_decoding = cache is not None and cache.get_seq_length() > 0
            inputs_embeds = self.embed(input_ids, pixel_values, is_decoding=is_decoding)
        if cu_seqlens is not None:
            self._check_pack(attention_mask)
            kwargs |= {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens}
            kwargs |= {"max_length_q": max_seqlen, "max_length_k": max_seqlen}
            # A mask that is already 4-D passes through as it is. Without one transformers would derive a
            # [T, T] mask from the position ids, and wait for the GPU to do so; our attention ignores it.
            attention_mask, use_cache = inputs_embeds.new_empty(1, 1, 1, 1), False
        return super().forward(
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )

    def embed(
        self, input_ids: torch.Tensor, pixel_values: Images | None = None, *, is_decoding: bool = False
    ) -> torch.Tensor:
        """Token embeddings ``[B, T, D]`` with image features in their places."""
        embeds_BTD = self.embed_tokens(input_ids)
        if pixel_values is not None and len(pixel_values) > 0:
            return self.splice(embeds_BTD, self.encode_images(pixel_values), input_ids)
        if is_decoding:
            return embeds_BTD
        if self.training or (torch.distributed.is_available() and torch.distributed.is_initialized()):
            # Sharded ranks wait for each other in tower and resampler: one dummy image, of zero weight.
            embeds_BTD = embeds_BTD + self.encode_images(self._dummy_image()).sum().to(embeds_BTD.dtype) * 0.0
        num_patches = (input_ids == self.config.im_patch_token).sum()
        _require(num_patches == 0, "the text has <im_patch> tokens but no image was given")
        return embeds_BTD

    def encode_images(self, pixel_values: Images) -> torch.Tensor:
        """uint8 or normalised images -> ``[N, num_query, D]``; one tower call a size and chunk."""
        if isinstance(pixel_values, torch.Tensor):
            return self._encode_batch(pixel_values)
        by_size: dict[torch.Size, list[int]] = {}
        for position, image in enumerate(pixel_values):
            by_size.setdefault(image.shape, []).append(position)
        features: dict[int, torch.Tensor] = {}
        for positions in by_size.values():
            encoded = self._encode_batch(torch.stack([pixel_values[position] for position in positions]))
            features.update(zip(positions, encoded, strict=True))
        return torch.stack([features[position] for position in range(len(pixel_values))])

    def splice(
        self, embeds_BTD: torch.Tensor, features_NQD: torch.Tensor, input_ids: torch.Tensor
    ) -> torch.Tensor:
        """Put the features into the image blocks, in order; blocks must be whole and match the images."""
        num_images, num_query = features_NQD.shape[:2]
        ids = input_ids.flatten()
        is_patch = ids == self.config.im_patch_token
        if num_images * num_query > ids.numel():
            raise ValueError(
                f"{num_images} images need {num_images * num_query} <im_patch> tokens; see num_query"
            )
        # A stable sort puts the <im_patch> positions first; unlike nonzero, its shape is known to the host.
        order = torch.argsort((~is_patch).to(torch.uint8), stable=True)
        blocks_NQ = order[: num_images * num_query].view(num_images, num_query)
        _require(
            self._are_whole_blocks(ids, is_patch, blocks_NQ),
            f"the text's image blocks do not match the {num_images} images: each needs <im_start>, "
            f"{num_query} <im_patch>, <im_end>, and no <im_patch> may be left over",
        )
        flat = embeds_BTD.flatten(0, 1)
        flat = flat.index_copy(0, blocks_NQ.flatten(), features_NQD.flatten(0, 1).to(flat.dtype))
        return flat.view_as(embeds_BTD)

    def _are_whole_blocks(
        self, ids: torch.Tensor, is_patch: torch.Tensor, blocks_NQ: torch.Tensor
    ) -> torch.Tensor:
        """A boolean scalar on the ids' device."""
        first, last = blocks_NQ[:, :1], blocks_NQ[:, -1:]
        offsets = torch.arange(blocks_NQ.shape[1], device=ids.device)
        starts = ids[(first - 1).clamp(min=0)] == self.config.im_start_token
        ends = ids[(last + 1).clamp(max=ids.numel() - 1)] == self.config.im_end_token
        contiguous = blocks_NQ == first + offsets
        return (is_patch.sum() == blocks_NQ.numel()) & contiguous.all() & starts.all() & ends.all()

    def _encode_batch(self, images: torch.Tensor) -> torch.Tensor:
        """One size of images: ``[N, 3, H, W]`` -> ``[N, num_query, D]``."""
        chunks = list(images.split(self.image_chunk_size or len(images)))
        features = [self._encode_chunk(chunk) for chunk in chunks]
        for _ in range(self.num_image_chunks - len(chunks)):
            features[0] = features[0] + self._encode_chunk(self._dummy_image()).sum() * 0.0
        return torch.cat(features) if len(features) > 1 else features[0]

    def _encode_chunk(self, images: torch.Tensor) -> torch.Tensor:
        tower = self.vision_tower
        config = self.config
        images = vision.normalize(
            images.to(self.device),
            self._tower_dtype(),
            mean=config.image_mean or vision.CLIP_MEAN,
            std=config.image_std or vision.CLIP_STD,
        )
        # A frozen tower keeps no activations. (One with adapters has parameters that need gradients.)
        needs_grad = torch.is_grad_enabled() and any(p.requires_grad for p in tower.parameters())
        with torch.set_grad_enabled(needs_grad):
            features, grid = vision.patch_features(tower, images)
        # A frozen tower may be kept in half precision beside a float32 resampler.
        return self.resampler(features.to(self.resampler.query.dtype), grid)

    def _tower_dtype(self) -> torch.dtype:
        return self.vision_tower.patch_embed.proj.weight.dtype

    def _dummy_image(self) -> torch.Tensor:
        size = self.config.image_size
        return torch.zeros(1, 3, size, size, dtype=self._tower_dtype(), device=self.device)

    def _check_pack(self, attention_mask: torch.Tensor | None) -> None:
        implementation = self.config._attn_implementation
        if implementation != attention.NAME and "flash" not in implementation:
            raise ValueError(
                f"attn_implementation={implementation!r} would let packed documents see each other; "
                f"load the model with attn_implementation={attention.NAME!r} (the default)"
            )
        if attention_mask is not None:
            raise ValueError("attention_mask and cu_seqlens exclude each other: a pack has no padding")


class OmniLMMForCausalLM(_OmniLMM, MistralForCausalLM):
    """The whole model, with its loss and ``generate``."""

    def __init__(self, config: OmniLMMConfig) -> None:
        MistralPreTrainedModel.__init__(self, config)  # MistralForCausalLM's own builds another LM
        self.model = OmniLMMModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = loss.LossHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        pixel_values: Images | None = None,
        *,
        shift_labels: torch.Tensor | None = None,
        num_supervised_tokens: int | torch.Tensor | None = None,
        num_supervised_rows: int | None = None,
        return_logits: bool = False,
        cu_seqlens: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Loss (float32) when labels are given, logits when they are not or ``return_logits`` asks for both.

        ``labels`` are unshifted, as Hugging Face has them; ``shift_labels`` are what each position must
        predict, as the loader has them. ``num_supervised_tokens`` is the loss's denominator, by default this
        batch's own count; ``num_supervised_rows`` is that count where the host knows it, which spares a
        wait for the GPU. Also: position_ids, max_seqlen (with cu_seqlens), cache, inputs_embeds,
        use_cache.
        """
        num_supervised_tokens = kwargs.pop(
            "num_items_in_batch", num_supervised_tokens
        )  # the HF Trainer's name
        if labels is not None:
            shift_labels = loss.shift(labels, cu_seqlens)
        if shift_labels is not None:
            kwargs.setdefault("use_cache", False)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            cu_seqlens=cu_seqlens,
            **kwargs,
        )
        hidden_BTD = outputs.last_hidden_state
        result = CausalLMOutputWithPast(
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        if shift_labels is not None:
            result.loss = self._loss(hidden_BTD, shift_labels, num_supervised_tokens, num_supervised_rows)
        if shift_labels is None or return_logits:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            result.logits = self.lm_head(hidden_BTD[:, keep])
        return result

    def _loss(
        self,
        hidden_BTD: torch.Tensor,
        shift_labels: torch.Tensor,
        num_supervised_tokens: int | torch.Tensor | None,
        num_rows: int | None,
    ) -> torch.Tensor:
        """Sum over supervised tokens over the denominator; 0, with zero gradients, if there is none."""
        rows, labels = loss.supervised_rows(hidden_BTD.flatten(0, 1), shift_labels.flatten(), num_rows)
        count = len(rows) if num_supervised_tokens is None else num_supervised_tokens
        count = count.clamp(min=1) if isinstance(count, torch.Tensor) else max(count, 1)
        return loss.summed_loss(self.lm_head, rows, labels) / count

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, *args: Any, is_first_iteration: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """Images enter with the prompt only; with a cache the tower must not run again for every token."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, *args, is_first_iteration=is_first_iteration, **kwargs
        )
        if not is_first_iteration and kwargs.get("use_cache", True):
            inputs.pop("pixel_values", None)
        return inputs

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', but never emits image tokens: there would be no image behind them."""
        kwargs.setdefault("suppress_tokens", self.config.image_token_ids)
        return super().generate(*args, **kwargs)

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Repeat a row's images with the row (beams, several answers), not each image by itself."""
        images = kwargs.pop("pixel_values", None)
        if images is not None and len(images) > 0 and expand_size > 1:
            counts = (input_ids == self.config.im_start_token).sum(dim=1).tolist()
            rest = iter(images)
            rows = [[next(rest) for _ in range(count)] for count in counts]
            repeated = [image for row in rows for _ in range(expand_size) for image in row]
            images = torch.stack(repeated) if isinstance(images, torch.Tensor) else repeated
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **kwargs
        )
        return input_ids, kwargs | ({} if images is None else {"pixel_values": images})


def _require(condition: torch.Tensor, message: str) -> None:
    """An error with a message on the CPU; on a GPU an assertion of the device, which costs no wait."""
    if attention.takes_gpu_path(condition):
        torch._assert_async(condition, message)
    elif not condition:
        raise ValueError(message)


def _refuse_mismatch(path: Any, info: dict[str, Any], *, has_head: bool) -> None:
    """Raise unless every parameter was found and every name of the checkpoint was used."""
    unexpected = {name for name in info["unexpected_keys"] if not name.endswith("rotary_emb.inv_freq")}
    if not has_head:
        unexpected.discard("lm_head.weight")
    problems = {
        "missing": set(info["missing_keys"]) - {"resampler.pos_embed", "model.resampler.pos_embed"},
        "unexpected": unexpected,
        "of another shape": {entry[0] for entry in info["mismatched_keys"]},
    }
    lines = [
        f"{kind} ({len(names)}): {', '.join(sorted(names))}" for kind, names in problems.items() if names
    ]
    if lines:
        raise ValueError(f"{path} does not hold the weights of this configuration; " + "; ".join(lines))
