"""Federated LLM-based recommendation: FELLRec on PyTorch Lightning."""

__version__ = "0.1.0"

__all__ = ["__version__"]
