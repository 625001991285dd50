"""`nodepint bench table`: problems trained to their end, by plain diffrax and by us."""
