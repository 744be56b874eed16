"""Where there is no GPU, Triton's interpreter runs the GPU kernels on the CPU.

It must be asked for before anything imports Triton, and bitsandbytes does. PyTorch's threads wait
as they do in serve.py: by spinning they would hold up the servers that tests start.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
