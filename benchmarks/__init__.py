"""Timings of rnnfast against torch.nn, each printed beside the floor the machine sets.

Run ``python -m benchmarks.run`` from the repository root, then ``python -m benchmarks.report`` to
turn its JSON into the tables of the documentation. Nothing here is part of the installed package.
"""
