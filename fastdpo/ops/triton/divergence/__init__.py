"""The divergence of two heads: what its tiles are made of; lists, products and draws are those of one head."""
