"""The command line: `main` has a function per command, and what a wrong input ends with; `samples` the
options of the two commands that make images; `commands` what the longer ones do; `doctor` is
`fastphi doctor`.
"""
