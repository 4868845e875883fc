"""Fits curves to measured points: everything that Shardwright does not have for it."""
