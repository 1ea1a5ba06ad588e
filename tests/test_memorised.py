"""A model that has memorised one sample, asked for it greedily, gives back the reply id by id, and stops."""

import pytest
import torch
from test_end_of_turn import VICUNA
from throwaway import byte_level_tokenizer, conversation, sentencepiece_tokenizer
from tiny_model import tiny_config

from omnidata.render import Renderer
from omnidata.schema import IGNORE_INDEX, IMAGE_TOKENS, Conversation
from omnimodel import OmniLMMForCausalLM

SHAPES = {
    "zephyr": (sentencepiece_tokenizer, "zephyr"),
    "mistral": (sentencepiece_tokenizer, "mistral"),
    "vicuna": (sentencepiece_tokenizer, VICUNA),
    "chatml": (byte_level_tokenizer, "chatml"),
    "generation": (byte_level_tokenizer, "generation"),
}


def memorise(tokenizer, rendered, steps=80):
    """A tiny OmniLMM, trained on one sample with one picture until it is known by heart."""
    torch.manual_seed(0)
    names = ("im_patch_token", "im_start_token", "im_end_token")
    ids = dict(zip(names, tokenizer.convert_tokens_to_ids(list(IMAGE_TOKENS)), strict=True))
    model = OmniLMMForCausalLM(tiny_config(vocab_size=len(tokenizer), **ids)).train()
    model.model.vision_tower.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    picture = torch.randint(0, 256, (1, 3, 28, 28), dtype=torch.uint8)
    ids = torch.from_numpy(rendered.input_ids).long()[None]
    labels = torch.from_numpy(rendered.labels).long()[None]
    for _ in range(steps):
        loss = model(input_ids=ids, labels=labels, pixel_values=picture).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.02:
            break
    return model.eval(), picture


SLOW = ("zephyr", "vicuna")  # 32,000 tokens: half a minute each on a slow machine


@pytest.mark.parametrize(
    "shape", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in SHAPES]
)
def test_what_was_learned_is_what_is_said(shape):
    tokenizer, template = SHAPES[shape]
    named = template in ("zephyr", "mistral", "chatml", "generation")
    tokenizer = tokenizer(template if named else "chatml")
    if not named:
        tokenizer.chat_template = template
    renderer = Renderer(tokenizer, num_query=4)
    whole = conversation("<image>\nHow many?", "Two: a cat,\n\n and a dog 图.", "And?", "None.")
    rendered = renderer.render(whole)
    model, picture = memorise(tokenizer, rendered)
    prompt = renderer.render_prompt(Conversation("x", whole.messages[:1], whole.images))
    output = model.generate(
        input_ids=torch.from_numpy(prompt).long()[None],
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        pixel_values=picture,
        do_sample=False,
        max_new_tokens=60,
        eos_token_id=list(renderer.end_of_turn),
        pad_token_id=renderer.end_of_turn[0],
    )
    said = output[0, len(prompt) :].tolist()
    behind = rendered.labels[len(prompt) :]
    learned = behind[: int((behind == IGNORE_INDEX).argmax())].tolist()  # the first of the two replies
    assert said == learned and said[-1] in renderer.end_of_turn and len(said) > 10
