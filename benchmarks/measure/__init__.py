"""Measuring: timing, the machine's ceilings, checking and running cases."""
