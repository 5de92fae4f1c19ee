"""The Perceiver resampler against its maths, written down another way: one tile, one head, one latent at a time."""

import math
from pathlib import Path

import pytest
import torch

from infimm_fast import InfiMMHDConfig, InfiMMHDVisionConfig
from infimm_fast.kernels import interval_attention
from infimm_fast.kernels.common.numerics import assert_error_budget, outlier_normal
from infimm_fast.kernels.interval import forward as triton_forward
from infimm_fast.models.infimm_hd.modeling_perceiver import PerceiverResampler

BACKENDS = ("sdpa", "reference")


def make(heads=2, head_dim=64, latents=5, width=64, layers=2, backend="sdpa", dtype=torch.float32):
    """A resampler whose every parameter matters, LayerNorms included."""
    config = InfiMMHDConfig(
        vision_config=InfiMMHDVisionConfig(hidden_size=width, num_attention_heads=2, num_hidden_layers=1),
        resampler_layers=layers,
        resampler_latents=latents,
        resampler_heads=heads,
        resampler_head_dim=head_dim,
        resampler_ff_mult=2.0,
    )
    resampler = PerceiverResampler(config)
    generator = torch.Generator().manual_seed(7)
    for name, value in resampler.named_parameters():
        noise = torch.randn(value.shape, generator=generator)
        if value.ndim == 2 and name != "latents":
            noise = noise * 1.5 / math.sqrt(value.shape[1])
        value.data = noise if "norm" not in name else 0.3 * noise + name.endswith("weight")
    for layer in resampler.layers:
        layer.attn.backend = backend
    return resampler.to(dtype)


def layer_norm(x, norm):
    centred = x - x.mean()
    return centred / torch.sqrt((centred**2).mean() + norm.eps) * norm.weight + norm.bias


def statement(resampler, media):
    """Flamingo, section 3.1.1, from the equations: every sum that matters is spelled out."""
    results = []
    for tile in media:
        latents = list(resampler.latents)
        for layer in resampler.layers:
            attn, ff = layer.attn, layer.ff
            queries = [attn.q_proj.weight @ layer_norm(latent, attn.norm_latents) for latent in latents]
            seen = [layer_norm(token, attn.norm_media) for token in tile]
            seen += [layer_norm(latent, attn.norm_latents) for latent in latents]
            key_weight, value_weight = attn.kv_proj.weight.chunk(2)
            keys, values = [key_weight @ x for x in seen], [value_weight @ x for x in seen]
            updated = []
            for latent, query in zip(latents, queries, strict=True):
                heads = []
                for head in range(attn.num_heads):
                    part = slice(head * attn.head_dim, (head + 1) * attn.head_dim)
                    scores = torch.stack([query[part] @ key[part] for key in keys]) / math.sqrt(attn.head_dim)
                    weights = torch.exp(scores - scores.max())
                    weights = weights / weights.sum()
                    heads.append(sum(weight * value[part] for weight, value in zip(weights, values, strict=True)))
                latent = latent + attn.o_proj.weight @ torch.cat(heads)
                hidden = ff.up_proj.weight @ layer_norm(latent, ff.norm)
                hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
                updated.append(latent + ff.down_proj.weight @ hidden)
            latents = updated
        results.append(torch.stack([layer_norm(latent, resampler.norm) for latent in latents]))
    return torch.stack(results)


@torch.no_grad()
@pytest.mark.parametrize("backend", (*BACKENDS, "auto"))
@pytest.mark.parametrize("heads, head_dim", ((2, 64), (3, 96)))
def test_against_the_statement(backend, heads, head_dim):
    resampler = make(heads, head_dim, backend=backend, dtype=torch.float64)
    media = outlier_normal(3, 7, 64, dtype=torch.float64, seed=1)
    expected = statement(resampler, media)
    torch.testing.assert_close(resampler(media), expected, atol=1e-10, rtol=1e-10)
    # A layer that is no-op, or tiles that all look the same, would make the comparison empty.
    assert (expected - resampler.norm(resampler.latents)).abs().max() > 0.1
    assert (expected[0] - expected[1]).abs().max() > 0.1


def wrong_latents_norm(resampler):
    for layer in resampler.layers:
        layer.attn.norm_latents = layer.attn.norm_media


def swapped_keys_and_values(resampler):
    for layer in resampler.layers:
        layer.attn.kv_proj.weight.data = layer.attn.kv_proj.weight.roll(layer.attn.kv_proj.weight.shape[0] // 2, 0)


def other_heads(resampler):
    for layer in resampler.layers:
        layer.attn.num_heads, layer.attn.head_dim = 4, 32


def no_final_norm(resampler):
    resampler.norm = torch.nn.Identity()


def without_the_latents_as_keys(resampler):
    for layer in resampler.layers:
        attend = layer.attn._attend
        layer.attn._attend = lambda q, k, v, attend=attend: attend(q, k[:, :-5], v[:, :-5])


@torch.no_grad()
@pytest.mark.parametrize(
    "mutation", (wrong_latents_norm, swapped_keys_and_values, other_heads, no_final_norm, without_the_latents_as_keys)
)
def test_mutations_are_seen(mutation):
    resampler = make(dtype=torch.float64)
    media = outlier_normal(2, 7, 64, dtype=torch.float64, seed=1)
    expected = statement(resampler, media)
    mutation(resampler)
    assert (resampler(media) - expected).abs().max() > 1e-3


def gradients(resampler, run, media, weight):
    media = media.clone().requires_grad_()
    (run(media) * weight).sum().backward()
    return {"media": media.grad, **{name: value.grad for name, value in resampler.named_parameters()}}


def test_gradients_are_the_statements():
    ours, plain = (make(layers=1, latents=3, dtype=torch.float64) for _ in range(2))
    media, weight = (outlier_normal(2, tokens, 64, dtype=torch.float64, seed=tokens) for tokens in (4, 3))
    actual = gradients(ours, ours, media, weight)
    expected = gradients(plain, lambda x: statement(plain, x), media, weight)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, atol=1e-9, rtol=1e-9, msg=name)


def compare_on_triton(dtype, heads, head_dim):
    """Forward and gradients on our kernels, in the interpreter's process; the launches that happened."""
    launches = []
    original = triton_forward.launch_forward
    triton_forward.launch_forward = lambda *args, **kwargs: launches.append(1) or original(*args, **kwargs)
    media = outlier_normal(2, 9, 64, dtype=torch.float32, seed=1).clamp(-4, 4)
    results = []
    try:
        for backend in ("triton", "sdpa"):
            resampler = make(heads, head_dim, layers=1, backend=backend).to(dtype)
            x = media.to(dtype, copy=True).requires_grad_()
            out = resampler(x)
            out.float().square().sum().backward()
            results.append((out.detach(), x.grad, resampler.latents.grad))
    finally:
        triton_forward.launch_forward = original
    errors = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*results, strict=True)]
    return errors, len(launches)


@pytest.mark.slow
@pytest.mark.parametrize("heads, head_dim", ((2, 64), (2, 96)))
def test_on_the_triton_kernels(heads, head_dim, interpreter):
    errors, launches = interpreter.call(
        Path(__file__), "compare_on_triton", dtype=torch.float32, heads=heads, head_dim=head_dim
    )
    assert launches == 1 and max(errors) < 1e-4, errors


def test_the_interval_of_a_tile_is_its_features_and_the_latents(monkeypatch):
    """What the kernels are handed: packed keys, one interval for each tile, nothing padded."""
    import infimm_fast.models.infimm_hd.modeling_perceiver as module

    seen = []

    def recorded(q, k, v, kv_range, **options):
        seen.append((tuple(q.shape), tuple(k.shape), kv_range[:, 0].tolist(), options["backend"]))
        return interval_attention(q, k, v, kv_range, **options)

    monkeypatch.setattr(module, "interval_attention", recorded)
    make(backend="reference")(torch.randn(3, 7, 64))
    assert seen == [((3, 5, 2, 64), (36, 2, 64), [[0, 12], [12, 24], [24, 36]], "reference")] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
@pytest.mark.parametrize("heads, head_dim", ((8, 64), (16, 96)))
def test_real_sizes_on_a_gpu(heads, head_dim, dtype):
    """InfiMM-Zephyr's: 577 features of 1024 channels, 64 latents; the whole layer within the budget of the plain one."""
    media = outlier_normal(3, 577, 1024, dtype=dtype, device="cuda", seed=1)

    def run(backend, dtype):
        resampler = make(heads, head_dim, latents=64, width=1024, layers=1, backend=backend).to("cuda", dtype)
        x = media.to(dtype, copy=True).requires_grad_()
        out = resampler(x)
        out.backward(torch.ones_like(out) / 64)
        return {"out": out.detach(), "media": x.grad, "latents": resampler.latents.grad}

    actual, plain, exact = run("triton", dtype), run("reference", dtype), run("reference", torch.float64)
    for name, value in exact.items():
        assert_error_budget(name, actual[name], plain[name], value)
