"""Runs that one command starts, one after the other; each is kept, and not made again."""
