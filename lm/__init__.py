"""From a pile of text, to a trustworthy scaling law, to a run that is known to fit."""

__version__ = "0.1.0"
