"""A plain PyTorch model of the Flamingo kind takes infimm_fast's gated block, or its attention alone, and goes back again.

Run it with ``python examples/plug_into_plain_flamingo.py``. The model is written out here: a small causal decoder, and
before each of its layers a gated cross-attention as one finds it in many repositories, with scores and mask in memory.
On a CPU our ops run on PyTorch's own attention, so that the timings say something only on a GPU.
"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from torch import nn

from infimm_fast.kernels import interval_attention
from infimm_fast.models.infimm_hd.fused_gated_cross_attention import FusedGatedCrossAttentionBlock

WIDTH, VISUAL, HEADS, HEAD_DIM, VOCABULARY, IMAGE_TOKEN = 128, 96, 4, 24, 100, 99
ROWS, LENGTH, IMAGES, TOKENS = 4, 48, 3, 65  # a row has room for IMAGES pictures of TOKENS visual tokens


# The plain model.


def naive_attention(q, k, v, seen):
    """Attend to the latest picture; q [B, T, H, D], k and v [B, S, H, D], seen [B, T] pictures so far -> [B, T, H, D]."""
    picture = torch.arange(k.shape[1], device=k.device) // TOKENS + 1  # of each visual token, counted from 1
    visible = (picture == seen[..., None])[:, None]  # [B, 1, T, S]
    scores = torch.einsum("bthd,bshd->bhts", q, k) * HEAD_DIM**-0.5
    weights = scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(-1) * visible
    return torch.einsum("bhts,bshd->bthd", weights, v)


class NaiveBlock(nn.Module):
    """``x + tanh(gate) * cross_attention(x)``, then the same with a feed-forward; rows without a picture pass."""

    def __init__(self, gate_size: int):
        super().__init__()
        self.attend = naive_attention
        self.attn_norm, self.ff_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.to_q = nn.Linear(WIDTH, HEADS * HEAD_DIM, bias=False)
        self.to_kv = nn.Linear(VISUAL, 2 * HEADS * HEAD_DIM, bias=False)
        self.to_out = nn.Linear(HEADS * HEAD_DIM, WIDTH, bias=False)
        self.ff_up, self.ff_down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)
        # Trained gates; a model that starts training has zeros.
        self.attn_gate, self.ff_gate = nn.Parameter(torch.randn(gate_size)), nn.Parameter(torch.randn(gate_size))

    def forward(self, x, images, seen):
        """Map text x [B, T, WIDTH] with images [B, S, VISUAL] to [B, T, WIDTH]."""
        keep = (seen[:, -1:, None] > 0).to(x.dtype)
        q = self.to_q(self.attn_norm(x)).unflatten(-1, (HEADS, HEAD_DIM))
        k, v = self.to_kv(images).unflatten(-1, (2, HEADS, HEAD_DIM)).unbind(2)
        x = x + keep * self.attn_gate.tanh() * self.to_out(self.attend(q, k, v, seen).flatten(2))
        return x + keep * self.ff_gate.tanh() * self.ff_down(F.gelu(self.ff_up(self.ff_norm(x))))


class PlainFlamingo(nn.Module):
    """A causal decoder with a gated block before each layer."""

    def __init__(self, gate_size: int, depth: int = 2):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(NaiveBlock(gate_size) for _ in range(depth))
        layer = {"dim_feedforward": 4 * WIDTH, "dropout": 0.0, "batch_first": True, "norm_first": True}
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(WIDTH, HEADS, **layer) for _ in range(depth))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids, images):
        """Map ids [B, T] and images [B, IMAGES * TOKENS, VISUAL] to logits [B, T, VOCABULARY]."""
        x, seen = self.embed(ids), (ids == IMAGE_TOKEN).cumsum(1)
        causal = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], device=ids.device)
        for block, layer in zip(self.blocks, self.layers, strict=True):
            x = layer(block(x, images, seen), causal, is_causal=True)
        return self.head(x)


# What it takes to plug ours in.


def latest_picture(seen):
    """Return the visual tokens of all rows, end to end, that each text token sees: [B, T, 2]; (0, 0) before any picture."""
    row = torch.arange(len(seen), device=seen.device)[:, None] * IMAGES * TOKENS
    start = row + (seen - 1) * TOKENS
    return torch.stack((start, start + TOKENS), dim=-1) * (seen > 0)[..., None]


def our_attention(q, k, v, seen):
    """Do what `naive_attention` does; on a GPU without scores or mask in memory."""
    return interval_attention(q, k.flatten(0, 1), v.flatten(0, 1), latest_picture(seen))


class OurBlock(nn.Module):
    """Our gated block behind the plain model's arguments."""

    def __init__(self, gate_size: int):
        super().__init__()
        gate = "scalar" if gate_size == 1 else "vector"
        self.block = FusedGatedCrossAttentionBlock(WIDTH, VISUAL, HEADS, HEAD_DIM, ff_mult=4, gate=gate)

    def forward(self, x, images, seen):
        """See `NaiveBlock.forward`."""
        return self.block(x, latest_picture(seen), seen[:, -1] > 0, images.flatten(0, 1))


OUR_NAMES = {
    "attn_norm": "block.attn.norm",
    "to_q": "block.attn.q_proj",
    "to_kv": "block.attn.kv_proj",
    "to_out": "block.attn.o_proj",
    "attn_gate": "block.attn_gate",
    "ff_norm": "block.ff.norm",
    "ff_up": "block.ff.up_proj",
    "ff_down": "block.ff.down_proj",
    "ff_gate": "block.ff_gate",
}
PLAIN_NAMES = {ours: plain for plain, ours in OUR_NAMES.items()}


def renamed(tensors, names):
    """Rename parameters; both blocks keep them in the same layout."""
    return {name.replace(old, names[old], 1): t for name, t in tensors.items() for old in names if name.startswith(old)}


# The comparison.


def measure(model, ids, images):
    """Return the logits, all gradients by the plain model's names, and the milliseconds of a forward and backward pass."""
    images = images.clone().requires_grad_()
    for _ in range(2):  # the first pass warms up
        model.zero_grad()
        images.grad, begin = None, time.perf_counter()
        logits = model(ids, images)
        F.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
        images.grad.sum().item()  # waits for a GPU
        milliseconds = (time.perf_counter() - begin) * 1e3
    gradients = {"images": images.grad}
    for name, parameter in model.named_parameters():
        for ours, plain in PLAIN_NAMES.items():
            name = name.replace(f".{ours}", f".{plain}")
        gradients[name] = parameter.grad
    return logits.detach(), gradients, milliseconds


def difference(actual, expected):
    """Return the largest difference over the largest expected value."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def report(what, result, expected):
    """Print one line of the table, and end the program if the differences are too large."""
    logits = difference(result[0], expected[0])
    gradients = max(difference(result[1][name], gradient) for name, gradient in expected[1].items())
    print(f"{what:<34}{logits:>10.1e}{gradients:>12.1e}{result[2]:>10.1f}")
    if not max(logits, gradients) < 1e-4:
        raise SystemExit(f"{what}: the differences are larger than 1e-4")


def compare(gate_size, device):
    """Plug our op and our block in, and take them out again."""
    model = PlainFlamingo(gate_size).to(device)
    ids = torch.randint(IMAGE_TOKEN, (ROWS, LENGTH), device=device)
    ids[0, [3, 17, 30]] = IMAGE_TOKEN  # text before the first picture sees none
    ids[1, [0, 20]] = IMAGE_TOKEN
    ids[2, 40] = IMAGE_TOKEN  # and the last row has no picture
    images = torch.randn(ROWS, IMAGES * TOKENS, VISUAL, device=device)
    original = measure(model, ids, images)
    report("as it was", original, original)

    # The attention alone, inside the plain blocks.
    for block in model.blocks:
        block.attend = our_attention
    report("our attention in its blocks", measure(model, ids, images), original)
    for block in model.blocks:
        block.attend = naive_attention

    # The whole block, with copies of the weights.
    plain = model.blocks
    model.blocks = nn.ModuleList(OurBlock(gate_size) for _ in plain).to(device)
    for ours, theirs in zip(model.blocks, plain, strict=True):
        ours.load_state_dict(renamed(theirs.state_dict(), OUR_NAMES))
    report("our blocks", measure(model, ids, images), original)

    # Folded for inference, and unfolded, which is exact.
    model.requires_grad_(False)
    before = model(ids, images)
    for ours in model.blocks:
        ours.block.fold()
    print(f"{'our blocks, folded for inference':<34}{difference(model(ids, images), original[0]):>10.1e}")
    for ours in model.blocks:
        ours.block.unfold()
    if not torch.equal(model(ids, images), before):
        raise SystemExit("unfolding did not restore the blocks")
    model.requires_grad_(True)

    # Back again, with the weights that our blocks have by now.
    for ours, theirs in zip(model.blocks, plain, strict=True):
        theirs.load_state_dict(renamed(ours.state_dict(), PLAIN_NAMES))
    model.blocks = plain
    restored = measure(model, ids, images)
    report("back again", restored, original)
    if not torch.equal(restored[0], original[0]):
        raise SystemExit("the model is not what it was")


def main() -> None:
    """Compare with a gate for each channel and with a single one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    for gate_size in (WIDTH, 1):
        print(f"gates of size {gate_size}, on {device}; largest relative differences, time of forward and backward")
        print(f"{'':<34}{'logits':>10}{'gradients':>12}{'ms':>10}")
        compare(gate_size, device)


if __name__ == "__main__":
    main()
