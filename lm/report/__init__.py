"""Figures and the self-contained page of a study's fits."""
