"""Models on disk: weights, tokenizers, our own form of a subject. Files are data, never code."""
