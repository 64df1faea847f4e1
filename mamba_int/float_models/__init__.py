"""Float Mamba models: S6, SSD and complex diagonal states, trained, saved, and run token by token.

Importing the package or ``mamba_int.float_models.numpy_forward`` needs NumPy only.
"""
