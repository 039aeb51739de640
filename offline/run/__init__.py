"""What goes over the layers: compressing, evaluating, counting."""
