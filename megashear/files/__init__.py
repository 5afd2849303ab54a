"""Files that others made: opened as regular files only, read within bounds."""
