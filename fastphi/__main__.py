"""`python -m fastphi`: the command line, also as `torchrun ... -m fastphi train ...`."""

from fastphi.cli.main import main

main()
