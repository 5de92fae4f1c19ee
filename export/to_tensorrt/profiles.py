"""Optimisation profiles: the shapes that an engine takes, made of named limits of the graphs' free axes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from infimm_fast.export.common.errors import LimitError
from infimm_fast.export.common.spec import AxisLimits, GraphSpec

Range = tuple[int, int, int]


@dataclass(frozen=True)
class Limits:
    """Smallest, usual and largest sizes of conversations about pictures; TensorRT tunes for the usual ones.

    What they mean for the axes of a model's graphs is up to its family. `Profile` names the axes themselves.

    Attributes:
        name: of the profile.
        tiles: sub-images and thumbnails of all pictures of a batch.
        batch: rows of text.
        text: tokens of one run of the decoder.
        past: tokens in the cache before it.
        pictures: tiles whose visual tokens the decoder reads; 0 for text only.
    """

    name: str
    tiles: Range = (1, 10, 40)
    batch: Range = (1, 1, 4)
    text: Range = (1, 256, 2048)
    past: Range = (0, 0, 2048)
    pictures: Range = (0, 10, 40)

    def __post_init__(self) -> None:
        for field in ("tiles", "batch", "text", "past", "pictures"):
            low, usual, high = getattr(self, field)
            if not 0 <= low <= usual <= high or (low == 0 and field in ("tiles", "batch", "text")):
                raise LimitError(f"profile {self.name}: {field}={low},{usual},{high} must be ordered and positive")


@dataclass(frozen=True)
class Profile:
    """One optimisation profile of one graph.

    Attributes:
        name: of the profile.
        axes: free axis -> (smallest, usual, largest) size.
    """

    name: str
    axes: dict[str, Range]

    def shapes(self, spec: GraphSpec) -> dict[str, tuple[tuple[int, ...], ...]]:
        """Return input -> its smallest, usual and largest shape."""
        return {
            tensor.name: tuple(tensor.sizes({axis: sizes[i] for axis, sizes in self.axes.items()}) for i in range(3))
            for tensor in spec.inputs
        }

    def holds(self, sizes: Mapping[str, int]) -> bool:
        """Return whether free axes of these sizes lie in the profile."""
        return all(self.axes[axis][0] <= size <= self.axes[axis][2] for axis, size in sizes.items())


# A prompt and a step of generation are tuned apart: one reads a few hundred tokens at once, the other reads one.
PRESETS: dict[str, tuple[Limits, ...]] = {
    "chat": (
        Limits("prompt"),
        Limits("step", text=(1, 1, 1), past=(1, 512, 4095)),
    ),
    "batch": (
        Limits("prompt", tiles=(1, 40, 160), batch=(1, 8, 16), pictures=(0, 40, 160)),
        Limits("step", tiles=(1, 40, 160), batch=(1, 8, 16), text=(1, 1, 1), past=(1, 512, 4095), pictures=(0, 40, 160)),
    ),
    "one-tile": (
        Limits("prompt", tiles=(1, 1, 4), batch=(1, 1, 1), text=(1, 64, 512), past=(0, 0, 512), pictures=(0, 1, 4)),
        Limits("step", tiles=(1, 1, 4), batch=(1, 1, 1), text=(1, 1, 1), past=(1, 128, 1023), pictures=(0, 1, 4)),
    ),
}


def resolve_profiles(profiles: str | Iterable[Limits | Profile]) -> tuple[Limits | Profile, ...]:
    """Return profiles by the name of a preset, or those given.

    Raises:
        LimitError: the name is not known, or there is no profile.
    """
    if isinstance(profiles, str):
        if profiles not in PRESETS:
            raise LimitError(f"profiles={profiles!r} is not known; choose one of {', '.join(PRESETS)}, or give Limits")
        return PRESETS[profiles]
    resolved = tuple(profiles)
    if not resolved:
        raise LimitError("profiles is empty; give a preset or at least one Limits or Profile")
    return resolved


def profiles_of(
    spec: GraphSpec, profiles: Iterable[Limits | Profile], ranges: Callable[[Limits], dict[str, Range]], declared: AxisLimits
) -> tuple[Profile, ...]:
    """Return the profiles of one graph: those of its own axes, without repetitions, cut to what the artifact declares.

    Args:
        spec: the graph.
        profiles: of the model.
        ranges: of every free axis, for limits; see `Family.axis_ranges`.
        declared: free axis -> (smallest, largest) size of the artifact.

    Raises:
        LimitError: a profile lies outside what the artifact declares, or does not know an axis of the graph.
    """
    found: dict[tuple, Profile] = {}
    for profile in profiles:
        known = profile.axes if isinstance(profile, Profile) else ranges(profile)
        missing = [axis for axis in spec.free_axes if axis not in known]
        if missing:
            raise LimitError(f"profile {profile.name} says nothing of {', '.join(missing)}, which the {spec.name} graph has")
        axes = {axis: _cut(profile.name, axis, known[axis], declared.get(axis)) for axis in spec.free_axes}
        found.setdefault(tuple(axes.items()), Profile(profile.name, axes))
    return tuple(found.values())


def _cut(profile: str, axis: str, sizes: Range, declared: tuple[int, int] | None) -> Range:
    if declared is None:
        return sizes
    low, high = declared
    if sizes[0] > high or sizes[2] < low:
        raise LimitError(
            f"profile {profile}: {axis} {sizes[0]} to {sizes[2]} lies outside {low} to {high}, the artifact's own"
        )
    return max(sizes[0], low), min(max(sizes[1], low), high), min(sizes[2], high)


def choose_profile(profiles: Iterable[Profile], spec: GraphSpec, sizes: Mapping[str, int]) -> int:
    """Return the index of the profile for free axes of these sizes: the one tuned for sizes nearest to them.

    Raises:
        LimitError: no profile holds them; the message says which axis is to blame, if it is one.
    """
    profiles = tuple(profiles)
    fitting = [index for index, profile in enumerate(profiles) if profile.holds(sizes)]
    if fitting:
        return min(fitting, key=lambda index: sum(abs(profiles[index].axes[axis][1] - size) for axis, size in sizes.items()))
    given = ", ".join(f"{axis}={size}" for axis, size in sorted(sizes.items()))
    taken = "; ".join(
        f"{profile.name}: " + ", ".join(f"{axis} {low} to {high}" for axis, (low, _, high) in profile.axes.items())
        for profile in profiles
    )
    raise LimitError(f"{given} lie outside every profile of the {spec.name} engine ({taken})")
