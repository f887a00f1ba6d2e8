"""Types of the programs' command-line arguments."""

from __future__ import annotations

import argparse


def at_least_one(text: str) -> int:
    """A whole number >= 1."""
    number = int(text) if text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number >= 1, found {text!r}")
    return number
