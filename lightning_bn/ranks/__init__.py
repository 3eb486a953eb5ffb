"""Several processes: what they agree on, and batch norm over the batches of all of them."""
