"""Opens artifacts: the table of providers, and `load`."""
