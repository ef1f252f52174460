"""meidnet_core: the model, data and metrics behind the MEIDNet book.

Modules are imported one by one (`from meidnet_core import model`), so that the model,
the losses and the training loop need nothing but torch and numpy.
"""

__version__ = "0.1.0"
