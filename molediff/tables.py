"""Bond lengths and valences as data.

Lengths in pm and valences are those of EDM (Hoogeboom et al. 2022, ``qm9/bond_analyze.py``), taken
there from tables of common bond lengths. The reference valences are those of the GEOM-Drugs
evaluation of Nikitin et al. 2025 (isayevlab/geom-drugs-3dgen-evaluation).
"""

from __future__ import annotations

import re

import numpy as np

from molediff.molecules import atomic_number

_SINGLE = """
H-H74 H-C109 H-N101 H-O96 H-F92 H-B119 H-Si148 H-P144 H-As152 H-S134 H-Cl127 H-Br141 H-I161
C-C154 C-N147 C-O143 C-F135 C-Si185 C-P184 C-S182 C-Cl177 C-Br194 C-I214
N-N145 N-O140 N-F136 N-Cl175 N-Br214 N-S168 N-I222 N-P177
O-O148 O-F142 O-Br172 O-S151 O-P163 O-Si163 O-Cl164 O-I194
F-F142 F-S158 F-Si160 F-Cl166 F-Br178 F-P156 F-I187
B-Cl175 Si-Si233 Si-S200 Si-Cl202 Si-Br215 Si-I243 Cl-Cl199 Cl-P203 Cl-S207 Cl-Br214
S-S204 S-Br225 S-P210 S-I234 Br-Br228 Br-P222 P-P221 I-I266
"""
_DOUBLE = "C-C134 C-N129 C-O120 C-S160 N-N125 N-O121 O-O121 O-P150 P-S186"
_TRIPLE = "C-C120 C-N116 C-O113 N-N110"

EDM_MARGINS_PM = (10, 5, 3)
"""Added to single, double and triple lengths; tuned by EDM's authors on real QM9."""


def _thresholds() -> np.ndarray:
    table = np.full((3, 119, 119), -np.inf)
    for order, lengths in enumerate((_SINGLE, _DOUBLE, _TRIPLE)):
        for a, b, length in re.findall(r"([A-Z][a-z]?)-([A-Z][a-z]?)(\d+)", lengths):
            i, j = atomic_number(a), atomic_number(b)
            table[order, i, j] = table[order, j, i] = int(length) + EDM_MARGINS_PM[order]
    table.setflags(write=False)
    return table


EDM_THRESHOLDS_PM = _thresholds()
"""[3, 119, 119]: a pair has at least bond order k where it is closer than entry [k-1]; minus
infinity where the table has no such bond. Entries fall with the order, so counting the satisfied
ones gives EDM's nested rule."""

_EDM_VALENCES = {
    "H": (1,), "C": (4,), "N": (3,), "O": (2,), "F": (1,), "B": (3,), "Al": (3,), "Si": (4,),
    "P": (3, 5), "S": (4,), "Cl": (1,), "As": (3,), "Br": (1,), "I": (1,), "Hg": (1, 2),
    "Bi": (3, 5),
}  # fmt: skip
EDM_VALENCE_OK = np.zeros((119, 256), dtype=bool)
"""[119, 256]: whether an element is stable with this sum of bond orders."""
for _symbol, _valences in _EDM_VALENCES.items():
    EDM_VALENCE_OK[atomic_number(_symbol), list(_valences)] = True
EDM_VALENCE_OK.setflags(write=False)

_REFERENCE = """
H 0 0,1
C 0 0,4 2,2 2,1 3,0 | C +1 0,3 2,1 3,0 | C -1 0,3 2,1 3,0
N 0 0,3 2,0 2,1 3,0 | N +1 0,4 2,0 2,1 2,2 3,0 | N -1 0,2 2,0 | N -2 0,1
O 0 0,2 2,0 | O -1 0,1 | O +1 0,3
F 0 0,1
S 0 0,2 0,3 0,6 2,0 | S +1 0,3 2,0 2,1 3,0 | S +2 0,4 2,1 2,2 | S +3 0,2 0,5 | S -1 0,1
P 0 0,3 0,5 | P +1 0,4
Cl 0 0,1 | Cl +1 0,2 | Br 0 0,1 | Br +1 0,2
I 0 0,1 | I +1 0,2 | I +2 0,3
Si 0 0,4 | Si +1 0,5
B -1 0,4 | B 0 0,3
Bi 0 0,3 | Bi +2 0,5
"""


def _reference_valences() -> dict[tuple[int, int], frozenset[tuple[int, int]]]:
    table = {}
    for entry in re.split(r"[|\n]", _REFERENCE.strip()):
        symbol, charge, *states = entry.split()
        pairs = [state.split(",") for state in states]
        allowed = frozenset((int(aromatic), int(total)) for aromatic, total in pairs)
        table[atomic_number(symbol), int(charge)] = allowed
    return table


REFERENCE_VALENCES = _reference_valences()
"""(atomic number, formal charge) -> allowed (aromatic bonds, sum of the other bond orders)."""
