"""Images from noise (§2.3): Algorithm 1 with and without a target, and Algorithm 2, which moves images
until their φ is the target's.

reconstruction, prior: Algorithm 1 as users call it; sampler: its two forms; guidance: Algorithm 2.
run: the steps, stored and gone on from; plan: what decides the result; record: what the steps did;
result: what comes out, and its file; parts: those that ranks make.
"""

from fastphi.sampling.guidance import MatchResult, match_phi
from fastphi.sampling.prior import sample
from fastphi.sampling.reconstruction import reconstruct
from fastphi.sampling.record import StepInfo
from fastphi.sampling.result import Reconstruction

__all__ = ["MatchResult", "Reconstruction", "StepInfo", "match_phi", "reconstruct", "sample"]
