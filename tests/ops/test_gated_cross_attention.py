"""The cross-attention op: backends against the fp64 reference, intervals of every kind, typed errors."""

import pytest
import torch

from infimm_fast.kernels import KernelArgumentError, gated_cross_attention
from infimm_fast.kernels.gated_cross_attention.reference import gated_cross_attention_reference


def make(dtype=torch.float32, heads=4, kv_heads=4, head_dim=16, keys=37, rows=3, length=9):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(rows, length, heads, head_dim, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, keys, kv_heads, head_dim, generator=generator, dtype=torch.float64)
    bounds = torch.randint(0, keys + 1, (rows, length, 2), generator=generator)
    kv_range = bounds.sort(dim=-1).values
    kv_range[0, 0] = torch.tensor([5, 5])  # empty
    kv_range[0, 1] = torch.tensor([9, 4])  # start after end: empty too
    kv_range[1, 2] = torch.tensor([0, keys])  # all
    kv_range[1, 3] = torch.tensor([-7, keys + 100])  # clamped to all
    kv_range[2] = 0  # a whole row without anything
    return q.to(dtype), k.to(dtype), v.to(dtype), kv_range


def plain(q, k, v, kv_range, scale):
    """Token by token, in the dtype given: shares no code with the backends."""
    out = torch.zeros_like(q)
    group = q.shape[2] // k.shape[1]
    for row in range(q.shape[0]):
        for token in range(q.shape[1]):
            start, end = max(int(kv_range[row, token, 0]), 0), min(int(kv_range[row, token, 1]), len(k))
            for head in range(q.shape[2]) if start < end else ():
                weights = (k[start:end, head // group] @ q[row, token, head] * scale).softmax(0)
                out[row, token, head] = weights @ v[start:end, head // group]
    return out


@pytest.mark.parametrize("backend", ("sdpa", "reference", "auto"))
@pytest.mark.parametrize("kv_heads", (4, 2, 1))
def test_backends_against_a_loop(backend, kv_heads):
    q, k, v, kv_range = make(torch.float64, kv_heads=kv_heads)
    expected = plain(q, k, v, kv_range, 16**-0.5)
    torch.testing.assert_close(gated_cross_attention(q, k, v, kv_range, backend=backend), expected)
    torch.testing.assert_close(
        gated_cross_attention(q, k, v, kv_range.int(), scale=0.3, backend=backend), plain(q, k, v, kv_range, 0.3)
    )


@pytest.mark.parametrize("backend", ("sdpa", "reference"))
def test_empty_intervals_give_zeros_and_no_gradient(backend):
    q, k, v, kv_range = make()
    tensors = [tensor.requires_grad_() for tensor in (q, k, v)]
    out = gated_cross_attention(*tensors, kv_range, backend=backend)
    empty = kv_range.clamp(0, len(k))[..., 0] >= kv_range.clamp(0, len(k))[..., 1]
    assert empty.sum() >= 11 and (out[empty] == 0).all() and (out[~empty] != 0).any(-1).all()
    out.square().sum().backward()
    assert all(torch.isfinite(tensor.grad).all() for tensor in tensors)
    assert (q.grad[empty] == 0).all()


@pytest.mark.parametrize("backend", ("sdpa", "reference"))
def test_no_visual_tokens_at_all(backend):
    q, k, v, kv_range = make()
    assert (gated_cross_attention(q, k[:0], v[:0], kv_range, backend=backend) == 0).all()


def test_gradients_of_the_backends_agree():
    q, k, v, kv_range = make(torch.float64, kv_heads=2)
    gradients = []
    for backend in ("sdpa", "reference"):
        tensors = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
        gated_cross_attention(*tensors, kv_range, backend=backend).pow(3).sum().backward()
        gradients.append([tensor.grad for tensor in tensors])
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected)


def test_log_sum_exp():
    q, k, v, kv_range = make(torch.float64)
    _, lse = gated_cross_attention(q, k, v, kv_range, return_lse=True)
    assert lse.shape == (3, 4, 9) and (lse[2] == float("-inf")).all()
    expected = torch.logsumexp(torch.einsum("hd,lhd->hl", q[1, 2], k) * 16**-0.5, dim=-1)
    torch.testing.assert_close(lse[1, :, 2], expected)


def test_strided_keys_are_read_in_place():
    q, k, v, kv_range = make()
    packed = torch.stack((k, v), 1)
    expected = gated_cross_attention(q, k, v, kv_range)
    torch.testing.assert_close(gated_cross_attention(q, packed[:, 0], packed[:, 1], kv_range), expected)


@pytest.mark.parametrize("mutation", ("scale", "start", "end", "heads"))
def test_the_comparison_sees_mutations(mutation):
    q, k, v, kv_range = make(torch.float64)
    expected, changed, scale = plain(q, k, v, kv_range, 0.25), kv_range.clone(), 0.25
    if mutation == "scale":
        scale = 0.26
    elif mutation == "start":
        changed[..., 0] += 1
    elif mutation == "end":
        changed[..., 1] -= 1
    else:
        k = k.flip(1)
    out, _ = gated_cross_attention_reference(q, k, v, changed, scale)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(out, expected)


def test_errors():
    q, k, v, kv_range = make()
    cases = (
        ((q[0], k, v, kv_range), {}, r"q has shape \[9, 4, 16\]; expected \[B, T, Hq, D\]"),
        ((q, k[..., :8], v, kv_range), {}, "k has shape"),
        ((q, k, v[:5], kv_range), {}, "v has shape"),
        ((q, k, v, kv_range[:, :3]), {}, "kv_range has shape"),
        ((q, k, v, kv_range.float()), {}, "accepted are int32, int64"),
        ((q, k.half(), v, kv_range), {}, "k is torch.float16"),
        ((q.int(), k.int(), v.int(), kv_range), {}, "q has dtype torch.int32"),
        ((q[:, :, :3], k, v, kv_range), {}, "must be a multiple"),
        ((q, k, v, kv_range), {"backend": "magic"}, "accepted are auto"),
        ((q, k, v, kv_range), {"backend": "sdpa", "return_lse": True}, "no log-sum-exp"),
    )
    for arguments, options, message in cases:
        with pytest.raises(KernelArgumentError, match=message):
            gated_cross_attention(*arguments, **options)
