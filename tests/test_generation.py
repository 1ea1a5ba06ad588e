"""generate(): the reference's tokens, with and without cache, alone and in a batch."""

import torch
from tiny_model import BLOCK, END, PATCH, START, documents, golden_case, golden_model, tiny_model
from transformers.generation.streamers import BaseStreamer

from omnimodel.modeling import SAMPLING

GREEDY = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}


def new_tokens(model, ids, **kwargs):
    return model.generate(input_ids=ids, **GREEDY | kwargs)[:, ids.shape[1] :]


def test_greedy_tokens_are_the_reference_s_with_and_without_cache():
    model, fields = golden_model(), golden_case("generate_greedy")
    for use_cache in (True, False):
        tokens = new_tokens(model, fields["input_ids"], pixel_values=fields["images"], use_cache=use_cache)
        assert tokens.tolist() == fields["new_tokens"].tolist()


def test_cached_logits_equal_a_full_forward():
    model, (rows, images) = tiny_model().eval(), documents()
    result = model.generate(
        input_ids=rows[0][None],
        pixel_values=images[0],
        return_dict_in_generate=True,
        output_scores=True,
        **GREEDY,
    )
    full = model(result.sequences, pixel_values=images[0]).logits[0]
    scores = torch.cat(result.scores)
    allowed = scores.isfinite()
    expected = full[len(rows[0]) - 1 : -1]
    torch.testing.assert_close(scores[allowed], expected[allowed], atol=1e-5, rtol=1e-5)


def test_a_left_padded_batch_gives_what_each_row_gives_alone():
    model, (rows, images) = tiny_model(sliding_window=12).eval(), documents()
    width = max(map(len, rows))
    padded = torch.stack([torch.cat([torch.zeros(width - len(row), dtype=torch.long), row]) for row in rows])
    mask = torch.stack([torch.arange(width) >= width - len(row) for row in rows]).long()
    together = new_tokens(model, padded, pixel_values=torch.cat(images), attention_mask=mask)
    for row, own_images, tokens in zip(rows, images, together, strict=True):
        alone = new_tokens(model, row[None], pixel_values=own_images)
        assert alone[0].tolist() == tokens.tolist()


def test_images_are_encoded_once():
    model, (rows, images) = tiny_model().eval(), documents()
    calls = []
    model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    new_tokens(model, rows[0][None], pixel_values=images[0])
    assert len(calls) == 1
    calls.clear()
    new_tokens(model, rows[2][None])
    assert not calls


def test_beams_keep_each_row_s_images_together():
    """transformers repeats images one by one: with two a row, beams would swap them."""
    model, (rows, images) = tiny_model().eval(), documents()
    ids = torch.stack([rows[0], torch.tensor([1, 5, *BLOCK, *BLOCK, 30, 31, 32, 2])])
    both = torch.cat([images[0], images[1], images[0][:1]])
    for as_list in (False, True):
        pixels = list(both) if as_list else both
        result = model.generate(
            input_ids=ids, pixel_values=pixels, num_return_sequences=3, num_beams=3, **GREEDY
        )
        for row in range(2):
            own = both[2 * row : 2 * row + 2]
            alone = model.generate(
                input_ids=ids[row : row + 1], pixel_values=own, num_return_sequences=3, num_beams=3, **GREEDY
            )
            assert result[3 * row : 3 * row + 3].tolist() == alone.tolist()


def test_image_tokens_are_never_emitted():
    model, (rows, images) = tiny_model().eval(), documents()
    with torch.no_grad():
        model.lm_head.weight[[PATCH, START, END]] = 100 * model.model.norm.weight  # by far the likeliest
        model.lm_head.weight[[PATCH, START, END], ::2] *= -1
    for use_cache in (True, False):
        tokens = new_tokens(model, rows[1][None], pixel_values=images[1], use_cache=use_cache)
        assert not set(tokens[0].tolist()) & {PATCH, START, END}


def test_tokens_are_streamed_as_they_are_made():
    class Collect(BaseStreamer):
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append("end")

    model, (rows, images) = tiny_model().eval(), documents()
    streamer = Collect()
    tokens = new_tokens(model, rows[1][None], pixel_values=images[1], streamer=streamer)
    assert streamer.tokens == [*rows[1].tolist(), *tokens[0].tolist(), "end"]


def test_the_original_s_sampling_runs_and_is_seeded():
    model, (rows, images) = tiny_model().eval(), documents()
    outputs = []
    for _ in range(2):
        torch.manual_seed(0)
        outputs.append(
            new_tokens(
                model, rows[1][None], pixel_values=images[1], **SAMPLING | {"do_sample": True}
            ).tolist()
        )
    assert outputs[0] == outputs[1]
