"""The benchmark: every loss, and sampling, against what people use today, on the machine at hand.

``ltkernels bench`` runs it from an installed package; ``benchmarks/`` in the source tree holds what it measured and
how to read it. One idea a file:

* ``scenarios``: batch shapes and inputs;
* ``peers``: the losses and the forms they are compared with;
* ``sampling``: class-balanced sampling and what it is compared with;
* ``peers_crt``: a whole step of training a classifier on cached features;
* ``peers_accuracy_counts``: the counts of an evaluation and how they are made today;
* ``device``: timing, memory and name of a machine;
* ``runner``: equality first, then interleaved rounds, then records;
* ``targets``: the figures this project sets itself;
* ``report``: JSON Lines, tables, README figures;
* ``plot``: pictures of a run;
* ``command``: the command line.
"""

from __future__ import annotations

from ltkernels.bench.command import main

__all__ = ["main"]
