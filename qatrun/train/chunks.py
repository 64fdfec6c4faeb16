"""How many logits are held in float32 at once; known without importing what computes them."""

CHUNKED_FROM = 2**28  # a gigabyte in float32, of which there would be three
CHUNK = 2**26
