"""Tasks as data: task files, rows, few-shot splits, and how a row is written for a backbone."""
