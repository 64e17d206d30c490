"""python -m mod_jax.data.scenes --data_dir data/scenes: prepares the built-in data set."""

from mod_jax.data.scenes.builder import main

main()
