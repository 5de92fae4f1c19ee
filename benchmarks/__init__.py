"""Benchmarks and offline checks of the kernels; installs as ``infimm_fast.benchmarks``."""
