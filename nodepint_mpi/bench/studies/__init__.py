"""Studies: runs that one command starts, one after the other; each is kept, and not made again.

`runs` says what is to be run and what of it is there, `kept` how a run is kept, `launch` how it is
started, `work` does what is lacking, and `rows` reads what the run directories hold. `scaling`,
`table` and `sweep` are the three studies: what is special to each.
"""
