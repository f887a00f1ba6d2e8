"""Plain differentiable PyTorch: the definition of what every other backend must compute."""
