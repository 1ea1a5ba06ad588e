"""The whole model against the reference, and everything about images that the reference gets wrong."""

import json

import pytest
import torch
from tiny_model import (
    BLOCK,
    END,
    GOLDEN,
    PATCH,
    START,
    documents,
    golden_case,
    golden_model,
    gradients,
    pack,
    tiny_config,
    tiny_model,
)

from omnimodel import ImageProcessor, OmniLMMConfig, OmniLMMForCausalLM
from omnimodel.parts import freeze
from omnimodel.weights import expected_shapes

SURPLUS_IMAGE = {"text_then_image_dummy_first", "text_only_extra_image"}
INDEX = json.loads((GOLDEN / "model/index.json").read_text())
FORWARD = [
    case
    for case in INDEX["cases"]
    if case
    not in SURPLUS_IMAGE | {"all_labels_ignored", "generate_greedy", "two_images_one_sample_REFERENCE_BUG"}
]


@pytest.fixture(scope="module")
def reference():
    """The reference's m_a."""
    return golden_model()


# --- the reference's numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FORWARD)
def test_forward_loss_and_gradients_equal_the_reference(case, reference):
    model = golden_model("m_b", sliding_window=6) if "sliding_window_6" in case else reference
    fields = golden_case(case)
    model.zero_grad()
    output = model(
        fields["input_ids"], fields["attention_mask"], fields["labels"], fields["images"], return_logits=True
    )
    is_text = fields["attention_mask"].bool()
    torch.testing.assert_close(output.logits[is_text], fields["logits"][is_text], atol=1e-5, rtol=1e-5)
    assert output.loss.dtype == torch.float32
    assert output.loss.item() == pytest.approx(fields["loss"].item(), abs=1e-5)
    output.loss.backward()
    for name, expected in fields.items():
        if name.startswith("grad:"):
            torch.testing.assert_close(
                model.get_parameter(name.removeprefix("grad:")).grad, expected, atol=1e-5, rtol=1e-5
            )


@pytest.mark.parametrize(
    "case", ["one_image_per_sample", "image_list_mixed_sizes", "text_then_image_dummy_first"]
)
def test_image_features_equal_the_reference(case, reference):
    fields = golden_case(case)
    features = reference.model.encode_images(fields["images"])
    torch.testing.assert_close(features, fields["image_features"], atol=1e-5, rtol=1e-5)


def test_both_images_of_one_sample_land_in_their_own_places(reference):
    fields = golden_case("two_images_one_sample_IDEAL")
    embeds = reference.model.embed(fields["input_ids"], fields["images"])
    torch.testing.assert_close(embeds, fields["inputs_embeds"], atol=1e-5, rtol=1e-5)
    with_bug = golden_case("two_images_one_sample_REFERENCE_BUG")
    loss = reference(
        with_bug["input_ids"], with_bug["attention_mask"], with_bug["labels"], with_bug["images"]
    ).loss
    assert loss.item() == pytest.approx(fields["loss"].item(), abs=1e-5)
    assert loss.item() != pytest.approx(with_bug["loss"].item(), abs=0.1)  # keeps the last image only


def test_parameter_names_and_shapes_are_those_of_the_12b_checkpoint():
    golden = json.loads((GOLDEN / "keys/omnilmm_12b.json").read_text())
    shapes = expected_shapes(OmniLMMConfig(vocab_size=32009))
    assert {name: list(shape) for name, shape in shapes.items()} == golden["keys"]
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == golden["total"] == 11_614_393_088


# --- images that do not fit the text ----------------------------------------------------------------------


@pytest.mark.parametrize("case", sorted(SURPLUS_IMAGE))
def test_an_image_without_a_place_is_an_error(case, reference):
    fields = golden_case(case)
    with pytest.raises(ValueError, match="do not match the"):
        reference(fields["input_ids"], fields["attention_mask"], fields["labels"], fields["images"])


@pytest.mark.parametrize(
    "case",
    [
        "start_without_end",
        "block_too_short",
        "more_images_than_blocks",
        "stray_patch_token_first_row",
        "text_inside_block",
        "no_images_for_block",
        "images_none_with_block",
    ],
)
def test_what_the_reference_refuses_or_silently_gets_wrong_is_refused(case, reference):
    error = INDEX["errors"][case]
    images = torch.zeros(error["n_images"], 3, 56, 56)
    with pytest.raises(ValueError, match="image"):
        reference(torch.tensor(error["input_ids"]), pixel_values=images)


def test_text_alone_needs_no_images(reference):
    ids = torch.tensor(INDEX["errors"]["text_only_images_none"]["input_ids"])
    with_none = reference(ids).logits  # the reference raises
    assert torch.equal(with_none, reference(ids, pixel_values=[]).logits)
    assert torch.equal(with_none, reference(ids, pixel_values=torch.zeros(0, 3, 56, 56)).logits)


@pytest.mark.parametrize(
    "ids",
    [
        [START, PATCH, PATCH, PATCH, PATCH, 5, END],  # no end behind it
        [PATCH, PATCH, PATCH, PATCH, END, 5, START],  # no start in front
        [START, PATCH, PATCH, 5, PATCH, PATCH, END],  # torn
        [PATCH, *BLOCK[:4], END, 5],  # the right number, shifted by one
    ],
)
def test_blocks_must_be_whole(ids):
    model = tiny_model().eval()
    with pytest.raises(ValueError, match="image blocks do not match"):
        model(torch.tensor([ids]), pixel_values=torch.zeros(1, 3, 28, 28))


def test_a_rectangular_image_is_read_as_the_rectangle_it_is():
    model = tiny_model().eval()
    features = model.model.encode_images(torch.randn(1, 3, 28, 112))  # 2x8 patches; the reference takes 4x4
    assert features.shape == (1, 4, 128)


# --- what a microbatch costs and touches ------------------------------------------------------------------


def test_bytes_and_normalised_floats_give_the_same():
    model, (rows, images) = tiny_model().eval(), documents()
    floats = ImageProcessor(28).normalize(images[0])
    as_bytes = model(rows[0][None], pixel_values=images[0]).logits
    assert torch.equal(as_bytes, model(rows[0][None], pixel_values=floats).logits)
    assert torch.equal(as_bytes, model(rows[0][None], pixel_values=list(floats)).logits)


def test_all_images_go_through_the_tower_in_one_call():
    model, calls = tiny_model(), []
    model.model.vision_tower.register_forward_hook(
        lambda module, inputs, output: calls.append(len(inputs[0]))
    )
    model(**pack())
    assert calls == [3]
    calls.clear()
    model.model.image_chunk_size, model.model.num_image_chunks = 2, 3
    loss, chunked = gradients(model, pack())
    assert calls == [2, 1, 1]  # the last on a dummy, so that all ranks make three calls
    model.model.image_chunk_size = model.model.num_image_chunks = 0
    whole_loss, whole = gradients(model, pack())
    torch.testing.assert_close(loss, whole_loss)
    torch.testing.assert_close(chunked, whole, atol=1e-6, rtol=1e-4)


def test_a_microbatch_without_images_still_takes_part_everywhere_with_zero_weight():
    model = tiny_model()
    batch = {"input_ids": torch.tensor([[1, 5, 6, 2]]), "labels": torch.tensor([[1, 5, 6, 2]])}
    loss, grads = gradients(model, batch)
    idle = [grad for name, grad in grads.items() if "vision_tower" in name or "resampler" in name]
    assert all(grad is not None and not grad.any() for grad in idle)
    assert loss == model.eval()(**batch).loss


def test_a_frozen_tower_keeps_no_activations_and_the_resampler_still_learns():
    model, calls = tiny_model(), []
    freeze(model, ["vision_tower", "language_model"])
    model.model.vision_tower.register_forward_hook(
        lambda module, inputs, output: calls.append(output.requires_grad)
    )
    _, grads = gradients(model, pack())
    assert calls == [False]
    assert grads["model.resampler.query"].any() and grads["model.embed_tokens.weight"].any()
    assert grads["model.vision_tower.pos_embed"] is None and grads["model.norm.weight"] is None


def test_a_half_precision_tower_serves_a_float32_model():
    model = tiny_model()
    exact = model(**pack()).loss.item()
    model.model.vision_tower.bfloat16()
    loss, grads = gradients(model, pack())
    assert loss.item() == pytest.approx(exact, rel=1e-2)
    assert grads["model.resampler.query"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_images", [True, False])
def test_forward_and_backward_read_nothing_back_from_the_device(dtype, with_images):
    """On the meta device there is nothing to read: item(), nonzero() and boolean indexing raise."""
    model = tiny_model().to(dtype).to("meta")
    batch = pack("meta")
    if not with_images:
        batch["pixel_values"] = None
    model(**batch).loss.backward()
    assert model.lm_head.weight.grad is not None
    with pytest.raises(RuntimeError, match="meta tensors"):  # the count has to be read where it is not given
        model(**batch | {"num_supervised_rows": None})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_synchronisation_on_a_gpu():
    model, batch = tiny_model().cuda().bfloat16(), pack("cuda")
    model(**batch).loss.backward()  # the first call loads kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**batch).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- loss -------------------------------------------------------------------------------------------------


def test_nothing_supervised_gives_zero_loss_and_zero_gradients():
    loss, grads = gradients(
        tiny_model(), pack() | {"shift_labels": torch.full((1, 35), -100), "num_supervised_rows": 0}
    )
    assert loss == 0  # the reference: nan
    assert all(not grad.any() for grad in grads.values())


def test_the_denominator_is_the_step_s_not_the_microbatch_s():
    model, batch = tiny_model(), pack()
    count = batch["num_supervised_tokens"]
    own = model(**batch | {"num_supervised_tokens": None}).loss
    torch.testing.assert_close(model(**batch | {"num_supervised_tokens": 4 * count}).loss, own / 4)
    torch.testing.assert_close(
        model(**batch | {"num_supervised_tokens": torch.tensor(4 * count)}).loss, own / 4
    )
    trainer = {name: value for name, value in batch.items() if name != "num_supervised_tokens"}
    torch.testing.assert_close(model(**trainer, num_items_in_batch=4 * count).loss, own / 4)


def test_unshifted_labels_are_shifted_once_and_never_across_documents():
    model, batch = tiny_model(), pack()
    rows, _ = documents()
    labels = torch.cat([torch.where(row < PATCH, row, -100) for row in rows])[None]
    unshifted = {
        name: value for name, value in batch.items() if name not in ("shift_labels", "num_supervised_rows")
    }
    assert torch.equal(model(**unshifted, labels=labels).loss, model(**batch).loss)


def test_logits_only_when_asked_for():
    model, batch = tiny_model(), pack()
    assert model(**batch).logits is None
    both = model(**batch, return_logits=True)
    assert both.logits.shape == (1, 35, 96) and both.loss is not None
    last = model.eval()(**{k: v for k, v in batch.items() if k != "shift_labels"}, logits_to_keep=1).logits
    torch.testing.assert_close(last, both.logits[:, -1:])


# --- a model from a configuration -------------------------------------------------------------------------


def test_a_fresh_model_is_initialised_everywhere():
    model = tiny_model()
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all() and parameter.abs().max() < 2, name
    assert model.model.resampler.query.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_a_model_built_on_the_meta_device_starts_like_any_other():
    batch = pack()
    with torch.device("meta"):
        model = OmniLMMForCausalLM(tiny_config())
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(torch.nan)
    model.reset_buffers()
    torch.manual_seed(0)
    model.init_weights()
    loss, grads = gradients(model.train(), batch)
    assert loss.item() == pytest.approx(torch.tensor(96.0).log().item(), abs=0.5)
    assert all(grad.isfinite().all() for grad in grads.values())


def test_num_query_must_be_a_square():
    with pytest.raises(ValueError, match="num_query=60 is not a square"):
        tiny_config(num_query=60)
