"""LLaVA-MoD in JAX: small multimodal mixture-of-experts models distilled from large ones (arXiv 2408.15881)."""
