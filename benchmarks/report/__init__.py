"""What comes out: stored runs, tables, plots, comparisons."""
