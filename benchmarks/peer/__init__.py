"""The PyTorch work that this project is compared with: python -m benchmarks.peer --help

It runs in an environment of its own (`make compare` sets it up), because nothing else here needs
DeepSpeed. It imports nothing of mod_jax.
"""
