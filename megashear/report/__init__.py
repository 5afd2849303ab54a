"""What a checkpoint or a run holds, for people to look at: tables, figures, a page."""
