"""Measurements that are kept: each prints a table, and what was found is dated in LOG.md."""
