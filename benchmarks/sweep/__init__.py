"""Tasks × bundles × engines × seeds, tuned, scored on the test rows, and put into one table."""
