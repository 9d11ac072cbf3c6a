"""KV transport: pages of a KV cache to a peer GPU's lent memory and back. See docs/kv_transport.md."""
