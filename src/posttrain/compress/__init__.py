"""Smaller models: rounding weights to few bits, and leaving weights out."""
