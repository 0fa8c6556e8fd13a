"""What every room uses and no paper mentions: checks of arguments, whole files, processes, plots, pages.

Imports nothing else of fastphi. `validate` is where a bad argument is refused, `files` where every file
is written.
"""
