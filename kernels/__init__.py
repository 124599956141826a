"""Triton kernels, installed as ``attnext.kernels``; importing this package does not import Triton."""
