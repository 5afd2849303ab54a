"""Runs that are killed -9 at random instants, and what must be left of them."""
