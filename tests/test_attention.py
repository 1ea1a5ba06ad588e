"""Packed documents never see each other, on every path and on every version of torch."""

import itertools

import pytest
import torch
from tiny_model import documents, pack, tiny_model
from torch.nn import functional as F

from omnimodel import attention


def separate_logits(model):
    rows, images = documents()
    return torch.cat(
        [model(row[None], pixel_values=im).logits for row, im in zip(rows, images, strict=True)], dim=1
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("window", [None, 6])
def test_packed_equals_one_document_at_a_time(training, window):
    model = tiny_model(sliding_window=window).train(training)
    packed = model(**pack(), return_logits=True).logits
    assert (packed - separate_logits(model)).abs().max() < 1e-6


def test_without_boundaries_the_same_pack_is_wrong():
    """What the test above would see if isolation were off: it must be far outside of its tolerance."""
    model = tiny_model()
    joined = pack() | {"cu_seqlens": torch.tensor([0, 35], dtype=torch.int32), "max_seqlen": 35}
    difference = model(**joined, return_logits=True).logits - separate_logits(model)
    assert difference[:, 18:].abs().max() > 1e-2


def test_a_document_s_tokens_change_nothing_in_the_others():
    model, batch = tiny_model(), pack()
    before = model(**batch, return_logits=True).logits
    batch["input_ids"][0, 15] = 50  # in the first document
    after = model(**batch, return_logits=True).logits
    changed = (before != after).any(dim=-1)[0]
    assert changed[15:18].all() and not changed[:15].any() and not changed[18:].any()


def test_gradients_of_a_pack_are_the_sum_of_its_documents():
    model, batch = tiny_model(), pack()
    model(**batch).loss.backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    start = 0
    for row, images in zip(*documents(), strict=True):
        labels = batch["shift_labels"][:, start : start + len(row)]
        start += len(row)
        count = batch["num_supervised_tokens"]
        model(
            row[None], pixel_values=images, shift_labels=labels, num_supervised_tokens=count
        ).loss.backward()
    separate = {name: p.grad for name, p in model.named_parameters()}
    torch.testing.assert_close(packed, separate, atol=1e-6, rtol=1e-4)


def test_an_attention_that_would_mix_documents_is_refused():
    model = tiny_model(attn_implementation="eager")
    with pytest.raises(ValueError, match="would let packed documents see each other"):
        model(**pack())
    with pytest.raises(ValueError, match="no padding"):
        tiny_model()(**pack(), attention_mask=torch.ones(1, 35))


def heads(num_tokens, *, num_heads=4, num_kv_heads=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, n, num_tokens, 16) for n in (num_heads, num_kv_heads, num_kv_heads)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


BOUNDS = torch.tensor([0, 1, 8, 20], dtype=torch.int32)


@pytest.mark.parametrize("window", [None, 1, 5])
def test_per_document_and_masked_attention_agree(window):
    query, key, value = heads(20)
    by_document = attention.per_document_attention(
        query, key, value, attention.Packing(BOUNDS, 12, 0.25, window)
    )
    masked = attention.masked_attention(query, key, value, attention.Packing(BOUNDS, 12, 0.25, window))
    torch.testing.assert_close(by_document, masked, atol=1e-6, rtol=1e-5)
    assert by_document.shape == (20, 4, 16)


@pytest.mark.parametrize("has_gqa", [True, False], ids=["torch 2.12+", "torch 2.11"])
@pytest.mark.parametrize("window", [None, 5])
def test_the_kernel_is_called_with_its_own_layout_heads_and_window(has_gqa, window, monkeypatch):
    """The CUDA kernel's signature, computed by SDPA: each argument must mean what the kernel means."""

    def kernel(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
        assert (q.shape[1] == k.shape[1]) or enable_gqa
        assert cu_q is cu_k and max_q == max_k == 12 and window_size[1] == 0
        outputs = []
        for start, end in itertools.pairwise(cu_q.tolist()):
            distance = torch.arange(end - start)[:, None] - torch.arange(end - start)[None]
            mask = (distance >= 0) & (
                (window_size[0] < 0) | (distance <= window_size[0])
            )  # tokens to the left
            qkv = [x[start:end].transpose(0, 1)[None] for x in (q, k, v)]
            outputs.append(F.scaled_dot_product_attention(*qkv, attn_mask=mask, scale=scale, enable_gqa=True))
        return torch.cat(outputs, dim=2)[0].transpose(0, 1)

    def old_kernel(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size):
        return kernel(
            q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=window_size, enable_gqa=False
        )

    monkeypatch.setattr(attention, "varlen_attn", kernel if has_gqa else old_kernel)
    monkeypatch.setattr(attention, "KERNEL_GROUPS_HEADS", has_gqa)
    query, key, value = heads(20)
    expected = attention.masked_attention(query, key, value, attention.Packing(BOUNDS, 12, 0.25, window))
    actual = attention.varlen_attention(query, key, value, attention.Packing(BOUNDS, 12, 0.25, window))
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)


def test_the_kernel_is_told_of_grouped_heads_alone(monkeypatch):
    """Told of equal heads, torch 2.14's two passes over a tower's documents would be two kernels'."""
    said = []
    monkeypatch.setattr(attention, "varlen_attn", lambda q, *_, **words: said.append(words) or q)
    query, key, value = heads(20)
    of_tower = attention.Packing(BOUNDS, 12, is_causal=False)
    attention.varlen_attention(query, query, query, of_tower)
    attention.varlen_attention(query, key, value, of_tower)
    assert "enable_gqa" not in said[0] and said[0]["window_size"] == (-1, -1)
    assert said[1].get("enable_gqa", False) is attention.KERNEL_GROUPS_HEADS


def test_the_kernel_needs_the_longest_length():
    with pytest.raises(ValueError, match="max_seqlen"):
        attention.varlen_attention(*heads(20), attention.Packing(BOUNDS, scale=0.25))


def test_under_autocast_the_half_precision_kernel_is_chosen(monkeypatch):
    """The rotary tables make queries float32 there, which would choose the quadratic path on a GPU."""
    dtypes = []
    choose = attention._choose
    monkeypatch.setattr(attention, "_choose", lambda query: dtypes.append(query.dtype) or choose(query))
    with torch.autocast("cpu", torch.bfloat16):
        tiny_model()(**pack())
    assert set(dtypes) == {torch.bfloat16}


def test_a_batch_of_packs_is_refused():
    query, key, value = (torch.cat([x, x]) for x in heads(20))
    with pytest.raises(ValueError, match="one row"):
        attention.omnilmm_attention(None, query, key, value, None, cu_seq_lens_q=BOUNDS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("window", [None, 5])
def test_the_real_kernel_agrees_with_the_mask(window):
    query, key, value = (x.cuda() for x in heads(20, dtype=torch.bfloat16))
    bounds = BOUNDS.cuda()
    expected = attention.masked_attention(query, key, value, attention.Packing(bounds, 12, 0.25, window))
    actual = attention.varlen_attention(query, key, value, attention.Packing(bounds, 12, 0.25, window))
    torch.testing.assert_close(actual, expected, atol=2e-2, rtol=2e-2)
