"""Inverse design: from wishes to molecules in files, judged by methods that did not steer."""

from molediff.design.judging import Design
from molediff.design.run import Designs, design
from molediff.design.wishes import Wish

__all__ = ["Design", "Designs", "Wish", "design"]
