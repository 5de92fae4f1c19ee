"""The gated block on the fused kernels, as it trains and folded for inference, against the plain block."""

import copy
import pickle

import pytest
import torch
from torch import nn

from infimm_fast import FusedGatedCrossAttentionBlock, GatedCrossAttentionBlock
from infimm_fast.errors import FoldError
from infimm_fast.kernels.common.numerics import assert_error_budget, outlier_normal
from infimm_fast.models.infimm_hd.fused_gated_cross_attention import FoldedWeights

HIDDEN, VISUAL, TOKENS = 96, 56, 130
CLOSE = {"atol": 2e-6, "rtol": 2e-5}


def make_block(gate="vector", dtype=torch.float32):
    """A plain block with gates wide open and LayerNorms far from the identity."""
    torch.manual_seed(0)
    block = GatedCrossAttentionBlock(HIDDEN, VISUAL, num_heads=3, head_dim=16, ff_mult=2.0, gate=gate)
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if "gate" in name:
                parameter.normal_(std=1.0)
            elif "norm" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.5)
            else:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return block.to(dtype).requires_grad_(False)


def make_inputs(dtype=torch.float32, requires_grad=False):
    """Four rows: text before the first picture, one without any picture, one whose intervals lie, two pictures."""
    x = outlier_normal(4, 5, HIDDEN, dtype=dtype, seed=1).requires_grad_(requires_grad)
    features = outlier_normal(TOKENS, VISUAL, dtype=dtype, seed=2).requires_grad_(requires_grad)
    kv_range = torch.zeros(4, 5, 2, dtype=torch.int64)
    kv_range[0, 2:] = torch.tensor([0, 65])
    kv_range[2] = torch.tensor([3, 40])
    kv_range[3, :2], kv_range[3, 2:] = torch.tensor([0, 65]), torch.tensor([65, 130])
    return x, kv_range, torch.tensor([True, False, False, True]), features


def fused_of(block, folded):
    fused = FusedGatedCrossAttentionBlock.from_block(block)
    return fused.fold() if folded else fused


@pytest.mark.parametrize("gate", ("vector", "scalar"))
@pytest.mark.parametrize("folded", (False, True))
def test_output_equals_the_plain_block(gate, folded):
    block, inputs = make_block(gate), make_inputs()
    expected = block(*inputs)
    fused = fused_of(block, folded)
    torch.testing.assert_close(fused(*inputs), expected, **CLOSE)
    key_value = block.attn.project_visual(inputs[3])
    torch.testing.assert_close(fused(*inputs[:3], None, key_value), expected, **CLOSE)
    assert torch.equal(fused(*inputs)[1:3], inputs[0][1:3]), "a row without a picture must pass unchanged"
    assert (expected[0, :2] - inputs[0][0, :2]).abs().max() > 0.1, "text before the picture takes the feed-forward"


@pytest.mark.parametrize("gate", ("vector", "scalar"))
def test_gradients_equal_the_plain_block(gate):
    block = make_block(gate).requires_grad_(True)
    plain_inputs, fused_inputs = make_inputs(requires_grad=True), make_inputs(requires_grad=True)
    weight = torch.randn(4, 5, HIDDEN)
    (block(*plain_inputs) * weight).sum().backward()
    expected = {name: parameter.grad for name, parameter in block.named_parameters()}
    block.zero_grad()
    fused = FusedGatedCrossAttentionBlock.from_block(block)
    (fused(*fused_inputs) * weight).sum().backward()
    assert [name for name, _ in fused.named_parameters()] == list(expected)
    for name, parameter in fused.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=2e-5, rtol=2e-5)
    for index in (0, 3):
        torch.testing.assert_close(fused_inputs[index].grad, plain_inputs[index].grad, atol=2e-5, rtol=2e-5)


def test_a_folded_block_passes_gradients_through():
    block = make_block()
    plain_inputs, fused_inputs = make_inputs(requires_grad=True), make_inputs(requires_grad=True)
    block(*plain_inputs).square().sum().backward()
    fused_of(block, True)(*fused_inputs).square().sum().backward()
    for index in (0, 3):
        torch.testing.assert_close(fused_inputs[index].grad, plain_inputs[index].grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
@pytest.mark.parametrize("gate", ("vector", "scalar"))
@pytest.mark.parametrize("folded", (False, True))
def test_errors_are_within_the_plain_blocks_budget(dtype, gate, folded):
    block, inputs = make_block(gate, dtype), make_inputs(dtype)
    exact = copy.deepcopy(block).double()
    exact_inputs = [tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs]
    plain = block(*inputs)
    assert_error_budget("out", fused_of(block, folded)(*inputs), plain, exact(*exact_inputs))


@pytest.mark.parametrize(
    "mutation",
    ("attn_gate", "ff_gate", "no tanh", "scale", "norm weight", "q_bias", "up_bias", "flag", "epsilon", "residual"),
)
def test_the_comparison_sees_mutations_of_the_fold(mutation, monkeypatch):
    block, inputs = make_block(), make_inputs()
    expected = block(*inputs)
    fused = fused_of(block, True)
    weights, gates = (
        fused.folded,
        {"attn_gate": ("o_weight", block.attn.o_proj), "ff_gate": ("down_weight", block.ff.down_proj)},
    )
    if mutation in gates:
        name, linear = gates[mutation]
        setattr(weights, name, linear.weight)
    elif mutation == "no tanh":
        weights.o_weight = block.attn.o_proj.weight * block.attn_gate[:, None]
    elif mutation == "scale":
        weights.q_weight = weights.q_weight * block.attn.head_dim**0.5
    elif mutation == "norm weight":
        weights.up_weight = block.ff.up_proj.weight
    elif mutation.endswith("bias"):
        getattr(weights, mutation).zero_()
    elif mutation == "flag":
        inputs = (*inputs[:2], torch.ones(4, dtype=torch.bool), inputs[3])
    elif mutation == "epsilon":
        weights.attn_eps = 1e-2
    else:
        monkeypatch.setattr(torch, "addmm", lambda x, a, b: a @ b)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(fused(*inputs), expected, **CLOSE)


def test_unfolding_is_exact_even_with_closed_gates():
    block, inputs = make_block(dtype=torch.bfloat16), make_inputs(torch.bfloat16)
    block.attn_gate.zero_()
    expected = copy.deepcopy(block)
    fused = fused_of(block, True)
    assert fused(*inputs).isfinite().all()
    for name, value in fused.unfold().state_dict().items():
        assert torch.equal(value, expected.state_dict()[name]), name
    assert torch.equal(fused.to_block()(*inputs), expected(*inputs))
    assert type(fused.to_block()) is GatedCrossAttentionBlock


def test_a_folded_block_is_saved_as_its_parameters():
    block = make_block()
    names = list(block.state_dict())
    fused = fused_of(block, True)
    assert list(fused.state_dict()) == names
    for copied in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        copied._fingerprint = copied._take_fingerprint()
        assert copied.folded is not fused.folded
        torch.testing.assert_close(copied(*make_inputs()), fused(*make_inputs()), atol=0, rtol=0)


def test_loading_weights_unfolds():
    block, inputs = make_block(), make_inputs()
    fused = fused_of(block, True)
    other = make_block("vector")
    with torch.no_grad():
        other.ff.up_proj.weight.mul_(3.0)
    fused.load_state_dict(other.state_dict())
    assert fused.folded is None
    torch.testing.assert_close(fused(*inputs), other(*inputs), **CLOSE)
    holder = nn.ModuleDict({"block": fused.fold()})
    holder.load_state_dict({f"block.{name}": value for name, value in make_block().state_dict().items()}, assign=True)
    assert fused.folded is None
    torch.testing.assert_close(fused(*inputs), make_block()(*inputs), **CLOSE)


@pytest.mark.parametrize("change", ("in place", "child", "replaced", "requires grad"))
def test_changed_parameters_are_refused(change):
    fused, inputs = fused_of(make_block(), True), make_inputs()
    if change == "in place":
        fused.attn_gate.add_(1.0)
    elif change == "child":
        fused.ff.load_state_dict(make_block().ff.state_dict())
    elif change == "replaced":
        fused.attn.q_proj.weight = nn.Parameter(torch.zeros_like(fused.attn.q_proj.weight), requires_grad=False)
    else:
        fused.requires_grad_(True)
    with pytest.raises(FoldError, match="changed since fold"):
        fused(*inputs)
    fused.requires_grad_(False)
    torch.testing.assert_close(fused.fold()(*inputs), fused.unfold()(*inputs), **CLOSE)


def test_casting_folds_anew_from_the_parameters():
    """Rounding folded weights a second time would be another result."""
    block = make_block()
    fused = fused_of(copy.deepcopy(block), True).to(torch.bfloat16)
    expected = fused_of(block.to(torch.bfloat16), True)
    for (name, value), other in zip(fused.folded.named_buffers(), expected.folded.buffers(), strict=True):
        assert value.dtype == torch.bfloat16 and torch.equal(value, other), name


def test_offloaded_parameters_come_back():
    block = make_block()
    before = {name: value.clone() for name, value in block.state_dict().items()}
    fused = FusedGatedCrossAttentionBlock.from_block(block).fold(offload=True)
    assert {parameter.device.type for parameter in fused.parameters()} == {"cpu"}
    fused.unfold()
    assert all(torch.equal(value, before[name]) for name, value in fused.state_dict().items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
def test_offload_and_output_on_a_gpu(dtype):
    block, inputs = make_block(dtype=dtype), make_inputs(dtype)
    exact = copy.deepcopy(block).double()(*(t.double() if t.is_floating_point() else t for t in inputs))
    plain = block.cuda()(*(tensor.cuda() for tensor in inputs))
    fused = FusedGatedCrossAttentionBlock.from_block(block).fold(offload=True)
    assert fused.attn.q_proj.weight.device.type == "cpu" and fused.folded.q_weight.device.type == "cuda"
    out = fused(*(tensor.cuda() for tensor in inputs))
    assert_error_budget("out", out.cpu(), plain.cpu(), exact)
    assert fused.unfold().attn.q_proj.weight.device.type == "cuda"
    assert_error_budget("out", fused(*(tensor.cuda() for tensor in inputs)).cpu(), plain.cpu(), exact)


class QuantisedLinear(nn.Linear):
    """What libraries for quantised weights put in the place of a linear layer."""


def _quantise(block):
    block.ff.up_proj.__class__ = QuantisedLinear


def _quantise_tensor(block):
    block.ff.down_proj.weight = nn.Parameter(block.ff.down_proj.weight.to(torch.int8), requires_grad=False)


def _parametrise(block):
    nn.utils.parametrizations.weight_norm(block.attn.o_proj)


def _tie(block):
    block.ff_gate = block.attn_gate


def _train(block):
    block.attn.norm.weight.requires_grad_(True)


def _hook(block):
    block.attn.q_proj._hf_hook = object()


@pytest.mark.parametrize(
    ("change", "message"),
    (
        (_quantise, r"ff\.up_proj is a .*QuantisedLinear"),
        (_quantise_tensor, r"ff\.down_proj\.weight is quantised .*int8"),
        (_parametrise, r"attn\.o_proj is a .*Parametrized"),
        (_tie, r"attn_gate is tied: it is attn_gate and ff_gate"),
        (_train, r"attn\.norm\.weight requires grad"),
        (_hook, r"attn\.q_proj is moved"),
    ),
)
def test_weights_that_cannot_be_folded_are_named(change, message):
    block = make_block()
    change(block)
    fused = FusedGatedCrossAttentionBlock.from_block(block)
    with pytest.raises(FoldError, match=message):
        fused.fold()
    assert fused.folded is None


def test_compile_and_export():
    block, inputs = make_block(), make_inputs()
    for folded in (False, True):
        fused = fused_of(block, folded)
        expected = fused(*inputs)
        torch.testing.assert_close(torch.compile(fused, fullgraph=True, backend="aot_eager")(*inputs), expected, **CLOSE)
        tokens = torch.export.Dim("tokens", min=2, max=64)
        shapes = ({1: tokens}, {1: tokens}, None, None)
        exported = torch.export.export(fused, inputs, dynamic_shapes=shapes).module()
        longer = [torch.cat((inputs[0], inputs[0]), 1), torch.cat((inputs[1], inputs[1]), 1), *inputs[2:]]
        torch.testing.assert_close(exported(*longer), fused(*longer), **CLOSE)


def test_the_folded_weights_are_no_parameters():
    weights = FoldedWeights(make_block())
    assert not list(weights.parameters()) and not weights.state_dict()
    assert sorted(name for name, _ in weights.named_buffers()) == [
        "down_weight",
        "o_weight",
        "q_bias",
        "q_weight",
        "up_bias",
        "up_weight",
    ]
