"""What a C++ candidate is built with: lean headers of torch, and a ninja that tries them first."""
