"""Idefics' and Mllama's cross-attention on our op: the same logits, gradients and words as with eager attention."""

import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from infimm_fast.integrations import interval_masks, transformers_attention
from infimm_fast.integrations.interval_masks import intervals_of_mask, mask_of_intervals
from infimm_fast.integrations.transformers_attention import attention_forward, batched_interval_attention
from infimm_fast.kernels import KernelArgumentError
from interpreter import load_file

PATH = Path(__file__).with_name("cross_attention_models.py")
MODELS = load_file(PATH)
CROSS_LAYERS = {"idefics": 3, "mllama": 2}
TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}

# The models' self-attention has masks, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:attention with .* runs on SDPA")


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Let the name infimm_fast take our op as it would on a GPU; it then runs on the op's SDPA backend."""
    transformers_attention._warn_once.cache_clear()
    monkeypatch.setattr(transformers_attention, "_triton_runs", lambda query: True)


@pytest.fixture
def op_calls(monkeypatch):
    """The packed intervals that our op was called with."""
    calls = []
    op = transformers_attention.interval_attention

    def recorded(q, k, v, kv_range, **kwargs):
        calls.append(kv_range)
        return op(q, k, v, kv_range, **kwargs)

    monkeypatch.setattr(transformers_attention, "interval_attention", recorded)
    return calls


@pytest.mark.parametrize("family", MODELS.FAMILIES)
@pytest.mark.parametrize("implementation", ("infimm_fast", "infimm_fast_reference"))
def test_logits_and_gradients(family, implementation, op_calls, monkeypatch):
    analyses = []
    analyse = interval_masks._analyse
    monkeypatch.setattr(interval_masks, "_analyse", lambda mask: analyses.append(mask) or analyse(mask))
    build, inputs = MODELS.FAMILIES[family]
    results = []
    for name in ("eager", implementation):
        model = build(name)
        out = model(**inputs()).logits
        F.cross_entropy(out.flatten(0, 1), inputs()["input_ids"].flatten()).backward()
        results.append((out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    assert len(op_calls) == CROSS_LAYERS[family] and len(analyses) == 1
    (expected, expected_grads), (actual, actual_grads) = results
    torch.testing.assert_close(actual, expected, **TOLERANCE)
    assert actual_grads.keys() == expected_grads.keys() and any("cross_attn.k_proj" in name for name in actual_grads)
    for name, gradient in expected_grads.items():
        torch.testing.assert_close(actual_grads[name], gradient, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("family", MODELS.FAMILIES)
@pytest.mark.parametrize("implementation", ("infimm_fast", "infimm_fast_reference"))
def test_generation(family, implementation, op_calls):
    expected_tokens, expected_logits = MODELS.generated(family, "eager")
    tokens, logits = MODELS.generated(family, implementation)
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(logits, expected_logits, **TOLERANCE)
    assert len(op_calls) == 3 * CROSS_LAYERS[family]


@pytest.mark.parametrize("family", MODELS.FAMILIES)
def test_rows_without_a_picture_follow_the_family(family, op_calls):
    """Mllama's see everything, unused tiles too; Idefics puts zeros over what they receive, so that nothing is read."""
    MODELS.logits(family, "infimm_fast")
    keys = MODELS.IMAGES * MODELS.TOKENS * (MODELS.TILES if family == "mllama" else 1)
    last_row = op_calls[0][-1] - (MODELS.ROWS - 1) * keys
    assert last_row.unique(dim=0).tolist() == [[0, keys if family == "mllama" else 0]]


@pytest.mark.parametrize(("family", "kind"), (("idefics", "hole"), ("mllama", "hole"), ("mllama", "unused tiles")))
def test_holes_go_to_sdpa_with_a_warning_or_raise(family, kind, op_calls):
    expected = MODELS.logits(family, "eager", kind)
    with pytest.warns(UserWarning, match="not one interval of keys"):
        actual = MODELS.logits(family, "infimm_fast", kind)
    torch.testing.assert_close(actual, expected, **TOLERANCE)
    with pytest.raises(KernelArgumentError, match=r"not one interval of keys.*backend='reference'"):
        MODELS.logits(family, "infimm_fast_reference", kind)
    assert not op_calls


@pytest.mark.parametrize("family", MODELS.FAMILIES)
@pytest.mark.parametrize("shift", ((1, 0), (0, -1), (0, 1)), ids=("start", "end too early", "end too late"))
def test_an_interval_off_by_one_is_seen(family, shift, monkeypatch):
    expected = MODELS.logits(family, "eager")
    pack = transformers_attention.pack_intervals

    def shifted(kv_range, num_keys):
        empty = kv_range[..., :1] >= kv_range[..., 1:]
        return pack(kv_range + torch.tensor(shift).masked_fill(empty, 0), num_keys)

    monkeypatch.setattr(transformers_attention, "pack_intervals", shifted)
    difference = (MODELS.logits(family, "infimm_fast") - expected).abs()
    assert difference[0].max() > 1e-3  # the first row's intervals end in the middle of its pictures


@pytest.mark.parametrize("family", MODELS.FAMILIES)
def test_intervals_passed_to_the_model(family, op_calls):
    """The ways of the docstring; the mask is not looked at then, and self-attention does not mind."""
    build, make_inputs = MODELS.FAMILIES[family]
    inputs = make_inputs()
    with torch.no_grad():
        expected = build("eager")(**inputs).logits
        if family == "mllama":
            tiles = inputs["cross_attention_mask"].bool().flatten(2)[:, None]
            kv_range = intervals_of_mask(tiles | ~tiles.any(-1, keepdim=True)) * MODELS.TOKENS
        else:
            kv_range = intervals_of_mask(inputs["image_attention_mask"].bool()[:, None]) * MODELS.TOKENS
        torch.testing.assert_close(build("infimm_fast")(**inputs, kv_range=kv_range).logits, expected, **TOLERANCE)
        other = build("infimm_fast")(**inputs, kv_range=kv_range.clamp(max=4)).logits
    assert (other - expected).abs().max() > 1e-3 and len(op_calls) == 2 * CROSS_LAYERS[family]


@pytest.mark.parametrize("family", MODELS.FAMILIES)
def test_autocast(family, op_calls):
    """Mllama's normed keys are float32 then, and its values bfloat16."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, actual = (MODELS.logits(family, name).float() for name in ("sdpa", "infimm_fast"))
    assert (actual - expected).abs().max() < 0.05 * expected.abs().max() and len(op_calls) == CROSS_LAYERS[family]


@pytest.mark.parametrize("family", MODELS.FAMILIES)
def test_checkpointing(family, op_calls):
    build, inputs = MODELS.FAMILIES[family]
    gradients = []
    for checkpointing in (False, True):
        model = build("infimm_fast").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**inputs(), use_cache=False).logits.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if "cross_attn" in name})
    assert len(op_calls) == 3 * CROSS_LAYERS[family] and None not in gradients[0].values()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, **TOLERANCE)


def test_dropout_of_a_model_in_training():
    model = MODELS.idefics("infimm_fast", dropout=0.5).train()
    with pytest.warns(UserWarning, match="dropout"):
        model(**MODELS.idefics_inputs())


def test_without_triton_the_mask_goes_to_sdpa_as_it_is(monkeypatch, op_calls):
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*interval.*")
        MODELS.logits("mllama", "infimm_fast")
    assert not op_calls


@pytest.mark.slow
@pytest.mark.parametrize("family", MODELS.FAMILIES)
def test_on_the_triton_kernel_in_the_interpreter(family, interpreter):
    actual = interpreter.call(PATH, "logits", family=family, implementation="infimm_fast_triton")
    torch.testing.assert_close(actual, MODELS.logits(family, "eager"), **TOLERANCE)
    tokens, logits = interpreter.call(PATH, "generated", family=family, implementation="infimm_fast_triton", tokens=2)
    expected_tokens, expected_logits = MODELS.generated(family, "eager", tokens=2)
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(logits, expected_logits, **TOLERANCE)


class TinyCrossAttention(torch.nn.Module):
    """A module as the attention function sees it: grouped heads, and Idefics' wrong attribute."""

    is_causal = True
    num_key_value_groups = 2


def attention_inputs(layout="projection"):
    """Queries, keys and values of two rows, and the intervals of their four tokens."""
    generator = torch.Generator().manual_seed(2)
    q = torch.randn(2, 4, 4, 8, generator=generator).transpose(1, 2)
    if layout == "projection":  # [B, S, H, D] in memory
        k, v = (torch.randn(2, 7, 2, 8, generator=generator).transpose(1, 2) for _ in range(2))
    elif layout == "cache":  # [B, H, S, D] in memory
        k, v = torch.randn(2, 2, 2, 7, 8, generator=generator)
    else:
        k, v = (torch.randn(2, 8, 2, 7, generator=generator).permute(0, 2, 3, 1) for _ in range(2))
    kv_range = torch.tensor([[[0, 3], [2, 7], [0, 0], [0, 7]], [[0, 0], [6, 7], [1, 2], [0, 1]]])
    return q, k, v, kv_range


def dense(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize("layout", ("projection", "cache", "neither"))
@pytest.mark.parametrize("backend", ("sdpa", "reference"))
def test_layouts_of_keys_and_values(layout, backend, monkeypatch):
    q, k, v, kv_range = attention_inputs(layout)
    packed = []
    op = transformers_attention.interval_attention
    monkeypatch.setattr(
        transformers_attention, "interval_attention", lambda *args, **kwargs: packed.append(args) or op(*args, **kwargs)
    )
    tensors = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    out = batched_interval_attention(*tensors, kv_range, backend=backend)
    mask = mask_of_intervals(kv_range, 7)
    torch.testing.assert_close(out, dense(q, k, v, mask))
    grads = torch.autograd.grad(out.square().sum(), tensors)
    expected = torch.autograd.grad(dense(*tensors, mask).square().sum(), tensors)
    torch.testing.assert_close(grads, expected, **TOLERANCE)
    in_place = packed[0][1].untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
    assert in_place == (layout == "projection" or (layout == "cache" and backend == "reference"))


def test_one_row_is_read_in_place_from_a_cache(monkeypatch):
    q, k, v, kv_range = (tensor[:1] for tensor in attention_inputs("cache"))
    pointers = []
    monkeypatch.setattr(transformers_attention, "interval_attention", lambda q, k, *_, **__: pointers.append(k) or q)
    batched_interval_attention(q, k, v, kv_range)
    assert pointers[0].data_ptr() == k.data_ptr() and pointers[0].shape == (7, 2, 8)


@pytest.mark.parametrize("hidden", (float("-inf"), torch.finfo(torch.float32).min))
def test_tokens_without_any_key(hidden, op_calls):
    """What SDPA gives them: 0, or the mean of all values if only finite numbers hide the keys."""
    q, k, v, kv_range = attention_inputs()
    mask = torch.zeros(2, 1, 4, 7).masked_fill(~mask_of_intervals(kv_range, 7), hidden)
    out, _ = attention_forward(TinyCrossAttention(), q, k, v, mask)
    torch.testing.assert_close(out, dense(q, k, v, mask))
    mean = v.mean(2).repeat_interleave(2, dim=1)[0] if hidden != float("-inf") else torch.zeros(4, 8)
    torch.testing.assert_close(out[0, 2], mean)
    assert len(op_calls) == (hidden == float("-inf"))


def test_no_mask_shows_everything_and_a_causal_one_is_not_guessed(op_calls):
    q, k, v, _ = attention_inputs()
    out, _ = attention_forward(TinyCrossAttention(), q, k, v, None)
    torch.testing.assert_close(out, dense(q, k, v, None))
    assert len(op_calls) == 1
    with pytest.raises(KernelArgumentError, match="causal"):
        attention_forward(TinyCrossAttention(), q, k, v, None, is_causal=True, backend="reference")


def test_masks_that_say_nothing_about_single_tokens(op_calls):
    q, k, v, kv_range = attention_inputs()
    mask = mask_of_intervals(kv_range, 7)
    learned = torch.zeros(2, 1, 4, 7, requires_grad=True)
    of_heads = mask.expand(2, 4, 4, 7).clone()
    broadcast_key = torch.ones(2, 1, 4, 1, dtype=torch.bool)
    for unusual in (learned, of_heads, broadcast_key):
        out, _ = attention_forward(TinyCrossAttention(), q, k, v, unusual)
        torch.testing.assert_close(out, dense(q, k, v, unusual))
    assert not op_calls


@pytest.mark.parametrize("arguments", ({"dropout": 0.1}, {"position_bias": torch.zeros(1)}))
def test_intervals_passed_along_with_what_the_op_does_not_know_raise(arguments):
    q, k, v, kv_range = attention_inputs()
    with pytest.raises(KernelArgumentError, match="cannot serve kv_range"):
        attention_forward(TinyCrossAttention(), q, k, v, None, kv_range=kv_range, **arguments)


@pytest.mark.parametrize("shape", ((2, 3, 2), (3, 4, 2), (4, 2)))
def test_intervals_of_the_wrong_shape_raise(shape):
    q, k, v, _ = attention_inputs()
    with pytest.raises(KernelArgumentError, match="kv_range has shape"):
        attention_forward(TinyCrossAttention(), q, k, v, None, kv_range=torch.zeros(shape, dtype=torch.int64))


class Attend(torch.nn.Module):
    """The attention function as a model calls it."""

    def __init__(self, backend="auto"):
        super().__init__()
        self.inner = TinyCrossAttention()
        self.backend = backend

    def forward(self, q, k, v, mask, kv_range=None):
        return attention_forward(self.inner, q, k, v, mask, kv_range=kv_range, backend=self.backend)[0]


@pytest.mark.slow
def test_compiled():
    q, k, v, kv_range = attention_inputs()
    mask = mask_of_intervals(torch.tensor([[[0, 1]]]), 7)
    interval_masks.read_mask(mask)  # were the known intervals used, the graph would keep them
    compiled = torch.compile(Attend(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, mask), dense(q, k, v, mask))
    mask.logical_not_()
    torch.testing.assert_close(compiled(q, k, v, mask), dense(q, k, v, mask))
    for length in (4, 3):
        out = compiled(q[:, :, :length], k, v, mask, kv_range[:, :length])
        torch.testing.assert_close(out, dense(q, k, v, mask_of_intervals(kv_range, 7))[:, :length])
    with pytest.raises(Exception, match="pass kv_range"):
        torch.compile(Attend("reference"), fullgraph=True, backend="aot_eager")(q, k, v, mask)


def test_exported():
    q, k, v, kv_range = attention_inputs()
    mask = mask_of_intervals(kv_range, 7)
    length, keys = torch.export.Dim("length", min=2), torch.export.Dim("keys", min=2)
    axes = ({2: length}, {2: keys}, {2: keys})
    without = torch.export.export(Attend(), (q, k, v, mask), dynamic_shapes=(*axes, {2: length, 3: keys})).module()
    torch.testing.assert_close(without(q, k, v, ~mask), dense(q, k, v, ~mask))
    passed = torch.export.export(Attend(), (q, k, v, None, kv_range), dynamic_shapes=(*axes, None, {1: length})).module()
    out = passed(q[:, :, :3], k[:, :, :6], v[:, :, :6], None, kv_range[:, :3])
    expected = dense(q, k[:, :, :6], v[:, :, :6], mask_of_intervals(kv_range, 6))[:, :3]
    torch.testing.assert_close(out, expected)


@pytest.mark.gpu
def test_captured_graphs_follow_the_mask(monkeypatch):
    monkeypatch.undo()
    *tensors, kv_range = (tensor.cuda() for tensor in attention_inputs())
    mask, module = mask_of_intervals(kv_range, 7), TinyCrossAttention()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        attention_forward(module, *tensors, mask)  # the mask's intervals are known now
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph, stream=stream):
        out, _ = attention_forward(module, *tensors, mask)
        passed, _ = attention_forward(module, *tensors, None, kv_range=kv_range)
    mask.copy_(~mask)
    kv_range.copy_(kv_range.flip(0))
    graph.replay()
    torch.testing.assert_close(out, dense(*tensors, mask), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(passed, dense(*tensors, mask_of_intervals(kv_range, 7)), atol=1e-4, rtol=1e-4)
