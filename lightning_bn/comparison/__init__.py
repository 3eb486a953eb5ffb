"""Several averages of the same batches in one run, and which of them did best."""
