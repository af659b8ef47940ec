"""A study: budgets x sizes, planned, run on this machine's cores, and written as two tables."""
