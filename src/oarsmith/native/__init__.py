"""The step of the engine on a CPU, compiled. Only what packs a decoder's weights imports PyTorch here."""
