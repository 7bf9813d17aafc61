"""Evaluation: standard metrics on public data sets in their own file formats."""
