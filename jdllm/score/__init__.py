"""Likelihoods of given texts under masked diffusion."""
