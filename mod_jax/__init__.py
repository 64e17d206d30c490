"""LLaVA-MoD in JAX: small multimodal MoE models, distilled from large ones (arXiv 2408.15881)."""

__version__ = "0.1.0"


def load(path, stage: str | None = None, dtype: str = "float32", template: str | None = None):
    """Loads a model and its processor from any folder that holds both.

        model = mod_jax.load("runs/quickstart")
        model.generate("What is this?", ["photo.jpg"])
        model.logits("<image>\\nA cat", ["photo.jpg"])

    Args:
      path: Folder of a run, a native folder (written by `mod_jax.convert import`), or a Hugging
        Face LLaVA folder in any supported layout (docs/checkpoints.md).
      stage: Stage of a run whose student is loaded; None is the last one.
      dtype: Dtype of the activations, "float32" or "bfloat16". Parameters are float32.
      template: Name of a chat template (`mod_jax.data.samples.tokens.TEMPLATES`). None is that of
        the run's stage, or of the folder, or "qwen" (LLaVA-1.5's) if the folder has none.

    Returns:
      A `mod_jax.inference.chat.Chat` with the attributes `config`, `params` and `processor` and the
      methods `logits(text, images)` and `generate(text, images)`.

    Raises:
      ConfigError: If a stage is not finished, files of the folder are incomplete, or the model has
        options that are not supported.
    """
    from mod_jax.inference import chat  # imports jax, which takes seconds

    return chat.load(path, stage, dtype, template)
