"""Plain PyTorch definitions of the operators, on any device."""
