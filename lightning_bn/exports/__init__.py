"""Programs that a model was exported to: what became of its batch norms."""
