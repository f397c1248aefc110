"""How would training scale? `python -m benchmarks.scaling [--quick] [--check] [--json FILE] [--plot FILE] ...`

On paper: the time of a step of GC ViT-B and L on 8 to 1024 GPUs with each engine, what the file system must read for
it, and what a checkpoint takes; then the same model of a cluster beside published measurements. `docs/scaling.md` has
the assumptions and what would make them wrong. The speed of one GPU is what `benchmarks.model` measured there
(--model-json), else assumed; every table says which.
"""

import argparse
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import scaling_checks
from benchmarks.scaling_model import ENGINES, Links, Profile, Setup, can_shard, play_step, profile_variant

MODELS = {"gc_vit_base": "GC ViT-B", "gc_vit_large": "GC ViT-L"}
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)

