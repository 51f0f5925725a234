"""Watchers of a run: they know events and nothing else of this package."""
