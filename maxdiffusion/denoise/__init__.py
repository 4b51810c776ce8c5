"""The denoise loop and the strategies that vary it: schedule, solver, guidance, experts, cache."""

from maxdiffusion.denoise.caches import Cache, NoCache
from maxdiffusion.denoise.experts import Experts, Segment, SingleExpert, TwoExperts
from maxdiffusion.denoise.guidance import BatchedGuidance, Contexts, Guidance, NoGuidance, TwoPassGuidance
from maxdiffusion.denoise.loop import Denoiser, Program, State
from maxdiffusion.denoise.network import Network, Predict, split
from maxdiffusion.denoise.noise import noise
from maxdiffusion.denoise.schedule import Schedule
from maxdiffusion.denoise.solvers import SOLVERS, DPMpp2M, Euler, Solver, UniPC

__all__ = [
    "SOLVERS",
    "BatchedGuidance",
    "Cache",
    "Contexts",
    "DPMpp2M",
    "Denoiser",
    "Euler",
    "Experts",
    "Guidance",
    "Network",
    "NoCache",
    "NoGuidance",
    "Predict",
    "Program",
    "Schedule",
    "Segment",
    "SingleExpert",
    "Solver",
    "State",
    "TwoExperts",
    "TwoPassGuidance",
    "UniPC",
    "noise",
    "split",
]
