"""The ops and stages that are measured; every module here is imported by `infimm_fast.benchmarks.registry.load_suites`."""
