"""One run: the compiled step, its schedule and optimizer, and the loop around them."""
