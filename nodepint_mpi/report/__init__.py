"""What a run came to, on a page: one small function for every section, listed in `build.py`."""
