"""How it is measured: timing, the machine's ceilings, checking and running cases."""
