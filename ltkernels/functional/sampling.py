"""The samples at positions of a class-balanced stream."""

from __future__ import annotations

import torch
from torch import Tensor

from ltkernels import arguments as arg
from ltkernels.class_draws import AliasTable, ClassRounds
from ltkernels.class_index import ClassIndex
from ltkernels.ops import sampling as _sampling


def sample_indices(
    class_index: ClassIndex,
    start: int | Tensor,
    stop: int | None = None,
    step: int = 1,
    *,
    seed: int,
    epoch: int | Tensor = 0,
    class_probs: Tensor | AliasTable | ClassRounds | None = None,
    replacement: bool = True,
    num_samples: int | None = None,
) -> Tensor:
    r"""The samples at positions of a class-balanced stream: a pure function of (seed, epoch, position).

    What is at a position does not depend on the call that asks for it, on the device or on the backend. So a stream is
    resumed at any position at once, and rank r of W that takes positions r, r + W, ... has its part of the one stream.

    * With replacement, a position draws a class with the given probabilities, then one of its members.
    * Without replacement, classes are dealt in rounds (every class once, or in proportion to ``class_probs``), shuffled
      within the round, and every member of a class comes once before any comes twice, in an order that is random anew
      each time.

    A sampler for a ``DataLoader`` is :class:`ltkernels.samplers.LongTailSampler`.

    Args:
        class_index: the samples of each class, on the device where the result is wanted.
        start: the first position, >= 0; an int, or a 0-d int64 tensor on that device, which is read when the kernel
            runs: a captured graph that adds to it goes on in the stream at every replay.
        stop: the position before which to end, >= ``start``.
        step: distance of the positions, >= 1.
        seed: which stream; an integer of 64 bits.
        epoch: another stream of the same seed; an int in [0, 2^32) or a 0-d int64 tensor on the device.
        class_probs: with replacement, how probable the classes are relative to one another, ``(C,)``, finite and >= 0,
            or an :class:`~ltkernels.samplers.AliasTable` made of it, which saves making it in this call. Without
            replacement the same or a :class:`~ltkernels.samplers.ClassRounds`. Default: all classes alike.
        replacement: whether members are drawn with replacement.
        num_samples: how many positions, instead of ``stop``.

    Returns:
        int64 tensor ``(n,)`` on the device of ``class_index``.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong value, shape or device; a class that can come and has no member.

    Example:
        >>> import ltkernels as ltk
        >>> index = ltk.samplers.ClassIndex([0, 0, 0, 0, 0, 0, 1, 2, 1])
        >>> ltk.functional.sample_indices(index, 0, 6, seed=1, replacement=False).tolist()  # two rounds of classes
        [7, 2, 6, 7, 1, 8]
        >>> ltk.functional.sample_indices(index, 1, 6, 2, seed=1, replacement=False).tolist()  # the second of two ranks
        [2, 7, 8]

    Source:
        Philox4x32-10: Salmon et al. 2011. Alias tables: Walker 1977, Vose 1991.
    """
    if not isinstance(class_index, ClassIndex):
        raise TypeError(f"class_index: expected a ltkernels.samplers.ClassIndex, found {type(class_index).__name__}")
    if not isinstance(replacement, bool):
        raise TypeError(f"replacement: expected a bool, found {replacement!r}")
    device = class_index.offsets.device
    step = arg.integer("step", step)
    if step < 1:
        raise ValueError(f"step: expected >= 1, found {step}")
    start, start_at = arg.position("start", start, device, 2**63)
    epoch, epoch_at = arg.position("epoch", epoch, device, 2**32)
    count = _count(start, start_at, stop, step, num_samples)
    table, rounds = _class_draws(class_index, class_probs, replacement)
    slots, quotas = (None, None) if rounds is None else (rounds.slots, rounds.quotas)
    if rounds is not None:
        groups, draws, distinct = rounds.groups, rounds.draws, rounds.distinct
    else:
        groups, draws, distinct = (0 if replacement else class_index.num_classes), 1, False
    return _sampling.sample_indices(
        class_index.offsets, class_index.members, None if table is None else table.entries, slots, quotas, start_at,
        epoch_at, class_index.num_classes, groups, draws, distinct, arg.integer("seed", seed), epoch, start, step,
        count,
    )  # fmt: skip


def _count(start: int, start_at: Tensor | None, stop: int | None, step: int, num_samples: int | None) -> int:
    if (stop is None) == (num_samples is None):
        raise ValueError(f"stop: expected stop or num_samples, found {stop=} and {num_samples=}")
    if stop is None:
        count = arg.integer("num_samples", num_samples)  # type: ignore[arg-type]
        if count < 0:
            raise ValueError(f"num_samples: expected >= 0, found {count}")
    else:
        stop = arg.integer("stop", stop)
        if start_at is not None:
            raise ValueError(f"stop: expected None with a tensor as start (give num_samples), found {stop}")
        if stop < start:
            raise ValueError(f"stop: expected >= start, which is {start}, found {stop}")
        count = -((start - stop) // step)
    if count and start + (count - 1) * step >= 2**63:
        raise ValueError(f"num_samples: expected positions below 2^63, found {start + (count - 1) * step}")
    return count


def _class_draws(
    class_index: ClassIndex, class_probs: Tensor | AliasTable | ClassRounds | None, replacement: bool
) -> tuple[AliasTable | None, ClassRounds | None]:
    """How classes come, if not all with the same probability; both None where they do."""
    wanted: type[AliasTable] | type[ClassRounds] = AliasTable if replacement else ClassRounds
    classes, device = class_index.num_classes, class_index.offsets.device
    if class_probs is None:
        _check_members(class_index, None)
        return None, None
    if isinstance(class_probs, Tensor):
        if class_probs.device.type != "cpu":
            raise ValueError(
                f"class_probs: expected a tensor on the CPU, or {wanted.__name__}(...).to(device), found a tensor on"
                f" {class_probs.device}"
            )
        class_probs = AliasTable(class_probs) if replacement else ClassRounds(classes, class_probs)
        class_probs = class_probs.to(device)
    if not isinstance(class_probs, wanted):
        raise TypeError(
            f"class_probs: expected None, a torch.Tensor or {wanted.__name__} with replacement={replacement}, found"
            f" {type(class_probs).__name__}"
        )
    has_tables = not isinstance(class_probs, ClassRounds) or class_probs.slots is not None
    if class_probs.num_classes != classes or (has_tables and class_probs.device != device):
        raise ValueError(
            f"class_probs: expected {classes} classes on {device} as class_index has, found {class_probs.num_classes}"
            f" on {class_probs.device}"
        )
    _check_members(class_index, class_probs)
    return (class_probs, None) if isinstance(class_probs, AliasTable) else (None, class_probs)


def _check_members(class_index: ClassIndex, class_draws: AliasTable | ClassRounds | None) -> None:
    """Refuses classes that can be drawn and have no member."""
    if torch.compiler.is_compiling() or not class_index.has_empty_classes:
        return
    empty = class_index.class_counts == 0
    if class_draws is not None:
        empty &= class_draws.drawn
    if empty.any():
        raise ValueError(
            "class_index: expected a member of every class that can be drawn, found none of class"
            f" {int(empty.nonzero()[0])}; give it probability 0 in class_probs"
        )
