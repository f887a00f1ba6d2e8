"""Reads the machine code of every GPU kernel and holds it against a checked-in budget; needs no GPU.

``python -m benchmarks.codecheck`` from the root of the tree, or ``make codecheck``. Kernels join by being found: all of
``csrc/cuda/*.cu``, and the ``variants()`` of every module in ``ltkernels/triton``.
"""
