"""The loss on supervised rows equals the loss on everything, at a fraction of the memory."""

import pytest
import torch
from tiny_model import gradients, pack, tiny_model
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from omnimodel.loss import LossHead, shift, summed_loss, supervised_rows


class LargestTensor(TorchDispatchMode):
    """Records the elements of the largest tensor that any operation allocated (views do not count)."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage().data_ptr() for tensor in args if isinstance(tensor, torch.Tensor)}
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, tensor.numel())
        return output


def problem(num_tokens=70, width=16, vocab=50, dtype=torch.float32):
    torch.manual_seed(0)
    hidden = torch.randn(num_tokens, width, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, vocab, (num_tokens,)).masked_fill(torch.rand(num_tokens) < 0.6, -100)
    head = LossHead(width, vocab, bias=False).to(dtype)
    return hidden, labels, head


def full_loss(hidden, labels, head):
    return F.cross_entropy(
        F.linear(hidden.float(), head.weight.float()), labels, ignore_index=-100, reduction="sum"
    )


@pytest.mark.parametrize("chunk_rows", [1, 7, 1024])
def test_chunked_equals_full_in_loss_and_gradients(chunk_rows):
    hidden, labels, head = problem()
    head.chunk_rows = chunk_rows
    loss = summed_loss(head, *supervised_rows(hidden, labels)) / 9
    ours = torch.autograd.grad(loss * 2, [hidden, head.weight])
    full = full_loss(hidden, labels, head) / 9
    torch.testing.assert_close(loss, full, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(
        ours, torch.autograd.grad(full * 2, [hidden, head.weight]), atol=1e-6, rtol=1e-5
    )


def test_gradients_are_right_to_float64():
    hidden, labels, head = problem(dtype=torch.float64)
    rows, row_labels = supervised_rows(hidden, labels)
    loss = summed_loss(head, rows, row_labels)
    full = F.cross_entropy(rows @ head.weight.t(), row_labels, reduction="sum")
    ours, expected = (torch.autograd.grad(x, [hidden, head.weight], retain_graph=True) for x in (loss, full))
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)  # log-softmax itself is float32


def test_in_bfloat16_the_loss_is_summed_in_float32():
    hidden, labels, head = problem(num_tokens=2000, dtype=torch.bfloat16)
    loss = summed_loss(head, *supervised_rows(hidden, labels))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(full_loss(hidden, labels, head).item(), rel=1e-3)
    grads = torch.autograd.grad(loss, [hidden, head.weight])
    assert [grad.dtype for grad in grads] == [torch.bfloat16] * 2
    exact = torch.autograd.grad(full_loss(hidden, labels, head), [hidden, head.weight])
    for ours, expected in zip(grads, exact, strict=True):
        assert (ours - expected).float().norm() < 0.01 * expected.float().norm()


def test_under_autocast_weights_keep_their_dtype():
    model = tiny_model()
    with torch.autocast("cpu", torch.bfloat16):
        loss, grads = gradients(model, pack())
    exact, exact_grads = gradients(model, pack())
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=1e-2)
    head = "lm_head.weight"
    assert grads[head].dtype == torch.float32
    assert (grads[head] - exact_grads[head]).norm() < 0.05 * exact_grads[head].norm()


def test_no_tensor_of_all_the_logits_is_ever_made():
    hidden, labels, head = problem(num_tokens=512, vocab=4000)
    head.chunk_rows = 32
    with LargestTensor() as seen:
        summed_loss(head, *supervised_rows(hidden, labels)).backward()
    assert seen.largest <= max(32 * 4000, head.weight.numel())
    with LargestTensor() as seen_full:
        full_loss(hidden, labels, head).backward()
    assert seen_full.largest == 512 * 4000


def test_rows_are_found_in_order_with_or_without_their_number():
    hidden, labels, _ = problem()
    keep = labels != -100
    for count in (None, int(keep.sum())):
        rows, row_labels = supervised_rows(hidden, labels, count)
        assert torch.equal(rows, hidden[keep]) and torch.equal(row_labels, labels[keep])


def test_a_wrong_number_of_rows_is_an_error():
    hidden, labels, _ = problem()
    with pytest.raises(RuntimeError, match="num_supervised_rows"):
        supervised_rows(hidden, labels, 3)


def test_shifting_happens_inside_documents():
    labels = torch.tensor([[1, 2, 3, 4, 5]])
    assert shift(labels).tolist() == [[2, 3, 4, 5, -100]]
    assert shift(labels, torch.tensor([0, 2, 5])).tolist() == [[2, -100, 4, 5, -100]]


@pytest.mark.parametrize("count", [0, 5])
def test_a_head_that_is_no_longer_ours_gives_the_same(count):
    """As after resizing the vocabulary, or with adapters on lm_head."""
    hidden, _, head = problem(num_tokens=count)
    labels = torch.arange(count)
    plain = nn.Linear(16, 50, bias=False)
    plain.weight = head.weight
    ours, theirs = (summed_loss(h, hidden, labels, chunk_rows=2) for h in (head, plain))
    torch.testing.assert_close(ours, theirs)
    grads = [torch.autograd.grad(x, [hidden, head.weight]) for x in (ours, theirs)]
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-5)


def test_a_frozen_head_costs_no_gradient_buffer():
    hidden, labels, head = problem(num_tokens=8, vocab=4000)
    head.weight.requires_grad_(False)
    head.chunk_rows = 1
    with LargestTensor() as seen:
        summed_loss(head, *supervised_rows(hidden, labels)).backward()
    assert seen.largest <= 4000 and hidden.grad.any()
