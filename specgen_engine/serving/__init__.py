"""What serving on a machine without a GPU takes: models from packages, environment and arguments of SGLang's CPU
engine.
"""
