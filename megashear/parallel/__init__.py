"""Ranks, groups and devices: the only package that knows them."""
