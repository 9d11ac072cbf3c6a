"""Replay of recorded reasoning: the engine computes every token, the sampled ids come from a trace."""
