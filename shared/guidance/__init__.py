"""Guidance: denoisers and solvers that follow energies, conditions, measurements and rewards."""

from shared.guidance.classifier_free import ClassifierFree
from shared.guidance.composition import Conditioned, Mixture, Product
from shared.guidance.editing import SDEdit, interpolate, truncate
from shared.guidance.energies import (
    AnyOf,
    Classifier,
    Energy,
    Faithful,
    Function,
    Realistic,
    Source,
    SquaredError,
    Sum,
    Within,
    low_pass,
)
from shared.guidance.guided import Guided, Interval, Term
from shared.guidance.inverse_problems import (
    GaussianNoise,
    Inpainting,
    Known,
    Measurement,
    Norm,
    PoissonNoise,
    RePaint,
    prior_spread,
)
from shared.guidance.steering import Steered

__all__ = [
    "AnyOf",
    "Classifier",
    "ClassifierFree",
    "Conditioned",
    "Energy",
    "Faithful",
    "Function",
    "GaussianNoise",
    "Guided",
    "Inpainting",
    "Interval",
    "Known",
    "Measurement",
    "Mixture",
    "Norm",
    "PoissonNoise",
    "Product",
    "RePaint",
    "Realistic",
    "SDEdit",
    "Source",
    "SquaredError",
    "Steered",
    "Sum",
    "Term",
    "Within",
    "interpolate",
    "low_pass",
    "prior_spread",
    "truncate",
]
