"""What GPU kernels of every op share: tickets for reductions in one launch, and the word they report bad values in."""

from __future__ import annotations

from threading import Lock, Thread

import torch
from torch import Tensor

# --- Tickets ---
#
# A sum over all blocks of a launch is finished by the block that comes last, which a counter in device memory tells.
# Whoever comes last puts it back to zero, so a counter is zeroed once and then serves call after call; only calls that
# run at the same time must not share one. Calls on one stream never do.

_lock = Lock()
_TICKETS = 1024
_POOL = 1 << 18
_of_stream: dict[tuple[int, int], Tensor] = {}
_of_graphs: dict[int, tuple[Tensor, int]] = {}


def tickets(device: torch.device, count: int = 1) -> Tensor:
    """At least ``count`` int32 zeros on ``device`` for a launch on its current stream, which has to leave zeros.

    A captured launch gets counters of its own, since its graph may be replayed beside anything: from memory that was
    zeroed before the capture where there is some left, or else zeroed by the graph.
    """
    if device.type != "cuda":  # kernels that are emulated or interpreted
        index, stream, capturing = -1, 0, False
    else:
        index = torch.cuda.current_device() if device.index is None else device.index
        stream = torch._C._cuda_getCurrentRawStream(index)
        capturing = torch.cuda.is_current_stream_capturing()
    if capturing:
        with _lock:
            pool, used = _of_graphs.get(index, (None, 0))
            if pool is not None and used + count <= pool.numel():
                _of_graphs[index] = (pool, used + count)
                return pool[used : used + count]
        return torch.zeros(count, dtype=torch.int32, device=device)
    found = _of_stream.get((index, stream))
    if found is None or found.numel() < count:
        with _lock:
            found = _of_stream[index, stream] = _lasting_zeros(max(count, _TICKETS), device)
            if index not in _of_graphs:
                _of_graphs[index] = (_lasting_zeros(_POOL, device), 0)
    return found


def _lasting_zeros(count: int, device: torch.device) -> Tensor:
    """Zeros that stay: a thread of its own allocates them, since this one's memory may come from a graph's pool.

    ``torch.compile(mode="reduce-overhead")`` warms up with such a pool, and refuses what outlives the warm-up in it.
    """
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    made: list[Tensor] = []

    def allocate() -> None:
        made.append(torch.zeros(count, dtype=torch.int32, device=device))

    thread = Thread(target=allocate)
    thread.start()
    thread.join()
    (zeros,) = made
    torch.cuda.current_stream(device).wait_stream(torch.cuda.default_stream(device))  # which the other thread used
    return zeros


# --- Reports ---

_LABEL_OUT_OF_RANGE, _LABEL_OF_ABSENT_CLASS, _FOREIGN_STATE, LABEL_NOT_COUNTED, PREDICTION_NOT_COUNTED = range(1, 6)
_words: dict[int, Tensor] = {}


def error_word(device: torch.device) -> Tensor:
    """One int32 in pinned memory, which kernels on ``device`` write to and the host reads without waiting for them."""
    index = -1 if device.type != "cuda" else torch.cuda.current_device() if device.index is None else device.index
    word = _words.get(index)
    if word is None:
        word = _words[index] = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
    return word


def check() -> None:
    """Raise if a kernel that has run on a GPU found a label that it could not use.

    Labels on a GPU are not looked at when a loss is called, for that would wait for the device. The kernel gives the
    row a NaN loss, or does not count it, and leaves a note, which the next eager call and this function report. This
    does not wait either: it sees what has run by now, everything after ``torch.cuda.synchronize()``. Reported once, the
    note is gone.

    Raises:
        IndexError: a label outside ``[0, C)`` that is not ``ignore_index``.
        ValueError: a label of a class whose ``class_bias`` is -inf: one without training samples.
        RuntimeError: a backward that was given the state of another backend's forward.

    Example:
        >>> import ltkernels as ltk
        >>> ltk.check()  # nothing to report
    """
    for index, word in list(_words.items()):  # another thread may add one
        code = word.item()
        if code == 0:
            continue
        word.zero_()
        place = f"in an earlier call on {f'cuda:{index}' if index >= 0 else 'an emulated GPU'}"
        where = f"{place}; its row's loss is NaN"
        if code == _LABEL_OUT_OF_RANGE:
            raise IndexError(f"target: expected labels in [0, C) or ignore_index, found another {where}")
        if code == _LABEL_OF_ABSENT_CLASS:
            raise ValueError(
                "target: expected labels of classes with a finite class_bias, found a class with class_bias -inf"
                f" (a class without training samples) {where}"
            )
        if code == LABEL_NOT_COUNTED:
            raise IndexError(
                f"target: expected labels in [0, C) or ignore_index, found another {place}; its row is not counted"
            )
        if code == PREDICTION_NOT_COUNTED:
            raise IndexError(
                f"input: expected predicted labels in [0, C), found another {place}; its row is not counted"
            )
        raise RuntimeError(
            "backward: expected the state of a forward on the same backend, found another's (was use_backend called"
            " between the two?); the gradient is NaN"
        )
