"""Images from noise (§2.3): Algorithm 1 with and without a target, and Algorithm 2, which moves images
until their φ is the target's.

reconstruction, sampler: Algorithm 1 as users call it, and its two loops; guidance: Algorithm 2. plan: what
decides the result; record: what the steps did; result: what comes out, and its file.
"""

from fastphi.sampling.guidance import MatchResult, match_phi
from fastphi.sampling.reconstruction import reconstruct
from fastphi.sampling.record import StepInfo
from fastphi.sampling.result import Reconstruction
from fastphi.sampling.sampler import sample

__all__ = ["MatchResult", "Reconstruction", "StepInfo", "match_phi", "reconstruct", "sample"]
