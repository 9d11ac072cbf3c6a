"""Models whose KV is not plain: GLM-5 (sparse attention over a latent), DeepSeek-V4 (windows, compressed blocks)."""
