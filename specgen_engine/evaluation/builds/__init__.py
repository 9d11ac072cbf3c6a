"""What a C++ candidate is built with: lean headers of torch, and a ninja and an nvcc before the real ones."""
