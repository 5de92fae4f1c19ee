"""Checks and times candidates for a kernel's launch configuration on a GPU, and says which one wins.

Nothing changes a configuration by itself: a table's row changes by hand, with its reason.
"""
