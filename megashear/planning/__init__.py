"""Plans of runs: memory, time and layouts, by arithmetic alone."""
