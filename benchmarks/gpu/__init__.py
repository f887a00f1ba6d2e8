"""``make gpu``: everything that needs a GPU, on a machine with one where nothing can be installed.

::

    python -m benchmarks.gpu                            all stages, results into benchmarks/results
    python -m benchmarks.gpu --stages build,bench --only 1000 --out /tmp/gpu
    python -m benchmarks.gpu --dry-run                  the same Python on the CPU, on tiny batches: proves that it runs
    python -m benchmarks.gpu --load FILE                the tables of a result file again
    python -m benchmarks.gpu --winners FILE             the faster backend by type and number of classes, to paste

Run it from the root of a source tree. One idea a file:

* ``__main__``: command line; ends with the summary;
* ``stages``: what is run, each stage in processes of its own within a budget, so that none hides another;
* ``sanitize``: a small program over every kernel path for compute-sanitizer;
* ``table``: what the benchmark needs to know of an op; **a new hot path joins by one entry in ``ops.py``**;
* ``cross_entropy``: that entry for cross_entropy: shapes, losses, forms, truth, bytes;
* ``timing``: CUDA graphs and events, and their stand-ins for a dry run;
* ``measure``: checks and times one case after the other and writes records;
* ``bench``: compiles ahead in parallel, then runs ``measure``, again after a crash;
* ``figures``: what the issue asks for, beside what was found;
* ``summary``: tables, plot and the winners.
"""
