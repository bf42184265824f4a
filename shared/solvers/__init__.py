"""Solvers: one file per family, all tables but the adaptive ones."""

from shared.solvers.ancestral import DDIM as DDIM
from shared.solvers.ancestral import DDPM as DDPM
from shared.solvers.ancestral import DDIMInversion as DDIMInversion
from shared.solvers.deis import DEIS as DEIS
from shared.solvers.dpm_solver import DPMSolverMultistep as DPMSolverMultistep
from shared.solvers.dpm_solver import DPMSolverSDE as DPMSolverSDE
from shared.solvers.dpm_solver import DPMSolverSinglestep as DPMSolverSinglestep
from shared.solvers.grids import GivenTimes as GivenTimes
from shared.solvers.grids import KarrasTimes as KarrasTimes
from shared.solvers.grids import LogSNRTimes as LogSNRTimes
from shared.solvers.grids import PowerTimes as PowerTimes
from shared.solvers.karras import DPM2 as DPM2
from shared.solvers.karras import LMS as LMS
from shared.solvers.karras import DPMpp2SAncestral as DPMpp2SAncestral
from shared.solvers.karras import Euler as Euler
from shared.solvers.karras import Heun as Heun
from shared.solvers.langevin import AncestralSDE as AncestralSDE
from shared.solvers.langevin import EulerMaruyama as EulerMaruyama
from shared.solvers.langevin import Langevin as Langevin
from shared.solvers.langevin import PredictorCorrector as PredictorCorrector
from shared.solvers.langevin import ReverseDiffusion as ReverseDiffusion
from shared.solvers.langevin import ScoreSDETimes as ScoreSDETimes
from shared.solvers.search import FastDPMTimes as FastDPMTimes
from shared.solvers.search import LeastCostTimes as LeastCostTimes
from shared.solvers.search import TableTimes as TableTimes
from shared.solvers.unipc import UniPC as UniPC
