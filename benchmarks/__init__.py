"""Benchmarks and offline checks of the kernels and of the model; installs as ``infimm_fast.benchmarks``."""

# In the order in which cases of equal importance run: where time is short, the last ones are left out.
SECTIONS = ("ops", "vision", "e2e", "cross", "preprocess", "decode", "prefill", "export")
