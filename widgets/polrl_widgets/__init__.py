"""The live lab of polrl: sliders made from knobs, curves and pictures that move while a method trains.

`Lab(NoiseMask())` in a notebook cell is the whole interface.
"""

from .gallery import Gallery
from .glossary import Glossary
from .lab import Lab, front_end
from .map import Kinds, Symptoms
from .still import Still, still
from .teaching import Predict, start, study_picture

if front_end() == "live":
    # torch imports this with the first optimizer, which takes a second: better here than between a cell and its lab.
    import torch._dynamo  # noqa: F401

__all__ = [
    "Gallery",
    "Glossary",
    "Kinds",
    "Lab",
    "Predict",
    "Still",
    "Symptoms",
    "start",
    "still",
    "study_picture",
]
