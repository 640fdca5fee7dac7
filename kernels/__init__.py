"""Tensor operations, one per file. No code here: diffusers and transformers probe for a package of this name."""
