"""What a run will need: memory, time, layouts; arithmetic only."""
