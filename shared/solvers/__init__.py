"""Solvers: one file per family, all tables but the adaptive ones."""

from shared.solvers.deis import DEIS as DEIS
from shared.solvers.dpm_solver import DPMSolverMultistep as DPMSolverMultistep
from shared.solvers.dpm_solver import DPMSolverSDE as DPMSolverSDE
from shared.solvers.dpm_solver import DPMSolverSinglestep as DPMSolverSinglestep
from shared.solvers.grids import GivenTimes as GivenTimes
from shared.solvers.grids import KarrasTimes as KarrasTimes
from shared.solvers.grids import LogSNRTimes as LogSNRTimes
from shared.solvers.grids import PowerTimes as PowerTimes
from shared.solvers.unipc import UniPC as UniPC
