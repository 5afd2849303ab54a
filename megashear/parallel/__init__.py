"""Ranks, groups and devices: only this package knows them."""
