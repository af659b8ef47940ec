"""What a run costs before it runs: arithmetic, the compiled peak of a TPU slice, the roofline."""
