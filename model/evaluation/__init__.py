"""What a PaliGemma is worth: standard metrics on public data sets' own files."""
