"""A study of seconds."""

from fastphi.study import Settings

TINY = Settings(
    images=60,
    few=20,
    draws=2,
    levels=(0.0, 0.2, 0.5, 1.0),
    clusters=3,
    targets=2,
    copies=8,
    steps=3,
    pairs_of=3,
    paths=1,
    pair_steps=3,
)
