"""Stored runs, tables, plots and comparisons."""
