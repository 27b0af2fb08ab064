"""How well networks of Fashion-MNIST quantize, as trained, rescaled and equalized."""
