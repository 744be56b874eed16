"""Set the process up as serve.py does. Imported for that, before anything that imports PyTorch.

PyTorch's threads else spin for milliseconds after the little that they do in a step (the logits of
several sequences), on the cores that the native kernels' threads need.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
