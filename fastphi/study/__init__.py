"""`fastphi analyze`: every analysis of one model and one data set, judged by the paper's claims.

material: what the stages share; stages: one analysis each; study: runs them, and goes on where it stopped;
record: a result on disk. claim, claims: the verdict rules; report, explorer: the pages.
"""

from fastphi.study.material import QUICK, Settings
from fastphi.study.study import Study

__all__ = ["QUICK", "Settings", "Study"]
