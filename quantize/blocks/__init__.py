"""Blocks of float models as integers: one module for each mixer."""
