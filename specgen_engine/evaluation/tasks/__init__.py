"""Tasks of several formats, each made into reference modules that a judge can run."""
