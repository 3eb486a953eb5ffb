"""Several sets of running statistics for one network; see `docs/sets.md`."""
