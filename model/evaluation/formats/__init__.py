"""Public data sets' file formats, read as questions with references. Every entry is checked."""
