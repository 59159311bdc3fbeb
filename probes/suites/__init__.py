"""The nine suites, one file each."""
