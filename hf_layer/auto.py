"""`import hf_layer.auto` calls `hf_layer.register()`: its defaults, and its errors."""

from .models import register

register()
