"""`nodepint scaling`: the same few steps on more and more ranks, and what comes of it."""
