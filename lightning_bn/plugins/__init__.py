"""Plugins for Lightning's Trainer; each translates what Lightning asks for into calls of the core."""
