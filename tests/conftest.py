"""Where there is no GPU, Triton's interpreter runs the GPU kernels on the CPU.

It must be asked for before anything imports Triton, and bitsandbytes does.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
