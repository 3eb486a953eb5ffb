"""Callbacks for the Lightning Trainer: each translates hooks into calls of the core, and none computes anything
itself."""
