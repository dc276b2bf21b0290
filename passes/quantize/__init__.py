"""Weight quantization: what a scheme is, how weights are rounded to it, and the pass that stores them so."""
