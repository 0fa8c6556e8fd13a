"""What every room uses and no paper mentions: checks of arguments, whole files, processes, ranks, plots,
pages.

Imports nothing else of fastphi but its version. `validate` is where a bad argument is refused, `files`
where every file is written.
"""
