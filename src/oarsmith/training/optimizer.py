"""The update rules by the name a configuration gives them (``training/optimizers`` holds one file a rule)."""

from oarsmith.training.optimizers.adafactor import AdafactorSettings, adafactor
from oarsmith.training.optimizers.adam8bit import Adam8bit
from oarsmith.training.optimizers.adam_mini import AdamMini
from oarsmith.training.optimizers.adamw import AdamW, AdamWSettings
from oarsmith.training.optimizers.base import Optimizer
from oarsmith.training.optimizers.blocks import block_matrices, embedding_names, fused_matrices, step_size_units
from oarsmith.training.optimizers.low_rank import ApolloSettings, GaLoreSettings, apollo, galore
from oarsmith.training.optimizers.muon import MuonSettings, muon
from oarsmith.training.optimizers.offload import offloaded

__all__ = [
    "AdafactorSettings",
    "Adam8bit",
    "AdamMini",
    "AdamW",
    "AdamWSettings",
    "ApolloSettings",
    "GaLoreSettings",
    "MuonSettings",
    "Optimizer",
    "adafactor",
    "apollo",
    "block_matrices",
    "embedding_names",
    "fused_matrices",
    "galore",
    "muon",
    "offloaded",
    "step_size_units",
]
