"""Texts from a trained decoder."""
