"""`python -m fastphi.demo`, which `make demo` calls."""

from fastphi.demo.demo import main

main()
