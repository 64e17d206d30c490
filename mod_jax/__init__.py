"""LLaVA-MoD in JAX: small multimodal mixture-of-experts models distilled from large ones (arXiv 2408.15881)."""

__version__ = "0.1.0"


def load(path, stage: str | None = None, dtype: str = "float32", template: str | None = None):
    """A model and its processor, from any folder that holds both.

        model = mod_jax.load("runs/quickstart")
        model.generate("What is this?", ["photo.jpg"])
        model.logits("<image>\\nA cat", ["photo.jpg"])

    Args:
      path: a run's folder, one that `mod_jax.convert import` wrote, or a Hugging Face LLaVA folder in any layout that it reads.
      stage: of a run: whose student; its last one by default.
      dtype: of the activations, float32 or bfloat16; parameters are float32.
      template: name of a chat template (`data.conversation.TEMPLATES`). By default that of the run's stage, or of the folder, or "qwen" (LLaVA-1.5's)
        where it has none.
    Returns:
      `mod_jax.inference.chat.Chat`: `.config`, `.params`, `.processor`, `.logits(text, images)`, `.generate(text, images)`.
    Raises:
      ConfigError: if a stage is not finished, the folder's files are not whole, or hold what our model does not compute.
    """
    from mod_jax.inference import chat  # imports jax, which takes seconds

    return chat.load(path, stage, dtype, template)
