"""Room docstring to be written."""
