"""Tuning of the kernels' launch configurations where a GPU is at hand for minutes only.

`plan` compiles candidates and predicts their times without a GPU, `run` checks and times them on one, `report` writes
``benchmarks/TUNING.md``. Nothing chooses a configuration by itself: a table row changes by hand, with its reason.
"""
