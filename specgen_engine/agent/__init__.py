"""The agent loop of `specgen optimize`: generate, validate, profile, again; against any OpenAI endpoint."""
