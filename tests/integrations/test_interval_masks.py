"""Dense masks to intervals and back; one look at each mask tensor, none too few."""

import gc

import pytest
import torch

from infimm_fast.integrations import interval_masks
from infimm_fast.integrations.interval_masks import intervals_of_mask, mask_of_intervals, pack_intervals, read_mask

ROWS, LENGTH, KEYS = 3, 40, 23


def random_intervals(seed=0):
    """Canonical intervals, with empty and full ones, and ones at either end."""
    generator = torch.Generator().manual_seed(seed)
    kv_range = torch.randint(0, KEYS + 1, (ROWS, LENGTH, 2), generator=generator).sort(dim=-1).values
    kv_range[0, :4] = torch.tensor([[0, 0], [0, KEYS], [0, 1], [KEYS - 1, KEYS]])
    kv_range[1] *= torch.randint(0, 2, (LENGTH, 1), generator=generator)
    return kv_range.masked_fill(kv_range[..., :1] == kv_range[..., 1:], 0)


def additive(mask, hidden, dtype=torch.float32):
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, hidden)


@pytest.mark.parametrize("seed", range(5))
def test_round_trip(seed):
    kv_range = random_intervals(seed)
    mask = mask_of_intervals(kv_range, KEYS)
    assert mask.shape == (ROWS, 1, LENGTH, KEYS) and mask.dtype == torch.bool
    for row, token in ((0, 1), (2, 5), (2, 39)):
        seen = [key for key in range(KEYS) if kv_range[row, token, 0] <= key < kv_range[row, token, 1]]
        assert mask[row, 0, token].nonzero().flatten().tolist() == seen
    assert torch.equal(intervals_of_mask(mask), kv_range)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for hidden in (float("-inf"), torch.finfo(dtype).min, torch.finfo(dtype).min * 0.75):
            assert torch.equal(intervals_of_mask(additive(mask, hidden, dtype)), kv_range)


@pytest.mark.parametrize("seed", range(5))
def test_one_hole_anywhere_is_found(seed):
    mask = mask_of_intervals(random_intervals(seed), KEYS)
    lengths = mask.sum(-1, keepdim=True)
    row, _, token = (lengths[..., 0] >= 3).nonzero()[seed].tolist()
    start = int(mask[row, 0, token].int().argmax())
    mask[row, 0, token, start + 1] = False
    assert intervals_of_mask(mask) is None
    assert intervals_of_mask(additive(mask, float("-inf"))) is None
    mask[row, 0, token, start] = False  # now the interval starts later
    assert intervals_of_mask(mask) is not None


def test_views_and_broadcast_masks():
    mask = mask_of_intervals(random_intervals(), KEYS)
    transposed = mask.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(intervals_of_mask(transposed), random_intervals())
    padding = mask_of_intervals(torch.tensor([[[0, 5]], [[2, 23]]]), KEYS)  # [2, 1, 1, S]
    assert intervals_of_mask(padding.expand(2, 1, 7, KEYS))[:, 3].tolist() == [[0, 5], [2, 23]]
    assert intervals_of_mask(padding).tolist() == [[[0, 5]], [[2, 23]]]
    assert intervals_of_mask(mask[..., :0]).tolist() == torch.zeros(ROWS, LENGTH, 2).tolist()


def test_what_is_no_interval_mask():
    mask = mask_of_intervals(random_intervals(), KEYS)
    floating = additive(mask, float("-inf"))
    assert intervals_of_mask(mask.expand(-1, 2, -1, -1)) is None  # of several heads
    assert intervals_of_mask(mask[:, 0]) is None
    assert intervals_of_mask(mask.long()) is None
    for value in (1.0, -1e4, float("nan"), float("inf")):  # a bias
        biased = floating.clone()
        biased[0, 0, 1, 7] = value
        assert intervals_of_mask(biased) is None


def test_rows_hidden_by_finite_numbers_are_told_apart():
    mask = mask_of_intervals(random_intervals(), KEYS)
    assert not read_mask(mask).averages and not read_mask(additive(mask, float("-inf"))).averages
    assert read_mask(additive(mask, torch.finfo(torch.float32).min)).averages
    seen = mask_of_intervals(torch.tensor([[[0, 5], [3, 9]]]), KEYS)
    assert not read_mask(additive(seen, torch.finfo(torch.float32).min)).averages


def test_packed_intervals_stay_in_their_row():
    kv_range = torch.tensor([[[0, 3], [2, 99]], [[-5, 2], [4, 4]]], dtype=torch.int32)
    packed = pack_intervals(kv_range, 10)
    assert packed.tolist() == [[[0, 3], [2, 10]], [[10, 12], [14, 14]]]
    assert packed.dtype == torch.int32


@pytest.fixture
def analyses(monkeypatch):
    """Masks that were really looked at."""
    seen = []
    analyse = interval_masks._analyse
    monkeypatch.setattr(interval_masks, "_analyse", lambda mask: seen.append(mask.shape) or analyse(mask))
    return seen


def test_a_mask_is_read_once(analyses):
    mask = mask_of_intervals(random_intervals(), KEYS)
    results = [read_mask(mask) for _ in range(8)]
    assert len(analyses) == 1 and all(result is results[0] for result in results)
    assert read_mask(mask.clone()) is not results[0] and len(analyses) == 2  # equal, but another tensor


def test_a_mask_changed_in_place_is_read_again(analyses):
    mask = mask_of_intervals(random_intervals(), KEYS)
    read_mask(mask)
    mask[0, 0, 0, :2] = True
    assert read_mask(mask).kv_range[0, 0].tolist() == [0, 2]
    mask.view(-1)[2] = True  # through a view
    assert read_mask(mask).kv_range[0, 0].tolist() == [0, 3]
    mask[0, 0, 0, 9] = True
    assert read_mask(mask).kv_range is None
    assert len(analyses) == 4


def test_inference_tensors_do_not_count_their_changes_and_are_read_each_time(analyses):
    with torch.inference_mode():
        mask = mask_of_intervals(random_intervals(), KEYS)
        read_mask(mask)
        mask[0, 0, 0, :2] = True
        assert read_mask(mask).kv_range[0, 0].tolist() == [0, 2]
    assert len(analyses) == 2


def test_nothing_is_kept_of_a_dead_mask(analyses):
    gc.collect()
    before = len(interval_masks._known_masks)
    for start in range(20):  # most get the address of the one before
        mask = mask_of_intervals(torch.tensor([[[start, KEYS]]]), KEYS)
        assert read_mask(mask).kv_range.tolist() == [[[start, KEYS]]]
        assert len(interval_masks._known_masks) == before + 1
        del mask
    assert len(interval_masks._known_masks) == before and len(analyses) == 20
