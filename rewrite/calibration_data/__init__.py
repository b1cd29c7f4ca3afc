"""Data to calibrate on: sets of inputs made of arrays, text or images, one in memory at a time.

    files.py     which files a path holds, and of which kind      arrays.py   .npz
    text.py      text, through the tokenizer beside the source    images.py   images, through its processor

A path is read several times and may be larger than the memory. So sets are made anew by every reading, in an order
that depends on names alone; and it may be hostile, so that nothing is unpickled and no link leads out of a folder.
"""

from rewrite.calibration_data.files import find_files
from rewrite.calibration_data.sets import SAMPLES, CalibrationSets, calibration_sets

__all__ = ["SAMPLES", "CalibrationSets", "calibration_sets", "find_files"]
