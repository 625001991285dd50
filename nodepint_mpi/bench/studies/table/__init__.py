"""`nodepint bench table`: problems trained to their end, by plain diffrax and by nodepint_mpi."""
