"""`python -m nodepint_mpi`, the same as the command `nodepint`."""

from nodepint_mpi.cli.main import main

if __name__ == "__main__":
    main()
